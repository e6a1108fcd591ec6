"""How specialised heads are: effects of every head on every behaviour, side by side, and what follows from them.

    table = specialisation([(evidence, judge(evidence)) for evidence in families])
    table.to_pandas()

**Effects** are shares of a behaviour's reach (clean metric less chance), so that behaviours compare; 1 is all of it.

**Selectivity** of a head is the index tau of Yanai et al. 2005, "Genome-wide midrange transcription profiles
reveal expression level relationships in human tissue specification", there of a gene over tissues:

    tau = sum_j (1 - e_j / max_i e_i) / (T - 1)

over the T behaviours it was measured on, with `e_j = max(share_j, 0)`: what is lost without the head counts, what is
won does not. 1: it serves one behaviour; 0: all alike. The largest of several noisy numbers is large, so heads that are
verified for nothing have no index (NaN).

**Pairs** of behaviours that each suffer from their own heads, measured on fresh items: `headwise.verify.crossing`.

**Similarity** of behaviours: of their columns of effects, and how many verified heads they share against chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations

import numpy as np
import pandas
from jaxtyping import Bool, Float
from scipy import stats

from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.verify.crossing import CrossedSet
from headwise.verify.dissociation import Dissociation, dissociation
from headwise.verify.evidence import Evidence, Values
from headwise.verify.verdict import FamilyVerdict


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike two behaviours are in the heads that both were mapped on.

    Attributes:
        cosine, spearman: of the two columns of effects; NaN where one of them is the same everywhere.
        n_first, n_second, shared: verified heads of each, and of both.
        shared_by_chance: expected of two such sets drawn at random.
        p: probability of so large an overlap of random sets (hypergeometric).
    """

    first: str
    second: str
    cosine: float
    spearman: float
    n_first: int
    n_second: int
    shared: int
    shared_by_chance: float
    p: float


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Heads by behaviours.

    Attributes:
        behaviours: those that the model solves; `refused` the others.
        units: of each behaviour's metric.
        heads: in canonical order.
        effects: mean loss with the head out, as a share of the behaviour's reach; NaN where it was not measured.
        raw: the same in the metric's unit.
        verified: whether the effect is verified.
        selectivity: tau; NaN for a head that is verified for nothing, or was measured on one behaviour only.
        preferred: the behaviour that the head serves most; empty where there is no selectivity.
        pairs: double dissociations; empty where no heads were tried on fresh items of both behaviours.
        similarity: of every pair of behaviours.
    """

    behaviours: tuple[str, ...]
    refused: tuple[str, ...]
    units: tuple[str, ...]
    heads: HeadSet
    effects: Float[np.ndarray, "head behaviour"]
    raw: Float[np.ndarray, "head behaviour"]
    verified: Bool[np.ndarray, "head behaviour"]
    selectivity: Float[np.ndarray, " head"]
    preferred: tuple[str, ...]
    pairs: tuple[Dissociation, ...]
    similarity: tuple[Similarity, ...]

    def to_pandas(self) -> pandas.DataFrame:
        """One row per head and behaviour: head, layer, index, behaviour, effect (share of reach), raw, unit, verified,
        selectivity, preferred."""
        rows = [
            {
                "head": head.label,
                "layer": head.layer,
                "index": head.index,
                "behaviour": behaviour,
                "effect": self.effects[row, column],
                "raw": self.raw[row, column],
                "unit": self.units[column],
                "verified": bool(self.verified[row, column]),
                "selectivity": self.selectivity[row],
                "preferred": self.preferred[row],
            }
            for row, head in enumerate(self.heads.heads)
            for column, behaviour in enumerate(self.behaviours)
        ]
        return pandas.DataFrame(rows)

    def pairs_to_pandas(self) -> pandas.DataFrame:
        """One row per pair of behaviours and set of heads: own, other, excess, low, high, ceiling, p, double."""
        rows = [
            {
                "heads_of": of.heads_of,
                "against": each.second if of is each.of_first else each.first,
                "own": of.own,
                "other": of.other,
                "excess": of.excess.value,
                "low": of.excess.low,
                "high": of.excess.high,
                "ceiling": of.ceiling,
                "p": of.p,
                "double": each.double,
            }
            for each in self.pairs
            for of in (each.of_first, each.of_second)
        ]
        return pandas.DataFrame(rows)

    def similarity_to_pandas(self) -> pandas.DataFrame:
        """One row per pair of behaviours, with the fields of `Similarity`."""
        return pandas.DataFrame(
            [asdict(each) for each in self.similarity], columns=[f.name for f in fields(Similarity)]
        )


def specialisation(
    judged: Sequence[tuple[Evidence, FamilyVerdict]], crossed: Sequence[CrossedSet] = ()
) -> Specialisation:
    """Lay the families of one model side by side; with `crossed`, look for double dissociations.

    Raises `InputError` for no families, and for crossed sets of behaviours that are not among them.
    """
    if not judged:
        raise InputError("specialisation needs the evidence and verdict of at least one behaviour")
    names = behaviour_names([evidence for evidence, _ in judged])
    solved = {name: pair for name, pair in zip(names, judged, strict=True) if not pair[1].refusal}
    heads = HeadSet(tuple(head for evidence, _ in solved.values() for head in evidence.heads))
    rows = {head: row for row, head in enumerate(heads)}
    shape = (len(heads), len(solved))
    effects, raw, verified = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    for column, (evidence, verdict) in enumerate(solved.values()):
        at = [rows[head] for head in evidence.heads]
        known = np.isfinite(evidence.clean)
        raw[at, column] = evidence.drops(evidence.values)[:, known].mean(axis=1)
        effects[at, column] = raw[at, column] / _reaches(evidence)[known].mean()
        verified[[rows[head] for head in verdict.verified if head in rows], column] = True
    tau = np.where(verified.any(axis=1), selectivity(effects), np.nan)
    best = [int(np.nanargmax(row)) if np.isfinite(t) else -1 for row, t in zip(effects, tau, strict=True)]
    behaviours = tuple(solved)
    return Specialisation(
        behaviours=behaviours,
        refused=tuple(name for name in names if name not in solved),
        units=tuple(evidence.unit for evidence, _ in solved.values()),
        heads=heads,
        effects=effects,
        raw=raw,
        verified=verified,
        selectivity=tau,
        preferred=tuple(behaviours[each] if each >= 0 else "" for each in best),
        pairs=_dissociations({name: evidence for name, (evidence, _) in solved.items()}, crossed, names),
        similarity=tuple(
            similarity(behaviours[a], behaviours[b], effects[:, [a, b]], verified[:, [a, b]])
            for a, b in combinations(range(len(behaviours)), 2)
        ),
    )


def behaviour_names(families: Sequence[Evidence]) -> tuple[str, ...]:
    """What to call the families: by their probe, or by their whole key where two have the same probe."""
    probes = [each.family.probe for each in families]
    return tuple(each.family.key if probes.count(each.family.probe) > 1 else each.family.probe for each in families)


def selectivity(effects: Float[np.ndarray, "head behaviour"]) -> Float[np.ndarray, " head"]:
    """tau of each head, NaN behaviours left out; NaN for fewer than two behaviours, or without any positive effect."""
    helps = np.clip(effects, 0, None)
    measured = np.isfinite(effects).sum(axis=1)
    largest = np.where(np.isfinite(helps), helps, 0).max(axis=1, initial=0)
    defined = (measured > 1) & (largest > 0)
    lost = measured - np.nansum(helps, axis=1) / np.where(defined, largest, 1)
    return np.where(defined, np.clip(lost / np.where(defined, measured - 1, 1), 0, 1), np.nan)  # but for rounding


def similarity(
    first: str,
    second: str,
    effects: Float[np.ndarray, "head 2"],
    verified: Bool[np.ndarray, "head 2"],
) -> Similarity:
    """Two behaviours from their columns; heads that were measured on one of them only are left out."""
    both = np.isfinite(effects).all(axis=1)
    one, other = effects[both].T
    n_first, n_second = (int(each) for each in verified[both].sum(axis=0))
    shared, n = int(verified[both].all(axis=1).sum()), int(both.sum())
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    varied = n > 1 and np.ptp(one) > 0 and np.ptp(other) > 0
    return Similarity(
        first,
        second,
        cosine=float(one @ other) / lengths if lengths else float("nan"),
        spearman=float(stats.spearmanr(one, other).statistic) if varied else float("nan"),
        n_first=n_first,
        n_second=n_second,
        shared=shared,
        shared_by_chance=n_first * n_second / n if n else float("nan"),
        p=float(stats.hypergeom.sf(shared - 1, n, n_first, n_second)) if n else float("nan"),
    )


def _reaches(evidence: Evidence) -> Values:
    """Distance of the clean metric from chance on each item: what there is to lose. NaN where it has no number."""
    return (evidence.clean - evidence.chance) * evidence.sign


def _dissociations(
    solved: Mapping[str, Evidence], crossed: Sequence[CrossedSet], names: Sequence[str]
) -> tuple[Dissociation, ...]:
    unknown = [each.behaviour for each in crossed if each.behaviour not in names]
    if unknown:
        raise InputError(f"the heads of {unknown[0]} were crossed, which is none of {', '.join(names)}")
    there = {each.behaviour: each for each in crossed if each.behaviour in solved}
    pairs = (
        (a, b)
        for a, b in combinations([name for name in solved if name in there], 2)
        if {a, b} <= there[a].values.keys() & there[b].values.keys()
    )
    return tuple(dissociation(there[a], there[b], solved[a], solved[b]) for a, b in pairs)
