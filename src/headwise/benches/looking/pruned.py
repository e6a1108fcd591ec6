"""Per-head vision-token pruning: what stays right as fewer image tokens are kept, and what a cache would let go of.

Pruning acts behind the prompt, so answers of several tokens are looked at: the panels of a strip in order, and
listings. The control keeps as many image tokens of each head, drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.benches.looking.items import Bench
from headwise.benches.looking.row import Row, Share
from headwise.metrics import measure
from headwise.model.operations import Here
from headwise.model.site import Site
from headwise.probes import ItemSet
from headwise.use.intervention import Intervention
from headwise.use.looking.vision_pruning import VisionPruning, vision_cache

RATES = (0.75, 0.5, 0.25, 0.1, 0.0)
CONTROLS = 3


@dataclass(frozen=True, eq=False, repr=False)
class RandomPruning(VisionPruning):
    """As many image tokens of each head, drawn at random instead of by attention."""

    id: ClassVar[str] = "random-vision-pruning"
    seed: int = 0

    def _dropped(self, site: Site, row: Float[Tensor, "batch head key"], here: Here) -> Bool[Tensor, "batch head key"]:
        draw = torch.Generator().manual_seed(self.seed * 1000 + site.id.layer)
        return super()._dropped(site, torch.rand(row.shape, generator=draw).to(row.device), here)


def part(bench: Bench) -> list[Row]:
    """Whole answers that are right, by the share of the image tokens that each head keeps."""
    strips = bench.items("strip", "judging", bench.sizes.pruned)
    lists = bench.items("listing", "judging", bench.sizes.pruned, faintness=0.0)
    return [_row(bench, items, rate) for items in (strips, lists) for rate in RATES]


def _row(bench: Bench, items: ItemSet, rate: float) -> Row:
    held = vision_cache(bench.model, items, VisionPruning(rate))
    freed, whole = sum(each.bytes_freed for each in held), sum(each.bytes_held for each in held)
    random = [RandomPruning(rate, seed=draw) for draw in range(CONTROLS if 0 < rate < 1 else 0)]
    return Row.of(
        f"{items.probe}: {rate:.0%} kept",
        _right(bench, items, None),
        _right(bench, items, VisionPruning(rate)),
        [_right(bench, items, each) for each in random],
        wanted=0,
        note=f"frees {freed / 1024:.1f} of {whole / 1024:.1f} KiB of cache by prompt ({freed / whole:.0%})",
        seed=bench.seed,
    )


def _right(bench: Bench, items: ItemSet, under: Intervention | None) -> Share:
    return Share.mean(measure(bench.model, items, "exact-match", under=under))
