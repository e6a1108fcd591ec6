"""The same behaviours by other heads: what a null model has in place of the heads a detector looks for.

The substitutes come one position late. They attend to the token after the one that a detector expects, and read there
what the previous-token head has left: `prev` in place of the token, `prev_name` in place of `name`. Patterns then fit
no role, and the answer is the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from headwise.errors import InputError
from headwise.zoo.planted.circuits import (
    BEHAVIOURS,
    Ask,
    Behaviour,
    HeadPlan,
    Maps,
    Write,
    circuits_named,
    decoy,
    offset_head,
    previous_token,
)

Way = Literal["heads", "mlp"]
WAYS: tuple[Way, ...] = ("heads", "mlp")

CIRCUIT_OF: dict[Behaviour, str] = {
    "repeat": "induction",
    "ioi": "indirect-object",
    "facts": "memory",
    "conflict": "context",
    "keys": "key",
}

LATE = {"tok": "prev", "name": "prev_name", "subject": "prev_subject", "object": "prev_object", "key_shift": "key_late"}


def null_plans(names: tuple[str, ...], behaviour: Behaviour, way: Way, maps: Maps) -> tuple[HeadPlan, ...]:
    """The plans of the named circuits, those that write the answer of `behaviour` made decoys, and late heads instead.

    With `heads` the late heads write into the output. With `mlp` they write into `relay`, from where the last block's
    feed-forward part takes it to the output.

    Raises InputError for an unknown behaviour or way.
    """
    if behaviour not in BEHAVIOURS:
        raise InputError(f"no planted behaviour {behaviour!r}; choose from {', '.join(BEHAVIOURS)}")
    if way not in WAYS:
        raise InputError(f"a null solves {behaviour} by way='heads' or way='mlp', not {way!r}")
    circuit = CIRCUIT_OF[behaviour]
    chosen = {*names, circuit}
    if behaviour == "repeat":
        chosen.add("key")  # whose window of two tokens tells where the token before the last stood
    if behaviour == "conflict":
        chosen.add("memory")
    plans = circuits_named(tuple(chosen), maps)
    wanted = [plan for plan in plans if plan.direct.get(behaviour, 0.0) > 0]
    late = [_late(plan, behaviour, way, maps) for plan in wanted]
    if behaviour == "keys":
        shifted = Write("key_shift", "key_late")
        late.append(offset_head("key-late", ("key-late",), 1, shifted, values=("key_shift",), after=("key-shift",)))
    front = () if any(plan.name == "previous-token" for plan in plans) else (previous_token(maps),)
    return (*front, *(_silenced(plan, behaviour, maps) for plan in plans), *late)


def _silenced(plan: HeadPlan, behaviour: Behaviour, maps: Maps) -> HeadPlan:
    """A decoy where the plan, or the one it backs up, would give the answer; its name stays."""
    if plan.direct.get(behaviour, 0.0) > 0 or (behaviour == "keys" and plan.backs_up):
        return replace(decoy(plan, maps), name=plan.name, backs_up=None)
    return plan


def _late(plan: HeadPlan, behaviour: Behaviour, way: Way, maps: Maps) -> HeadPlan:
    keys = tuple(LATE.get(key, key) for key in plan.keys)
    asks = tuple(replace(ask, key=LATE.get(ask.key, ask.key)) for ask in plan.asks)
    after = ("previous-token", *plan.after)
    if behaviour == "repeat":
        # One position later, the token that was matched stands second in the key window.
        keys = ("key", "bos")
        asks = (Ask("tok", "key", 25.0, maps.key_second), *plan.asks[1:])
        after = ("previous-token", "offset-2")
    if behaviour == "keys":
        after = ("previous-token", "key-late")
    answers = tuple(write for write in plan.writes if write.into == "out")
    return replace(
        plan,
        name=f"late-{plan.name}",
        roles=(f"late-{plan.roles[0]}",),
        keys=keys,
        values=("prev",),
        asks=asks,
        writes=tuple(replace(write, value="prev", into="relay" if way == "mlp" else "out") for write in answers),
        after=after,
        direct={} if way == "mlp" else plan.direct,
        relayed=plan.direct if way == "mlp" else {},
    )
