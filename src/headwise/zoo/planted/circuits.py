"""The circuits, head by head: what a head's query asks of a key, what it takes from there and where it writes it.

Scores are sums of `weight * <query feature, key feature>`; the features are those of `stream.py`, of unit size. A head
that finds nothing attends to the bos token, whose code is zero: it then writes nothing. A condition on the query
("only after ` to`") raises the score of the bos token where the condition does not hold. The weights below leave about
8 between the best and the second score where both kinds of position occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from headwise.errors import InputError

Behaviour = Literal["repeat", "ioi", "facts", "conflict", "keys"]
BEHAVIOURS: tuple[Behaviour, ...] = ("repeat", "ioi", "facts", "conflict", "keys")

DIALS = ("induction", "mover", "memory", "context", "key-copy")
"""The roles that write into the output. Their strength can be set."""

DEFAULT_STRENGTH: Mapping[str, float] = {"memory": 0.7}
"""Strengths other than 1: what is read wins over what is remembered, by 0.3 of a full effect."""

NEAR_TIE = (0.52, 0.48)
"""Shares of the two induction heads."""

NOWHERE = "unread"
"""A subspace that nothing reads."""

PEAK_SCORE = 80.0
BOS_AT_PEAK = 0.86
"""Between the peak (1) and its runner-up (0.73)."""


@dataclass(frozen=True)
class Ask:
    """A term of the score: `weight * <turn @ query feature, key feature>`."""

    query: str
    key: str
    weight: float
    turn: Tensor | None = None


@dataclass(frozen=True)
class Write:
    """A term of what the head adds: `weight * turn @ value feature`, into a subspace."""

    value: str
    into: str
    weight: float = 1.0
    turn: Tensor | None = None


@dataclass(frozen=True)
class HeadPlan:
    """One head.

    `keys` and `values` are the subspaces its keys and values hold, in this order; heads that agree in both can share a
    KV group. `positional` heads have position features in their keys as well, and `offset` is the distance they look
    back, with `peak` as the height of that term. `after` are the plans that have to be in earlier layers, because this
    one reads what they write. `direct` is the share of a full effect that the head itself writes into the output,
    `relayed` what it leaves for the feed-forward part to write there.
    """

    name: str
    roles: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    asks: tuple[Ask, ...]
    writes: tuple[Write, ...]
    after: tuple[str, ...] = ()
    positional: bool = False
    offset: int | None = None
    peak: float = PEAK_SCORE
    first_layer: bool = False
    direct: Mapping[Behaviour, float] = field(default_factory=dict)
    relayed: Mapping[Behaviour, float] = field(default_factory=dict)
    dial: str | None = None
    backs_up: str | None = None
    decoy_of: str | None = None

    @property
    def sharing(self) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
        """What heads of one KV group have in common."""
        return self.keys, self.values, self.positional


@dataclass(frozen=True)
class Maps:
    """The random and the learned matrices that plans refer to.

    `key_first` and `key_second` take a code to one half of its dimensions each, so that a key window holds two tokens
    apart and equal windows have a product of exactly 2. `memory` takes a subject's code to its object's, for one
    relation each. `unread` takes a code to the subspace that nothing reads.
    """

    key_first: Tensor
    key_second: Tensor
    memory: tuple[Tensor, ...]
    unread: Tensor


def circuit_plans(maps: Maps) -> dict[str, tuple[HeadPlan, ...]]:
    """The plans of every circuit, by the circuit's name."""
    return {
        "patterns": _patterns(maps),
        "induction": _induction(maps),
        "indirect-object": _indirect_object(maps),
        "memory": _memory(maps),
        "context": _context(maps),
        "key": _key(maps),
    }


CIRCUITS = ("patterns", "induction", "indirect-object", "memory", "context", "key")

FROM_EMBEDDING = ("tok", "name", "subject", "object")


def offset_head(
    name: str,
    roles: tuple[str, ...],
    offset: int,
    *writes: Write,
    values: tuple[str, ...] = FROM_EMBEDDING,
    after: tuple[str, ...] = (),
) -> HeadPlan:
    """Attends `offset` positions back, and to the bos token where the text is too short for that."""
    return HeadPlan(
        name=name,
        roles=roles,
        keys=("bos",),
        values=values,
        asks=(Ask("constant", "bos", BOS_AT_PEAK * PEAK_SCORE),),
        writes=writes,
        positional=True,
        offset=offset,
        after=after,
    )


