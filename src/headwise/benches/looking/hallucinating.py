"""Hallucination with VHR, VAR and PAINT: questions whether something is there, and listings, beside random heads.

The strengths are the papers', chosen on models of 7B and more, and those that do best on other items of the same kind,
for questions and listings each by itself: most right, then surest (`headwise.use.tuning`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from headwise.benches.looking.items import CHOOSING, FINDING, Bench
from headwise.benches.looking.row import Row, Share
from headwise.errors import HeadwiseError
from headwise.find.method import scored_sites
from headwise.find.visual_sink import checked_tau, deep_sites, sink_dimensions
from headwise.heads import HeadSet
from headwise.metrics import measure
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet
from headwise.use.hallucination import Answers, Listings, answers, listings
from headwise.use.intervention import Intervention
from headwise.use.looking.paint import PAINT, visual_sensitivity
from headwise.use.looking.redistribution import VAR
from headwise.use.looking.reinforcement import VHR
from headwise.use.scaling import HeadScaling
from headwise.use.tuning import tuned

BATCH = 32
IDLE = 1e-3
"""In logits: an edit that moves no answer further does nothing."""
CLEAR = ("panel", "place", "count")

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Graded:
    """An edit by its strengths.

    Attributes:
        made: the edit of a strength.
        paper: the paper's strength; grid: those that are tried.
        controls: the same edit of a strength on random heads; none where it takes all heads alike.
        told: a strength in words.
    """

    made: Callable[[Numbers], Intervention]
    paper: Numbers
    grid: Sequence[Numbers]
    controls: Callable[[Numbers], Sequence[Intervention]]
    told: str


@dataclass(frozen=True)
class Chosen:
    """A strength, and what is to be said of it."""

    strength: Numbers
    note: str


def part(bench: Bench) -> list[Row]:
    """For every edit and strength: answers, listings, and what stays right on clear pictures."""
    rows = []
    for name, made in EDITS.items():
        try:
            rows += _of_edit(bench, name, made(bench))
        except HeadwiseError as error:
            rows.append(Row(name, refused=str(error)))
    return rows


def _of_edit(bench: Bench, name: str, edit: Graded) -> list[Row]:
    questions = bench.items("existence", "choosing", CHOOSING, kind="adversarial")
    lists = bench.items("listing", "choosing", CHOOSING)
    paper = Chosen(edit.paper, _told(bench, edit, edit.paper))
    rows = _judged(bench, f"{name}, the paper's strength", edit, paper, paper)
    return rows + _judged(bench, f"{name}, tuned", edit, _best(bench, edit, questions), _best(bench, edit, lists))


def _best(bench: Bench, edit: Graded, items: ItemSet) -> Chosen:
    found = tuned(bench.model, [edit.made(each) for each in edit.grid], items, batch_size=BATCH)
    strength = edit.grid[[each for each, _ in found.tried].index(found.best)]
    note = _told(bench, edit, strength)
    return Chosen(strength, note if found.helps else f"{note}; no better than none where it was chosen")


def _judged(bench: Bench, name: str, edit: Graded, for_questions: Chosen, for_lists: Chosen) -> list[Row]:
    """The figures of an edit: of questions and of listings each at its own strength, of clear pictures at that of
    questions, and without controls."""
    own = edit.made(for_questions.strength)
    clear = Row.of(
        f"{name}: clear pictures", _clear(bench, None), _clear(bench, own), heads=own.acts_on, wanted=0, seed=bench.seed
    )
    return [
        *_rows(bench, name, edit, for_questions, _answers, OF_ANSWERS),
        *_rows(bench, name, edit, for_lists, _listings, OF_LISTINGS),
        clear,
    ]


def _rows(
    bench: Bench,
    name: str,
    edit: Graded,
    chosen: Chosen,
    observed: Callable[[Bench, Intervention | None], Any],
    figures: Mapping[str, tuple[Callable[[Any], Share], int]],
) -> list[Row]:
    own = edit.made(chosen.strength)
    without, with_it = observed(bench, None), observed(bench, own)
    others = [observed(bench, each) for each in edit.controls(chosen.strength)]
    return [
        Row.of(
            f"{name}: {figure}",
            share(without),
            share(with_it),
            [share(each) for each in others],
            heads=own.acts_on,
            wanted=wanted,
            note=chosen.note,
            seed=bench.seed,
        )
        for figure, (share, wanted) in figures.items()
    ]


def _told(bench: Bench, edit: Graded, strength: Numbers) -> str:
    """A strength in words, and whether the edit does anything."""
    words = edit.told.format(*(f"{each:g}" for each in strength))
    moved = float((_margins(bench, edit.made(strength)) - _margins(bench, None)).abs().max())
    return words if moved > IDLE else f"{words}; it moves no answer by more than {IDLE:g} logits"


# -- what is measured -------------------------------------------------------------------------------------------------


def _answers(bench: Bench, under: Intervention | None) -> Answers:
    if under is None:
        return bench.once("answers", lambda: answers(bench.model, _questions(bench), batch_size=BATCH))
    return answers(bench.model, _questions(bench), under=under, batch_size=BATCH)


def _listings(bench: Bench, under: Intervention | None) -> Listings:
    items = bench.items("listing", "judging", bench.sizes.lists)
    if under is None:
        return bench.once("listings", lambda: listings(bench.model, items, batch_size=BATCH))
    return listings(bench.model, items, under=under, batch_size=BATCH)


def _margins(bench: Bench, under: Intervention | None) -> torch.Tensor:
    few = bench.items("existence", "choosing", CHOOSING, kind="adversarial")

    def made() -> torch.Tensor:
        return measure(bench.model, few, "logit-difference", under=under, batch_size=BATCH)

    return bench.once("margins", made) if under is None else made()


def _clear(bench: Bench, under: Intervention | None) -> Share:
    def right(name: str) -> torch.Tensor:
        items = bench.items(name, "judging", bench.sizes.clear)
        return measure(bench.model, items, "exact-match", under=under, batch_size=BATCH)

    def all_right() -> Share:
        return Share.mean(torch.cat([right(name) for name in CLEAR]))

    return bench.once("clear", all_right) if under is None else all_right()


def _questions(bench: Bench) -> ItemSet:
    return bench.items("existence", "judging", bench.sizes.questions, kind="adversarial")


def _of_lists(counted: Callable[[frozenset[str], frozenset[str]], tuple[int, int]]) -> Callable[[Listings], Share]:
    def share(found: Listings) -> Share:
        both = [counted(there, named) for there, named in zip(found.there, found.named, strict=True)]
        of, among = np.array(both, dtype=np.float64).T
        return Share(of, among)

    return share


OF_ANSWERS: Mapping[str, tuple[Callable[[Answers], Share], int]] = {
    "accuracy": (lambda found: Share.mean(found.right), 1),
    "false yes": (
        lambda found: Share((found.yes & ~found.there).double().numpy(), (~found.there).double().numpy()),
        -1,
    ),
}
OF_LISTINGS: Mapping[str, tuple[Callable[[Listings], Share], int]] = {
    "CHAIR_i": (_of_lists(lambda there, named: (len(named - there), len(named))), -1),
    "CHAIR_s": (_of_lists(lambda there, named: (int(bool(named - there)), 1)), -1),
    "recall": (_of_lists(lambda there, named: (len(named & there), len(there))), 0),
}
"""What is taken of answers and listings, and the way that it is to go; 0 is to be kept."""


# -- the edits --------------------------------------------------------------------------------------------------------


def _vhr(bench: Bench) -> Graded:
    """VHR chooses half of the heads of every layer prompt by prompt; the control reinforces random halves."""
    halves = _halves(bench)
    return Graded(
        made=lambda strength: VHR(strength[0]),
        paper=(2.0,),
        grid=[(1.1,), (1.25,), (1.5,), (2.0,), (3.0,)],
        controls=lambda strength: [HeadScaling(each, strength[0], scope=VHR().scope) for each in halves],
        told="alpha {}",
    )


def _var(bench: Bench) -> Graded:
    """VAR changes the heads that look at the picture, row by row; the control changes random halves of the same layers,
    in every row with a visual sink."""
    dims = sink_dimensions(bench.model, bench.items("existence", "finding", FINDING))
    tau = checked_tau(bench.model, None)
    inner = {site.label for site in deep_sites(bench.model)[:-1]}
    drawn = [half.filter(lambda each: each.site.label in inner) for half in _halves(bench)]
    return Graded(
        made=lambda strength: VAR(dims, p=strength[0], tau=strength[1] * tau),
        paper=(0.6, 1.0),
        grid=[(p, part) for part in (1.0, 0.5) for p in (0.8, 0.6, 0.3, 0.0)],
        controls=lambda strength: [
            VAR(dims, p=strength[0], tau=strength[1] * tau, heads=each, rho=1.0, least=0.0) for each in drawn
        ],
        told="p {}, {} of the default tau",
    )


def _paint(bench: Bench) -> Graded:
    return _painting(lambda strength: PAINT(alpha=0.7 * strength[0], beta=0.3 * strength[0]), lambda strength: ())


def _paint_by_head(bench: Bench) -> Graded:
    """The control deals the heads' weights out among the heads of each layer anew."""
    weights = visual_sensitivity(bench.model, bench.items("existence", "finding", FINDING))
    dealt = [_dealt(weights, Random(f"{bench.seed}/{draw}")) for draw in range(bench.sizes.controls)]

    def of(given: Mapping[str, float], strength: Numbers) -> PAINT:
        return PAINT(given, alpha=0.7 * strength[0], beta=0.3 * strength[0])  # type: ignore[arg-type]

    return _painting(lambda strength: of(weights, strength), lambda strength: [of(each, strength) for each in dealt])


