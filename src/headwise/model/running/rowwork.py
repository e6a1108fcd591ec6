"""Edits and reads of rows `[batch, head, query, key]`: scores, patterns, statistics.

Rows are recomputed from what the kernel was given, for the heads and queries concerned and in chunks. Only those heads'
and queries' z is replaced by rows times values; everything else keeps the kernel's bits. Keys that the model hides
(future, padding, outside a window), or an earlier edit, stay hidden, whatever an edit returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from headwise.errors import InputError, Refusal
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import (
    PatternRows,
    ScoreRows,
    mix_values,
    pattern_rows,
    row_chunks,
    score_rows,
    visible,
)
from headwise.model.attention.statistics import STATISTICS, RowStatistics, row_statistics
from headwise.model.operations import Received
from headwise.model.positions import Window
from headwise.model.running import valuework
from headwise.model.running.plan import Operations, Placed
from headwise.model.running.received import find_received, received_keys
from headwise.model.running.valuework import Stage

VARIABLES = ("rows", "scores", "statistics")
HIDDEN = -1e30  # a hidden score while it is edited: a factor's gradient would be 0 times -inf, which is no number


def serve(call: AttentionCall, z: Tensor, operations: Operations, stage: Stage) -> Tensor:
    """z with the edited heads' part replaced, after keeping the rows and statistics asked for."""
    if stage.shared:
        first, second = valuework.halves(z, stage)
        second = serve(call.of_rows(slice(len(first), None)), second, operations, stage.of("second"))
        return torch.cat([serve(call.of_rows(slice(len(first))), first, operations, stage.of("first")), second])
    listed = operations.edits.get("rows", [])
    edits = valuework.of_stream(listed, stage)
    for placed in in_order(edits):
        if isinstance(placed.edit.keys, Received):
            find_received(call, placed, partial(_rows_before, placed, call, edits, stage), stage)
    reads = [placed for name in ("scores", "rows", "statistics") for placed in operations.reads.get(name, [])]
    if stage.stream == "second":
        reads = []
        for placed in listed:
            source = partial(_rows_again, call, edits, stage, placed.edit.variable)
            stage.run.exchange.keep(stage.place(placed.edit), source)
    graded = [placed for placed in reads if placed.read.grad and _queries(placed, call, stage) is not None]
    if edits or graded:
        z = _replaced(call, z, edits, graded, stage)
    for placed in reads:
        if placed.read.variable == "statistics":
            _read_statistics(call, placed, edits, stage)
        elif placed not in graded:
            _read_rows(call, placed, edits, stage)
    return z


def edited_rows(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Tensor,
    edits: Sequence[Placed],
    stage: Stage,
    graded: Sequence[Placed] = (),
) -> tuple[ScoreRows, PatternRows]:
    """Scores and pattern of some heads and queries, after the edits on them. `queries` as in `score_rows`.

    The reads in `graded` are served here, on the way to z, so that their gradients come by.
    """
    scored = score_rows(call, torch.tensor(heads), queries)
    for placed in edits:
        if placed.edit.variable == "score":
            seen = visible(scored)
            scores = _applied(scored.scores.clamp(min=HIDDEN), seen, heads, queries, placed, stage)
            scored = replace(scored, scores=scores.masked_fill(~seen, float("-inf")))
    scored = replace(scored, scores=_tap_rows(scored.scores, "scores", heads, queries, graded, stage))
    pattern = pattern_rows(scored)
    for placed in edits:
        if placed.edit.variable == "pattern":
            seen = visible(scored)
            weights = _applied(pattern.weights, seen, heads, queries, placed, stage)
            pattern = replace(pattern, weights=weights.masked_fill(~seen, 0.0))
    pattern = replace(pattern, weights=_tap_rows(pattern.weights, "rows", heads, queries, graded, stage))
    return scored, pattern


def in_order(edits: Sequence[Placed]) -> list[Placed]:
    """Edits in the order in which rows meet them: scores first, then patterns."""
    return sorted(edits, key=lambda placed: placed.edit.variable == "pattern")


