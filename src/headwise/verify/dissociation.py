"""Double dissociation of two behaviours: each suffers from its own heads, not from the other's (Teuber 1955).

    fresh = {name: fresh_items(model, evidence, finding=()) for name, evidence in families.items()}
    crossed = [measure_crossed(model, name, heads_behind(verdict), fresh, families) for name, verdict in solved.items()]
    dissociation(crossed[0], crossed[1], families["ioi"], families["facts"]).double

What selected the heads never tests them: heads are verified on the items of the evidence, so a large loss there is in
part luck, and both sets of heads would look as if they cost their own behaviour more. The pairs are measured on items
that neither found nor verified a head.

Losses are shares of a behaviour's reach (clean metric less chance) on the same fresh items, so that two behaviours
compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import Probe, encode
from headwise.probes import probe as probe_named
from headwise.probes.encoding import ITEMS, ItemSet
from headwise.sweep import Controls, KnockOut, matched_sets, measure_sets
from headwise.sweep.matched import FEWEST
from headwise.verify.evidence import Evidence, Values
from headwise.verify.gathering import ground
from headwise.verify.judging import why_refused
from headwise.verify.verdict import FamilyVerdict

CONTROLS = 20
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class CrossedSet:
    """The heads of one behaviour out on fresh items of every behaviour, and matched random sets likewise.

    Attributes:
        behaviour: whose heads these are.
        item_ids: by behaviour, its fresh items.
        clean: by behaviour whose items they are, the metric of each item without a knock-out.
        values: the same with the heads out.
        control_values: the same with each of the control sets out.
    """

    behaviour: str
    heads: HeadSet
    controls: Controls
    item_ids: Mapping[str, tuple[str, ...]]
    clean: Mapping[str, Values]
    values: Mapping[str, Values]
    control_values: Mapping[str, Float[np.ndarray, "set item"]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 percent interval."""

    value: float
    low: float
    high: float


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


def heads_behind(verdict: FamilyVerdict) -> HeadSet:
    """The heads that a behaviour is taken to rest on: those verified alone; where none is, because they hide one
    another, the smallest set that is verified together. Empty where nothing is verified."""
    joints = sorted((each for each in verdict.joints if each.ruling == "verified"), key=lambda each: len(each.heads))
    return verdict.verified or (joints[0].heads if joints else HeadSet())


