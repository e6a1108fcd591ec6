"""Importance of all heads by gradient, in forwards: `gate-gradient` against hooks and peers.

A forward is that of the model alone with `logits_to_keep=1`. `headwise` takes gradients at z and at nothing else: no
parameter has one, nothing below the first read is in the graph, and the vocabulary is only asked for at the last token.
A peer's user could set all that, too; as documented they take the gradients of every parameter on the way.

Two items of 64 tokens, the logit difference, GPT-2-small and Llama-GQA shapes. All ways give the same scores, to
`max_diff`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.benches.peers import ALL_LOGITS, LAST_LOGIT, GradientPeer, Hooks, Work, installed
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, random_items
from headwise.benches.turns import Way, cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.find.gate_gradient import gate_gradient
from headwise.model.attached import AttachedModel, attach

ITEMS, TOKENS, TURNS = 2, 64, 7
APART = 1e-3
"""How far the scores of two ways may be apart, as a share of the largest: rounding in fp32, and other kernels."""


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`SHAPE.forwards` (headwise), `SHAPE.forwards_PEER_all_logits`, `..._last_logit`, `SHAPE.max_diff` (of the largest
    score)."""
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
    peers: dict[str, GradientPeer] = {"hf": hooks}
    for name, peer in installed().items():
        if hasattr(peer, "importance"):
            peers[name] = peer(work)  # type: ignore[assignment]
    asked = {"all_logits": ALL_LOGITS, "last_logit": LAST_LOGIT}
    ways: dict[str, Way] = {
        f"forwards_{name}_{kept}": partial(peer.importance, given)
        for name, peer in peers.items()
        for kept, given in asked.items()
    }

    def forward() -> None:
        with torch.no_grad():
            hooks.model(input_ids=work.ids, **LAST_LOGIT)

    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:
        ways["forwards"] = partial(_of_headwise, model, work)
        expected = hooks.importance(ALL_LOGITS)
        furthest = max(_apart(name, way(), expected) for name, way in ways.items())  # type: ignore[arg-type]
        forward()
        taken = cpu_seconds({"forward": forward, **ways}, turns=turns)
    return {name: ratio(taken[name], taken["forward"]) for name in ways} | {"max_diff": furthest}


def _of_headwise(model: AttachedModel, work: Work) -> Float[Tensor, "item layer head"]:
    scored = gate_gradient(model, work.items, loss="logit-difference")
    return torch.stack([scored[site] for site in sorted(scored)], dim=1)


def _apart(name: str, found: Tensor, expected: Tensor) -> float:
    """Raises `HeadwiseError` where a way gives other scores: a comparison of times would mean nothing."""
    apart = float((found - expected).abs().max() / expected.abs().max())
    if not apart < APART:
        raise HeadwiseError(f"{name} gives other scores than plain hooks, {apart:.1e} of the largest apart")
    return apart
