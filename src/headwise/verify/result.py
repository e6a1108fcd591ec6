"""What `verify` gives back: the verdict on the set it was asked about, and what belongs beside it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.heads import HeadSet
from headwise.verify.evidence import Evidence
from headwise.verify.verdict import FamilyVerdict, JointVerdict, Ruling, SingleVerdict, plain


@dataclass(frozen=True, eq=False, slots=True)
class OffTarget:
    """What the same knock-out costs elsewhere.

    Attributes:
        effect: mean cost over the items, positive where the knock-out does harm; `ci` its 95 percent interval.
        controls: the same of each of the control sets that were tried.
        clean: the metric without a knock-out.
    """

    probe: str
    metric: str
    unit: str
    n_items: int
    clean: float
    effect: float
    ci: tuple[float, float]
    controls: Float[np.ndarray, " set"]


@dataclass(frozen=True, slots=True)
class Dose:
    """The metric at one dose: a share of the knock-out of the whole set, or the first heads of a ranking."""

    heads: HeadSet
    strength: float
    value: float
    ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class KeptOnly:
    """The metric with every other head of the stack out; `left` is the share of the distance from chance that stays."""

    heads: HeadSet
    value: float
    left: float


@dataclass(frozen=True, eq=False, slots=True)
class Verdict:
    """The verdict on a set of heads, and its evidence.

    Attributes:
        heads: what was asked about.
        family: the verdicts on everything that was measured, the single heads of the whole stack with them.
        off_target: None where the model gives nothing for it, or nothing was to be measured.
        doses: the set taken out by degrees; empty where the probe is refused.
        growing: the first head, the first two, ... of the ranking that was given; empty where none was.
        kept_only: None where the probe is refused.
        reference: which items what `mean` and `resample` put in place is of; empty for the other modes.
    """

    heads: HeadSet
    family: FamilyVerdict
    evidence: Evidence
    off_target: OffTarget | None
    doses: tuple[Dose, ...]
    growing: tuple[Dose, ...]
    kept_only: KeptOnly | None
    reference: str = ""

    @property
    def joint(self) -> JointVerdict:
        """The whole set knocked out together."""
        return self.family.joint("given")

    @property
    def singles(self) -> tuple[SingleVerdict, ...]:
        """Each of the heads alone."""
        return tuple(each for each in self.family.singles if each.head in self.heads)

    @property
    def ruling(self) -> Ruling:
        return self.joint.ruling

    @property
    def reason(self) -> str:
        return self.joint.reason

    def to_json(self) -> dict[str, Any]:
        """The object that `headwise verify --json` prints; numbers that are none are None."""
        joint, against = self.joint, self.joint.against
        off = self.off_target
        return plain(
            {
                "joint": {
                    "effect": joint.effect,
                    "excess": against.excess,
                    "ci": list(against.ci),
                    "p": against.p,
                    "q": joint.q,
                    "controls": joint.controls.tolist(),
                },
                "single": [
                    {"head": each.head.label, "effect": each.effect, "p": each.against.p, "q": each.q}
                    for each in self.singles
                ],
                "verdict": self.ruling,
                "units": self.family.unit,
                "mode": self.family.family.mode,
                "scope": self.family.family.scope,
                "items": self.family.n_items,
                "family_size": self.family.size,
                "off_target": None
                if off is None
                else {
                    "probe": off.probe,
                    "metric": off.metric,
                    "units": off.unit,
                    "items": off.n_items,
                    "effect": off.effect,
                    "ci": list(off.ci),
                    "controls": off.controls.tolist(),
                },
            }
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rest = self._lines()
        return f"<div><b>{html.escape(head)}</b><br>{'<br>'.join(map(html.escape, rest))}</div>"

    def _lines(self) -> list[str]:
        joint, family = self.joint, self.family
        lines = [f"{', '.join(self.heads.labels)} on {family.family.key}, {family.n_items} items: {self.ruling}"]
        lines.append(f"  {joint.reason}")
        if self.reference:
            lines.append(f"  {family.family.mode} over {self.reference}")
        if self.ruling == "refused":
            return lines
        low, high = joint.against.ci
        lines.append(
            f"  together: effect {joint.effect:.3g} {family.unit} of {abs(family.clean - family.chance):.3g}, "
            f"excess {joint.against.excess:.3g} [{low:.3g}, {high:.3g}] over {joint.against.n} control sets "
            f"(matched by {joint.match}), p {joint.against.p:.2g}, q {joint.q:.2g} among {family.size} claims"
        )
        alone = (f"{each.head} {each.effect:.3g} {each.ruling}" for each in self.singles)
        lines.append(f"  alone: {', '.join(alone)}")
        if self.kept_only is not None:
            lines.append(f"  kept alone, all other heads out: {self.kept_only.left:.0%} of the distance is left")
        if self.off_target is not None:
            off = self.off_target
            low, high = off.ci
            lines.append(
                f"  off target ({off.probe}, {off.metric}): {off.effect:+.3g} {off.unit} [{low:.3g}, {high:.3g}]"
            )
        return lines