def previous_token(maps: Maps) -> HeadPlan:
    """Every position learns what stood before it: the first layer of induction, and of a key window."""
    return offset_head(
        "previous-token",
        ("previous-token",),
        1,
        Write("tok", "prev"),
        Write("tok", "key", turn=maps.key_first),
        Write("name", "prev_name"),
        Write("subject", "prev_subject"),
        Write("object", "prev_object"),
    )


def _patterns(maps: Maps) -> tuple[HeadPlan, ...]:
    """Heads with a pattern and no effect."""
    to_nowhere = Write("tok", NOWHERE, turn=maps.unread)
    back = [offset_head(f"offset-{n}", (f"offset-{n}", "fixed-offset"), n, to_nowhere) for n in (3, 4)]
    first = replace(back[0], name="sink", roles=("sink",), offset=None, asks=(Ask("constant", "bos", 20.0),))
    even = replace(back[0], name="uniform", roles=("uniform",), offset=None, asks=())
    return (*back, first, even)


def _induction(maps: Maps) -> tuple[HeadPlan, ...]:
    one = HeadPlan(
        name="induction",
        roles=("induction",),
        keys=("prev", "bos"),
        values=("tok",),
        asks=(Ask("tok", "prev", 25.0), Ask("constant", "bos", 40.0), Ask("content", "bos", -25.0)),
        writes=(Write("tok", "out"),),
        after=("previous-token",),
        direct={"repeat": 1.0},
        dial="induction",
    )
    near = [
        replace(
            one,
            name=f"induction-{'ab'[index]}",
            writes=(Write("tok", "out", share),),
            direct={"repeat": share},
        )
        for index, share in enumerate(NEAR_TIE)
    ]
    return (*near, decoy(one, maps))


def _indirect_object(maps: Maps) -> tuple[HeadPlan, ...]:
    """A same-token head marks what came before; the inhibitor takes the marked name to where a receiver is wanted; the
    mover attends to the names, but to that one.
    """
    same = HeadPlan(
        name="same-token",
        roles=("same-token", "duplicate-token"),
        keys=("tok", "bos"),
        values=("constant", "bos"),
        # Itself is the same token, too: the position term pushes that one below the bos token.
        asks=(Ask("tok", "tok", 205.0), Ask("constant", "bos", 153.0)),
        writes=(Write("constant", "twice"), Write("bos", "twice", -1.0)),
        positional=True,
        offset=0,
        peak=-60.0,
        first_layer=True,
    )
    inhibitor = HeadPlan(
        name="inhibitor",
        roles=("name-inhibitor",),
        keys=("twice", "name", "bos"),
        values=("tok",),
        asks=(
            Ask("constant", "twice", 25.0),
            Ask("constant", "name", 25.0),
            Ask("constant", "bos", 62.5),
            Ask("give", "bos", -25.0),
        ),
        writes=(Write("tok", "inhibit"),),
        after=("same-token",),
    )
    mover = HeadPlan(
        name="mover",
        roles=("mover",),
        keys=("tok", "name", "bos"),
        values=("tok",),
        asks=(
            Ask("constant", "name", 40.0),
            Ask("inhibit", "tok", -32.0),
            Ask("constant", "bos", 56.0),
            Ask("give", "bos", -40.0),
        ),
        writes=(Write("tok", "out"),),
        after=("inhibitor",),
        direct={"ioi": 1.0},
        dial="mover",
    )
    return (same, inhibitor, mover, decoy(mover, maps))


