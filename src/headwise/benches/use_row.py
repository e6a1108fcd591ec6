"""What a row of `headwise bench uses` is, and what the rows of one model share: items in three parts, ranked heads.

The parts of a behaviour's items find heads, choose strengths, and judge. The last are of the tenth that no organism saw
in training (`probes.held_out`), the others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from headwise.heads import Head, HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import Item, ItemSet, Probe, encode, held_out
from headwise.sweep import KnockOut
from headwise.use.evaluating import compare
from headwise.use.evaluation import Comparison
from headwise.use.intervention import Intervention
from headwise.verify.gathering import every_head, ground, map_of
from headwise.verify.judging import judge

FINDING, CHOOSING, JUDGING = 16, 24, 32
"""Items of each part."""
CONTROLS = 20


@dataclass(frozen=True)
class Row:
    """One use on one model; `refused` says why there is none, and the other figures mean nothing then.

    Attributes:
        heads: the heads it acts on.
        items: how many judge.
        clean, edited: mean metric without and with it.
        change, excess: mean change, and what of it is beyond the controls; with intervals.
        p: two-sided; NaN for fewer than 8 controls.
        wanted: 1 where the metric is to rise, -1 where it is to fall.
        note: what else is to be said.
    """

    heads: tuple[str, ...] = ()
    items: int = 0
    clean: float = float("nan")
    edited: float = float("nan")
    change: float = float("nan")
    interval: tuple[float, float] = (float("nan"), float("nan"))
    excess: float = float("nan")
    excess_interval: tuple[float, float] = (float("nan"), float("nan"))
    p: float = float("nan")
    wanted: int = 1
    note: str = ""
    refused: str = ""

    @staticmethod
    def of(found: Comparison, heads: HeadSet, *, wanted: int = 1, note: str = "") -> Row:
        return Row(
            heads=heads.labels,
            items=len(found.item_ids),
            clean=float(found.clean.mean()),
            edited=float(found.edited.mean()),
            change=found.change,
            interval=found.interval,
            excess=found.excess,
            excess_interval=found.excess_interval,
            p=found.p,
            wanted=wanted,
            note=note,
        )

    @property
    def holds(self) -> bool:
        """Whether change and excess go the wanted way with their whole intervals, and p, if any, is at most 0.05."""
        bounds = [self.wanted * bound for bound in (*self.interval, *self.excess_interval)]
        return not self.refused and all(bound > 0 for bound in bounds) and not self.p > 0.05


@dataclass(frozen=True)
class Parts:
    """The items of a behaviour; none is in two parts."""

    finding: ItemSet
    choosing: ItemSet
    judging: ItemSet

    def each(self, made: Callable[[ItemSet], ItemSet]) -> Parts:
        return Parts(made(self.finding), made(self.choosing), made(self.judging))


@dataclass(frozen=True)
class Ranked:
    """Heads by what taking each out alone costs, the largest first: the verified ones, or all where none is; `note`
    says which."""

    heads: tuple[Head, ...]
    note: str

    def top(self, k: int) -> HeadSet:
        return HeadSet(self.heads[:k])


@dataclass(frozen=True)
class Bench:
    """A model, and what several rows share, made when it is first needed."""

    model: AttachedModel
    seed: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def kept(self, key: Any, made: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = made()
        return self._kept[key]

    def parts(self, asked: Probe) -> Parts:
        """Items of a probe, in three parts. Raises `InputError` where the probe has not as many."""
        key = ("parts", asked.id, tuple(sorted(asked.grid.items())))
        return self.kept(key, lambda: self._parts(asked))  # type: ignore[no-any-return]

    def _parts(self, asked: Probe) -> Parts:
        seen: dict[object, None] = {}
        both: dict[bool, list[Item]] = {False: [], True: []}
        wanted = {False: FINDING + CHOOSING, True: JUDGING}
        for item in islice(asked.items(f"uses/{self.seed}"), 200 * JUDGING):
            of = both[held_out(item)]
            if item.prompt not in seen and len(of) < wanted[held_out(item)]:
                seen[item.prompt] = None
                of.append(item)

        def encoded(items: Sequence[Item]) -> ItemSet:
            # With wrong answers beside the right one what is lost is the choice, and not the form of the answer.
            metric = "logit-difference" if all(item.foils for item in items) else asked.metric
            return replace(encode(items, self.model, name=asked.id), metric=metric)

        known = both[False]
        return Parts(encoded(known[:FINDING]), encoded(known[FINDING:]), encoded(both[True]))

    def ranked(self, asked: Probe) -> Ranked:
        """The heads that are verified for a behaviour, by what taking each out alone costs; see `Ranked`."""
        parts = self.parts(asked)
        return self.kept(("ranked", parts.finding.ids), lambda: self._ranked(parts.finding))  # type: ignore[no-any-return]

    def _ranked(self, items: ItemSet) -> Ranked:
        found = ground(self.model, items, KnockOut(), seed=self.seed)
        mapped = every_head(self.model)
        verdict = judge(found.evidence(mapped, map_of(self.model, found, mapped), ()))
        by_effect = sorted(verdict.singles, key=lambda each: -each.effect)
        verified = [each.head for each in by_effect if each.ruling == "verified"]
        if verified:
            return Ranked(tuple(verified), f"verified alone: {len(verified)}")
        why = verdict.refusal or "these are the strongest ones"
        return Ranked(tuple(each.head for each in by_effect), f"verified alone: none, {why}")

    def compared(self, intervention: Intervention, items: ItemSet, metric: str = "exact-match") -> Comparison:
        return compare(self.model, intervention, items, metric=metric, controls=CONTROLS, seed=self.seed)


def joined(found: Sequence[Comparison]) -> Comparison:
    """Several comparisons as one over all their items; the first controls of all become the first, and so on."""
    first = found[0]
    return replace(
        first,
        probe=", ".join(dict.fromkeys(each.probe for each in found)),
        item_ids=tuple(f"{each.probe}/{id}" for each in found for id in each.item_ids),
        clean=np.concatenate([each.clean for each in found]),
        edited=np.concatenate([each.edited for each in found]),
        controls=np.concatenate([each.controls for each in found], axis=1),
    )
