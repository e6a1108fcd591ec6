"""Edits and reads of tensors laid out as `[batch, position, head, dim]`: q, k, v, z, mlp, residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.heads import SiteId
from headwise.model.capture import Moment
from headwise.model.edit import Edit
from headwise.model.operations import Here, Layout
from headwise.model.positions import Window, locate_queries
from headwise.model.running.affine import affinely
from headwise.model.running.decided import decide, kept_factors
from headwise.model.running.plan import Placed
from headwise.model.running.run import Place, Run, Stream
from headwise.model.site import Site

Values = Float[Tensor, "batch position head dim"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One call of one site, as edits and reads see it. `label` is the block's where a block is meant.

    A call whose rows are those of two streams (`shared`) is taken apart, so that edits and reads only ever see the rows
    of one, as if it ran alone. The second stream's part comes first: the first one may ask for it.
    """

    site: Site
    run: Run
    window: Window | None
    batch: int
    device: torch.device
    label: SiteId | None = None
    chunk: int = 0
    half: Stream | None = None

    @property
    def shared(self) -> bool:
        return self.stream == "both"

    @property
    def stream(self) -> Stream | None:
        """Whose rows these are in a dual run; None in any other."""
        return self.half or self.run.stream

    def of(self, stream: Stream) -> Stage:
        return replace(self, batch=self.batch // 2, half=stream)

    @property
    def moment(self) -> Moment:
        return self.run.moment(self.site, self.chunk)

    @property
    def id(self) -> SiteId:
        return self.label or self.site.id

    def place(self, edit: Edit) -> Place:
        """What the value that an edit works on is filed under, so that the other stream finds the same one."""
        return self.id, edit.variable, edit.point, self.moment


def edited(x: Values, listed: Sequence[Placed], stage: Stage, *, keys: bool = False) -> Values:
    """`x` after the edits, in order; the very same tensor where none applies."""
    if stage.shared and listed:
        first, second = halves(x, stage)
        second = edited(second, listed, stage.of("second"), keys=keys)
        return torch.cat([edited(first, listed, stage.of("first"), keys=keys), second])
    for placed in of_stream(listed, stage):
        if (at_once := affinely(placed, x)) is not None:
            x = at_once(x)
            placed.met(x.shape[0] * x.shape[1])
            continue
        if (factors := kept_factors(placed, x, stage)) is not None:
            x = x * factors
            placed.met(x.shape[0] * x.shape[1])
            continue
        chosen = positions_of(placed, stage, keys=keys)
        if chosen is not None and not bool(chosen.any()):
            placed.met(0)
            continue
        current = x if placed.heads == tuple(range(x.shape[2])) else x[:, :, list(placed.heads)]
        here = here_of(placed, stage, "values", x.shape[1], chosen=chosen)
        result = blended(placed, placed.edit.operation(current, here), current, here)
        if chosen is not None:
            result = torch.where(chosen[:, :, None, None], result, current)
        if current is x:
            x = result
        else:
            x = x.index_copy(2, torch.tensor(placed.heads, device=x.device), result)
        placed.met(x.shape[0] * x.shape[1] if chosen is None else chosen.expand(x.shape[:2]).sum())
    if stage.stream == "second":
        for placed in listed:
            stage.run.exchange.keep(stage.place(placed.edit), lambda heads, queries: x[:, :, list(heads)])
    return x


def of_stream(listed: Sequence[Placed], stage: Stage) -> list[Placed]:
    """The edits that are for the stage's stream.

    Raises:
        Refusal: a module that runs before the streams part, such as an encoder in `generate`.
    """
    if listed and stage.stream == "unparted":
        raise Refusal(
            f"{stage.id.label} runs before the two streams of the dual run part (generate() encodes once for both); "
            "leave its edits out"
        )
    return [placed for placed in listed if stage.stream in (None, placed.edit.stream)]


def halves(x: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """The first and the second stream's rows.

    Raises:
        Refusal: the call holds them in one row.
    """
    if len(x) % 2:
        raise Refusal(f"{stage.id.label} was given {len(x)} rows for two streams; use model.dual(mode='caches')")
    first, second = x.chunk(2)
    return first, second


def on_first(x: Values, stage: Stage, act: Callable[[Values, Stage], Values]) -> Values:
    """`x` after `act` on the first stream's rows, the only ones that reads see."""
    if stage.stream == "second":
        return x
    if not stage.shared:
        return act(x, stage)
    first, second = halves(x, stage)
    acted = act(first, stage.of("first"))
    return x if acted is first else torch.cat([acted, second])


def across(x: Tensor, listed: Sequence[Placed], stage: Stage, *, keys: bool = False) -> Tensor:
    """`edited` for the kernel's layout `[batch, head, position, dim]`."""
    return edited(x.transpose(1, 2), listed, stage, keys=keys).transpose(1, 2) if listed else x


def read(x: Values, listed: Sequence[Placed], stage: Stage, *, squeeze: bool = False) -> Values:
    """Keep what was asked for; returns `x`, tapped where a gradient was asked for."""
    make = first_head if squeeze else as_it_is

    def act(x: Values, stage: Stage) -> Values:
        for placed in listed:
            pick = pick_of(placed, stage)
            if placed.read.grad and pick is not None:
                x = tap(x, placed, stage, chained(pick, make))
            keep(placed, make, x, stage)
        return x

    return on_first(x, stage, act) if listed else x


def read_across(x: Tensor, listed: Sequence[Placed], stage: Stage) -> Tensor:
    return read(x.transpose(1, 2), listed, stage).transpose(1, 2) if listed else x


def read_new_keys(x: Tensor, listed: Sequence[Placed], stage: Stage) -> Tensor:
    """Read keys or values of the positions that this forward computed; a cache's older columns are left out.

    Returns `x`, tapped where a gradient was asked for: that of what this forward's kernel was given.

    Raises:
        Refusal: positions cannot be told here, and the call sees more keys than queries.
    """
    if not listed:
        return x
    window, n_queries = stage.window, stage.run.shapes[stage.site.id][1]
    if stage.site.kind != "self":
        if stage.moment[0] > 0 and window is not None and window.frame.past > 0:  # cross keys are made once
            if stage.stream != "second":
                for placed in listed:
                    placed.met(0)
            return x
        start, length = 0, x.shape[2]
    elif window is not None and window.joined:
        if window.frame.past:
            raise Refusal(
                f"{stage.site.label}: its keys are not those of its own tokens alone, so which of them are new cannot "
                "be told under a cache, and k and v cannot be read"
            )
        start, length = 0, x.shape[2]
    elif window is not None:
        start, length = window.start - window.offset, window.length
    elif x.shape[2] == n_queries or stage.site.chunked:
        start, length = 0, x.shape[2]
    else:
        raise Refusal(f"{stage.site.label}: which of its keys are new cannot be told, so k and v cannot be read")

    def new_ones(keys: Tensor) -> Tensor:
        return keys.transpose(1, 2)[:, start : start + length]

    def act(x: Tensor, stage: Stage) -> Tensor:
        for placed in listed:
            pick = pick_of(placed, stage, keys=True)
            if placed.read.grad and pick is not None:
                x = tap(x, placed, stage, chained(new_ones, pick))
            keep(placed, as_it_is, new_ones(x), stage, keys=True)
        return x

    return on_first(x, stage, act)


def read_gate(z: Values, listed: Sequence[Placed], stage: Stage) -> Values:
    """Tap z so that <z, dM/dz> of each head and position is there after backward."""

    def act(z: Values, stage: Stage) -> Values:
        for placed in listed:
            pick = pick_of(placed, stage)
            if pick is None:
                placed.met(0)
                continue
            value = z.detach()
            z = tap(z, placed, stage, chained(partial(_dot, value), pick))
            placed.met(len(value) * pick.positions(value))
        return z

    return on_first(z, stage, act) if listed else z


def _dot(value: Values, gradient: Values) -> Float[Tensor, "batch position head"]:
    return (gradient * value).sum(-1)


def keep(placed: Placed, make: Callable[[Values], Any], x: Values, stage: Stage, *, keys: bool = False) -> None:
    """Store the chosen heads and positions of `x`, after `make` and the read's own `reduce`."""
    if stage.stream == "second":
        return
    if stage.shared:
        (x, _), stage = halves(x, stage), stage.of("first")
    pick = pick_of(placed, stage, keys=keys)
    if pick is None:
        placed.met(0)
        return
    chosen = pick(x)
    placed.met(chosen.shape[0] * chosen.shape[1])
    start = 0 if stage.window is None or (keys and stage.window.cross) else stage.window.start
    store(placed, stage, make(chosen), start, lent=x)


@dataclass(frozen=True, eq=False)
class Pick:
    """The part of `[batch, position, head, ...]` that a read wants; `index` None is every position."""

    heads: tuple[int, ...]
    index: Int[Tensor, "batch position"] | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.heads != tuple(range(x.shape[2])):
            x = x[:, :, list(self.heads)]
        return self.at_positions(x)

    def at_positions(self, x: Tensor) -> Tensor:
        if self.index is not None:
            index = self.index.reshape(*self.index.shape, *[1] * (x.dim() - 2))
            x = x.gather(1, index.expand(-1, -1, *x.shape[2:]))
        return x

    def positions(self, x: Tensor) -> int:
        return int(x.shape[1] if self.index is None else self.index.shape[1])


def pick_of(placed: Placed, stage: Stage, *, keys: bool = False) -> Pick | None:
    """What a read takes of this call; None where it holds nothing for it."""
    if placed.read.queries is None:
        return Pick(placed.heads, None)
    index = queries_of(placed, stage, keys=keys)
    return None if index is None else Pick(placed.heads, index)


def store(placed: Placed, stage: Stage, value: Any, start: int, lent: Tensor | None = None) -> None:
    """File one call's value; `lent` is a tensor of the model's that it may be a view of."""
    assert placed.captured is not None
    if placed.read.reduce is not None:
        value = placed.read.reduce(value)
    placed.captured.put(stage.id, stage.moment, own(value, lent), start)


def own(value: Any, lent: Tensor | None) -> Any:
    """A copy of what lies in memory that the model goes on with (some write to it), or in more than was asked for."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    shared = lent is not None and storage.data_ptr() == lent.untyped_storage().data_ptr()
    return value.clone() if shared or storage.nbytes() > value.nbytes else value


def tap(x: Tensor, placed: Placed, stage: Stage, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """`x`, of whose gradient `pick(gradient)` is kept when backward comes by.

    Raises:
        InputError: gradients are off.
    """
    if not torch.is_grad_enabled():
        if stage.run.checkpointing:  # the first pass of a reentrant checkpoint; the recomputed one is tapped
            return x
        raise InputError("a gradient read needs gradients: leave torch.no_grad() (generate() runs without them)")
    # A tensor of its own, so that the hook is on the way that the caller goes on with.
    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
    captured, moment, label = placed.captured, stage.moment, stage.id
    assert captured is not None

    def receive(gradient: Tensor) -> None:
        captured.piece(label, moment).grad = pick(gradient)

    x.register_hook(receive)  # type: ignore[no-untyped-call]
    return x


def chained(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: then(first(tensor))


def first_head(tensor: Tensor) -> Tensor:
    return tensor[:, :, 0]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


# -- what edits have in common -------------------------------------------------------------------------------


def here_of(placed: Placed, stage: Stage, layout: Layout, span: int, **seen: Any) -> Here:
    source = stage.run.exchange.source(stage.place(placed.edit)) if stage.stream == "first" else None
    return Here(
        site=stage.id,
        label=stage.id.label,
        heads=placed.heads,
        names=placed.names,
        slots=placed.slots,
        count=placed.count,
        layout=layout,
        window=stage.window,
        items=items_of(stage),
        batch=stage.batch,
        span=span,
        forward=stage.moment[0],
        step=None if stage.run.plan.denoising is None else stage.run.plan.denoising.step,
        chunk=stage.chunk,
        other=None if source is None else partial(source, placed.heads, seen.get("queries")),
        decided=partial(decide, placed, stage),
        **seen,
    )


def blended(placed: Placed, result: Tensor | float, current: Tensor, here: Here) -> Tensor:
    """The operation's result at the edit's strength, in the shape of `current`."""
    result = result.expand_as(current) if isinstance(result, Tensor) else torch.full_like(current, result)
    strength = here.pick(placed.edit.strength, current)
    if isinstance(strength, float) and strength in (0.0, 1.0):
        return result if strength else current
    # Equal values stay what they are: hidden scores are -inf, and inf - inf is no number.
    return torch.where(result == current, current, current + strength * (result - current))


def positions_of(placed: Placed, stage: Stage, *, keys: bool = False) -> Bool[Tensor, "batch position"] | None:
    """Where an edit applies in this call: scope, queries and rows of the batch together; None is everywhere.

    Raises:
        Refusal: the edit is limited to positions, and this tower's positions cannot be told.
    """
    edit, window = placed.edit, stage.window
    chosen: Tensor | None = None
    if edit.when.place != "all" or edit.queries is not None:
        if window is None:
            raise Refusal(
                f"edit.{edit.name} is limited to positions, and at {stage.id.label} the tower lays its tokens out in "
                "its own way, so that positions cannot be told; use scope='all'"
            )
        frame = window.key_frame if keys else window.frame
        place = window.keys if keys else window.queries
        for part in (frame.in_scope(edit.when.place), frame.select(edit.queries)):
            here = place(part)
            chosen = here if chosen is None else chosen if here is None else chosen & here
    rows = rows_of(placed, stage)
    if rows is None:
        return chosen
    return rows[:, None] if chosen is None else chosen & rows[:, None]


def items_of(stage: Stage) -> Int[Tensor, " batch"]:
    """Row of the batch, before beams, of each row of a call."""
    share = max(stage.batch // (stage.run.rows or stage.batch), 1)
    return torch.arange(stage.batch) // share


def rows_of(placed: Placed, stage: Stage) -> Bool[Tensor, " batch"] | None:
    """Rows of the batch that an edit applies to, beams counted."""
    edit, given = placed.edit, stage.run.rows or stage.batch
    of_branch = _rows_of_branch(placed, stage)
    if edit.rows is None:
        return of_branch
    wrong = [row for row in edit.rows if not 0 <= row < given]
    if wrong:
        raise InputError(f"edit.{edit.name}: rows={list(edit.rows)}, and the batch has {given} rows")
    if stage.batch % given:
        raise Refusal(
            f"edit.{edit.name}: rows= cannot be honoured at {stage.id.label}, whose tower lays {given} items out "
            f"in {stage.batch} rows; leave rows= out"
        )
    share = stage.batch // given
    rows = torch.zeros(stage.batch, dtype=torch.bool)
    for row in edit.rows:
        rows[row * share : (row + 1) * share] = True
    rows = rows.to(stage.device)
    return rows if of_branch is None else rows & of_branch


def _rows_of_branch(placed: Placed, stage: Stage) -> Bool[Tensor, " batch"] | None:
    """Rows of the branch of guidance that an edit is for, where branches are parts of the batch."""
    branch, denoising = placed.edit.when.branch, stage.run.plan.denoising
    if branch is None or denoising is None or denoising.guidance != "batch":
        return None
    rows = torch.zeros(stage.batch, dtype=torch.bool, device=stage.device)
    rows[denoising.rows_of(branch, stage.batch)] = True
    return rows


def queries_of(placed: Placed, stage: Stage, *, keys: bool = False) -> Tensor | None:
    """Indices of the wanted positions among this call's queries (or its new keys); None where it holds none."""
    if stage.window is None:
        raise Refusal(
            f"read.{placed.read.name}: positions cannot be told at {stage.id.label}, whose tower lays its tokens out "
            "in its own way; leave queries= out"
        )
    return locate_queries(stage.window.key_frame if keys else stage.window.frame, placed.read.queries)
