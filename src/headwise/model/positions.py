"""Where tokens stand: absolute columns, attended tokens, prompt and decode, and the scopes built on them.

A position is a column of the padded sequence, counted from 0 and never renumbered by a cache. Negative positions count
from each row's last attended prompt token, so `-1` is the same token with and without a cache. What is "prompt" is told
from recorded lengths, never from the number of queries in a call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index as as_index
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.errors import InputError, Refusal

SCOPES = ("all", "prompt", "decode", "last")

# Columns of one row, or of every row.
SpanRows = Sequence[int] | Sequence[Sequence[int]] | slice


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of the prompt that lie in any of some scopes or spans, or (`outside`) in none of them.

    Attributes:
        named: words such as `span:NAME`, `last` or `first`.
        outside: whether the other columns of the prompt are meant.
    """

    named: tuple[str, ...]
    outside: bool = False


Positions = str | int | slice | Sequence[int] | Tensor | Columns | None


@dataclass(frozen=True, eq=False)
class Frame:
    """The positions of one forward of one tower.

    Attributes:
        past: columns already in the cache before this forward.
        length: query positions in this forward.
        batch: rows in this forward (with beams and a second stream counted).
        device: where masks are wanted.
        attended: `[batch, past + length]`, False on padding; None means everything is attended. A function
            makes it when it is first asked for: most steps of a generation do not.
        prompt: columns below it belong to the prompt.
        generating: whether there are positions behind the prompt, decoded or given (then `last` covers them too).
        spans: named columns as given with the run.
        items: rows of the batch before beams were expanded; None where nothing was.
        source: frame of the sequence that cross-attention reads, if there is one.
    """

    past: int
    length: int
    batch: int
    device: torch.device
    attended: Bool[Tensor, "batch column"] | Callable[[], Tensor | None] | None
    prompt: int
    generating: bool = False
    spans: Mapping[str, SpanRows] = field(default_factory=dict)
    items: int | None = None
    source: Frame | None = None

    @property
    def total(self) -> int:
        return self.past + self.length

    @cached_property
    def told(self) -> Bool[Tensor, "batch column"] | None:
        """True on attended columns, as far as the run was told; None where it was not."""
        return self.attended() if callable(self.attended) else self.attended

    @cached_property
    def mask(self) -> Bool[Tensor, "batch column"]:
        """True on attended columns."""
        if self.told is not None:
            return self.told
        return torch.ones(self.batch, self.total, dtype=torch.bool, device=self.device)

    @cached_property
    def columns(self) -> Int[Tensor, " column"]:
        return torch.arange(self.total, device=self.device)

    @cached_property
    def _selected(self) -> dict[str | Columns, Bool[Tensor, "batch column"] | None]:
        """What was asked for by name: every layer of a forward asks for the same."""
        return {}

    @cached_property
    def located(self) -> dict[str | Columns, Int[Tensor, "batch query"] | None]:
        """Kept by `locate_queries`, which has to wait for the device to count."""
        return {}

    @cached_property
    def first(self) -> Int[Tensor, " batch"]:
        """Column of each row's first attended token (0 for a row with none)."""
        return self.mask.int().argmax(dim=1)

    @cached_property
    def prompt_end(self) -> Int[Tensor, " batch"]:
        """Column of each row's last attended prompt token."""
        if self.total < self.prompt:  # the prompt comes in pieces, and its end has not been seen yet
            return torch.full((self.batch,), self.prompt - 1, device=self.device)
        seen = torch.where(self.mask & (self.columns < max(self.prompt, 1)), self.columns, -1)
        return seen.max(dim=1).values.clamp(min=0)

    def in_scope(self, scope: str) -> Bool[Tensor, "batch column"] | None:
        """Columns of a scope, not to be written into; None stands for all of them."""
        if scope not in self._selected:
            self._selected[scope] = self._of_scope(scope)
        return self._selected[scope]

    @torch.inference_mode(False)  # what is kept may meet a graph in a later layer
    def _of_scope(self, scope: str) -> Bool[Tensor, "batch column"] | None:
        if scope == "all":
            return None
        if scope == "prompt":
            return (self.columns < self.prompt).expand(self.batch, -1)
        if scope == "decode":
            return (self.columns >= self.prompt).expand(self.batch, -1)
        if scope == "last":
            last = self.columns == self.prompt_end[:, None]
            return last | (self.columns >= self.prompt) if self.generating else last
        return self.span(scope.removeprefix("span:"))

    def span(self, name: str) -> Bool[Tensor, "batch column"]:
        """Columns of a named span.

        Raises:
            InputError: the run was given no span of that name, or one whose rows do not fit the batch.
        """
        if name not in self.spans:
            known = ", ".join(sorted(self.spans)) or "none"
            lacks = " and its tokens hold no picture" if name == "image" else ""
            raise InputError(
                f"no span named {name!r} was given with this run{lacks} (spans given: {known}); pass spans={{...}}"
            )
        rows = self.spans[name]
        if not isinstance(rows, slice) and len(rows) and not isinstance(rows[0], int):
            per_row = cast(Sequence[Sequence[int]], rows)
            return torch.stack([self._listed(row) for row in self._spread(per_row, f"span {name!r}")])
        return self._listed(cast("slice | Sequence[int]", rows)).expand(self.batch, -1)

    def select(self, positions: Positions) -> Bool[Tensor, "batch column"] | None:
        """Columns named by a selector: a scope-like word, `"first"`, columns, a slice, or None for all."""
        if positions is None:
            return None
        if isinstance(positions, str):
            if positions == "first":
                return self.columns == self.first[:, None]
            return self.in_scope(positions)
        if isinstance(positions, Columns):
            if positions not in self._selected:
                self._selected[positions] = self._of_prompt(positions)
            return self._selected[positions]
        if isinstance(positions, slice):
            return self._listed(positions).expand(self.batch, -1)
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            return self._boolean(positions)
        chosen = torch.zeros(self.batch, self.total, dtype=torch.bool, device=self.device)
        for position in [positions] if isinstance(positions, int) else positions:
            self._require(int(position))
            chosen |= self.columns == self.absolute(position)[:, None]
        return chosen

    @torch.inference_mode(False)
    def _of_prompt(self, columns: Columns) -> Bool[Tensor, "batch column"]:
        prompt = self.in_scope("prompt")
        assert prompt is not None
        inside = torch.zeros_like(prompt)
        for name in columns.named:
            marked = self.select(name)
            inside = torch.ones_like(inside) if marked is None else inside | marked
        return prompt & (~inside if columns.outside else inside)

    def absolute(self, position: int) -> Int[Tensor, " batch"]:
        """Column of a position in each row; negative ones count from the row's last attended prompt token."""
        if position >= 0:
            return torch.full((self.batch,), position, device=self.device)
        return self.prompt_end + 1 + position

    def _require(self, column: int) -> None:
        """Raises InputError for a column that this run does not have and, not generating, will not come to."""
        end = max(self.total, self.prompt)  # a prompt may come in pieces
        if column >= end and not self.generating:
            raise InputError(f"position {column} lies beyond the run, which has {end} columns, counted from 0")

    def spread(self, values: Tensor, what: str) -> Tensor:
        """One row for all, or one per item of the batch, repeated over beams to this frame's number of rows.

        Raises:
            InputError: another number of rows.
        """
        rows, items = len(values), self.batch if self.items is None else self.items
        if rows not in (1, items):
            raise InputError(f"{what} has {rows} rows, and the run has {items}")
        return values.repeat_interleave(self.batch // rows, dim=0)

    def _spread(self, rows: Sequence[Sequence[int]], what: str) -> list[Sequence[int]]:
        index = self.spread(torch.arange(len(rows)), what)
        return [rows[int(row)] for row in index]

    def _boolean(self, chosen: Bool[Tensor, "row column"]) -> Bool[Tensor, "batch column"]:
        chosen = self.spread(chosen.to(self.device), "the position mask")
        if chosen.shape[1] < self.total:  # decoded columns lie beyond a mask made for the prompt
            chosen = torch.nn.functional.pad(chosen, (0, self.total - chosen.shape[1]))
        return chosen[:, : self.total]

    def _listed(self, row: slice | Sequence[int]) -> Bool[Tensor, " column"]:
        if isinstance(row, slice):
            if min(row.start or 0, row.stop or 0) < 0 or (row.step or 1) < 1:
                raise InputError(f"{row} has a negative bound or step; give absolute columns")
            stop = self.total if row.stop is None else row.stop
            return (
                (self.columns >= (row.start or 0))
                & (self.columns < stop)
                & ((self.columns - (row.start or 0)) % (row.step or 1) == 0)
            )
        chosen = torch.zeros(self.total, dtype=torch.bool, device=self.device)
        for column in row:
            self._require(column)
        chosen[[column for column in row if column < self.total]] = True
        return chosen


@dataclass(frozen=True, slots=True)
class Window:
    """The stretch of a frame's columns that one call sees: queries `start..start+length`, keys from `offset` on.

    Keys that are `joined` hold something else beside the frame's own columns (states of an encoder, a summary of what
    left the window), so none of them has a name.
    """

    frame: Frame
    start: int
    length: int
    offset: int
    n_keys: int
    cross: bool = False
    joined: bool = False

    @property
    def key_frame(self) -> Frame:
        """The frame that key columns are counted in: the encoder's for cross-attention.

        Raises:
            Refusal: cross-attention whose source sequence was not seen in this run; keys that are `joined`.
        """
        if self.joined:
            raise Refusal(
                "its keys are not the tokens of its own sequence alone, so key columns have no names; leave keys=, "
                "to= and scopes of k and v out"
            )
        if not self.cross:
            return self.frame
        if self.frame.source is None:
            raise Refusal(
                "the sequence this cross-attention reads was not seen in the run, so its columns have no names"
            )
        return self.frame.source

    @staticmethod
    def of_call(frame: Frame, n_queries: int, n_keys: int, cross: bool, joined: bool = False) -> Window:
        """Place a call's queries and keys among the frame's columns.

        Keys that are fewer than the columns so far belong to a sliding-window cache, whose last key is the newest;
        keys that are more belong to a static cache, whose unused end is masked.
        """
        offset = 0 if cross or joined else max(0, frame.total - n_keys)
        return Window(frame, frame.past, n_queries, offset, n_keys, cross, joined)

    def queries(self, chosen: Bool[Tensor, "batch column"] | None) -> Bool[Tensor, "batch query"] | None:
        return None if chosen is None else chosen[:, self.start : self.start + self.length]

    def keys(self, chosen: Bool[Tensor, "batch column"] | None) -> Bool[Tensor, "batch key"] | None:
        if chosen is None:
            return None
        seen = chosen[:, self.offset : self.offset + self.n_keys]
        if seen.shape[1] < self.n_keys:
            seen = torch.nn.functional.pad(seen, (0, self.n_keys - seen.shape[1]))
        return seen


def checked_positions(positions: Positions, what: str) -> Positions:
    """A selector as reads and edits take it; tensors of columns become lists, in their order.

    Raises:
        InputError: a word that is none, fractions, or truth values in place of columns.
    """
    if positions is None or isinstance(positions, (slice, Columns)):
        return positions
    if isinstance(positions, str):
        if positions != "first":
            check_scope(positions, what)
        return positions
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return positions
    try:
        listed = positions.tolist() if isinstance(positions, Tensor) else positions
        columns = [listed] if isinstance(listed, int) else list(listed)
        if any(isinstance(column, bool) for column in columns):
            raise TypeError
        return [operator.index(column) for column in columns]
    except TypeError:
        raise InputError(
            f"{what}={positions!r} does not name positions; give columns such as [0, 3] or [-1], a slice, 'first', "
            "'last', 'prompt', 'decode' or 'span:NAME'"
        ) from None


def check_scope(scope: str, what: str = "scope") -> None:
    """Raise InputError for a scope that does not exist."""
    named = isinstance(scope, str) and scope.startswith("span:") and len(scope) > 5
    if scope not in SCOPES and not named:
        also = "" if what == "scope" else ", first, columns, a slice"
        raise InputError(f"{what}={scope!r} is not one of {', '.join(SCOPES)}, span:NAME{also}")


def checked_span(name: str, rows: SpanRows | Tensor) -> SpanRows:
    """A span as given with a run: a slice, columns for every row, or columns (or a slice) row by row.

    Raises:
        InputError: something else, a negative column, a mask in place of columns.
    """
    try:
        if isinstance(rows, slice):
            return _columns(rows)
        listed = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if any(isinstance(entry, slice) or hasattr(entry, "__len__") for entry in listed):
            return [_columns(entry) for entry in listed]  # type: ignore[return-value, arg-type]
        return _columns(listed)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(
            f"span {name!r} is {rows!r}; expected columns counted from 0 such as [3, 4], one list per row, or a slice"
        ) from None


def _columns(row: Sequence[int] | slice) -> list[int] | slice:
    """Raises TypeError or ValueError for what are not columns counted from 0."""
    if isinstance(row, slice):
        if min(row.start or 0, row.stop or 0) < 0 or (row.step or 1) < 1:
            raise ValueError
        return row
    columns = [as_index(column) for column in row]
    if any(isinstance(column, bool) or index < 0 for column, index in zip(row, columns, strict=True)):
        raise ValueError
    return columns


def locate_queries(frame: Frame, positions: Positions) -> Int[Tensor, "batch query"] | None:
    """Indices, among this forward's queries, of the positions asked for; None where it holds none of them.

    Raises:
        Refusal: the rows of the batch would need different numbers of positions in this forward.
    """
    if not isinstance(positions, (str, Columns)):
        return _located(frame, positions)
    if positions not in frame.located:
        frame.located[positions] = _located(frame, positions)
    return frame.located[positions]


@torch.inference_mode(False)
def _located(frame: Frame, positions: Positions) -> Int[Tensor, "batch query"] | None:
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return torch.arange(frame.length, device=frame.device).expand(frame.batch, -1)
    if not isinstance(positions, (str, int, slice, Tensor, Columns)):
        for position in positions:
            frame._require(int(position))
        wanted = [frame.absolute(int(position)) - frame.past for position in positions]
        index = torch.stack(wanted, dim=1) if wanted else torch.zeros(frame.batch, 0, device=frame.device).long()
        inside = (index >= 0) & (index < frame.length)
        if not inside.any():
            return None
        if bool((inside == inside[:1]).all()):
            return index[:, inside[0]]
        raise Refusal(f"positions {list(positions)} fall into different forwards for different rows; read row by row")
    chosen = frame.select(positions)
    assert chosen is not None
    here = chosen[:, frame.past :]
    counts = here.sum(dim=1)
    if not bool(counts.any()):
        return None
    if not bool((counts == counts[0]).all()):
        raise Refusal(
            f"queries={positions!r} selects {counts.tolist()} positions in the rows of this batch; "
            "a read needs the same number in every row: read row by row, or name a position that all rows have"
        )
    return here.nonzero()[:, 1].view(frame.batch, -1)
