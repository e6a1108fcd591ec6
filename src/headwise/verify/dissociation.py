"""Double dissociation of two behaviours: each suffers from its own heads, not from the other's (Teuber 1955).

    dissociation(crossed["ioi"], crossed["facts"], families["ioi"], families["facts"]).double

`headwise.verify.crossing` measures what goes in, on items that neither found nor verified a head. Losses are shares of
a behaviour's reach (clean metric less chance) on these same items, so that two behaviours compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.verify.crossing import CrossedSet, require_fresh
from headwise.verify.evidence import Evidence, Values

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 percent interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, slots=True)
class Together:
    """The heads behind a behaviour out together, on fresh items of it: the set was chosen on others.

    Attributes:
        share: loss as a share of the reach of the behaviour; the interval is over items.
        controls: the same of each control set; `ceiling` their 95th percentile.
        p: one-sided rank p of the loss among the controls.
        n_items: number of fresh items.
    """

    heads: HeadSet
    share: Estimate
    controls: Float[np.ndarray, " set"]
    ceiling: float
    p: float
    n_items: int

    @property
    def holds(self) -> bool:
        """Whether the loss is there, and above random sets'."""
        return self.share.low > 0 and self.share.value > self.ceiling


@dataclass(frozen=True, eq=False, slots=True)
class Contrast:
    """The heads of one behaviour: what they cost their own, against what they cost the other one.

    Attributes:
        own, other: loss as a share of the reach of the behaviour.
        excess: own minus other, less the same of the control sets. The interval is over items, each paired with itself
            under the controls, and over control sets.
        controls: own minus other of each control set; `ceiling` their 95th percentile.
        p: one-sided rank p of own minus other among the controls.
    """

    heads_of: str
    own: float
    other: float
    excess: Estimate
    controls: Float[np.ndarray, " set"]
    ceiling: float
    p: float

    @property
    def holds(self) -> bool:
        """Whether the loss is more than random heads' on the own behaviour rather than on the other."""
        return self.excess.low > 0 and self.own - self.other > self.ceiling


@dataclass(frozen=True, eq=False, slots=True)
class Dissociation:
    """Two behaviours and their heads.

    Attributes:
        of_first, of_second: for the heads of each, own behaviour against the other.
        on_first, on_second: on the items of each, its own heads' loss minus the other's heads', paired by item, as a
            share of reach. This comparison needs no common scale of the two behaviours.
        double: all four hold: each set of heads costs its own behaviour more than the other one, by more than random
            heads do, and each behaviour suffers more from its own heads than from the other's.
    """

    first: str
    second: str
    of_first: Contrast
    of_second: Contrast
    on_first: Estimate
    on_second: Estimate

    @property
    def double(self) -> bool:
        return self.of_first.holds and self.of_second.holds and self.on_first.low > 0 and self.on_second.low > 0


def together(crossed: CrossedSet, evidence: Evidence) -> Together:
    """The heads of `crossed` on the fresh items of their own behaviour, whose evidence is given.

    Raises `InputError` if they were not tried on these, or if the items found or verified heads.
    """
    name = crossed.behaviour
    if name not in crossed.values:
        raise InputError(f"the heads of {name} were not tried on its own items")
    require_fresh(name, crossed.item_ids[name], {name: evidence})
    losses = _Losses.of(crossed, name, evidence)
    controls = np.array([losses.share(each)[0] for each in losses.drops(crossed.control_values[name])])
    share = _estimate(*losses.share(losses.drops(crossed.values[name])))
    return Together(
        crossed.heads,
        share,
        controls,
        _ceiling(controls),
        p=_rank(share.value, controls),
        n_items=len(crossed.item_ids[name]),
    )


