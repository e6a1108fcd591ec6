"""The operations edits are made of: functions from the current tensor to the edited one.

An operation sees only the selected heads, in one of two layouts: values `[batch, position, head, dim]` (q, k, v, z, and
with one "head" mlp and residual) or rows `[batch, head, query, key]` (score, pattern). Which positions and rows of the
batch keep the result, and at what strength, is decided outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.model.attention.rows import uniform_pattern
from headwise.model.positions import Positions, Window

VALUE_VARIABLES = frozenset({"q", "k", "v", "z", "mlp", "residual_pre", "residual_post"})
ROW_VARIABLES = frozenset({"score", "pattern"})
Layout = Literal["values", "rows"]


@runtime_checkable
class Donor(Protocol):
    """What a reading captured, as a source of values."""

    def donate(self, here: Here) -> Tensor: ...


class ReferenceValues(Protocol):
    """z of a reference set of items, at their attended positions."""

    def mean(self, site: SiteId) -> Float[Tensor, "head head_dim"]: ...

    def draw(
        self, site: SiteId, rows: Int[Tensor, " batch"], columns: Int[Tensor, " position"], seed: int
    ) -> Float[Tensor, "batch position head head_dim"]: ...


Value = Any  # float | Tensor | Mapping[label, float | Tensor] | Callable[[Tensor, Here], Tensor] | Donor | OTHER


class _Other:
    def __repr__(self) -> str:
        return "OTHER"


OTHER = _Other()
"""As a value: the same variable of the same heads in the second stream of a dual run."""


@dataclass(frozen=True, slots=True)
class Received:
    """Keys that the tokens of the prompt attend to by more than a share of their attention, head by head.

    A key's share is the mean of its weight over the prompt's tokens that see it, as the edits before this one left the
    rows. It is counted once, when the prompt runs; decoding steps have the prompt's keys.

    Attributes:
        above: the share.
        skip: how many such keys are left alone, counted from the left.

    Raises InputError for a share that is none.
    """

    above: float = 0.1
    skip: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.above, Real) and 0 <= self.above < 1):
            raise InputError(f"above={self.above!r} is not a share of attention; give a number from 0 up to 1")
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise InputError(f"skip={self.skip!r} is not a number of keys; give 0 or more")


@dataclass(frozen=True, slots=True)
class LastRow(Received):
    """Keys that a function chooses by the row of the prompt's last token, once: `hw.edit.last_row`.

    Attributes:
        choose: takes that row `[batch, head, key]`, as the edits before this one left it, and `Here`; gives True at the
            keys chosen.
    """

    choose: Callable[[Tensor, Here], Tensor] = field(kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class Decided:
    """A number for each row and head that the prompt decides, once: `hw.edit.decided`.

    Attributes:
        choose: takes z of the edited heads at the prompt's last token `[batch, head, dim]`, the same in a run of the
            prompt without the span, and `Here`; gives `[batch, head]`.
        without: the span.
        markers: ids that are left out with the span where they stand next to it.
    """

    choose: Callable[[Tensor, Tensor, Here], Tensor]
    without: str
    markers: tuple[int, ...] = ()

    @property
    def run(self) -> tuple[str, tuple[int, ...]]:
        """What tells the run that it needs from those of others."""
        return self.without, self.markers

    def __repr__(self) -> str:
        return f"decided without {self.without!r}"


@dataclass(frozen=True, eq=False)
class Here:
    """Where an operation stands: one call of one site, and what it may look at there.

    Its tensors are not to be written into: other layers see the same ones.

    Attributes:
        site, label: the site (or, for mlp and residual, the block).
        heads: indices of the selected heads in the site; `names`: their labels; `slots`: their places in the whole
            head set of the edit, which has `count` heads.
        layout: `values` or `rows`.
        window: which columns this call sees; None where positions cannot be told.
        items: `[batch]` row of the batch, before beams, that each row of this call belongs to.
        batch, span: rows in this call, and positions (values) or queries (rows) of the current tensor.
        chosen: `[batch, position]` positions where the result will be kept; None is all.
        keys: `[batch, key]` key columns chosen, `[batch, head, key]` where they differ by head; None is all.
        visible: `[batch, head, query, key]`, for rows; `queries`: which of the call's queries the rows are.
        forward: which forward of the run, or of the denoising loop; `step`: which step of the loop, None outside one.
        chunk: which piece of its sequence this call is, where the module splits it.
        other: gives the second stream's tensor for the current one, to the first stream of a dual run.
        decided: gives the numbers of a `Decided`, `[batch, 1, head, 1]`.
    """

    site: SiteId
    label: str
    heads: tuple[int, ...]
    names: tuple[str, ...]
    slots: tuple[int, ...]
    count: int
    layout: Layout
    window: Window | None
    items: Int[Tensor, " batch"]
    batch: int
    span: int
    chosen: Bool[Tensor, "batch position"] | None = None
    keys: Bool[Tensor, "batch *head key"] | None = None
    visible: Bool[Tensor, "batch head query key"] | None = None
    forward: int = 0
    step: int | None = None
    chunk: int = 0
    queries: Int[Tensor, "*batch query"] | None = None
    other: Callable[[], Tensor] | None = None
    decided: Callable[[Decided, Tensor], Tensor] | None = None

    @property
    def marked(self) -> Bool[Tensor, "#batch #head 1 key"] | None:
        """`keys` in a form that broadcasts against rows."""
        if self.keys is None:
            return None
        return self.keys[:, None, None] if self.keys.dim() == 2 else self.keys[:, :, None]

    def pick(self, value: Value, current: Tensor) -> Tensor | float:
        """A value in a form that broadcasts against `current`.

        Raises:
            InputError: a tensor that cannot take that form; OTHER outside a dual run.
        """
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, _Other):
            if self.other is None:
                raise InputError(f"{self.label}: OTHER names the second stream, and this is not a dual run")
            return self.other()
        if isinstance(value, Decided):
            assert self.decided is not None
            return self.decided(value, current)
        if isinstance(value, Donor):
            given: Tensor = value.donate(self).to(current)
            return given
        if isinstance(value, Mapping):
            value = torch.stack([torch.as_tensor(value[name]) for name in self.names])
        elif isinstance(value, Tensor):
            if value.dim() and value.shape[0] == self.count and (value.dim() > 1 or self.count > 1 or len(value) == 1):
                value = value[list(self.slots)]
        else:
            made = value(current, self)
            if not isinstance(made, (Tensor, Real)):
                raise InputError(
                    f"{self.label}: the value's function gave a {type(made).__name__}; expected a tensor or a number"
                )
            return self._fitting(torch.as_tensor(made), current)
        if value.dim() == 1 and len(value) == len(self.slots):
            value = value.reshape(-1, 1, 1) if self.layout == "rows" else value.reshape(-1, 1)
        return self._fitting(value, current)

    def _fitting(self, value: Tensor, current: Tensor) -> Tensor:
        try:
            value.expand_as(current)
        except RuntimeError:
            raise InputError(
                f"{self.label}: the value has shape {list(value.shape)}; "
                f"expected one that broadcasts to {list(current.shape)}"
            ) from None
        return value.to(current)


def check_value(value: Value, names: Collection[str], dims: Collection[int], layout: Layout, what: str) -> None:
    """Refuse a value whose shape cannot be meant, before anything runs.

    Raises:
        InputError: a tensor that is neither a scalar nor `[n_heads]` nor `[n_heads, dim]`; a mapping without a head;
            what is none of the forms that a value takes.
    """
    if isinstance(value, (Real, _Other, Decided, Donor)):
        return
    if isinstance(value, Mapping):
        unknown = sorted(str(name) for name in value.keys() - set(names))
        if unknown:
            raise InputError(f"{what}: the mapping has an entry for {unknown[0]}, which is not among the heads edited")
        missing = sorted(set(names) - value.keys())
        if missing:
            raise InputError(f"{what}: the mapping has no entry for {missing[0]}; it needs one per head")
        shapes = {tuple(torch.as_tensor(value[name]).shape) for name in names}
        allowed = {()} if layout == "rows" else {(), *((dim,) for dim in dims)}
        if len(shapes) != 1 or not shapes <= allowed:
            raise InputError(f"{what}: entries have shapes {sorted(shapes)}; expected one of {sorted(allowed)} for all")
    elif isinstance(value, Tensor):
        n, shape = len(names), tuple(value.shape)
        allowed = {(), (n,)} if layout == "rows" else {(), (n,), *((n, dim) for dim in dims)}
        if n == 1 and layout == "values":
            allowed |= {(dim,) for dim in dims}
        if shape not in allowed or (len(shape) == 2 and len(set(dims)) > 1):
            raise InputError(
                f"{what}: the tensor has shape {list(shape)}; expected one of {sorted(map(list, allowed))}"
            )
    elif not callable(value):
        raise InputError(
            f"{what}: {value!r} is not a value; pass a number, a tensor, a mapping from head labels, a function, or "
            "what a reading captured"
        )


class Operation(ABC):
    """Base of the operations; frozen, so that a plan can share them between runs."""

    variables: ClassVar[frozenset[str]] = VALUE_VARIABLES | ROW_VARIABLES
    chooses_keys: ClassVar[bool] = False  # the operation itself looks at `here.keys`; its result holds for whole rows

    def serves(self, variable: str) -> bool:
        return variable in self.variables

    @property
    def values(self) -> tuple[Value, ...]:
        """The values whose shapes are checked when a plan opens."""
        return ()

    @abstractmethod
    def __call__(self, current: Tensor, here: Here) -> Tensor | float:
        """The edited tensor, or what broadcasts to it."""


@dataclass(frozen=True, eq=False)
class Set(Operation):
    value: Value

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.value,)

    def __call__(self, current: Tensor, here: Here) -> Tensor | float:
        return here.pick(self.value, current)


@dataclass(frozen=True, eq=False)
class Scale(Operation):
    factor: Value

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.factor,)

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        return current * here.pick(self.factor, current)


@dataclass(frozen=True, eq=False)
class Add(Operation):
    value: Value

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.value,)

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        return current + here.pick(self.value, current)


@dataclass(frozen=True, eq=False)
class Mix(Operation):
    value: Value
    weight: Value

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.value, self.weight)

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        weight = here.pick(self.weight, current)
        return (1 - weight) * current + weight * here.pick(self.value, current)


@dataclass(frozen=True, eq=False)
class Mean(Operation):
    variables: ClassVar[frozenset[str]] = frozenset({"z"})
    reference: ReferenceValues

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        return self.reference.mean(here.site)[list(here.heads)].to(current)


@dataclass(frozen=True, eq=False)
class Resample(Operation):
    variables: ClassVar[frozenset[str]] = frozenset({"z"})
    reference: ReferenceValues
    seed: int

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        start = 0 if here.window is None else here.window.start
        columns = torch.arange(start, start + current.shape[1])
        return self.reference.draw(here.site, here.items, columns, self.seed)[:, :, list(here.heads)].to(current)


@dataclass(frozen=True, eq=False)
class Uniform(Operation):
    variables: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        assert here.visible is not None
        return uniform_pattern(here.visible, current.dtype)


@dataclass(frozen=True, eq=False)
class Reweight(Operation):
    variables: ClassVar[frozenset[str]] = frozenset({"pattern"})
    chooses_keys: ClassVar[bool] = True
    factor: Value

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.factor,)

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        factor = here.pick(self.factor, current)
        scaled = current * factor
        if here.marked is not None:
            scaled = torch.where(here.marked, scaled, current)
        total = scaled.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, scaled * (current.sum(dim=-1, keepdim=True) / total.clamp(min=1e-38)), scaled)


@dataclass(frozen=True, eq=False)
class Redistribute(Operation):
    """The share of the mass on `keys` goes to `to` in proportion to what is there; rows keep their sums."""

    variables: ClassVar[frozenset[str]] = frozenset({"pattern"})
    chooses_keys: ClassVar[bool] = True
    share: Value
    to: Positions

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.share,)

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        given = here.marked
        assert given is not None
        taking = ~given
        if self.to is not None:
            if here.window is None:
                raise InputError(f"{here.label}: positions cannot be told here, so to= cannot be honoured")
            chosen = here.window.keys(here.window.key_frame.select(self.to))
            assert chosen is not None
            taking = taking & chosen[:, None, None, :]
        share = here.pick(self.share, current)
        moved = torch.where(given, current * share, torch.zeros_like(current)).sum(dim=-1, keepdim=True)
        there = torch.where(taking, current, torch.zeros_like(current))
        total = there.sum(dim=-1, keepdim=True)
        edited = torch.where(given, current * (1 - share), current) + there * (moved / total.clamp(min=1e-38))
        return torch.where(total > 0, edited, current)  # nowhere to put it: the row stays
