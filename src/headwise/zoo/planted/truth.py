"""What is known about the heads of a planted model: roles, direct and total effects, back-ups, decoys, near-ties."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pandas

from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.zoo.planted.circuits import BEHAVIOURS

FILE = "truth.json"


@dataclass(frozen=True, slots=True)
class HeadTruth:
    """A planted head. `name` is that of its plan; `decoy_of` the role whose pattern it has without the write."""

    head: str
    name: str
    roles: tuple[str, ...]
    decoy_of: str | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a head does for a behaviour.

    Attributes:
        direct: whether the head itself writes into the logits of the answer or its foil.
        total: whether the metric changes when this head alone is set to zero.
        size: its direct effect in logits, answer minus a foil whose code is orthogonal, on items that call for it.
            Negative: it writes the foil. For a foil with cosine c to the answer it is `size * (1 - c)`. None: no
            closed form, because the effect goes through later heads.
    """

    head: str
    behaviour: str
    direct: bool
    total: bool
    size: float | None


@dataclass(frozen=True, slots=True)
class TruthRow:
    """One row of the table: a head with all its roles, and one behaviour (None where it has no effect on any)."""

    head: str
    name: str
    roles: tuple[str, ...]
    decoy_of: str | None
    behaviour: str | None
    direct: bool
    total: bool
    size: float | None


@dataclass(frozen=True)
class Truth:
    """The answers for one model. Heads that are not named are random: no role, no direct or total effect beyond noise.

    Attributes:
        kind: `planted`, `null` or `random`. Of a random net nothing is known.
        model: architecture, layers, heads, seed, in words.
        heads_known: the planted heads.
        effects: every pair of head and behaviour with an effect. Pairs that are absent have none.
        backups: groups whose members hide one another: each alone costs nothing, all together everything.
        near_ties: groups with the same role and nearly the same size.
        background: logits; more than a head without an effect changes on the mean of several items. A single item may
            change by up to twice that.
    """

    kind: Literal["planted", "null", "random"]
    model: str
    heads_known: tuple[HeadTruth, ...] = ()
    effects: tuple[Effect, ...] = ()
    backups: tuple[tuple[str, ...], ...] = ()
    near_ties: tuple[tuple[str, ...], ...] = ()
    background: float = 0.0

    def heads(self, role: str) -> HeadSet:
        """The heads with this role. Raises InputError if no head has it."""
        found = [known.head for known in self.heads_known if role in known.roles]
        if not found:
            roles = sorted({each for known in self.heads_known for each in known.roles})
            raise InputError(f"no head of {self.model} has the role {role!r}; it has {', '.join(roles) or 'none'}")
        return HeadSet.parse(found)

    def named(self, name: str) -> Head:
        """The head of one plan, such as `induction-a`. Raises InputError if there is none."""
        for known in self.heads_known:
            if known.name == name:
                return Head.parse(known.head)
        names = ", ".join(known.name for known in self.heads_known)
        raise InputError(f"{self.model} has no planted head {name!r}; it has {names or 'none'}")

    def roles(self, head: Head | str) -> frozenset[str]:
        """Every role of a head; empty for a random one."""
        label = Head.parse(head).label
        return frozenset(role for known in self.heads_known if known.head == label for role in known.roles)

    def decoys(self, role: str | None = None) -> HeadSet:
        """The decoys of a role, or all: same pattern, no effect. Raises InputError if a role has none."""
        known_roles = {known.decoy_of for known in self.heads_known if known.decoy_of}
        if role is not None and role not in known_roles:
            raise InputError(
                f"{self.model} has no decoy of {role!r}; it has {', '.join(sorted(known_roles)) or 'none'}"
            )
        return HeadSet.parse(
            [known.head for known in self.heads_known if known.decoy_of and role in (None, known.decoy_of)], kind="head"
        )

    def with_effect(self, behaviour: str, kind: Literal["direct", "total"]) -> HeadSet:
        """The heads with a direct, or a total, effect on a behaviour. Raises InputError for an unknown one or kind."""
        _require_behaviour(behaviour)
        if kind not in ("direct", "total"):
            raise InputError(f"an effect is direct or total, not {kind!r}")
        return HeadSet.parse(
            [each.head for each in self.effects if each.behaviour == behaviour and getattr(each, kind)], kind="head"
        )

    def effect(self, head: Head | str, behaviour: str) -> Effect:
        """What a head does for a behaviour; without a direct and a total effect where nothing is recorded.

        Raises InputError for an unknown behaviour.
        """
        _require_behaviour(behaviour)
        label = Head.parse(head).label
        for each in self.effects:
            if (each.head, each.behaviour) == (label, behaviour):
                return each
        return Effect(label, behaviour, direct=False, total=False, size=None)

    def table(self) -> list[TruthRow]:
        """One row per planted head and behaviour it has an effect on, heads in canonical order."""
        rows = []
        for known in sorted(self.heads_known, key=lambda known: Head.parse(known.head)):
            effects: Sequence[Effect | None] = [each for each in self.effects if each.head == known.head] or [None]
            for each in effects:
                rows.append(
                    TruthRow(
                        head=known.head,
                        name=known.name,
                        roles=known.roles,
                        decoy_of=known.decoy_of,
                        behaviour=each.behaviour if each else None,
                        direct=each.direct if each else False,
                        total=each.total if each else False,
                        size=each.size if each else None,
                    )
                )
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        return pandas.DataFrame([asdict(row) for row in self.table()])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, form: dict[str, Any]) -> Self:
        """Inverse of `to_dict`, also after JSON has made lists of tuples. Raises InputError for another form."""
        try:
            return cls(
                kind=form["kind"],
                model=form["model"],
                heads_known=tuple(HeadTruth(**each | {"roles": tuple(each["roles"])}) for each in form["heads_known"]),
                effects=tuple(Effect(**each) for each in form["effects"]),
                backups=tuple(tuple(group) for group in form["backups"]),
                near_ties=tuple(tuple(group) for group in form["near_ties"]),
                background=form["background"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no stored truth ({error!r}); expected what Truth.to_dict gives") from error

    def save(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The truth beside a saved checkpoint. Raises InputError if there is none."""
        path = Path(folder) / FILE
        try:
            form = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as the truth of a planted model ({error}); save it again"
            ) from error
        return cls.from_dict(form)


def _require_behaviour(behaviour: str) -> None:
    if behaviour not in BEHAVIOURS:
        raise InputError(f"no planted behaviour {behaviour!r}; choose from {', '.join(BEHAVIOURS)}")
