"""The registry behind `headwise list` and `headwise bench`: what this installation offers, by kind and id.

A room of headwise, or another package, describes what it offers with an `Entry` and hands it to `register` when it is
imported. Another package makes itself known with an entry point whose value is the module that registers:

    [project.entry-points."headwise.catalogue"]
    my-heads = "my_package.headwise_entries"

Importing this module imports none of them; the first look-up does.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.metadata import entry_points
from threading import RLock
from typing import Literal, get_args

from headwise.errors import InputError, Refusal

Kind = Literal["methods", "probes", "models", "edits", "interventions", "benches"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ENTRY_POINTS = "headwise.catalogue"

RUN_OPTIONS = ("seed", "device", "dtype", "revision", "attn")
"""The settings that a command that runs a model takes; a bench takes some of them as keyword arguments."""

# Named here and not imported, because they stand below this file and import it in order to register.
ROOMS = (
    "headwise.model.edit",
    "headwise.zoo",
    "headwise.probes",
    "headwise.find",
    "headwise.use",
    "headwise.fit",
    "headwise.benches",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing on offer.

    `page` is its place in the documentation, relative to the docs root: `zoo.md` or `edits.md#zero`, and for an entry
    of another package a full address. Raises `InputError` for an id, kind or page that cannot be used.
    """

    id: str
    kind: Kind
    title: str
    page: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", self.id):
            raise InputError(
                f"catalogue id {self.id!r} must be lower-case words joined by '-', such as 'previous-token'"
            )
        _require_kind(self.kind)
        special = {"methods": MethodEntry, "interventions": InterventionEntry, "benches": BenchEntry}.get(self.kind)
        if special is not None and not isinstance(self, special):
            raise InputError(f"catalogue entry {self.id!r} of kind {self.kind!r} must be made with {special.__name__}")
        if not self.title or not self.page:
            raise InputError(f"catalogue entry {self.id!r} needs a title and a page; give both")

    def to_json(self) -> dict[str, object]:
        """The fields as `headwise list --json` prints them; a callable is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if not callable(value)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry(Entry):
    """A published method. `tier`: A matched against official code, B right on planted truth, C formula only."""

    kind: Kind = "methods"
    paper: str
    year: int
    tier: Literal["A", "B", "C"]
    status: Literal["exact", "reconstruction"]
    needs: tuple[str, ...]
    cost: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionEntry(Entry):
    """A published way of using heads; `made` is its class. Tier and status are those of `MethodEntry`."""

    kind: Kind = "interventions"
    paper: str
    year: int
    tier: Literal["A", "B", "C"]
    status: Literal["exact", "reconstruction"]
    cost: str
    made: type


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchEntry(Entry):
    """A measurement that ends in numbers.

    `run` takes keyword arguments with defaults, each one of `RUN_OPTIONS`, and returns dotted keys with numbers
    (`{"needle.accuracy": 1.0}`). What it does not take, `headwise bench` refuses for it.
    """

    kind: Kind = "benches"
    run: Callable[..., Mapping[str, float]]

    def __post_init__(self) -> None:
        Entry.__post_init__(self)  # a dataclass with slots is a new class, which an argument-less super() does not know
        parameters = inspect.signature(self.run).parameters.values()
        wrong = [p.name for p in parameters if p.name not in RUN_OPTIONS or p.default is inspect.Parameter.empty]
        if wrong:
            raise InputError(
                f"bench {self.id!r}: its run may only have parameters among {', '.join(RUN_OPTIONS)}, "
                f"each with a default; change {', '.join(wrong)}"
            )

    @property
    def options(self) -> tuple[str, ...]:
        """The settings that `run` takes."""
        return tuple(inspect.signature(self.run).parameters)


def register(entry: Entry) -> None:
    """Add one entry. Raises `InputError` if its kind already has the id."""
    with _lock:
        of_kind = _registered[entry.kind]
        if entry.id in of_kind:
            raise InputError(
                f"{entry.kind} already has {entry.id!r} ({of_kind[entry.id].title}); register it under another id"
            )
        of_kind[entry.id] = entry


def entries(kind: Kind) -> tuple[Entry, ...]:
    """Every entry of one kind, ordered by id. Raises as `entry` does."""
    _require_kind(kind)
    _gather()
    return tuple(sorted(_registered[kind].values(), key=lambda found: found.id))


def entry(kind: Kind, id: str) -> Entry:
    """One entry. Raises `InputError` for an unknown kind or id, `Refusal` if another package's entries do not load."""
    known = {found.id: found for found in entries(kind)}
    if id not in known:
        raise InputError(f"no {_SINGULAR[kind]} {id!r}; {_nearest(id, tuple(known), kind)}")
    return known[id]


_SINGULAR = {
    "methods": "method",
    "probes": "probe",
    "models": "model",
    "edits": "edit",
    "interventions": "intervention",
    "benches": "bench",
}
_lock = RLock()
_registered: dict[Kind, dict[str, Entry]] = {kind: {} for kind in KINDS}
_gathered = False


def _gather() -> None:
    global _gathered
    with _lock:
        if _gathered:
            return
        for room in ROOMS:
            importlib.import_module(room)
        for point in entry_points(group=ENTRY_POINTS):
            try:
                point.load()
            except Exception as error:
                raise Refusal(
                    f"the catalogue entries of {_owner(point.dist)} ({point.name} = {point.value}) do not load: "
                    f"{type(error).__name__}: {error}; repair or uninstall that package"
                ) from error
        _gathered = True


def _owner(distribution: object) -> str:
    return f"package {getattr(distribution, 'name', None) or 'unknown'!r}"


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}; {_nearest(kind, KINDS, 'kinds')}")


def _nearest(wanted: str, known: tuple[str, ...], kind: str) -> str:
    if not known:
        return f"this installation has no {kind} yet"
    close = get_close_matches(wanted, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"choose one of: {shown}"