def _painting(made: Callable[[Numbers], Intervention], controls: Callable[[Numbers], Sequence[Intervention]]) -> Graded:
    return Graded(
        made=made,
        paper=(1.0,),
        grid=[(0.25,), (0.5,), (1.0,), (2.0,)],
        controls=controls,
        told="{} times alpha 0.7 and beta 0.3",
    )


def _halves(bench: Bench) -> list[HeadSet]:
    return [_half(bench.model, f"{bench.seed}/{draw}") for draw in range(bench.sizes.controls)]


def _half(model: AttachedModel, seed: str) -> HeadSet:
    """Half of the heads of every layer, at random."""
    random = Random(f"half/{seed}")
    by_layer = [model.heads(site.label).heads for site in scored_sites(model)]
    return HeadSet(tuple(sorted(each for heads in by_layer for each in random.sample(heads, len(heads) // 2))))


def _dealt(weights: Mapping[str, float], random: Random) -> dict[str, float]:
    layers: dict[str, list[str]] = {}
    for label in weights:
        layers.setdefault(label.rpartition("H")[0], []).append(label)
    dealt: dict[str, float] = {}
    for labels in layers.values():
        numbers = [weights[label] for label in labels]
        random.shuffle(numbers)
        dealt |= dict(zip(labels, numbers, strict=True))
    return dealt


EDITS: Mapping[str, Callable[[Bench], Graded]] = {
    "VHR": _vhr,
    "VAR": _var,
    "PAINT": _paint,
    "PAINT by head": _paint_by_head,
}
