"""From what was measured to verdicts: pure arithmetic on `Evidence`, no model in sight.

A claim is one head of the exact map, or one set of heads knocked out together. It is **verified** if

- q <= `alpha` over the whole family, single heads and sets together;
- its effect is above the smallest of interest, a share of what there is to lose;
- its effect is above the 95th percentile of its controls.

It is **undecidable** if the first of the three fails and could not have held: too few controls, or controls so far
apart that a set which costs everything would not stand out. All claims are **refused** where the model does not solve
the probe.

**Controls step down.** The heads that verify for the behaviour are taken out of the controls of the others, and all is
judged again, until no further head verifies. Several heads that matter would hide one another otherwise: four of them
in a layer of 32 push its 95th percentile up to their own effects, and each of the four fails. What a verdict compares
with is heads that do *not* matter, and those are found one after the other, the largest effect first, as in
step-down tests. Taking the largest out of the controls makes the next one look larger, which would let noise climb; it
needs a first head above all three bounds to begin, the spread is one that a few heads do not move, and nothing
climbs over the smallest effect of interest. The comparison of the first round is kept as `with_verified`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from headwise.errors import InputError
from headwise.sweep.matched import Match
from headwise.verify.evidence import Evidence, Joint, Values
from headwise.verify.statistics import (
    above_chance_p,
    excess_interval,
    q_values,
    rank_p,
    studentised_floor,
    studentised_p,
)
from headwise.verify.verdict import Against, FamilyVerdict, JointVerdict, Ruling, SingleVerdict

SMALLEST = 0.05
ALPHA = 0.05

FEWEST_ITEMS = 8
FEWEST_CONTROLS = 8
ENOUGH = 20
"""Controls that a narrow choice must leave: heads of the layer, sets without a verified head."""
DRAWN = 50
"""Control sets that a studentised p is made from, unless there are no more."""
CHANCE_P = 0.01


def judge(evidence: Evidence, *, smallest: float = SMALLEST, alpha: float = ALPHA) -> FamilyVerdict:
    """The verdicts on all claims of a family.

    Items without a number in the clean run are left out. A claim without a number on an item that is left is
    undecidable, and is nobody's control.

    Args:
        smallest: the smallest effect of interest, as a share of the distance between clean metric and chance.
        alpha: bound on q.

    Raises:
        InputError: a share or a bound outside 0 to 1.
    """
    if not 0 <= smallest < 1 or not 0 < alpha < 1:
        raise InputError(f"smallest={smallest} and alpha={alpha} are shares; give numbers between 0 and 1")
    court = _Court.over(evidence, smallest, alpha)
    if court.refusal:
        return _refused(court)
    verified: frozenset[int] = frozenset()
    first = current = court.judged(verified)
    while grown := current.passing(court.n_heads) - verified:
        verified |= grown
        current = court.judged(verified)
    return court.verdict(first, current)


def why_refused(clean: Values, chance: float, sign: int, solved: float) -> str:
    """Why nothing can be said about heads on these items, in words; empty where something can.

    `sign` is that of the metric: -1 where lower is better.
    """
    values = clean[np.isfinite(clean)]
    if solved < 0.5:
        return f"the model answers {solved:.0%} of the items rightly, and half of them are needed"
    if len(values) < FEWEST_ITEMS:
        return f"{len(values)} items are left, and {FEWEST_ITEMS} are needed"
    if not above_chance_p(values, chance, sign) <= CHANCE_P:
        return f"the clean metric, {values.mean():.3g}, is not better than chance, {chance:.3g}"
    return ""


@dataclass(frozen=True, slots=True)
class _Compared:
    """`few`: what to say where there are too few controls for a p."""

    against: Against
    match: Match
    few: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Round:
    """All claims compared once, with some heads out of the controls."""

    compared: tuple[_Compared, ...]
    q: Float[np.ndarray, " claim"]
    rulings: tuple[tuple[Ruling, str], ...]

    def passing(self, n_heads: int) -> frozenset[int]:
        """The single heads that verify."""
        return frozenset(i for i, (ruling, _) in enumerate(self.rulings[:n_heads]) if ruling == "verified")


@dataclass(frozen=True, slots=True)
class _Court:
    """A family's evidence in the form in which it is judged: drops on the items that have a number."""

    evidence: Evidence
    clean: Values
    heads: Float[np.ndarray, "head item"]
    known: Bool[np.ndarray, " head"]
    sites: Int[np.ndarray, " head"]
    stacks: Int[np.ndarray, " head"]
    joints: tuple[tuple[Joint, Values, Float[np.ndarray, "set item"]], ...]
    reach: float
    smallest: float
    alpha: float
    refusal: str

    @classmethod
    def over(cls, evidence: Evidence, smallest: float, alpha: float) -> _Court:
        known = np.isfinite(evidence.clean)
        clean = evidence.clean[known]
        reach = float(clean.mean() - evidence.chance) * evidence.sign if clean.size else float("nan")
        joints = tuple(
            (each, evidence.drops(each.values)[known], evidence.drops(each.control_values)[:, known])
            for each in evidence.joints
        )
        refusal = why_refused(clean, evidence.chance, evidence.sign, evidence.solved)
        heads = evidence.drops(evidence.values)[:, known]
        return cls(
            evidence=evidence,
            clean=clean,
            heads=heads,
            known=np.isfinite(heads).all(axis=1),
            sites=_numbered([each.site for each in evidence.heads.heads]),
            stacks=_numbered([each.stack for each in evidence.heads.heads]),
            joints=joints,
            reach=reach,
            smallest=smallest * reach,
            alpha=alpha,
            refusal=refusal,
        )

    @property
    def n_heads(self) -> int:
        return len(self.heads)

    @property
    def size(self) -> int:
        return len(self.heads) + len(self.joints)

    @property
    def needed(self) -> float:
        """The p that must be within reach."""
        return self.alpha / (2 * self.size)

    def judged(self, verified: frozenset[int]) -> _Round:
        compared = tuple(
            [self._single(i, verified) for i in range(self.n_heads)]
            + [self._joint(i, verified) for i in range(len(self.joints))]
        )
        q = q_values([each.against.p for each in compared])
        rulings = tuple(
            self._ruling(effect, each, float(own)) for effect, each, own in zip(self.effects, compared, q, strict=True)
        )
        return _Round(compared, q, rulings)

    @property
    def effects(self) -> list[float]:
        """Of every claim."""
        return [_mean(each) for each in self.heads] + [_mean(drops) for _, drops, _ in self.joints]

    def _single(self, claim: int, verified: frozenset[int]) -> _Compared:
        """One head against the others of its layer; against those of its stack where these are few."""
        usable = self.known.copy()
        usable[[claim, *verified]] = False
        layer = usable & (self.sites == self.sites[claim])
        match: Match = "layers" if layer.sum() >= ENOUGH else "model"
        chosen = layer if match == "layers" else usable & (self.stacks == self.stacks[claim])
        against = self._against(self.heads[claim], self.heads[chosen], enough_drawn=True)
        few = (
            f"the model has too few heads to judge one alone: {against.n} others are left to compare it with, and a p "
            f"takes {FEWEST_CONTROLS}"
        )
        return _Compared(against, match, few)

    def _joint(self, claim: int, verified: frozenset[int]) -> _Compared:
        """A set against its control sets, without those that hold a verified head where enough are left."""
        joint, drops, controls = self.joints[claim]
        names = {self.evidence.heads.heads[i] for i in verified}
        known = np.isfinite(controls).all(axis=1)
        innocent = known & np.array([not names & set(each.heads) for each in joint.controls.sets], dtype=bool)
        note = ""
        if innocent.sum() < min(ENOUGH, known.sum()):
            note = f"only {innocent.sum()} of {known.sum()} control sets hold no verified head, so all are compared"
            innocent = known
        drawn = len(joint.controls.sets) >= DRAWN or joint.controls.exhausted
        against = self._against(drops, controls[innocent], enough_drawn=drawn)
        few = (
            f"{against.n} controls are too few for a p: a rank goes down to {against.p_floor:.2g} where "
            f"{self.needed:.2g} is needed, and a studentised one takes {DRAWN} sets, or {FEWEST_CONTROLS} "
            "where there are no more"
        )
        return _Compared(against, joint.controls.match, few, note)

    def _against(self, drops: Values, controls: Float[np.ndarray, "set item"], *, enough_drawn: bool) -> Against:
        n = len(controls)
        means = controls.mean(axis=1)
        effect = _mean(drops)
        floor = 1 / (n + 1)
        if not np.isfinite(effect) or n < 2:
            return _nothing(n, floor)
        kind: Literal["rank", "studentised"] = "rank"
        p = float("nan")
        if floor < self.needed:
            p = rank_p(effect, means)
        elif n >= FEWEST_CONTROLS and enough_drawn:
            kind, p = "studentised", studentised_p(drops, controls)
            floor = studentised_floor(self.reach, controls)
        return Against(
            n=n,
            excess=effect - float(means.mean()),
            ci=excess_interval(drops, controls),
            p=p,
            p_floor=floor,
            kind=kind,
            ceiling=float(np.percentile(means, 95)),
        )

    def _ruling(self, effect: float, compared: _Compared, q: float) -> tuple[Ruling, str]:
        against, unit = compared.against, self.evidence.unit
        note = f"; {compared.note}" if compared.note else ""
        if not np.isfinite(effect):
            return "undecidable", "the metric gave no number on some items"
        if effect <= self.smallest:
            return "not verified", (
                f"its effect, {effect:.3g} {unit}, is not above the smallest of interest, {self.smallest:.3g}"
            )
        if not np.isfinite(against.p):
            return "undecidable", f"{compared.few}{note}"
        if effect <= against.ceiling:
            return "not verified", (
                f"its effect, {effect:.3g} {unit}, is not above the 95th percentile of its {against.n} controls, "
                f"{against.ceiling:.3g}{note}"
            )
        if q > self.alpha and against.p_floor >= self.needed:
            return "undecidable", (
                f"q is {q:.2g}, and with these {against.n} controls and {len(self.clean)} items no p below "
                f"{against.p_floor:.2g} can come out where {self.needed:.2g} is needed{note}"
            )
        if q > self.alpha:
            return "not verified", f"q is {q:.2g}, above {self.alpha:g} (p {against.p:.2g}, {self.size} claims){note}"
        return "verified", (
            f"its effect, {effect:.3g} {unit}, is above the smallest of interest, {self.smallest:.3g}, and above the "
            f"95th percentile of its {against.n} controls, {against.ceiling:.3g}; q is {q:.2g}{note}"
        )

    def verdict(self, first: _Round, last: _Round) -> FamilyVerdict:
        """What a first and a last round come to."""
        effects = self.effects
        singles, joints = [], []
        for i in range(self.size):
            ruling, reason = last.rulings[i]
            against, with_verified = last.compared[i].against, first.compared[i].against
            match, q = last.compared[i].match, float(last.q[i])
            if i < self.n_heads:
                head = self.evidence.heads.heads[i]
                singles.append(SingleVerdict(head, effects[i], against, with_verified, match, q, ruling, reason))
                continue
            joint, _, controls = self.joints[i - self.n_heads]
            joints.append(
                JointVerdict(
                    name=joint.name,
                    heads=joint.heads,
                    effect=effects[i],
                    against=against,
                    with_verified=with_verified,
                    match=match,
                    controls=controls.mean(axis=1),
                    q=q,
                    ruling=ruling,
                    reason=reason,
                )
            )
        return self._family(singles, joints)

    def _family(self, singles: Sequence[SingleVerdict], joints: Sequence[JointVerdict]) -> FamilyVerdict:
        return FamilyVerdict(
            family=self.evidence.family,
            unit=self.evidence.unit,
            n_items=len(self.clean),
            size=self.size,
            clean=_mean(self.clean),
            chance=self.evidence.chance,
            solved=self.evidence.solved,
            smallest=self.smallest,
            refusal=self.refusal,
            joints=tuple(joints),
            singles=tuple(singles),
        )