def fresh_items(
    model: AttachedModel,
    evidence: Evidence,
    n: int = ITEMS,
    *,
    finding: Iterable[str],
    probe: Probe | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> ItemSet:
    """`n` items of a behaviour's probe that the model answers rightly and that neither found nor tested its heads.

    Args:
        finding: ids of the items that chose heads for the evidence to test (`scores.item_ids`); empty if none did,
            because every head was knocked out and no set was given.
        probe: the probe of the evidence, where it is your own or has settings of its own; None is that of its id.
        max_tokens: see `encode`.

    Raises:
        InputError: the probe has not so many further items; there is no probe of that id; no tokenizer.
        Refusal: the model answers less than half of them rightly, or as `ground`.
    """
    if isinstance(finding, str):
        raise InputError("finding takes the ids of the items that chose the heads; give a list, or () for none")
    family = evidence.family
    chosen = probe_named(family.probe) if probe is None else probe
    used = {*finding, *evidence.item_ids}
    wanted = n
    while True:
        unseen = _unseen(model, chosen, wanted, used, max_tokens, seed)
        found = ground(model, unseen, KnockOut(), measured=family.metric, seed=seed)
        right = len(found.items) if found.solved != 0 else 0
        if right >= n:
            return found.items
        if wanted >= 2 * n:  # half of them right is what a verdict asks for, too
            raise Refusal(
                f"{model.name} answers {right} of {wanted} fresh items of {chosen.id} rightly, and {n} are wanted; "
                "ask for fewer, or use a model that solves the probe"
            )
        wanted = min(wanted + n - right, 2 * n)


def measure_crossed(
    model: AttachedModel,
    behaviour: str,
    heads: HeadSet,
    items: Mapping[str, ItemSet],
    families: Mapping[str, Evidence],
    knock_out: KnockOut | None = None,
    *,
    others: HeadSet | None = None,
    n_controls: int = CONTROLS,
    seed: int = 0,
) -> CrossedSet:
    """Knock the heads of one behaviour out on fresh items of all of them, and `n_controls` matched random sets too.

    Args:
        heads: of `behaviour`, see `heads_behind`.
        items: by behaviour: items that did not select heads, see `fresh_items`. The clean metric is measured on them.
        families: by behaviour: the evidence that the heads were verified on.
        knock_out: None is that of the evidence.
        others: heads of the other behaviours; the random sets have none of them where enough sets are left without.

    Raises:
        InputError: items of the evidence among those given, or no items for a behaviour; no heads; families that were
            knocked out in different ways, and no `knock_out`.
        Refusal: the model does no better than chance on the fresh items, or as `measure_sets`.
    """
    for name in families:
        if name not in items:
            raise InputError(f"no items were given for {name}; draw some with fresh_items")
        _require_fresh(name, items[name].ids, families)
    out = knock_out or _knock_out_of(families)
    every = model.heads("main")
    controls = matched_sets(heads, every - others if others else every, n_controls, seed)
    if len(controls.sets) < min(n_controls, FEWEST):
        controls = matched_sets(heads, every, n_controls, seed)
    clean, values, control_values = {}, {}, {}
    for name, evidence in families.items():
        sets = [HeadSet(), heads, *controls.sets]
        measured = measure_sets(model, items[name], sets, out, evidence.family.metric).numpy()
        if why := why_refused(measured[0], evidence.chance, evidence.better, evidence.solved):
            raise Refusal(f"nothing can be lost on the fresh items of {name}: {why}; leave {name} out, or give others")
        clean[name], values[name], control_values[name] = measured[0], measured[1], measured[2:]
    ids = {name: items[name].ids for name in families}
    return CrossedSet(behaviour, heads, controls, ids, clean, values, control_values)


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
        _require_fresh(name, first.item_ids[name], families)

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


def _unseen(model: AttachedModel, probe: Probe, n: int, used: set[str], max_tokens: int | None, seed: int) -> ItemSet:
    """The first `n` items, of a stream of their own, that are not among `used`."""
    wanted = n
    while True:
        try:
            drawn = encode(probe, model.tokenizer, n=wanted, seed=f"dissociation/{seed}", max_tokens=max_tokens)
        except InputError as error:
            raise InputError(f"{n} fresh items are wanted, beside those that found or tested heads: {error}") from None
        left = drawn.only([each not in used for each in drawn.ids], "it found or tested heads")
        if len(left) >= n:
            return left
        wanted += n - len(left)


def _require_fresh(name: str, ids: Sequence[str], families: Mapping[str, Evidence]) -> None:
    """Of one probe there may be several families, and each has selected heads."""
    probe = families[name].family.probe
    selected = {id for each in families.values() if each.family.probe == probe for id in each.item_ids}
    if common := selected & set(ids):
        raise InputError(
            f"{len(common)} of the {len(ids)} items given for {name} are among those its heads were verified on, so "
            "they cannot test them; draw others with fresh_items"
        )


def _knock_out_of(families: Mapping[str, Evidence]) -> KnockOut:
    ways = {(each.family.mode, each.family.scope) for each in families.values()}
    if len(ways) > 1:
        raise InputError(f"heads were knocked out in {len(ways)} ways by the evidence; say which one with knock_out")
    return KnockOut(*ways.pop()) if ways else KnockOut()


@dataclass(frozen=True, eq=False, slots=True)
class _Losses:
    """What is lost on the fresh items of one behaviour, and what there is to lose."""

    clean: Values
    chance: float
    sign: int

    @staticmethod
    def of(crossed: CrossedSet, behaviour: str, evidence: Evidence) -> _Losses:
        return _Losses(crossed.clean[behaviour], evidence.chance, 1 if evidence.better == "higher" else -1)

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
        ceiling=float(np.quantile(controls, 0.95)) if k else float("nan"),
        p=(1 + int((controls >= difference).sum())) / (k + 1),
    )


def _estimate(value: float, variances: Sequence[float], freedom: Sequence[float]) -> Estimate:
    """Student's interval for a sum of independent parts, with degrees of freedom after Welch and Satterthwaite."""
    total = sum(variances)
    if not total > 0:
        return Estimate(value, value - total, value + total)  # no spread: no width; unknown spread: NaN
    df = total**2 / sum(v**2 / f for v, f in zip(variances, freedom, strict=True))
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * total**0.5
    return Estimate(value, value - width, value + width)
