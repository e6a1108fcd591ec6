"""Statistics of pattern rows in one sweep over queries, with no n x n held.

For a row p over keys j at columns c_j, seen from the query at column c_i, each `[batch, head, query]`:

    entropy        -sum_j p_j log p_j, in nats
    max, top1      max_j p_j, and the column c_j where it lies
    sink_mass      p_j of the first attended token of the sequence (Xiao et al., 2024, "attention sink")
    learned_sink   1 - sum_j p_j, the weight of a learned sink; 0 where the site has none
    mean_distance  sum_j p_j (c_i - c_j) / sum_j p_j, in tokens; negative where a head looks ahead
    span_mass      sum of p_j over the keys of a named span
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import ScoreRows, in_row_precision, last_visible_key, row_chunks, score_rows

Statistic = Literal["entropy", "max", "top1", "sink_mass", "learned_sink", "mean_distance"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """What was asked for; None otherwise. NaN (`top1`: -1) at invalid queries and where a query sees no key.

    `mean_distance` is fp64, because beyond 2048 tokens fp32 steps by more than 1e-4. A row split between far keys by
    large scores still inherits the rounding of those scores: about p (1 - p) times distance times 1e-7 of the score.
    """

    entropy: Float[Tensor, "batch head query"] | None
    max: Float[Tensor, "batch head query"] | None
    top1: Int[Tensor, "batch head query"] | None
    sink_mass: Float[Tensor, "batch head query"] | None
    learned_sink: Float[Tensor, "batch head query"] | None
    mean_distance: Float[Tensor, "batch head query"] | None
    span_mass: Mapping[str, Float[Tensor, "batch head query"]]


def row_statistics(
    call: AttentionCall,
    *,
    heads: Int[Tensor, " head"] | None,
    query_columns: Int[Tensor, " query"],
    key_columns: Int[Tensor, " key"],
    first_key: Int[Tensor, " batch"],
    valid_queries: Bool[Tensor, "batch query"] | None = None,
    queries: Int[Tensor, " chosen"] | Int[Tensor, "batch chosen"] | None = None,
    spans: Mapping[str, Bool[Tensor, "batch key"]] | None = None,
    rows: Callable[[Tensor], ScoreRows] | None = None,
    wanted: frozenset[str] = frozenset(STATISTICS),
    budget_bytes: int = 8 * 2**20,
) -> RowStatistics:
    """Statistics of the rows of the chosen query heads and queries.

    With a learned sink the keys hold less than all of a row: `entropy`, `max`, `sink_mass` and `span_mass` are of the
    keys' weights as they are, `mean_distance` is normalised by the mass the keys hold.

    Args:
        query_columns, key_columns: where all of the call's queries and keys lie in the (padded) sequence.
        first_key: column of each row's first attended token; where no key of the call has it (it left a sliding
            cache), `sink_mass` is 0.
        valid_queries: for all of the call's queries, False at padding; None if every query counts.
        queries: which of the call's queries, as in `score_rows`; None for all. The result has these, in this order.
        spans: keys that belong to each named span; always computed.
        rows: gives the scores of some queries in place of `score_rows` (edited scores); they are overwritten.
        budget_bytes: size of one chunk of scores; about four such buffers exist at a time.

    Raises:
        InputError: a statistic that does not exist, or columns, spans or rows that do not fit the call.
        Refusal: rows that cannot be rebuilt, as in `score_rows`.
    """
    spans = spans or {}
    n_rows = max(call.query.shape[0], call.key.shape[0])
    n_queries, n_keys = int(call.query.shape[2]), int(call.key.shape[2])
    unknown = sorted(wanted - set(STATISTICS))
    if unknown:
        raise InputError(f"no statistic named {unknown[0]!r}; there are {', '.join(STATISTICS)}")
    _require_shape("query_columns", query_columns, n_queries)
    _require_shape("key_columns", key_columns, n_keys)
    _require_shape("first_key", first_key, n_rows)
    if valid_queries is not None:
        _require_shape("valid_queries", valid_queries, n_rows, n_queries)
    for name, keys in spans.items():
        _require_shape(f"span {name!r}", keys, n_rows, n_keys)

    call = in_row_precision(call)
    queries = torch.arange(n_queries, device=call.query.device) if queries is None else queries
    marks = {f"span {name}": keys for name, keys in spans.items()}
    if "sink_mass" in wanted:
        marks["sink_mass"] = key_columns == first_key.unsqueeze(-1)
    shape = (n_rows, call.n_heads if heads is None else len(heads), queries.shape[-1])
    # What outlives a chunk is allocated beforehand: between the chunks' buffers it would keep the heap from shrinking.
    found = {
        name: torch.empty(shape, dtype=_dtype(name, call.query), device=call.query.device)
        for name in wanted | set(marks)
    }
    start = 0
    with torch.no_grad():
        for chunk in row_chunks(call, heads, queries, budget_bytes):
            n_seen = n_keys if rows else last_visible_key(call, chunk) + 1
            narrow = replace(call, key=call.key[:, :, :n_seen], value=call.value[:, :, :n_seen])
            scored = rows(chunk) if rows else score_rows(narrow, heads, chunk)
            chunk_marks = {name: keys[:, :n_seen] for name, keys in marks.items()}
            measured = _measure(scored, query_columns[chunk], key_columns[:n_seen], chunk_marks, wanted)
            for name, values in measured.items():
                found[name][:, :, start : start + chunk.shape[-1]] = values
            start += chunk.shape[-1]
    if valid_queries is not None:
        valid = valid_queries[:, queries] if queries.ndim == 1 else valid_queries.gather(1, queries)
        for name, values in found.items():
            values.masked_fill_(~valid.unsqueeze(1), _blank(name))
    return RowStatistics(
        **{name: found.get(name) for name in STATISTICS},
        span_mass={name: found[f"span {name}"] for name in spans},
    )


def _measure(
    rows: ScoreRows,
    query_columns: Int[Tensor, "*batch query"],
    key_columns: Int[Tensor, " key"],
    marks: Mapping[str, Bool[Tensor, "batch key"]],
    wanted: frozenset[str],
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Statistics of one chunk; overwrites its scores.

    Works on k = softmax over the keys alone: p = a k, with a the share that a learned sink leaves to the keys.
    """
    found: dict[str, Tensor] = {}
    top = rows.scores.amax(-1, keepdim=True)
    blind = (top == -torch.inf).squeeze(-1)
    if "top1" in wanted:
        found["top1"] = key_columns[rows.scores.argmax(-1)]
    # The floor has weight exp(-1e4) = 0 and, unlike -inf, a product of 0 with it.
    centred = rows.scores.sub_(top.masked_fill(blind.unsqueeze(-1), 0.0)).clamp_(min=-1e4)
    keys = centred.softmax(-1)
    largest = keys.amax(-1)  # 1 / sum_j exp(centred_j), because the largest centred score is 0
    if rows.sink is None:
        share, sink_weight = torch.ones_like(largest), torch.zeros_like(largest)
    else:
        ahead = top.squeeze(-1) - largest.log() - rows.sink
        share, sink_weight = torch.sigmoid(ahead), torch.sigmoid(-ahead)
    if "max" in wanted:
        found["max"] = share * largest
    if "learned_sink" in wanted:
        found["learned_sink"] = sink_weight
    if "entropy" in wanted:
        of_keys = -largest.log() - torch.linalg.vecdot(keys, centred)
        found["entropy"] = (share * of_keys + torch.special.entr(share)).clamp(min=0.0)
    if "mean_distance" in wanted:
        # In fp32 a sum over thousands of columns would be off by more than 1e-4 tokens.
        columns = key_columns.to(_distance_dtype(keys))
        moment, mass = (keys.to(columns.dtype) @ torch.stack([columns, torch.ones_like(columns)], dim=-1)).unbind(-1)
        found["mean_distance"] = query_columns.unsqueeze(-2) - moment / mass
    if marks:
        grid = torch.stack(list(marks.values()), dim=-1).to(keys.dtype)
        masses = (keys.flatten(1, 2) @ grid).reshape(*share.shape, -1) * share.unsqueeze(-1)
        found |= dict(zip(marks, masses.unbind(-1), strict=True))
    return {name: values.masked_fill(blind, _blank(name)) for name, values in found.items()}


def _blank(name: str) -> float:
    return -1 if name == "top1" else torch.nan


def _distance_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # mps has no fp64


def _dtype(name: str, rows: Tensor) -> torch.dtype:
    return {"top1": torch.long, "mean_distance": _distance_dtype(rows)}.get(name, rows.dtype)


def _require_shape(name: str, given: Tensor, *expected: int) -> None:
    if tuple(given.shape) != expected:
        raise InputError(f"{name} has shape {list(given.shape)}, this call needs {list(expected)}")