def dissociation(
    first: CrossedSet, second: CrossedSet, evidence_of_first: Evidence, evidence_of_second: Evidence
) -> Dissociation:
    """Hold two behaviours' heads against each other; of the evidence only chance and direction of the metric count.

    Raises `InputError` if one was not tried on the other's items, if the two were tried on different items, and for
    items on which heads were verified.
    """
    families = {first.behaviour: evidence_of_first, second.behaviour: evidence_of_second}
    for crossed in (first, second):
        missing = families.keys() - crossed.values.keys()
        if missing:
            raise InputError(f"the heads of {crossed.behaviour} were not tried on the items of {missing.pop()}")
    for name in families:
        if first.item_ids[name] != second.item_ids[name]:
            raise InputError(f"the two sets of heads were tried on different items of {name}; give both the same")
        require_fresh(name, first.item_ids[name], families)

    def on(behaviour: str, own: CrossedSet, other: CrossedSet) -> Estimate:
        losses = _Losses.of(own, behaviour, families[behaviour])
        rival = _Losses.of(other, behaviour, families[behaviour])
        more = losses.drops(own.values[behaviour]) - rival.drops(other.values[behaviour])
        return _estimate(*losses.share(more))

    return Dissociation(
        first.behaviour,
        second.behaviour,
        of_first=_contrast(first, families, first.behaviour, second.behaviour),
        of_second=_contrast(second, families, second.behaviour, first.behaviour),
        on_first=on(first.behaviour, first, second),
        on_second=on(second.behaviour, second, first),
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Losses:
    """What is lost on the fresh items of one behaviour, and what there is to lose."""

    clean: Values
    chance: float
    sign: int

    @staticmethod
    def of(crossed: CrossedSet, behaviour: str, evidence: Evidence) -> _Losses:
        return _Losses(crossed.clean[behaviour], evidence.chance, evidence.sign)

    def drops(self, values: Float[np.ndarray, "*set item"]) -> Float[np.ndarray, "*set item"]:
        cost: np.ndarray = (self.clean - values) * self.sign
        return cost

    def share(self, losses: Values) -> tuple[float, list[float], list[float]]:
        """Mean loss over reach, with its variance and degrees of freedom over items.

        Both are means over the same items, so the ratio's error is that of `(loss_i - share * reach_i) / reach`. Items
        without a number in the clean run are left out.
        """
        known = np.isfinite(self.clean)
        losses, reach = losses[known], ((self.clean - self.chance) * self.sign)[known]
        share, n = float(losses.mean() / reach.mean()), len(losses)
        if n < 2:
            return share, [float("nan")], [1.0]
        residual = (losses - share * reach) / reach.mean()
        return share, [float(residual.var(ddof=1)) / n], [n - 1.0]


def _contrast(crossed: CrossedSet, families: Mapping[str, Evidence], own: str, other: str) -> Contrast:
    shares, parts, of_controls = [], [], []
    for name in (own, other):
        losses = _Losses.of(crossed, name, families[name])
        drops, under = losses.drops(crossed.values[name]), losses.drops(crossed.control_values[name])
        shares.append(losses.share(drops)[0])
        of_controls.append(np.array([losses.share(each)[0] for each in under]))
        parts.append(losses.share(drops - (under.mean(axis=0) if len(under) else 0)))
    controls = of_controls[0] - of_controls[1]
    excess, variances, freedom = parts[0][0] - parts[1][0], [*parts[0][1], *parts[1][1]], [*parts[0][2], *parts[1][2]]
    k, difference = len(controls), shares[0] - shares[1]
    if k > 1:
        variances.append(float(controls.var(ddof=1)) / k)
        freedom.append(k - 1)
    return Contrast(
        crossed.behaviour,
        own=shares[0],
        other=shares[1],
        excess=_estimate(excess, variances, freedom),
        controls=controls,
        ceiling=_ceiling(controls),
        p=_rank(difference, controls),
    )


def _ceiling(controls: Float[np.ndarray, " set"]) -> float:
    return float(np.quantile(controls, 0.95)) if len(controls) else float("nan")


def _rank(value: float, controls: Float[np.ndarray, " set"]) -> float:
    return (1 + int((controls >= value).sum())) / (len(controls) + 1)


def _estimate(value: float, variances: Sequence[float], freedom: Sequence[float]) -> Estimate:
    """Student's interval for a sum of independent parts, with degrees of freedom after Welch and Satterthwaite."""
    total = sum(variances)
    if not total > 0:
        return Estimate(value, value - total, value + total)  # no spread: no width; unknown spread: NaN
    df = total**2 / sum(v**2 / f for v, f in zip(variances, freedom, strict=True))
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * total**0.5
    return Estimate(value, value - width, value + width)
