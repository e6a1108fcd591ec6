"""Two atlases side by side: which heads appeared, moved and vanished, from one model or checkpoint to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas
from scipy import stats

from headwise.errors import InputError
from headwise.heads import Head
from headwise.scores import Comparison
from headwise.verify.evidence import Evidence, Values

if TYPE_CHECKING:
    from headwise.atlas.opened import Atlas

Change = Literal["appeared", "vanished", "moved", "stayed"]


@dataclass(frozen=True, slots=True)
class HeadChange:
    """One head that is verified for a behaviour in at least one of two atlases.

    Attributes:
        change: `appeared`, verified in the second only; `vanished`, in the first only; `moved`, in both, and the
            interval of the difference does not hold 0; `stayed`, in both otherwise.
        before, after: its effect as a share of the behaviour's reach, on the mean of the items of each; NaN where the
            other model has no such head.
        difference: after minus before; over the items that both have where there are any (paired), else over each
            side's own (Welch). `low`, `high`: its 95 percent interval.
        n_items: number of items in both; 0 means not paired.
    """

    probe: str
    head: Head
    change: Change
    before: float
    after: float
    difference: float
    low: float
    high: float
    n_items: int


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """How alike the scores of a method on a probe are (`HeadScores.compare`); `k` is the smaller choice of the two."""

    method: str
    probe: str
    comparison: Comparison


@dataclass(frozen=True)
class AtlasComparison:
    """From a first atlas to a second one. Heads are joined by label, items by id.

    Attributes:
        first, second: names of the models.
        heads: every head that is verified in one of them, by behaviour.
        scores: every method and probe that both have scores of.
        not_compared: behaviours that only one of them has a verdict on, with the reason.
    """

    first: str
    second: str
    heads: tuple[HeadChange, ...]
    scores: tuple[ScoreChange, ...]
    not_compared: dict[str, str]

    def of(self, change: Change) -> tuple[HeadChange, ...]:
        """The heads that appeared, vanished, moved or stayed."""
        return tuple(each for each in self.heads if each.change == change)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per head and behaviour: probe, head, change, before, after, difference, low, high, n_items."""
        rows = [
            (
                each.probe,
                each.head.label,
                each.change,
                each.before,
                each.after,
                each.difference,
                each.low,
                each.high,
                each.n_items,
            )
            for each in self.heads
        ]
        columns = ["probe", "head", "change", "before", "after", "difference", "low", "high", "n_items"]
        return pandas.DataFrame(rows, columns=columns)

    def scores_to_pandas(self) -> pandas.DataFrame:
        """One row per method and probe: spearman, jaccard of the top k, jaccard by chance, k, n_heads, n_items."""
        names = ["spearman", "kendall", "jaccard", "jaccard_by_chance", "k", "n_heads", "n_items"]
        rows = [(each.method, each.probe, *(getattr(each.comparison, name) for name in names)) for each in self.scores]
        return pandas.DataFrame(rows, columns=["method", "probe", *names])

    def __str__(self) -> str:
        parts = []
        for change in ("appeared", "vanished", "moved", "stayed"):
            named = ", ".join(f"{each.head.label} ({each.probe})" for each in self.of(change))
            parts.append(f"{change}: {named or 'none'}")
        return f"from {self.first} to {self.second}\n" + "\n".join(parts)


def compare(first: Atlas, second: Atlas) -> AtlasComparison:
    """What changed from one atlas to another.

    Raises:
        InputError: they were made with other knock-outs, or have neither a behaviour nor scores in common.
    """
    for name in ("mode", "scope"):
        one, other = getattr(first.manifest.settings, name), getattr(second.manifest.settings, name)
        if one != other:
            raise InputError(
                f"{name} is {one!r} in {first.folder} and {other!r} in {second.folder}; compare alike ones"
            )
    sides = [
        {evidence.family.probe: (evidence, verdict) for evidence, verdict in each.families()}
        for each in (first, second)
    ]
    heads: list[HeadChange] = []
    not_compared: dict[str, str] = {}
    for probe in dict.fromkeys((*sides[0], *sides[1])):
        lacking = next(
            (each.folder for each, side in zip((first, second), sides, strict=True) if probe not in side), None
        )
        if lacking is not None:
            not_compared[probe] = f"{lacking} has no finished map of it"
            continue
        (before, one), (after, other) = sides[0][probe], sides[1][probe]
        if one.refusal or other.refusal:
            not_compared[probe] = one.refusal or other.refusal
            continue
        if one.family != other.family:
            not_compared[probe] = f"measured as {one.family.key} and as {other.family.key}"
            continue
        verified = (set(one.verified.heads), set(other.verified.heads))
        heads += [_head(probe, head, verified, before, after) for head in sorted(verified[0] | verified[1])]
    scores = tuple(_scores(first, second, *pair) for pair in first.scored if pair in second.scored)
    if not scores and not sides[0].keys() & sides[1].keys():
        raise InputError(
            f"{first.folder} and {second.folder} have no behaviour and no method in common; nothing to compare"
        )
    return AtlasComparison(first.manifest.model.name, second.manifest.model.name, tuple(heads), scores, not_compared)


def _head(
    probe: str, head: Head, verified: tuple[set[Head], set[Head]], before: Evidence, after: Evidence
) -> HeadChange:
    shares = (_shares(head, before), _shares(head, after))
    difference, low, high, n = _difference(shares, before.item_ids, after.item_ids)
    if head in verified[0] and head in verified[1]:
        change: Change = "moved" if low > 0 or high < 0 else "stayed"
    else:
        change = "appeared" if head in verified[1] else "vanished"
    was, now = (float(each.mean()) if each.size else float("nan") for each in shares)
    return HeadChange(probe, head, change, was, now, difference, low, high, n)


def _shares(head: Head, evidence: Evidence) -> Values:
    """Drop of every item with this head out, as a share of the reach; empty where the model has no such head."""
    if head not in evidence.heads.heads:
        return np.empty(0)
    row = evidence.heads.heads.index(head)
    return np.asarray(evidence.drops(evidence.values[row : row + 1])[0] / evidence.reach)


def _difference(
    shares: tuple[Values, Values], first: tuple[str, ...], second: tuple[str, ...]
) -> tuple[float, float, float, int]:
    one, other = shares
    if not one.size or not other.size:
        return float("nan"), float("nan"), float("nan"), 0
    joined = [id for id in first if id in set(second)]
    if len(joined) > 1:
        places = [{id: place for place, id in enumerate(ids)} for ids in (first, second)]
        pairs = np.array([other[places[1][id]] - one[places[0][id]] for id in joined])
        mean, error, degrees = float(pairs.mean()), float(stats.sem(pairs)), len(pairs) - 1.0
    else:
        parts = [float(each.var(ddof=1)) / len(each) if len(each) > 1 else float("nan") for each in shares]
        mean, error = float(other.mean() - one.mean()), float(np.sqrt(sum(parts)))
        spread = sum(part**2 / (len(each) - 1) for part, each in zip(parts, shares, strict=True) if len(each) > 1)
        degrees = sum(parts) ** 2 / spread if spread else 1.0
    half = float(stats.t.ppf(0.975, degrees)) * error
    return mean, mean - half, mean + half, len(joined)


def _scores(first: Atlas, second: Atlas, method: str, probe: str) -> ScoreChange:
    k = min(len(first.chosen(method, probe)), len(second.chosen(method, probe)))
    return ScoreChange(method, probe, first.scores(method, probe).compare(second.scores(method, probe), k))
