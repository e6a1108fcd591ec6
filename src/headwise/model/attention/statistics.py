"""Statistics of pattern rows with no n x n held: from the kernel's logsumexp, or else in one sweep over queries.

For a row p over keys j at columns c_j, seen from the query at column c_i, each `[batch, head, query]`:

    entropy        -sum_j p_j log p_j, in nats
    max, top1      max_j p_j, and the column c_j where it lies
    sink_mass      p_j of the first attended token of the sequence (Xiao et al., 2024, "attention sink")
    learned_sink   1 - sum_j p_j, the weight of a learned sink; 0 where the site has none
    mean_distance  sum_j p_j (c_i - c_j) / sum_j p_j, in tokens; negative where a head looks ahead
    span_mass      sum of p_j over the keys of a named span
    pair_mass      sum of p_j over keys that are given query by query

Which of the two ways a call goes is `flash_can`'s answer (`flash.py`); `swept.py` is the other one. Swept are: scores
that are edited, capped, or made by the model itself; `entropy` under a bias that does more than hide keys; calls on
devices without such a kernel. Both ways take causal and other masks, sliding windows, padding, shared KV heads and
learned sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.flash import flash_can, from_kernel
from headwise.model.attention.rows import ScoreRows
from headwise.model.attention.swept import Question, no_value, swept

Statistic = Literal["entropy", "max", "top1", "sink_mass", "learned_sink", "mean_distance"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """What was asked for; None otherwise. NaN (`top1`: -1) at invalid queries and where a query sees no key.

    `mean_distance` is fp64, and its scores are, too. What makes it inexact in fp32 is not the sum over positions but
    the scores: an error e in the score of one key moves the mean by p (1 - p) e times the key's distance from it, and a
    sum of 64 products around 25 is off by some 1e-5. At 4096 tokens, in a row that is split between far keys, that was
    4e-3 tokens with everything else in fp64; other ways to sum (positions centred, or split into two digits) changed
    nothing. Even scores rounded once to fp32 gave 0.8e-3. From fp64 scores it agrees with rows in fp64 to 1e-9; edited
    scores, and those that a model makes itself, come as they are.
    """

    entropy: Float[Tensor, "batch head query"] | None
    max: Float[Tensor, "batch head query"] | None
    top1: Int[Tensor, "batch head query"] | None
    sink_mass: Float[Tensor, "batch head query"] | None
    learned_sink: Float[Tensor, "batch head query"] | None
    mean_distance: Float[Tensor, "batch head query"] | None
    span_mass: Mapping[str, Float[Tensor, "batch head query"]]
    pair_mass: Mapping[str, Float[Tensor, "batch head query"]]


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
    pairs: Mapping[str, Int[Tensor, "batch query slot"]] | None = None,
    rows: Callable[[Tensor], ScoreRows] | None = None,
    wanted: frozenset[str] = frozenset(STATISTICS),
    budget_bytes: int = 8 * 2**20,
) -> RowStatistics:
    """Statistics of the rows of the chosen query heads and queries.

    With a learned sink the keys hold less than all of a row: `entropy`, `max` and the masses are of the keys' weights
    as they are, `mean_distance` is normalised by the mass the keys hold.

    Args:
        query_columns, key_columns: where all of the call's queries and keys lie in the (padded) sequence; rising.
        first_key: column of each row's first attended token; where no key of the call has it (it left a sliding
            cache), `sink_mass` is 0.
        valid_queries: for all of the call's queries, False at padding; None if every query counts.
        queries: which of the call's queries, as in `score_rows`; None for all. The result has these, in this order.
        spans: keys that belong to each named span; always computed.
        pairs: for all of the call's queries, the columns of the keys whose mass is wanted, no key twice; -1 for none.
            Columns that no key of the call has hold nothing. Always computed.
        rows: gives the scores of some queries in place of `score_rows` (edited scores); they are overwritten.
        budget_bytes: size of one chunk of scores where they are swept; about four such buffers exist at a time.

    Raises:
        InputError: a statistic that does not exist, or columns, spans or pairs that do not fit the call.
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
    for name, columns in (pairs or {}).items():
        _require_shape(f"pairs {name!r}", columns, n_rows, n_queries, columns.shape[-1])

    queries = torch.arange(n_queries, device=call.query.device) if queries is None else queries
    chosen = {f"pairs {name}": _keys_at(columns, key_columns) for name, columns in (pairs or {}).items()}
    if "sink_mass" in wanted:
        chosen["sink_mass"] = _keys_at(first_key.view(-1, 1, 1), key_columns)
    marks = {f"span {name}": keys for name, keys in spans.items()}
    question = Question(heads, queries, wanted - {"sink_mass"}, marks, chosen, query_columns, key_columns)
    with torch.no_grad():
        if rows is None and flash_can(call, wanted | set(marks) | set(chosen)):
            found = from_kernel(call, question, budget_bytes)
        else:
            found = swept(call, question, rows, budget_bytes)
    if valid_queries is not None:
        valid = valid_queries[:, queries] if queries.ndim == 1 else valid_queries.gather(1, queries)
        for name, values in found.items():
            values.masked_fill_(~valid.unsqueeze(1), no_value(name))
    return RowStatistics(
        **{name: found.get(name) for name in STATISTICS},
        span_mass={name: found[f"span {name}"] for name in spans},
        pair_mass={name: found[f"pairs {name}"] for name in pairs or {}},
    )


def _keys_at(columns: Int[Tensor, "*shape"], key_columns: Int[Tensor, " key"]) -> Int[Tensor, "*shape"]:
    """The call's key that lies at each column; -1 where none does."""
    place = torch.searchsorted(key_columns, columns.contiguous()).clamp(max=len(key_columns) - 1)
    return place.where(key_columns[place] == columns, -1)


def _require_shape(name: str, given: Tensor, *expected: int) -> None:
    if tuple(given.shape) != expected:
        raise InputError(f"{name} has shape {list(given.shape)}, this call needs {list(expected)}")
