"""The map of all heads at the last token alone: z at 0 where the answer is predicted from, and nowhere else.

Keys and values of all other positions are those of the clean run, so one token is run for each head. A forward is that
of the model alone with `logits_to_keep=1`; a user's loop takes one for each head.

Two items of 128 tokens, the logit difference, GPT-2-small and Llama-GQA shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from headwise.benches.peers import LAST_LOGIT, Hooks, Work
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, random_items
from headwise.benches.sweep import all_heads, spread
from headwise.benches.turns import cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.heads import HeadSet
from headwise.model.attached import attach
from headwise.sweep import KnockOut, measure_sets

ITEMS, TOKENS, TURNS = 2, 128, 5
COMPARED = 12
APART = 1e-3


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`SHAPE.forwards` for the whole map, and `SHAPE.max_diff` (logits, against hooks, one head at a time)."""
    found: dict[str, float] = {}
    for shape in (GPT2_SMALL, LLAMA_GQA):
        said(f"{shape.family} shape")
        work = Work(shape, random_items(shape, n=ITEMS, tokens=TOKENS, seed=seed), seed)
        found |= {f"{shape.family}.{name}": value for name, value in measure_shape(work, turns=TURNS).items()}
    return found


def measure_shape(work: Work, *, turns: int, compared: int = COMPARED) -> dict[str, float]:
    """The figures of one shape."""
    torch.set_num_threads(1)
    hooks, heads = Hooks(work), all_heads(work.shape)

    def forward() -> None:
        with torch.no_grad():
            hooks.model(input_ids=work.ids, **LAST_LOGIT)

    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:
        sets = [HeadSet((head,)) for head in heads]
        last = KnockOut(scope="last")
        found = measure_sets(model, work.items, sets, last)
        apart = 0.0
        for head in spread(work.shape, compared):
            alone = hooks.knock_out_set(HeadSet((head,)), positions=slice(-1, None))
            apart = max(apart, float((found[heads.index(head)] - alone).abs().max()))
        if not apart < APART:
            raise HeadwiseError(f"the scoped map gives other effects than plain hooks, {apart:.1e} logits apart")
        ways = {"forward": forward, "forwards": lambda: measure_sets(model, work.items, sets, last)}
        taken = cpu_seconds(ways, turns=turns)
    return {"forwards": ratio(taken["forwards"], taken["forward"]), "max_diff": apart}
