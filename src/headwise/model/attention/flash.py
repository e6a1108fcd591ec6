"""Statistics of rows from the logsumexp of a flash kernel, in memory O(n).

A flash kernel goes through all scores without writing one down, and hands out L_i = log sum_j exp(s_ij) beside its
output. With s_ij = scale q_i . k_j, hidden keys left out, and p_ij = exp(s_ij - L_i):

    a chosen pair    p_ij by its formula, one product of width qk_dim, whatever else is in the row
    entropy          L_i - scale q_i . (sum_j p_ij k_j)     the kernel with V := K
    mass on a span   sum_j p_ij 1[j in span]                the kernel with V := the indicator
    mean distance    i - sum_j p_ij j                       the kernel with V := the positions
    learned sink     its weight is sigmoid(sink - L_i), and the keys hold sigmoid(L_i - sink) of what they had

Values need not be as narrow as a head: q and k are filled up with zeros, which changes no score, so everything that
was asked for comes from one call, V := [K, indicators, positions]. A kernel is called for one or a few KV groups at a
time, all their query heads at once, and, where a mask hides keys, for as many queries as `MASK_BYTES` has room for.

The largest weight and its key are no sums, and are taken from the scores (`swept.strongest`), chunk by chunk.

Kernels: on the CPU `_scaled_dot_product_flash_attention_for_cpu`, in fp32, or fp64 where `mean_distance` is asked
for. On CUDA `_scaled_dot_product_efficient_attention`, in fp32, with the signature of torch 2.13; **that path has not
been run**, for want of a GPU. The flash kernel of CUDA takes half precision only, in which sum_j p_ij k_j would be
rounded to 2^-9 or 2^-11 of itself, and with it the entropy. Half-precision queries and keys are widened first, so what
they lose to the rows in fp64 of the same queries and keys is the rounding of fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import (
    MASKED_BELOW,
    bias_rows,
    causal_alone,
    kernel_family,
    owners_of,
    refuse_unreadable,
    sink_scores,
)
from headwise.model.attention.swept import Question, distance_dtype, no_value, shares, strongest, whole_entropy
from headwise.model.site import Capability

KERNELS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "cuda": "_scaled_dot_product_efficient_attention",
}
"""Operations of torch that hand out a logsumexp, by device."""

SLAB = 2**20
"""Most numbers of q in one call of the kernel, unless one KV group has more: what is worked on stays in the cache."""

LARGE_SLAB = 2**24
"""As `SLAB`, where there is a mask, which is made anew for each slab."""

MASK_BYTES = 32 * 2**20
"""Size of the piece of a mask that is made, as numbers, at a time."""


def flash_can(call: AttentionCall, wanted: frozenset[str]) -> Capability:
    """Whether the statistics come from a kernel's logsumexp; the reason why not. Then they are swept (`swept.py`).

    Raises:
        Refusal: rows of this call cannot be told at all, as in `score_rows`.
    """
    refuse_unreadable(call)
    device = call.query.device.type
    if not hasattr(torch.ops.aten, KERNELS.get(device, "")):
        return Capability(False, f"no kernel of torch on {device} hands out its logsumexp")
    if call.own_scores is not None or not call.query.shape[-1]:
        return Capability(False, "the model makes its scores itself")
    if call.options.get("softcap") is not None:
        return Capability(False, "no kernel caps scores")
    if not wanted - {"max", "top1"}:
        return Capability(False, "the largest weight is no sum over keys")
    if "mean_distance" in wanted and device == "cuda":
        return Capability(False, "mean_distance takes scores in fp64, which the kernel on CUDA does not make")
    if "entropy" in wanted and not _only_hides(call):
        return Capability(False, "the scores have a bias, and its mean under the pattern comes from no kernel")
    return Capability(True)


def from_kernel(
    call: AttentionCall, question: Question, budget_bytes: int
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Every answer by its name, of a call that `flash_can` takes. `budget_bytes` is for the largest scores' chunks."""
    found = {name: question.blank(call, name) for name in question.names}
    total = question.blank(call, "entropy")
    dtype = distance_dtype(call.query) if "mean_distance" in question.wanted else total.dtype
    with torch.autocast(call.query.device.type, enabled=False):  # it would put the kernel in half precision
        causal = _causal_throughout(call, question.queries)
        for slab in _slabs(call, question, SLAB if causal else LARGE_SLAB):
            _answer(call, slab, causal, question, dtype, found, total)
    if question.wanted & {"max", "top1"}:
        top, column = strongest(call, question, budget_bytes)
        blind = top == -torch.inf
        for name, values in {"max": (top - total).exp().clamp(max=1.0), "top1": column}.items():
            if name in question.wanted:
                found[name] = values.masked_fill(blind, no_value(name))
    return found