def _memory(maps: Maps) -> tuple[HeadPlan, ...]:
    """One head finds which relation is asked for; one head for each relation turns the subject into the object."""
    asked = "asked_relation"
    relation = HeadPlan(
        name="relation",
        roles=("relation",),
        keys=("relation", "bos"),
        values=("relations",),
        asks=(Ask("constant", "relation", 25.0), Ask("constant", "bos", 37.5), Ask("ask", "bos", -25.0)),
        writes=(Write("relations", asked),),
    )
    heads = []
    for index, look_up in enumerate(maps.memory):
        which = one_of(len(maps.memory), index, look_up)
        heads.append(
            HeadPlan(
                name=f"memory-{index}",
                roles=("memory",),
                keys=("subject", "bos"),
                values=("tok",),
                asks=(
                    Ask("constant", "subject", 25.0),
                    Ask("constant", "bos", 37.5),
                    Ask(asked, "bos", -25.0, which),
                ),
                writes=(Write("tok", "out", turn=look_up),),
                after=("relation",),
                direct={"facts": 1.0, "conflict": -1.0},
                dial="memory",
            )
        )
    return (relation, *heads, decoy(heads[0], maps))


def one_of(size: int, index: int, like: Tensor) -> Tensor:
    """`[1, size]`, a one at `index`: picks one feature of a subspace."""
    row = like.new_zeros(1, size)
    row[0, index] = 1.0
    return row


def _context(maps: Maps) -> tuple[HeadPlan, ...]:
    """Says what the text says: any object of a fact that stands there."""
    head = HeadPlan(
        name="context",
        roles=("context",),
        keys=("object", "bos"),
        values=("tok",),
        asks=(Ask("constant", "object", 25.0), Ask("constant", "bos", 37.5), Ask("ask", "bos", -25.0)),
        writes=(Write("tok", "out"),),
        direct={"conflict": 1.0},
        dial="context",
    )
    return (head, decoy(head, maps))


def _key(maps: Maps) -> tuple[HeadPlan, ...]:
    """Every position holds the two tokens before it (its key window), and then the window of the position before. The
    answer stands where that equals the window of the question: their product is then 2, and at most 1.65 where only one
    of the two tokens agrees; the bos token has 1.75. The back-up does the same unless it was done.
    """
    second = offset_head(
        "offset-2", ("offset-2", "fixed-offset", "key-window"), 2, Write("tok", "key", turn=maps.key_second)
    )
    shift = offset_head(
        "key-shift",
        ("previous-token", "key-shift"),
        1,
        Write("key", "key_shift"),
        values=("key",),
        after=("previous-token", "offset-2"),
    )
    head = HeadPlan(
        name="key-copy",
        roles=("key-copy",),
        keys=("key_shift", "bos"),
        values=("tok", "constant", "bos"),
        asks=(Ask("key", "key_shift", 80.0), Ask("constant", "bos", 300.0), Ask("ask", "bos", -160.0)),
        writes=(Write("tok", "out"), Write("constant", "done"), Write("bos", "done", -1.0)),
        after=("key-shift",),
        direct={"keys": 1.0},
        dial="key-copy",
    )
    backup = replace(
        head,
        name="key-backup",
        roles=("key-copy", "backup"),
        asks=(*head.asks, Ask("done", "bos", 100.0)),
        writes=(Write("tok", "out"),),
        after=("key-shift", "key-copy"),
        direct={},
        backs_up="key-copy",
    )
    return (second, shift, head, backup, decoy(head, maps))


def decoy(plan: HeadPlan, maps: Maps) -> HeadPlan:
    """The same query, keys and values; what it writes, nothing reads."""
    return replace(
        plan,
        name=f"{plan.name}-decoy",
        roles=("decoy",),
        writes=(Write("tok", NOWHERE, turn=maps.unread),),
        direct={},
        dial=None,
        decoy_of=plan.roles[0],
    )


def circuits_named(names: tuple[str, ...], maps: Maps) -> tuple[HeadPlan, ...]:
    """The plans of these circuits, with the previous-token head where one of them needs it.

    Raises InputError for a name that is no circuit.
    """
    unknown = [name for name in names if name not in CIRCUITS]
    if unknown or not names:
        raise InputError(
            f"no planted circuit {', '.join(map(repr, unknown)) or 'was named'}; choose from {', '.join(CIRCUITS)}"
        )
    every = circuit_plans(maps)
    plans = [plan for name in CIRCUITS if name in names for plan in every[name]]
    if any("previous-token" in plan.after for plan in plans):
        plans.insert(0, previous_token(maps))
    return tuple(plans)
