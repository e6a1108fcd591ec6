"""Words of a concept written less or more: colors, in what a model writes about a strip, by Head Pursuit."""

from __future__ import annotations

import numpy as np

from headwise.benches.looking.items import Bench
from headwise.benches.looking.row import Row, Share
from headwise.probes.scenes import COLORS
from headwise.use.directions.head_pursuit import ENHANCE, SUPPRESS, pursue_concept

CONCEPT = " ".join(COLORS)
PART = 1 / 12
WAYS = {"suppressed": (SUPPRESS, -1), "strengthened": (ENHANCE, 1)}


def part(bench: Bench) -> list[Row]:
    """Color words by caption, and the share of the other words that stays, for either strength of the paper."""
    rows = []
    captions = bench.items("strip", "judging", 2 * bench.sizes.captions)
    for name, (alpha, wanted) in WAYS.items():
        found = pursue_concept(
            bench.model,
            captions,
            CONCEPT,
            heads=bench.share_of_heads(PART),
            alpha=alpha,
            controls=bench.sizes.controls,
            seed=bench.seed,
        )
        heads = found.intervention.heads
        rows.append(
            Row.of(
                f"{name}: color words",
                Share.mean(found.written),
                Share.mean(found.changed),
                [Share.mean(each) for each in found.controls],
                heads=heads,
                wanted=wanted,
                note=f"alpha {alpha:g}, words by caption",
                seed=bench.seed,
            )
        )
        rows.append(
            Row.of(
                f"{name}: other words kept",
                Share.mean(np.where(np.isfinite(found.kept.numpy()), 1.0, np.nan)),
                Share.mean(found.kept),
                [Share.mean(each) for each in found.controls_kept],
                heads=heads,
                wanted=0,
                seed=bench.seed,
            )
        )
    return rows
