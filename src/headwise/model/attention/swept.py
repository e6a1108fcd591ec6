"""Statistics of rows from the rows themselves, a few queries at a time: the way for every call.

One chunk of scores is made, summed up and dropped before the next, so no n x n is held. It takes several passes over
every score; where a kernel hands out its logsumexp, `flash.py` needs fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import ScoreRows, in_row_precision, last_visible_key, row_chunks, score_rows


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the rows of one call. What is answered goes by the names in `wanted`, `marks` and `pairs`.

    Attributes:
        heads: query heads; None for all.
        queries: which of the call's queries, one choice for all rows of the batch or one for each.
        wanted: statistics by name.
        marks: keys whose mass is asked for, the same ones for every query.
        pairs: keys whose mass is asked for, query by query: indices into the call's keys, -1 for none. The axis of
            queries is that of the call, or 1 where all queries have the same keys.
        query_columns, key_columns: where all of the call's queries and keys lie in the sequence.
    """

    heads: Int[Tensor, " head"] | None
    queries: Int[Tensor, "*batch query"]
    wanted: frozenset[str]
    marks: Mapping[str, Bool[Tensor, "batch key"]]
    pairs: Mapping[str, Int[Tensor, "batch asked slot"]]
    query_columns: Int[Tensor, " query"]
    key_columns: Int[Tensor, " key"]

    @property
    def names(self) -> frozenset[str]:
        return self.wanted | set(self.marks) | set(self.pairs)

    def blank(self, call: AttentionCall, name: str) -> Tensor:
        """Where an answer is put. Allocated before the chunks: between their buffers it would keep the heap large."""
        n_rows = max(call.query.shape[0], call.key.shape[0])
        n_heads = call.n_heads if self.heads is None else len(self.heads)
        dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        dtype = {"top1": torch.long, "mean_distance": distance_dtype(call.query)}.get(name, dtype)
        return torch.empty((n_rows, n_heads, self.queries.shape[-1]), dtype=dtype, device=call.query.device)

    def pairs_of(self, name: str, queries: Int[Tensor, "*batch chunk"]) -> Int[Tensor, "batch asked slot"]:
        """The chosen keys of some queries of the call."""
        pairs = self.pairs[name]
        if pairs.shape[1] == 1:
            return pairs
        if queries.ndim == 1:
            return pairs[:, queries]
        return pairs.gather(1, queries.unsqueeze(-1).expand(-1, -1, pairs.shape[2]))


def distance_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # mps has no fp64


