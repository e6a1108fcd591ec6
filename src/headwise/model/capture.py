"""What a reading brings back: values by site, joined over the forwards of a run, and gradients beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.errors import InputError, NotFired, Refusal
from headwise.heads import Head, KVGroup, SiteId
from headwise.model.operations import Here
from headwise.model.read import BLOCK_VARIABLES, GROUP_VARIABLES, ROW_VARIABLES, Read

# Where a value stands in a run: forward of the run, pass of the tower within it (a vision tower may run once per
# image), call within the pass (a module may split its sequence). A recomputed call overwrites its first value.
Moment = tuple[int, int, int]


@dataclass(eq=False)
class Piece:
    """One call's value. `start` is the column of its first position, where positions can be told."""

    value: Any
    start: int = 0
    grad: Any = None


class Captured(Mapping[str, Any]):
    """Values of one read, by site label (`got.z["L4"]`) or head label (`got.z["L4H0"]`).

    The forwards of one run (prefill and decode steps) are joined along the position or query axis; rows of different
    length are padded with 0 (scores with -inf) on the key axis. Those of a denoising loop lie along a first axis, one
    entry per call. With `reduce` the entry is the list of what it returned, one per call. `pieces(label)` gives the
    calls one by one. Only the latest run (or loop) is kept.
    """

    def __init__(self, read: Read, heads: Mapping[SiteId, tuple[int, ...]]) -> None:
        self.read = read
        self.variable = read.variable
        self._heads = dict(heads)
        self._pieces: dict[SiteId, dict[Moment, Piece]] = {}
        self._of_gradients = False
        self.looped = False

    @property
    def grad(self) -> Captured:
        """The gradients, under the same labels, once `backward()` ran."""
        view = Captured(self.read, self._heads)
        view._of_gradients = True
        view.looped = self.looped
        view._pieces = self._pieces
        return view

    def pieces(self, label: str | SiteId) -> list[Any]:
        """Each call's value (or gradient) in order, unjoined."""
        return [value for _, value in self._values(SiteId.parse(label))]

    def heads_at(self, site: SiteId) -> tuple[int, ...]:
        """Which heads (or groups) of a site the head axis holds, in order."""
        return self._heads[site]

    def put(self, site: SiteId, moment: Moment, value: Any, start: int = 0) -> Piece:
        piece = self._pieces.setdefault(site, {})[moment] = Piece(value, start)
        return piece

    def piece(self, site: SiteId, moment: Moment) -> Piece:
        """The piece at a moment, made if a gradient comes where no value was kept."""
        return self._pieces.setdefault(site, {}).setdefault(moment, Piece(None))

    def clear(self) -> None:
        self._pieces.clear()

    def donate(self, here: Here) -> Tensor:
        """The donor's values for the columns and heads that `here` stands on (the `Donor` protocol).

        Raises:
            InputError: the donor holds other heads, another number of rows, or fewer positions than are edited.
            Refusal: keys that no columns tell apart, under a cache.
        """
        if self.read.queries is not None or self.read.reduce is not None:
            raise InputError(
                f"{here.label}: the donor was read with queries= or reduce=, and then its values do not say which "
                "positions they are of; read it without, and choose positions with the edit's scope="
            )
        if here.site not in self._heads or not set(here.heads) <= set(self._heads[here.site]):
            raise InputError(f"the donor run holds no {self.variable} of {', '.join(here.names)}; read it there first")
        values = self._of_same_call(here) if self.looped else self._of_same_chunk(here)
        axis = 2 if self.variable in ROW_VARIABLES else 1
        if values.dim() == 3:  # mlp and residual have no head axis
            values = values[:, :, None]
        picks = [self._heads[here.site].index(head) for head in here.heads] if values.shape[3 - axis] > 1 else [0]
        values = values.index_select(3 - axis, torch.tensor(picks, device=values.device))
        first = min(piece.start for piece in self._pieces[here.site].values())
        if here.window is not None and here.window.joined and self.variable in GROUP_VARIABLES | ROW_VARIABLES:
            n_keys = values.shape[-1 if self.variable in ROW_VARIABLES else axis]
            if here.window.frame.past or n_keys != here.window.n_keys:
                raise Refusal(
                    f"{here.label}: its keys are not those of its own tokens alone, so under a cache or at another "
                    f"length a donor's {self.variable} cannot be lined up with them; patch z instead"
                )
        start = 0 if here.window is None else (here.window.offset if self.variable in "kv" else here.window.start)
        if here.window is None and values.shape[axis] != here.span:
            raise InputError(f"{here.label}: the donor has {values.shape[axis]} positions, the run has {here.span}")
        steps = torch.arange(here.span) if here.queries is None else here.queries
        columns = (start - first + steps).to(values.device).expand(here.batch, -1)
        missing = (columns < 0) | (columns >= values.shape[axis])
        if bool((missing if here.chosen is None else missing & here.chosen.to(missing.device)).any()):
            raise InputError(
                f"{here.label}: the donor run holds columns {first} to {first + values.shape[axis] - 1}, and the edit "
                f"reaches beyond them; narrow it with scope= (for example scope='prompt') or read a longer run"
            )
        if here.visible is not None:  # rows: the key axis as long as this run's
            values = values[..., 0 if here.window is None else here.window.offset :]
            values = torch.nn.functional.pad(values, (0, here.visible.shape[-1] - values.shape[-1]))
        items = int(here.items[-1]) + 1
        if len(values) not in (1, items):
            raise InputError(f"{here.label}: the donor run has {len(values)} rows, this one has {items}")
        values = (
            values[here.items.to(values.device)] if len(values) > 1 else values.expand(here.batch, *values.shape[1:])
        )
        rows = torch.arange(len(values), device=values.device)[:, None]
        columns = columns.clamp(0, values.shape[axis] - 1)
        return values[rows, columns] if axis == 1 else values.transpose(1, 2)[rows, columns].transpose(1, 2)

    def __getitem__(self, label: str | SiteId) -> Any:
        if isinstance(label, str) and label not in self._labels:
            return self._one_head(self._member(label))
        site = SiteId.parse(label)
        if site not in self._heads:
            raise self._unread(site.label)
        values = self._values(site)
        if not values:
            raise NotFired(f"{site.label} has no {self.variable} {self._why_empty}")
        if self.read.reduce is not None and not self._of_gradients:
            return [value for _, value in values]
        return _join(values, self.variable, site.label, looped=self.looped)

    def _of_same_chunk(self, here: Here) -> Tensor:
        """What was read of the same piece, where positions cannot be told and the module splits its sequence."""
        values = self._values(here.site)
        pieces = [(moment, value) for moment, value in values if moment[2] == here.chunk]
        whole: Tensor = self[here.site.label]
        if here.window is not None or len(pieces) == len(values):
            return whole
        if not pieces:
            raise InputError(
                f"{here.label}: the donor run has fewer pieces than this one, which is at number {here.chunk}"
            )
        joined: Tensor = _join(pieces, self.variable, here.label)
        return joined

    def _of_same_call(self, here: Here) -> Tensor:
        """What was read in a denoising loop, of the call that is as many into its loop as this one."""
        if here.step is None:
            raise InputError(
                f"{here.label}: the donor was read in a denoising loop and has a value for every call; open "
                "model.denoising() around this run, too, or take one call's value with .pieces(label)"
            )
        values = [(moment, value) for moment, value in self._values(here.site) if moment[0] == here.forward]
        if not values:
            raise InputError(f"{here.label}: the donor's loop holds no value of call {here.forward}, counted from 0")
        joined: Tensor = _join(values, self.variable, here.label)
        return joined

    @property
    def _labels(self) -> list[str]:
        return [site.label for site in self._heads]

    @property
    def _why_empty(self) -> str:
        if self._of_gradients:
            return "gradient (call backward() first)"
        if self.variable == "gate":
            return "value: it is a gradient, found under .grad"
        return "value: nothing has run yet, or the run held none of its positions"

    def _member(self, label: str) -> Head | KVGroup:
        """The head (or group, for keys and values) of a label; raises KeyError unless it was read."""
        if self.variable not in (*BLOCK_VARIABLES, "final_scale") and self.read.reduce is None:
            try:
                member = KVGroup.parse(label) if self.variable in GROUP_VARIABLES else Head.parse(label)
            except InputError:
                raise self._unread(label) from None
            if member.index in self._heads.get(member.site, ()):
                return member
        raise self._unread(label)

    def _unread(self, label: str) -> KeyError:
        return KeyError(f"{label!r} was not read as {self.variable}; there is {', '.join(self._labels) or 'nothing'}")

    def _one_head(self, member: Head | KVGroup) -> Any:
        joined = self[member.site.label]
        place = self._heads[member.site].index(member.index)
        if not isinstance(joined, Tensor):
            return _merged([joined], lambda tensors: tensors[0].select(1 + self.looped, place))
        axis = (1 if self.variable in ROW_VARIABLES else 2) + self.looped
        return joined.select(axis, place if joined.shape[axis] > 1 else 0)  # a write's gradient is one for all heads

    def _values(self, site: SiteId) -> list[tuple[Moment, Any]]:
        pieces = sorted(self._pieces.get(site, {}).items())
        chosen = [(moment, piece.grad if self._of_gradients else piece.value) for moment, piece in pieces]
        return [(moment, value) for moment, value in chosen if value is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._heads)

    def __repr__(self) -> str:
        return f"<{self.variable} of {', '.join(self._labels[:4])}{' ...' if len(self) > 4 else ''}>"