def _refused(court: _Court) -> FamilyVerdict:
    """The same for every claim, with what was measured all the same."""
    nan = float("nan")
    evidence, why = court.evidence, court.refusal
    singles = [
        SingleVerdict(head, effect, _nothing(0, nan), _nothing(0, nan), "layers", nan, "refused", why)
        for head, effect in zip(evidence.heads.heads, court.effects[: court.n_heads], strict=True)
    ]
    joints = [
        JointVerdict(
            name=joint.name,
            heads=joint.heads,
            effect=_mean(drops),
            against=_nothing(len(controls), nan),
            with_verified=_nothing(len(controls), nan),
            match=joint.controls.match,
            controls=np.array([_mean(each) for each in controls]),
            q=nan,
            ruling="refused",
            reason=why,
        )
        for joint, drops, controls in court.joints
    ]
    return court._family(singles, joints)


def _nothing(n: int, floor: float) -> Against:
    nan = float("nan")
    return Against(n=n, excess=nan, ci=(nan, nan), p=nan, p_floor=floor, kind="rank", ceiling=nan)


def _mean(values: Values) -> float:
    return float(values.mean()) if values.size else float("nan")


def _numbered(names: Sequence[Hashable]) -> Int[np.ndarray, " name"]:
    """The same number for the same name."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)