def _rows_before(
    placed: Placed, call: AttentionCall, edits: Sequence[Placed], stage: Stage, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """The pattern of an edit's heads as the edits before it left it, and what is visible."""
    ordered = in_order(edits)
    before = ordered[: [each is placed for each in ordered].index(True)]
    scored, pattern = edited_rows(call, placed.heads, queries, before, stage)
    return pattern.weights, visible(scored)


def _rows_again(
    call: AttentionCall, edits: Sequence[Placed], stage: Stage, variable: str, heads: Sequence[int], queries: Tensor
) -> Tensor:
    """The second stream's rows, when the first one asks for them: made anew, so that no n x n is held for it."""
    scored, pattern = edited_rows(call, heads, queries, edits, stage)
    return scored.scores.clamp(min=HIDDEN) if variable == "score" else pattern.weights


def _applied(rows: Tensor, seen: Tensor, heads: Sequence[int], queries: Tensor, placed: Placed, stage: Stage) -> Tensor:
    """`rows` of `heads` after one edit on those among them that it names."""
    here_heads = [head for head in placed.heads if head in heads]
    if not here_heads:
        return rows
    local = [heads.index(head) for head in here_heads]
    kept = [placed.heads.index(head) for head in here_heads]
    placed_here = replace(
        placed,
        heads=tuple(here_heads),
        names=tuple(placed.names[index] for index in kept),
        slots=tuple(placed.slots[index] for index in kept),
    )
    edit, window = placed.edit, stage.window
    keys = None
    if isinstance(edit.keys, Received):
        keys = received_keys(placed, stage)[:, kept]
    elif edit.keys is not None:
        if window is None:
            raise Refusal(f"edit.{edit.name}: key columns cannot be told at {stage.id.label}; leave keys= out")
        keys = window.keys(window.key_frame.select(edit.keys))
    chosen = valuework.positions_of(placed, stage)
    chosen = None if chosen is None else _at(chosen, queries)
    current = rows[:, local]
    here = valuework.here_of(
        placed_here, stage, "rows", current.shape[2], chosen=chosen, keys=keys, visible=seen[:, local], queries=queries
    )
    result = valuework.blended(placed_here, edit.operation(current, here), current, here)
    where = None if chosen is None else chosen[:, None, :, None]
    if here.marked is not None and not edit.operation.chooses_keys:
        where = here.marked if where is None else where & here.marked
    if where is not None:
        result = torch.where(where, result, current)
    return rows.index_copy(1, torch.tensor(local, device=rows.device), result)


def _replaced(
    call: AttentionCall, z: Tensor, edits: Sequence[Placed], graded: Sequence[Placed], stage: Stage
) -> Tensor:
    """z with rows times values put in for the heads and queries that an edit (or a gradient read) names."""
    n_rows, n_queries, n_heads = z.shape[:3]
    concerned = torch.zeros(n_rows, n_queries, n_heads, dtype=torch.bool, device=z.device)
    for placed in edits:
        chosen = valuework.positions_of(placed, stage)
        concerned[:, :, list(placed.heads)] |= True if chosen is None else chosen[:, :, None]
        placed.met(n_rows * n_queries if chosen is None else chosen.expand(n_rows, n_queries).sum())
    for placed in graded:
        queries = _queries(placed, call, stage)
        assert queries is not None
        concerned[:, :, list(placed.heads)] |= _marked(queries, concerned[:, :, 0])[:, :, None]
    heads = concerned.any(dim=(0, 1)).nonzero()[:, 0].tolist()
    queries = concerned.any(dim=(0, 2)).nonzero()[:, 0]
    if not heads:
        return z
    index = torch.tensor(heads, device=z.device)
    pieces, chunks = [], []
    for chunk in [queries] if graded else row_chunks(call, index, queries):
        _, pattern = edited_rows(call, heads, chunk, edits, stage, graded)
        pieces.append(mix_values(pattern.weights, call, index).to(z.dtype))
        chunks.append(chunk)
    recomputed = torch.cat(pieces, dim=1)
    current = z[:, queries][:, :, index]
    recomputed = torch.where(concerned[:, queries][:, :, index, None], recomputed, current)
    part = z[:, :, index].index_copy(1, queries, recomputed)
    return z.index_copy(2, index, part)


def _tap_rows(
    rows: Tensor, variable: str, heads: Sequence[int], queries: Tensor, graded: Sequence[Placed], stage: Stage
) -> Tensor:
    """`rows` on whose way on the gradients asked for are kept, with their values."""
    for placed in graded:
        if placed.read.variable != variable:
            continue
        wanted = queries if placed.read.queries is None else valuework.queries_of(placed, stage)
        assert wanted is not None
        take = partial(_taken, local=[heads.index(head) for head in placed.heads], held=queries, wanted=wanted)
        rows = valuework.tap(rows, placed, stage, valuework.chained(take, partial(on_columns, window=stage.window)))
        _store_rows(placed, stage, take(rows))
    return rows


def _taken(rows: Tensor, local: list[int], held: Int[Tensor, " query"], wanted: Int[Tensor, "*batch query"]) -> Tensor:
    """Rows of the heads `local` and the queries `wanted`, out of those of the queries `held` (in rising order)."""
    rows = rows[:, local]
    places = torch.searchsorted(held, wanted.contiguous())
    if places.dim() == 1:
        return rows[:, :, places]
    places = places[:, None, :, None]
    return rows.gather(2, places.expand(-1, rows.shape[1], -1, rows.shape[3]))


def _read_rows(call: AttentionCall, placed: Placed, edits: Sequence[Placed], stage: Stage) -> None:
    queries = _queries(placed, call, stage)
    if queries is None:
        placed.met(0)
        return
    scored, pattern = edited_rows(call, placed.heads, queries, edits, stage)
    _store_rows(placed, stage, scored.scores if placed.read.variable == "scores" else pattern.weights)


def _store_rows(placed: Placed, stage: Stage, rows: Tensor) -> None:
    blank = float("-inf") if placed.read.variable == "scores" else 0.0
    placed.met(rows.shape[0] * rows.shape[2])
    start = 0 if stage.window is None else stage.window.start
    valuework.store(placed, stage, on_columns(rows, stage.window, blank), start)


def on_columns(rows: Tensor, window: Window | None, blank: float = 0.0) -> Tensor:
    """Rows whose key axis begins at column 0, also where a sliding cache has let the first columns go."""
    return rows if window is None or not window.offset else pad(rows, (window.offset, 0), value=blank)


def _read_statistics(call: AttentionCall, placed: Placed, edits: Sequence[Placed], stage: Stage) -> None:
    pattern_edited = _any_on(placed, [edit for edit in edits if edit.edit.variable == "pattern"])
    if pattern_edited and (placed.read.wanted or placed.read.spans):
        raise Refusal(
            f"{stage.id.label}: statistics of heads whose pattern is edited are not kept, but for pairs; "
            "read.rows gives them"
        )
    window = stage.window
    queries = _queries(placed, call, stage)
    if queries is None:
        placed.met(0)
        return
    n_rows, n_queries, n_keys = len(call.query), call.query.shape[2], call.key.shape[2]
    device = call.query.device
    if window is None:
        query_columns, key_columns = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
        first_key, valid, spans = torch.zeros(n_rows, dtype=torch.long, device=device), None, {}
        if placed.read.spans:
            raise Refusal(f"spans cannot be placed at {stage.id.label}, whose tower lays its tokens out in its own way")
        if placed.read.pairs:
            raise Refusal(f"pairs cannot be placed at {stage.id.label}, whose tower lays its tokens out in its own way")
    else:
        query_columns = torch.arange(window.start, window.start + n_queries, device=device)
        key_columns = torch.arange(window.offset, window.offset + n_keys, device=device)
        # Cross-attention may read a sequence whose columns have no names; then only what hangs on them is refused.
        of_columns = {"sink_mass", "top1", "mean_distance"} if window.joined else {"sink_mass"}
        named = of_columns & placed.read.wanted or placed.read.spans or placed.read.pairs
        first_key = window.key_frame.first if named else torch.zeros(n_rows, dtype=torch.long, device=device)
        valid = window.queries(window.frame.told)
        spans = {name: window.keys(window.key_frame.span(name)) for name in placed.read.spans}
    pairs = _pairs(placed, query_columns, n_rows, stage)
    if pattern_edited:
        masses = _edited_pair_masses(call, placed, edits, stage, queries, pairs, valid)
        statistics = RowStatistics(**dict.fromkeys(STATISTICS), span_mass={}, pair_mass=masses)
        placed.met(n_rows * queries.shape[-1])
        valuework.store(placed, stage, statistics, 0 if window is None else window.start)
        return
    statistics = row_statistics(
        call,
        heads=torch.tensor(placed.heads, device=device),
        queries=queries,
        query_columns=query_columns,
        key_columns=key_columns,
        first_key=first_key,
        valid_queries=valid,
        spans={name: keys for name, keys in spans.items() if keys is not None},
        pairs=pairs,
        wanted=placed.read.wanted,
        rows=partial(_edited_scores, call, placed, edits, stage) if _any_on(placed, edits) else None,
    )
    placed.met(n_rows * queries.shape[-1])
    valuework.store(placed, stage, statistics, 0 if window is None else window.start)


def _pairs(placed: Placed, query_columns: Int[Tensor, " query"], n_rows: int, stage: Stage) -> dict[str, Tensor]:
    """The key columns that a read names for each of this call's queries."""
    found = {}
    for name, columns in placed.read.pairs.items():
        last = int(query_columns[-1])
        if len(columns) != n_rows or columns.shape[1] <= last:
            raise InputError(
                f"read.statistics at {stage.id.label}: pairs {name!r} are for {columns.shape[0]} rows of "
                f"{columns.shape[1]} columns, and here are {n_rows} rows up to column {last}; give every column of "
                "every row its keys, or -1"
            )
        found[name] = columns.to(query_columns.device)[:, query_columns]
    return found


def _edited_pair_masses(
    call: AttentionCall,
    placed: Placed,
    edits: Sequence[Placed],
    stage: Stage,
    queries: Tensor,
    pairs: Mapping[str, Int[Tensor, "batch query slot"]],
    valid: Bool[Tensor, "batch query"] | None,
) -> dict[str, Tensor]:
    """`RowStatistics.pair_mass` of heads whose pattern is edited: read off the edited rows, a chunk at a time."""
    first, n_keys = 0 if stage.window is None else stage.window.offset, call.key.shape[2]
    pieces: dict[str, list[Tensor]] = {name: [] for name in pairs}
    for chunk in row_chunks(call, torch.tensor(placed.heads), queries):
        weights = edited_rows(call, placed.heads, chunk, edits, stage)[1].weights
        for name, columns in pairs.items():
            keys = torch.stack([_at(slot, chunk) for slot in columns.unbind(-1)], dim=-1) - first
            inside = (keys >= 0) & (keys < n_keys)
            index = keys.where(inside, 0).unsqueeze(1).expand(-1, weights.shape[1], -1, -1)
            mass = (weights.gather(-1, index) * inside.unsqueeze(1)).sum(-1)
            alive = torch.ones_like(inside[:, :, 0]) if valid is None else _at(valid, chunk)
            pieces[name].append(mass.masked_fill(~alive.unsqueeze(1), torch.nan))
    return {name: torch.cat(parts, dim=-1) for name, parts in pieces.items()}


def _any_on(placed: Placed, edits: Sequence[Placed]) -> bool:
    return any(set(edit.heads) & set(placed.heads) for edit in edits)


def _edited_scores(
    call: AttentionCall, placed: Placed, edits: Sequence[Placed], stage: Stage, queries: Tensor
) -> ScoreRows:
    return edited_rows(call, placed.heads, queries, edits, stage)[0]


def _queries(placed: Placed, call: AttentionCall, stage: Stage) -> Tensor | None:
    if placed.read.queries is None:
        return torch.arange(call.query.shape[2], device=call.query.device)
    return valuework.queries_of(placed, stage)


def _marked(queries: Tensor, like: Bool[Tensor, "batch position"]) -> Bool[Tensor, "batch position"]:
    """True at the queries."""
    return torch.zeros_like(like).scatter(1, queries.expand(len(like), -1), True)


def _at(chosen: Tensor, queries: Tensor) -> Tensor:
    """`[batch, query]` of the wanted queries out of `[batch, position]`; one column stands for every position."""
    if chosen.shape[1] == 1:
        return chosen
    return chosen[:, queries] if queries.dim() == 1 else chosen.gather(1, queries.to(chosen.device))
