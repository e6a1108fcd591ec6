"""Gaze redirection: does an answer become that of the place which heads are made to look at?"""

from __future__ import annotations

from collections.abc import Mapping

from headwise.benches.looking.items import Bench, Place
from headwise.benches.looking.row import Row, Share
from headwise.benches.looking.verdicts import Found, gazing
from headwise.heads import HeadSet
from headwise.metrics import measure
from headwise.probes import ItemSet
from headwise.scores import HeadScores
from headwise.use.evaluating import random_heads
from headwise.use.intervention import Intervention
from headwise.use.looking.gaze import BOTTOM, GazeRedirection, from_the_bottom
from headwise.use.tuning import tuned
from headwise.verify.gathering import every_head

PAPER = 0.09
"""Share of the heads that the paper turns."""
PARTS = (1 / 24, 1 / 12, 1 / 6, 1 / 3)
HOW: Mapping[Place, Mapping[str, Found]] = {"panel": gazing("panel"), "cell": gazing("place")}
"""By score; the paper's is the mass."""


def part(bench: Bench) -> list[Row]:
    """Of panels and of cells: the best gaze heads, as many as the paper takes and as many as do best on other items,
    beside random heads; and all heads."""
    return [row for place in HOW for row in _of_place(bench, place)]


def _of_place(bench: Bench, place: Place) -> list[Row]:
    judging = bench.crossed(place, "judging", bench.sizes.crossed)
    without = _hits(bench, judging, None)
    rows = []
    for score, found in HOW[place].items():
        scores = found.scores(bench)
        for name, heads, why in (
            ("the paper's share", scores.top(bench.share_of_heads(PAPER)), ""),
            ("tuned", *_best(bench, scores, place)),
        ):
            own = GazeRedirection(heads)
            drawn = random_heads(bench.model, own, bench.sizes.controls, bench.seed)
            rows.append(
                Row.of(
                    f"{place}, by {score}: {name}",
                    without,
                    _hits(bench, judging, own),
                    [_hits(bench, judging, each) for each in drawn],
                    heads=heads,
                    note=f"{len(heads)} heads{why}; {_from_the_bottom(bench, scores, judging, len(heads))}",
                    seed=bench.seed,
                )
            )
    everything = every_head(bench.model)
    turned = _hits(bench, judging, GazeRedirection(everything))
    return [*rows, Row.of(f"{place}: all heads", without, turned, heads=everything, seed=bench.seed)]


def _best(bench: Bench, scores: HeadScores, place: Place) -> tuple[HeadSet, str]:
    """The heads that do best on other pictures, and what they were chosen among."""
    sizes = sorted({bench.share_of_heads(each) for each in PARTS})
    choosing = bench.crossed(place, "choosing", bench.sizes.crossed // 2)
    best = tuned(bench.model, [GazeRedirection(scores.top(k)) for k in sizes], choosing).best
    return best.acts_on, f", best of {', '.join(map(str, sizes))} on other pictures"


def _hits(bench: Bench, items: ItemSet, under: Intervention | None) -> Share:
    return Share.mean(measure(bench.model, items, "exact-match", under=under))


def _from_the_bottom(bench: Bench, scores: HeadScores, judging: ItemSet, n: int) -> str:
    """The paper's control: random heads among those with the lowest scores, in a small model of a larger share."""
    share = max(BOTTOM, min(1.0, 2 * n / len(scores.ranked())))
    heads = from_the_bottom(scores, n, share=share, seed=bench.seed)
    reached = _hits(bench, judging, GazeRedirection(heads)).value
    return f"as many of the lowest {share:.0%} by score reach {reached:.3f}"