def _join(values: list[tuple[Moment, Any]], variable: str, label: str, *, looped: bool = False) -> Any:
    """Pieces of one site in one tensor: calls and forwards along positions, passes of a tower along the batch.

    The forwards of a denoising loop (`looped`) are along a first axis of their own.
    """
    forwards: dict[int, dict[int, list[Any]]] = {}
    for (forward, tower_pass, _), value in values:
        forwards.setdefault(forward, {}).setdefault(tower_pass, []).append(value)
    try:
        joined = [_stack([_along(calls, variable) for calls in passes.values()]) for passes in forwards.values()]
        return _one_after_another(joined) if looped else _along(joined, variable)
    except RuntimeError as error:
        raise InputError(
            f"the {variable} of {label} has pieces of different shape in this run ({error}); use .pieces({label!r})"
        ) from error


def _along(values: list[Any], variable: str) -> Any:
    if len(values) == 1:
        return values[0]
    if not isinstance(values[0], Tensor):
        return _merged(values, lambda tensors: torch.cat(tensors, dim=2))
    if variable not in ROW_VARIABLES:
        return torch.cat(values, dim=1)
    width, blank = max(value.shape[-1] for value in values), float("-inf") if variable == "scores" else 0.0
    padded = [torch.nn.functional.pad(value, (0, width - value.shape[-1]), value=blank) for value in values]
    return torch.cat(padded, dim=2)


