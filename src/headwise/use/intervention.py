"""What an intervention is: a published way of using heads, as a value that can be opened, combined and saved.

    steered = HeadScaling("L2H1, L3H4", 2.0)
    with steered(model):
        model.generate(**inputs)

An intervention knows nothing of any model until it is opened on one; it says then which edits it makes, and whether a
second stream runs beside the first one. Blocks nest, and `Together` keeps several as one.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from headwise.catalogue import InterventionEntry, entry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.model.capture import Opened
from headwise.model.edit import Edit
from headwise.model.positions import SpanRows
from headwise.model.weights import replaced

Spans = Mapping[str, SpanRows]
Combine = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Beside:
    """A second stream that runs beside the edited one.

    Attributes:
        edits: what is changed in the second stream alone.
        combine: makes the logits that the run returns of both streams' logits `[batch, position, vocab]`; None leaves
            the first stream's.
        mode: `batch`, one forward of twice the rows, or `caches`, a forward and a cache for each stream.
        without: a span of the prompt that the second stream does not have.
    """

    edits: tuple[Edit, ...] = ()
    combine: Combine | None = None
    mode: str = "batch"
    without: str | None = None

    def open(self, model: AttachedModel, given: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """The block in which both run; `given` are the options of `model.editing`."""
        return model.dual(*self.edits, combine=self.combine, mode=self.mode, without=self.without, **given)


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """Base of the interventions: frozen dataclasses, whose fields are all that is saved of them.

    A subclass says in `edits` what it changes, in `beside` whether a second stream runs, and in `weights` which
    parameters are others. Fields may be numbers,
    words, None, tuples of these, a `HeadSet`, tensors, mappings from head label to number or tensor, and interventions.
    Settings that change nothing make no edit, so that the model's own bits stay.
    """

    id: ClassVar[str]
    """Its name in the catalogue."""

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        """What it changes in `model`; nothing runs here.

        Raises:
            InputError: heads that the model does not have, values of another shape.
            Refusal: what this model cannot serve.
        """
        return ()

    def beside(self, model: AttachedModel) -> Beside | None:
        """The second stream, if there is one. Raises as `edits` does."""
        return None

    def weights(self, model: AttachedModel) -> Mapping[str, Tensor]:
        """Tensors that stand in the place of the model's parameters while it is open, by qualified name. Raises as
        `edits` does."""
        return {}

    def __call__(
        self,
        model: AttachedModel,
        *,
        spans: Spans | None = None,
        prompt_length: int | None = None,
        strict: bool = False,
    ) -> AbstractContextManager[Opened]:
        """Carry it out in every run inside the block: `with intervention(model): model.generate(...)`.

        Args:
            spans, prompt_length, strict: as in `model.editing`.

        Raises:
            InputError, Refusal: it does not fit this model; nothing has run.
            NotFired, PlanConflict: as `model.editing`.
        """
        if not isinstance(model, AttachedModel):
            raise InputError(f"{self.id} works on an attached model (hw.load, hw.attach), not a {type(model).__name__}")
        return self._opened(model, {"spans": spans, "prompt_length": prompt_length, "strict": strict})

    @contextmanager
    def _opened(self, model: AttachedModel, given: dict[str, Any]) -> Iterator[Opened]:
        edits, beside, weights = self.edits(model), self.beside(model), self.weights(model)
        with ExitStack() as blocks:
            opened = Opened()
            if weights:
                blocks.enter_context(replaced(model, weights))
            if beside is not None:
                blocks.enter_context(beside.open(model, given))
            if edits:
                opened = blocks.enter_context(model.editing(*edits, **given))
            yield opened

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def but(self, **changed: Any) -> Self:
        """The same with other settings. Raises InputError for a setting that it does not have."""
        unknown = sorted(changed.keys() - self.settings.keys())
        if unknown:
            raise InputError(f"{self.id} has no setting {unknown[0]!r}; it has {', '.join(self.settings)}")
        return replace(self, **changed)

    @property
    def acts_on(self) -> HeadSet:
        """All heads (or KV groups) that its fields name, in sets or as labels; empty where they name none."""
        return HeadSet.parse([*_named_in(tuple(self.settings.values()))])

    @property
    def named_spans(self) -> tuple[str, ...]:
        """Passages of the prompt that its fields name; where they stand is said with the block, as `spans=`."""
        return tuple(dict.fromkeys(_spans_in(tuple(self.settings.values()))))

    def on(self, heads: Any) -> Self:
        """The same on as many other heads, what belongs to a head included: numbers and vectors by label go along.

        Old and new heads are paired in their order, so within each layer where as many are in the same layers.

        Raises:
            InputError: another number of heads; it names none; settings that do not fit the new heads.
        """
        own = self.acts_on
        new = HeadSet.parse(heads, own.kind if not isinstance(heads, HeadSet) and own else None)
        if not own or len(own) != len(new) or own.kind != new.kind:
            raise InputError(f"{self.id} acts on {len(own)} {own.kind}s, so on() takes as many; it was given {new!r}")
        return self._renamed(dict(zip(own, new, strict=True)))

    def _renamed(self, to: Mapping[Any, Any]) -> Self:
        return replace(self, **{name: _renamed(value, to) for name, value in self.settings.items()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in self.settings.items())})"


@dataclass(frozen=True, eq=False, repr=False)
class Together(Intervention):
    """Several interventions as one, in the order given.

    Where one of them has a second stream, the others act in both streams: what is contrasted is the steered model with
    the steered model that lacks something. That is more than nested blocks do, whose edits are of the first stream
    alone. Raises InputError for none, and Refusal for two that each have a second stream.
    """

    id: ClassVar[str] = "together"
    parts: tuple[Intervention, ...] = field(default=())

    def __post_init__(self) -> None:
        parts = tuple(self.parts) if isinstance(self.parts, (tuple, list)) else ()
        if not parts or not all(isinstance(each, Intervention) for each in parts):
            raise InputError(f"Together takes interventions in a tuple, one or more, not {self.parts!r}")
        object.__setattr__(self, "parts", parts)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        return tuple(edit for part in self.parts for edit in part.edits(model))

    def beside(self, model: AttachedModel) -> Beside | None:
        flat = self._flat
        seconds = [(part, found) for part in flat if (found := part.beside(model)) is not None]
        if len(seconds) > 1:
            names = " and ".join(part.id for part, _ in seconds)
            raise Refusal(f"{names} each need a second stream, and a run has one; use one of them")
        if not seconds:
            return None
        owner, found = seconds[0]
        shared = [edit for part in flat if part is not owner for edit in part.edits(model)]
        return replace(found, edits=(*shared, *found.edits))

    @property
    def _flat(self) -> tuple[Intervention, ...]:
        """Parts that are no `Together`: whatever they are put together in, their order is one."""
        return tuple(each for part in self.parts for each in (part._flat if isinstance(part, Together) else (part,)))

    def weights(self, model: AttachedModel) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            own = part.weights(model)
            if twice := sorted(own.keys() & found.keys()):
                raise Refusal(f"{part.id} and another part both change {twice[0]}; merge one of them into the model")
            found |= own
        return found


def intervention(id: str) -> type[Intervention]:
    """The class of that id. Raises `InputError`, with the nearest ids."""
    found = entry("interventions", id)
    assert isinstance(found, InterventionEntry)
    assert issubclass(found.made, Intervention)
    return found.made


def named_heads(form: Any, what: str) -> HeadSet:
    """A set of heads in any form that `HeadSet.parse` reads, as a field of an intervention.

    Raises:
        InputError: no heads, KV groups, or what cannot be read.
    """
    heads = HeadSet.parse(form, "head" if not isinstance(form, HeadSet) else None)
    if not heads:
        raise InputError(f"{what} was given no heads; name at least one, such as 'L4H0'")
    if heads.kind != "head":
        raise InputError(f"{what} acts on heads, and {heads} are KV groups; use to_heads")
    return heads


def finite(value: Any, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, both included. Raises InputError for anything else, "2" and True too."""
    try:
        number = None if isinstance(value, (bool, np.bool_, str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None:
        raise InputError(f"{what}={value!r} is not a number")
    if not (math.isfinite(number) and low <= number <= high):
        raise InputError(f"{what}={value!r} is out of range; give a number {_range(low, high)}")
    return number


def _named_in(value: Any) -> Iterator[Any]:
    if isinstance(value, HeadSet):
        yield from value
    elif isinstance(value, Intervention):
        yield from value.acts_on
    elif isinstance(value, tuple):
        yield from (member for each in value for member in _named_in(each))
    elif isinstance(value, Mapping) and all(_labelled(key) is not None for key in value):
        yield from map(_labelled, value)


def _spans_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith("span:"):
        yield value.removeprefix("span:")
    elif isinstance(value, Intervention):
        yield from value.named_spans
    elif isinstance(value, tuple):
        yield from (name for each in value for name in _spans_in(each))


def _renamed(value: Any, to: Mapping[Any, Any]) -> Any:
    """The value with every head that it names put for another."""
    if isinstance(value, HeadSet):
        return HeadSet(tuple(to[each] for each in value), value.kind)
    if isinstance(value, Intervention):
        return value._renamed(to)
    if isinstance(value, tuple):
        return tuple(_renamed(each, to) for each in value)
    if isinstance(value, Mapping) and all(_labelled(key) is not None for key in value):
        return {to[_labelled(key)].label: entry for key, entry in value.items()}
    return value


def _labelled(key: Any) -> Any:
    """The head or group that a key of a mapping is the label of, or None."""
    try:
        members = HeadSet.parse(key).members if isinstance(key, str) else ()
    except InputError:
        return None
    return members[0] if len(members) == 1 else None


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return "that is finite" if math.isinf(high) else f"up to {high:g}"
    return f"from {low:g} on" if math.isinf(high) else f"from {low:g} to {high:g}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, Mapping):
        shown = ", ".join(f"{key!r}: {_short(entry)}" for key, entry in value.items())
        return f"{{{shown}}}" if len(value) <= 3 else f"<{len(value)} entries>"
    return repr(value)


__all__ = ["Beside", "Combine", "Intervention", "Spans", "Together", "finite", "intervention", "named_heads"]
