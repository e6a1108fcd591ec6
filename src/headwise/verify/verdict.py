"""The verdict: what was found about a set of heads, or about one, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from headwise.heads import Head, HeadSet
from headwise.sweep.matched import Match
from headwise.verify.evidence import Family

Ruling = Literal["verified", "not verified", "undecidable", "refused"]


@dataclass(frozen=True, slots=True)
class Against:
    """An effect held against controls.

    Attributes:
        n: number of controls.
        excess: effect minus the mean effect of the controls.
        ci: 95 percent interval of the excess, over items and controls.
        p: one-sided: that controls like these would show so large an effect.
        p_floor: the smallest p that could have come out.
        kind: `rank` or `studentised`.
        ceiling: 95th percentile of the controls' effects.
    """

    n: int
    excess: float
    ci: tuple[float, float]
    p: float
    p_floor: float
    kind: Literal["rank", "studentised"]
    ceiling: float


@dataclass(frozen=True, slots=True)
class SingleVerdict:
    """One head alone. `match`: where its controls are from. `with_verified`: the same comparison with the heads that
    were verified for this behaviour left among the controls."""

    head: Head
    effect: float
    against: Against
    with_verified: Against
    match: Match
    q: float
    ruling: Ruling
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain({"head": self.head.label, "effect": self.effect, **_compared(self)})


@dataclass(frozen=True, eq=False, slots=True)
class JointVerdict:
    """A set of heads together; `controls` are the mean effects of its control sets."""

    name: str
    heads: HeadSet
    effect: float
    against: Against
    with_verified: Against
    match: Match
    controls: Float[np.ndarray, " set"]
    q: float
    ruling: Ruling
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        heads = list(self.heads.labels)
        own = {"name": self.name, "heads": heads, "effect": self.effect, "controls": self.controls.tolist()}
        return plain({**own, **_compared(self)})


@dataclass(frozen=True, eq=False, slots=True)
class FamilyVerdict:
    """All claims of one family.

    Attributes:
        size: number of claims, over which q is computed.
        clean, chance, solved: as in `Evidence`, `clean` on the mean of the items.
        smallest: the smallest effect of interest, in the metric's unit.
        refusal: why nothing is claimed, where the model does not solve the probe; else empty.
    """

    family: Family
    unit: str
    n_items: int
    size: int
    clean: float
    chance: float
    solved: float
    smallest: float
    refusal: str
    joints: tuple[JointVerdict, ...]
    singles: tuple[SingleVerdict, ...]

    @property
    def verified(self) -> HeadSet:
        """The heads that are verified alone."""
        return HeadSet(tuple(each.head for each in self.singles if each.ruling == "verified"))

    def single(self, head: Head | str) -> SingleVerdict:
        """The verdict on one head. Raises `KeyError` if it was not in the map."""
        wanted = Head.parse(head)
        for each in self.singles:
            if each.head == wanted:
                return each
        raise KeyError(wanted.label)

    def joint(self, name: str) -> JointVerdict:
        """The verdict on the set of that name. Raises `KeyError` if there is none."""
        for each in self.joints:
            if each.name == name:
                return each
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON: names and numbers as in the fields, NaN and infinity as None."""
        return plain(
            {
                "family": self.family.key,
                "probe": self.family.probe,
                "metric": self.family.metric,
                "mode": self.family.mode,
                "scope": self.family.scope,
                "units": self.unit,
                "items": self.n_items,
                "family_size": self.size,
                "clean": self.clean,
                "chance": self.chance,
                "solved": self.solved,
                "smallest": self.smallest,
                "refusal": self.refusal,
                "verified": list(self.verified.labels),
                "joint": [each.to_json() for each in self.joints],
                "single": [each.to_json() for each in self.singles],
            }
        )


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The same for JSON: numbers that are none become None, at any depth."""
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _compared(verdict: SingleVerdict | JointVerdict) -> dict[str, Any]:
    return {
        "excess": verdict.against.excess,
        "ci": list(verdict.against.ci),
        "p": verdict.against.p,
        "p_floor": verdict.against.p_floor,
        "kind": verdict.against.kind,
        "n_controls": verdict.against.n,
        "ceiling": verdict.against.ceiling,
        "with_verified": {"p": verdict.with_verified.p, "excess": verdict.with_verified.excess},
        "match": verdict.match,
        "q": verdict.q,
        "verdict": verdict.ruling,
        "reason": verdict.reason,
    }