@dataclass(frozen=True, slots=True)
class _Slab:
    """Some of the chosen heads: their places among these, their numbers, and the KV groups that they read."""

    places: list[int]
    heads: list[int]
    groups: slice


def _slabs(call: AttentionCall, question: Question, size: int) -> Iterator[_Slab]:
    """The chosen heads, group by group; neighbouring groups with as many chosen heads go together within `size`."""
    heads = list(range(call.n_heads)) if question.heads is None else question.heads.tolist()
    owners = owners_of(call, torch.tensor(heads), call.n_kv_heads)
    listed = sorted(range(len(heads)), key=lambda place: owners[place])
    groups = [(owner, list(places)) for owner, places in itertools.groupby(listed, key=lambda place: owners[place])]
    n_rows = max(call.query.shape[0], call.key.shape[0])
    per_head = n_rows * question.queries.shape[-1] * call.query.shape[-1]
    start = 0
    while start < len(groups):
        owner, places = groups[start]
        most = max(1, size // (per_head * len(places)))
        n = 1
        while n < most and start + n < len(groups):
            following, chosen = groups[start + n]
            if following != owner + n or len(chosen) != len(places):
                break
            n += 1
        together = [place for _, chosen in groups[start : start + n] for place in chosen]
        yield _Slab(together, [heads[place] for place in together], slice(owner, owner + n))
        start += n


def _answer(
    call: AttentionCall,
    slab: _Slab,
    causal: bool,
    question: Question,
    dtype: torch.dtype,
    found: dict[str, Tensor],
    total: Tensor,
) -> None:
    """Puts the answers of a slab's heads in `found`; in `total` the logsumexp of their rows, with the learned sink."""
    n_rows, width = max(call.query.shape[0], call.key.shape[0]), int(call.query.shape[-1])
    key = call.key[:, slab.groups].to(dtype).expand(n_rows, -1, -1, -1)
    columns = _feature_columns(question, key)
    values = key if columns is None or "entropy" in question.wanted else key[..., :0]
    if columns is not None:
        values = torch.cat([values, columns.unsqueeze(1).expand(-1, key.shape[1], -1, -1)], dim=-1)
    n_values, wide = values.shape[-1], _width(max(width, values.shape[-1]), key.device)
    query = _taken(call.query, slab.heads, axis=1).to(dtype).expand(n_rows, -1, -1, -1)
    query, keys, values = (_widened(each, wide) for each in (query, key, values))
    heads = torch.tensor(slab.heads, device=query.device)
    places = _run(slab.places)
    for chunk, start, bias in _pieces(call, heads, question.queries, causal, dtype):
        asked = query if causal else _of_queries(query, chunk)
        blind, seen = _sight(bias)
        means, logsumexp = _kernel(
            asked,
            keys[:, :, seen],
            values[:, :, seen],
            None if bias is None else bias[..., seen],
            causal,
            call.scale,
        )
        asked = asked[..., :width]
        sink = sink_scores(call, heads, chunk, dtype)
        share, sink_weight = shares(logsumexp, sink)
        whole = logsumexp if sink is None else torch.logaddexp(logsumexp, sink)
        answers = {"learned_sink": sink_weight} if "learned_sink" in question.wanted else {}
        if "entropy" in question.wanted:
            of_keys = logsumexp - call.scale * _dot(asked, means[..., :width])
            answers["entropy"] = whole_entropy(of_keys, share)
        if columns is not None:
            sums = means[..., n_values - columns.shape[-1] : n_values].unbind(-1)
            answers |= {name: share * sums[index] for index, name in enumerate(question.marks)}
            if "mean_distance" in question.wanted:
                answers["mean_distance"] = question.query_columns[chunk].unsqueeze(-2) - sums[-1]
        for name in question.pairs:
            chosen = question.pairs_of(name, chunk)
            answers[name] = _pair_mass(asked, key, chosen, bias, whole, call.scale, chunk if causal else None)
        here = slice(start, start + chunk.shape[-1])
        total[:, places, here] = whole.to(total.dtype)
        for name, answer in answers.items():
            answer = answer if blind is None else answer.masked_fill(blind, no_value(name))
            found[name][:, places, here] = answer.to(found[name].dtype)


def _feature_columns(question: Question, key: Tensor) -> Float[Tensor, "batch key column"] | None:
    """What is summed over keys beside the keys themselves: spans, and last the positions. None for nothing."""
    columns = [marked.to(key.dtype) for marked in question.marks.values()]
    if "mean_distance" in question.wanted:
        columns.append(question.key_columns.to(key.dtype).expand(len(key), -1))
    return torch.stack(columns, dim=-1) if columns else None


def _causal_throughout(call: AttentionCall, queries: Int[Tensor, "*batch query"]) -> bool:
    """Whether these are all of the call's queries in their order, and only causality hides keys from them."""
    n_queries = call.query.shape[2]
    if call.options.get("position_bias") is not None or not causal_alone(call) or queries.shape != (n_queries,):
        return False
    return torch.equal(queries, torch.arange(n_queries, device=queries.device))


def _pieces(
    call: AttentionCall, heads: Tensor, queries: Int[Tensor, "*batch query"], causal: bool, dtype: torch.dtype
) -> Iterator[tuple[Int[Tensor, "*batch chunk"], int, Float[Tensor, "#batch #head #query key"] | None]]:
    """Some queries, how many came before, and what is added to their scores; None for nothing but causality."""

    def added(chunk: Tensor) -> Tensor | None:
        bias = None if causal else bias_rows(call, heads, chunk, dtype)
        return bias if bias is None else bias.reshape((1,) * (4 - bias.ndim) + bias.shape)

    probe = added(queries[..., :1])
    if probe is None:
        yield queries, 0, None
        return
    step = max(1, MASK_BYTES // (probe.numel() * probe.element_size()))
    for start in range(0, queries.shape[-1], step):
        chunk = queries[..., start : start + step]
        yield chunk, start, added(chunk)


def _sight(bias: Tensor | None) -> tuple[Bool[Tensor, "#batch #head query"] | None, slice]:
    """Which queries see no key; and from which key to which one any is seen, so that the rest is not gone through.

    On other devices than the CPU that is every key: the answer would have to be waited for.
    """
    if bias is None:
        return None, slice(None)
    hidden = bias == -torch.inf
    blind = hidden.all(-1)
    if bias.device.type != "cpu":
        return blind, slice(None)
    seen = (~hidden.flatten(0, 2).all(0)).nonzero()
    return blind, slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Float[Tensor, "batch head query dim"], Float[Tensor, "batch head query"]]:
    """softmax(s) V and log sum exp(s). Rows that see no key mean nothing. Causal: query i sees keys 0 to i."""
    operation = getattr(torch.ops.aten, KERNELS[query.device.type])
    key, value = _for_heads(key, query.shape[1]), _for_heads(value, query.shape[1])
    if query.device.type == "cpu":
        means, logsumexp = operation(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return means, logsumexp
    if bias is not None:  # its rows are to begin at multiples of 16 bytes
        n_keys = bias.shape[-1]
        bias = pad(bias, (0, -n_keys % 16))[..., :n_keys].expand(*query.shape[:3], -1)
    means, logsumexp, *_ = operation(query, key, value, bias, True, 0.0, causal, scale=scale)
    return means, logsumexp[..., : query.shape[2]]  # it comes in a multiple of 32


def _for_heads(shared: Float[Tensor, "batch group key dim"], n_heads: int) -> Float[Tensor, "batch head key dim"]:
    """Keys once for every head that reads them; of a single group without a copy. Not every kernel takes groups."""
    if shared.shape[1] == 1:
        return shared.expand(-1, n_heads, -1, -1)
    return shared.repeat_interleave(n_heads // shared.shape[1], dim=1)


def _pair_mass(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch group key dim"],
    chosen: Int[Tensor, "batch asked slot"],
    bias: Tensor | None,
    total: Float[Tensor, "batch head query"],
    scale: float,
    causal_from: Int[Tensor, " query"] | None,
) -> Float[Tensor, "batch head query"]:
    """sum over the slots of p_ij = exp(s_ij - total_i); `causal_from`: the queries' indices, where later keys are
    hidden by causality alone."""
    n_rows, _, n_queries, width = query.shape
    grouped = query.reshape(n_rows, key.shape[1], -1, n_queries, width)
    mass = torch.zeros_like(total)
    for index in chosen.unbind(-1):  # one slot after another: the keys of all at once would be slots times as large
        there = index >= 0
        keys = key.gather(2, index.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, width)).unsqueeze(2)
        scores = (grouped @ keys.mT)[..., 0] if index.shape[1] == 1 else _dot(grouped, keys)
        scores = scores.flatten(1, 2) * scale
        if bias is not None:
            place = index.clamp(min=0)[:, None, :, None].expand(-1, bias.shape[1], n_queries, 1)
            scores = scores + bias.expand(n_rows, -1, n_queries, -1).gather(-1, place).squeeze(-1)
        if causal_from is not None:
            there = there & (index <= causal_from)
        mass += (scores - total).exp() * there.unsqueeze(1)
    return mass


def _only_hides(call: AttentionCall) -> bool:
    """Whether all that is added to a score is 0, or hides its key."""
    mask, family = call.mask, kernel_family(call)
    if call.options.get("position_bias") is not None:
        return False
    if not isinstance(mask, Tensor) or family == "flash":
        return True
    if mask.dtype == torch.bool and family not in ("eager", "flex"):
        return True
    # Eager functions add a boolean mask as 0 and 1.
    pieces = torch.split(mask.flatten(0, -2), max(1, MASK_BYTES // (4 * mask.shape[-1])))
    return all(bool(((piece == 0) | (piece <= MASKED_BELOW)).all()) for piece in pieces)


def _taken(tensor: Tensor, indices: list[int], *, axis: int) -> Tensor:
    """`tensor` at the indices; a view where these count up."""
    run = _run(indices)
    if isinstance(run, slice):
        return tensor.narrow(axis, run.start, len(indices))
    return tensor.index_select(axis, torch.tensor(indices, device=tensor.device))


def _width(width: int, device: torch.device) -> int:
    """As wide as it must be; on CUDA the next multiple of 8, as its kernel wants it."""
    return width if device.type == "cpu" else -(-width // 8) * 8


def _widened(rows: Tensor, wide: int) -> Tensor:
    """`rows` with zeros put behind up to that width; themselves where they have it (`pad` would copy them)."""
    return rows if rows.shape[-1] == wide else pad(rows, (0, wide - rows.shape[-1]))


def _dot(one: Float[Tensor, "*shape dim"], other: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape"]:
    """Inner products along the last axis. By a product with ones: `sum` takes six times as long on so short an axis."""
    products: Tensor = (one * other) @ one.new_ones(one.shape[-1])
    return products


def _run(indices: list[int]) -> slice | list[int]:
    """The indices as a slice where they count up."""
    first = indices[0]
    return slice(first, first + len(indices)) if indices == list(range(first, first + len(indices))) else indices


def _of_queries(query: Float[Tensor, "batch head query dim"], chunk: Int[Tensor, "*batch chunk"]) -> Tensor:
    if chunk.ndim == 1:
        return query[:, :, chunk]
    return query.gather(2, chunk[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