def swept(
    call: AttentionCall, question: Question, rows: Callable[[Tensor], ScoreRows] | None, budget_bytes: int
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Every answer by its name. `rows` gives scores in place of `score_rows`; they are overwritten.

    For `mean_distance` the scores are made in fp64 (see `RowStatistics`), unless `rows` gives them.
    """
    found = {name: question.blank(call, name) for name in question.names}
    exact = call.query.to(distance_dtype(call.query)) if "mean_distance" in question.wanted and not rows else call.query
    for chunk, start, scored in _chunks(replace(call, query=exact), question, rows, budget_bytes):
        for name, values in _measured(scored, chunk, question).items():
            found[name][:, :, start : start + chunk.shape[-1]] = values
    return found


def strongest(
    call: AttentionCall, question: Question, budget_bytes: int
) -> tuple[Float[Tensor, "batch head query"], Int[Tensor, "batch head query"]]:
    """The largest score of each row, before softmax, and the column of its key; -inf where no key is visible."""
    top, column = question.blank(call, "max"), question.blank(call, "top1")
    for chunk, start, scored in _chunks(call, question, None, budget_bytes):
        here = slice(start, start + chunk.shape[-1])
        top[:, :, here] = scored.scores.amax(-1)
        column[:, :, here] = question.key_columns[scored.scores.argmax(-1)]
    return top, column


def _chunks(
    call: AttentionCall, question: Question, rows: Callable[[Tensor], ScoreRows] | None, budget_bytes: int
) -> Iterator[tuple[Int[Tensor, "*batch chunk"], int, ScoreRows]]:
    """Some of the queries, how many came before, and their scores as far as the last key that any of them sees."""
    call = in_row_precision(call)
    start = 0
    for chunk in row_chunks(call, question.heads, question.queries, budget_bytes):
        n_seen = int(call.key.shape[2]) if rows else last_visible_key(call, chunk) + 1
        narrow = replace(call, key=call.key[:, :, :n_seen], value=call.value[:, :, :n_seen])
        yield chunk, start, rows(chunk) if rows else score_rows(narrow, question.heads, chunk)
        start += chunk.shape[-1]


def _measured(
    rows: ScoreRows, chunk: Int[Tensor, "*batch chunk"], question: Question
) -> dict[str, Float[Tensor, "batch head chunk"]]:
    """The answers for one chunk; overwrites its scores.

    Works on k = softmax over the keys alone: p = a k, with a the share that a learned sink leaves to the keys.
    """
    wanted, n_seen = question.wanted, rows.scores.shape[-1]
    found: dict[str, Tensor] = {}
    top = rows.scores.amax(-1, keepdim=True)
    blind = (top == -torch.inf).squeeze(-1)
    if "top1" in wanted:
        found["top1"] = question.key_columns[rows.scores.argmax(-1)]
    # The floor has weight exp(-1e4) = 0 and, unlike -inf, a product of 0 with it.
    centred = rows.scores.sub_(top.masked_fill(blind.unsqueeze(-1), 0.0)).clamp_(min=-1e4)
    keys = centred.softmax(-1)
    largest = keys.amax(-1)  # 1 / sum_j exp(centred_j), because the largest centred score is 0
    share, sink_weight = shares(top.squeeze(-1) - largest.log(), rows.sink)
    if "max" in wanted:
        found["max"] = share * largest
    if "learned_sink" in wanted:
        found["learned_sink"] = sink_weight
    if "entropy" in wanted:
        found["entropy"] = whole_entropy(-largest.log() - torch.linalg.vecdot(keys, centred), share)
    if "mean_distance" in wanted:
        columns = question.key_columns[:n_seen].to(distance_dtype(keys))
        moment, mass = (keys.to(columns.dtype) @ torch.stack([columns, torch.ones_like(columns)], dim=-1)).unbind(-1)
        found["mean_distance"] = question.query_columns[chunk].unsqueeze(-2) - moment / mass
    if question.marks:
        grid = torch.stack([marked[:, :n_seen] for marked in question.marks.values()], dim=-1).to(keys.dtype)
        masses = (keys.flatten(1, 2) @ grid).reshape(*share.shape, -1) * share.unsqueeze(-1)
        found |= dict(zip(question.marks, masses.unbind(-1), strict=True))
    for name in question.pairs:
        chosen = question.pairs_of(name, chunk)
        inside = (chosen >= 0) & (chosen < n_seen)  # beyond: hidden from the whole chunk
        index = chosen.where(inside, 0).unsqueeze(1).expand(*keys.shape[:3], -1)
        found[name] = (keys.gather(-1, index) * inside.unsqueeze(1)).sum(-1) * share
    return {name: values.masked_fill(blind, no_value(name)) for name, values in found.items()}


def shares(
    logsumexp: Float[Tensor, "batch head query"], sink: Float[Tensor, "batch head query"] | None
) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"]]:
    """What the keys and a learned sink hold of each row; 1 and 0 without one."""
    if sink is None:
        return torch.ones_like(logsumexp), torch.zeros_like(logsumexp)
    ahead = logsumexp - sink
    return torch.sigmoid(ahead), torch.sigmoid(-ahead)


def whole_entropy(
    of_keys: Float[Tensor, "batch head query"], share: Float[Tensor, "batch head query"]
) -> Float[Tensor, "batch head query"]:
    """-sum_j p_j log p_j over the keys, p = share x softmax, from the entropy of the softmax."""
    entropy: Tensor = share * of_keys + torch.special.entr(share)
    return entropy.clamp(min=0.0)


def no_value(name: str) -> float:
    """What stands where a query sees no key, or counts for nothing."""
    return -1 if name == "top1" else torch.nan
