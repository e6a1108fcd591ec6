"""The direct path from every head to the logits, in forwards.

A forward is that of the model alone with `logits_to_keep=1`. `direct-logit` runs one forward that captures z of the
last token, and the rest is closed form: the logits are a sum over writes once the scale of the final norm is held.
`direct_logit_by_source` splits it by the token that was read, for all heads and all tokens of one query row.

Two items of 64 tokens, GPT-2-small and Llama-GQA shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.benches.peers import LAST_LOGIT, Hooks, Work
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, random_items
from headwise.benches.turns import cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.find.direct_logit import direct_logit, direct_logit_by_source
from headwise.model.attached import attach

ITEMS, TOKENS, TURNS = 2, 64, 15
APART = 1e-4
"""How far the two ways may be apart, as a share of the largest score: rounding in fp32."""


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`SHAPE.forwards` (all heads), `SHAPE.sources.forwards` (all heads by all tokens), `SHAPE.noise` (the forward over
    itself), `SHAPE.max_diff` and `SHAPE.sources.max_diff` (of the largest score)."""
    found: dict[str, float] = {}
    for shape in (GPT2_SMALL, LLAMA_GQA):
        said(f"{shape.family} shape")
        work = Work(shape, random_items(shape, n=ITEMS, tokens=TOKENS, seed=seed), seed)
        found |= {f"{shape.family}.{name}": value for name, value in measure_shape(work, turns=TURNS).items()}
    return found


def measure_shape(work: Work, *, turns: int) -> dict[str, float]:
    """The figures of one shape."""
    torch.set_num_threads(1)
    hooks = Hooks(work)

    def forward() -> None:
        with torch.no_grad():
            hooks.model(input_ids=work.ids, **LAST_LOGIT)

    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:

        def all_heads() -> Float[Tensor, "item head"]:
            scored = direct_logit(model, work.items)
            return torch.cat([scored[site] for site in sorted(scored)], dim=1)

        def all_sources() -> Float[Tensor, "item head source"]:
            return direct_logit_by_source(model, work.items)

        expected = by_hand(hooks)
        figures = {
            "max_diff": _apart(all_heads(), expected),
            "sources.max_diff": _apart(all_sources().sum(2), expected),
        }
        forward()
        ways = {"forward": forward, "again": forward, "forwards": all_heads, "sources.forwards": all_sources}
        taken = cpu_seconds(ways, turns=turns)
    both = taken["forward"] + taken["again"]
    figures |= {name: ratio(taken[name], both) for name in ("forwards", "sources.forwards")}
    return figures | {"noise": ratio(taken["again"], taken["forward"])}


def by_hand(hooks: Hooks) -> Float[Tensor, "item head"]:
    """The same from what plain hooks give, by the derivative of the final norm with its scale taken for a constant."""
    work, model = hooks.work, hooks.model
    network = model.transformer if work.shape.family == "gpt2" else model.model
    norm = network.ln_f if work.shape.family == "gpt2" else network.norm
    kept: dict[object, Tensor] = {}

    def keep(module: object, args: tuple[Tensor, ...]) -> None:
        kept[module] = args[0][:, -1]

    projections = [work.projection(model, layer) for layer in range(work.shape.layers)]
    handles = [module.register_forward_pre_hook(keep) for module in (*projections, norm)]
    with torch.no_grad():
        model(input_ids=work.ids, **LAST_LOGIT)
    for handle in handles:
        handle.remove()
    stream = kept[norm].double()
    centred = stream - stream.mean(-1, keepdim=True) if work.shape.family == "gpt2" else stream
    epsilon = norm.eps if work.shape.family == "gpt2" else norm.variance_epsilon
    scale = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    unembedding = model.get_output_embeddings().weight.double()
    answers = unembedding[[each.answer[0] for each in work.items]]
    foils = unembedding[[each.foils[0][0] for each in work.items]]
    direction = (answers - foils) * norm.weight.double() * scale
    if work.shape.family == "gpt2":
        direction = direction - direction.mean(-1, keepdim=True)
    scores = []
    for projection in projections:
        matrix = projection.weight.double()
        matrix = matrix if work.shape.family == "gpt2" else matrix.T  # GPT-2 keeps it as [in, out]
        parts = kept[projection].double() * (direction @ matrix.T)
        scores.append(parts.reshape(len(stream), work.shape.heads, -1).sum(-1))
    return torch.cat(scores, dim=1).detach()


def _apart(found: Tensor, expected: Tensor) -> float:
    apart = float((found - expected).abs().max() / expected.abs().max())
    if not apart < APART:
        raise HeadwiseError(f"direct paths are not those taken by hand, {apart:.1e} of the largest apart")
    return apart