def _one_after_another(values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return _merged(values, torch.stack)
    return torch.stack(values)


def _stack(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if not isinstance(values[0], Tensor):
        return _merged(values, lambda tensors: torch.cat(tensors, dim=0))
    return torch.cat(values, dim=0)


def _merged(values: list[Any], join: Any) -> Any:
    """Join frozen dataclasses of tensors (row statistics) field by field."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(values[0]):
        held = [getattr(value, entry.name) for value in values]
        if isinstance(held[0], Tensor):
            changes[entry.name] = join(held)
        elif isinstance(held[0], Mapping):
            changes[entry.name] = {name: join([part[name] for part in held]) for name in held[0]}
    return dataclasses.replace(values[0], **changes)


@dataclass(frozen=True, slots=True)
class Fired:
    """How often a read or edit met a site in the latest run, and at how many positions (rows counted)."""

    what: str
    site: str
    calls: int
    positions: int


@dataclass(eq=False)
class Opened:
    """The handle of an open plan: what was read, by name (`got.z`), and in `fired` what met what."""

    captures: dict[str, Captured] = field(default_factory=dict)
    fired: tuple[Fired, ...] = ()

    def __getattr__(self, name: str) -> Captured:
        captures: dict[str, Captured] = self.__dict__.get("captures", {})
        if name in captures:
            return captures[name]
        raise AttributeError(f"nothing named {name!r} was asked for; there is {', '.join(captures) or 'nothing'}")
