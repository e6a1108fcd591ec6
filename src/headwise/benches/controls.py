"""Control sets: 24 sets of 10 heads, over all layers and over layers 5 to 9 of 12, against one whole run per set.

A set is run from the first layer it touches; sets are sorted by it and share forwards. Control sets that are matched by
layer are cheap where the heads under test sit in upper layers.

Two items of 64 tokens, the logit difference, the GPT-2-small shape; the other way is plain hooks with
`logits_to_keep=1`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from headwise.benches.peers import Hooks, Work
from headwise.benches.shapes import GPT2_SMALL, Shape, random_items
from headwise.benches.turns import cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.heads import Head, HeadSet, SiteId
from headwise.model.attached import attach
from headwise.sweep import KnockOut, measure_sets

ITEMS, TOKENS, TURNS = 2, 64, 5
SETS, SIZE = 24, 10
APART = 1e-3


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`all_layers.ratio` and `upper_layers.ratio`, the time of hooks over that of headwise, each with its `max_diff`
    (logits)."""
    work = Work(GPT2_SMALL, random_items(GPT2_SMALL, n=ITEMS, tokens=TOKENS, seed=seed), seed)
    found: dict[str, float] = {}
    for name, layers in (("all_layers", range(GPT2_SMALL.layers)), ("upper_layers", range(5, 10))):
        said(name.replace("_", " "))
        sets = drawn(work.shape, layers, sets=SETS, size=SIZE, seed=seed)
        found |= {f"{name}.{key}": value for key, value in measure_sets_of(work, sets, turns=TURNS).items()}
    return found


def drawn(shape: Shape, layers: Sequence[int], *, sets: int, size: int, seed: int) -> list[HeadSet]:
    """Sets of heads drawn from these layers."""
    draw = random.Random(f"controls/{seed}")
    heads = [Head(SiteId(layer=layer), index) for layer in layers for index in range(shape.heads)]
    return [HeadSet(tuple(draw.sample(heads, size))) for _ in range(sets)]


def measure_sets_of(work: Work, sets: Sequence[HeadSet], *, turns: int) -> dict[str, float]:
    """The figures for these sets."""
    torch.set_num_threads(1)
    hooks = Hooks(work)

    def one_by_one() -> torch.Tensor:
        return torch.stack([hooks.knock_out_set(heads) for heads in sets])

    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:
        apart = float((measure_sets(model, work.items, sets, KnockOut()) - one_by_one()).abs().max())
        if not apart < APART:
            raise HeadwiseError(f"sets have other effects than by plain hooks, {apart:.1e} logits apart")
        ways = {"hooks": one_by_one, "headwise": lambda: measure_sets(model, work.items, sets, KnockOut())}
        taken = cpu_seconds(ways, turns=turns)
    return {"ratio": ratio(taken["hooks"], taken["headwise"]), "max_diff": apart}
