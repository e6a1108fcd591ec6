"""Score and pattern rows recomputed from what an attention function was given, for chosen heads and queries only.

A kernel hands back z and keeps its pattern to itself. These functions rebuild any rows of it from one `AttentionCall`
by the kernel's own rules, in fp32 (fp64 where the queries are fp64), never more rows than asked for, differentiable
through q, k and v:

    s_ij = softcap(q_i . k_j * scale) + position_bias_ij + mask_ij,    softcap(x) = c * tanh(x / c)
    p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink))

A model that takes the softmax in code of its own shows its s_ij, and then these are what the rows are made of.

Rules read in transformers 5.23: `integrations/sdpa_attention.py`, `flex_attention.py`, `flash_attention.py` with
`modeling_flash_attention_utils.py`, and the eager functions of `models/*/modeling_*.py`. What these rules cannot
rebuild is refused with the reason; whether they hold on a given model is measured when it is attached.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from headwise.errors import InputError, Refusal
from headwise.model.attention.calls import AttentionCall

# Every way models write "masked" lies below this: -inf, the minimum of any float type, also one cast from fp16, -1e9.
MASKED_BELOW = torch.finfo(torch.float16).min / 2

# Some older models hide keys by adding -1e4 to scores of their own. No score of a model comes near it.
OWN_MASKED_BELOW = -9e3

KernelFamily = Literal["eager", "sdpa", "flex", "flash", "other"]


@dataclass(frozen=True, slots=True)
class ScoreRows:
    """Scores before softmax, -inf where masked, and the score of the learned sink where the site has one."""

    scores: Float[Tensor, "batch head query key"]
    sink: Float[Tensor, "batch head query"] | None


@dataclass(frozen=True, slots=True)
class PatternRows:
    """Attention weights over the keys, and the weight of the learned sink where the site has one.

    `weights.sum(-1) + sink` is 1; where no key is visible the weights are 0.
    """

    weights: Float[Tensor, "batch head query key"]
    sink: Float[Tensor, "batch head query"] | None


def score_rows(
    call: AttentionCall,
    heads: Int[Tensor, " head"] | None,
    queries: Int[Tensor, " query"] | Int[Tensor, "batch query"],
) -> ScoreRows:
    """Scores of the chosen query heads and queries against every key of the call.

    Args:
        heads: query heads in the order wanted, repeats allowed; None for all.
        queries: indices into the queries of this call (not columns of the sequence), the same for every row of the
            batch or one choice per row.

    Returns:
        `scores[b, i, t, j]` of `heads[i]` and `queries[t]` (or `queries[b, t]`). A key counts as masked where the mask
        says so or an additive mask is at or below -32752; the columns keep the width of `call.key`, also where the
        kernel crops them.

    Raises:
        InputError: a head or query that the call does not have.
        Refusal: a paged cache, packed sequences, or a mask, sink or bias these rules do not cover.
    """
    refuse_unreadable(call)
    heads = _checked(torch.arange(call.n_heads) if heads is None else heads, call.n_heads, "heads", dims=(1,))
    queries = _checked(queries, call.query.shape[2], "queries", dims=(1, 2)).to(call.query.device)
    n_rows = max(call.query.shape[0], call.key.shape[0])  # learned queries may come with one row for the whole batch
    if queries.ndim == 2 and len(queries) != n_rows:
        raise InputError(f"queries has {len(queries)} rows, expected one per row of the batch, {n_rows}")

    if call.own_scores is not None:
        own = _select(call.own_scores, heads, queries).to(_row_dtype(call))
        return ScoreRows(own.masked_fill(own <= OWN_MASKED_BELOW, -torch.inf), None)
    # Under autocast the product would silently be in half precision.
    with torch.autocast(call.query.device.type, enabled=False):
        query = _select(call.query.expand(n_rows, -1, -1, -1), heads, queries).to(_row_dtype(call))
        owners = owners_of(call, heads, call.n_kv_heads)
        scores = _by_owner(lambda rows, keys: rows @ keys.mT, query * call.scale, call.key, owners)
        softcap = call.options.get("softcap")
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        bias = bias_rows(call, heads, queries, scores.dtype)
        if bias is not None:
            scores += bias
        return ScoreRows(scores, sink_scores(call, heads, queries, scores.dtype))


def bias_rows(
    call: AttentionCall, heads: Int[Tensor, " head"], queries: Int[Tensor, "*batch query"], dtype: torch.dtype
) -> Float[Tensor, "#batch #head #query key"] | None:
    """What is added to q.k: position bias and mask, -inf where masked. None where nothing is added."""
    hidden = _mask_bias(call, heads, queries, dtype)
    position_bias = call.options.get("position_bias")
    if position_bias is None:
        return hidden
    grid = _select(_as_grid(position_bias, call, "position_bias"), heads, queries).to(dtype)
    return grid if hidden is None else grid + hidden


def pattern_rows(rows: ScoreRows) -> PatternRows:
    """Softmax over the keys and the sink; the sink's share is then held apart, so with one the keys sum to less than 1.

    A row with no visible key is 0 everywhere (as in sdpa under a boolean mask; eager functions, whose additive masks
    are finite, spread such a padding row over all keys). It gives gradients of 0, never NaN.
    """
    # A finite floor in place of -inf keeps exp(-inf + inf) out of softmax and of its gradient.
    scores = rows.scores.clamp(min=torch.finfo(rows.scores.dtype).min)
    alive = visible(rows).any(-1)
    if rows.sink is None:
        return PatternRows(scores.softmax(-1) * alive.unsqueeze(-1), None)
    ahead = scores.logsumexp(-1) - rows.sink
    key_share = torch.where(alive, torch.sigmoid(ahead), 0.0)
    sink_weight = torch.where(alive, torch.sigmoid(-ahead), 1.0)
    return PatternRows(scores.softmax(-1) * key_share.unsqueeze(-1), sink_weight)


def mix_values(
    weights: Float[Tensor, "batch head query key"], call: AttentionCall, heads: Int[Tensor, " head"] | None
) -> Float[Tensor, "batch query head head_dim"]:
    """Weighted sums of the values, in the layout kernels return: z of `heads`, in the dtype of `weights`.

    Raises:
        InputError: a head that the call does not have.
        Refusal: query heads that do not divide evenly over the value heads.
    """
    heads = _checked(torch.arange(call.n_heads) if heads is None else heads, call.n_heads, "heads", dims=(1,))
    owners = owners_of(call, heads, int(call.value.shape[1]))
    with torch.autocast(weights.device.type, enabled=False):
        return _by_owner(torch.matmul, weights, call.value, owners).transpose(1, 2)


def visible(rows: ScoreRows) -> Bool[Tensor, "batch head query key"]:
    """Which keys each query may attend to."""
    return rows.scores > -torch.inf


def uniform_pattern(
    seen: Bool[Tensor, "batch head query key"], dtype: torch.dtype
) -> Float[Tensor, "batch head query key"]:
    """Equal weights over the visible keys, summing to 1 (a learned sink gets none); 0 where no key is visible."""
    return seen.to(dtype) / seen.sum(-1, keepdim=True).clamp(min=1)


def row_chunks(
    call: AttentionCall,
    heads: Int[Tensor, " head"] | None,
    queries: Int[Tensor, " query"] | Int[Tensor, "batch query"],
    budget_bytes: int = 8 * 2**20,
) -> Iterator[Int[Tensor, "*batch chunk"]]:
    """Split `queries` so that one chunk's scores stay within `budget_bytes`; a chunk holds one query at least."""
    n_heads = call.n_heads if heads is None else len(heads)
    n_rows = max(call.query.shape[0], call.key.shape[0])
    bytes_per_query = n_rows * n_heads * call.key.shape[2] * _row_dtype(call).itemsize
    step = max(1, budget_bytes // max(1, bytes_per_query))
    for start in range(0, queries.shape[-1], step):
        yield queries[..., start : start + step]


def last_visible_key(call: AttentionCall, queries: Int[Tensor, " query"]) -> int:
    """A bound that costs nothing: no key after it is visible to any of `queries`."""
    if causal_alone(call):
        return min(int(queries.max()), int(call.key.shape[2]) - 1)
    return int(call.key.shape[2]) - 1


def causal_alone(call: AttentionCall) -> bool:
    """Whether nothing hides keys but causality aligned at the first key, which the kernel sees to without a mask."""
    return call.mask is None and kernel_family(call) == "sdpa" and _top_left_causal(call)


def in_row_precision(call: AttentionCall) -> AttentionCall:
    """The same call with q, k, v in the dtype of row computations, so that a sweep over chunks casts them once."""
    dtype = _row_dtype(call)
    return replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def _row_dtype(call: AttentionCall) -> torch.dtype:
    return torch.float64 if call.query.dtype == torch.float64 else torch.float32


def kernel_family(call: AttentionCall) -> KernelFamily:
    """Whose rules for masks and sinks the call goes by."""
    families: tuple[KernelFamily, ...] = ("eager", "sdpa", "flex", "flash")
    return next((family for family in families if family in call.kernel), "other")


def refuse_unreadable(call: AttentionCall) -> None:
    """Raises Refusal where the call does not hold all that its kernel goes by."""
    options, family = call.options, kernel_family(call)
    paged = [name for name in ("cache", "block_table") if options.get(name) is not None]
    if paged or "paged" in call.kernel:
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: with a paged cache the kernel alone sees the earlier keys; "
            "use generate() with a dynamic or static cache"
        )
    sparse = [name for name in ("indices", "block_indices") if options.get(name) is not None]
    if sparse and family not in ("eager", "sdpa"):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: it picks keys by its option {sparse[0]!r} and not by its mask; "
            "load the model with attn_implementation='eager' or 'sdpa'"
        )
    if family == "flash" and call.mask is None and _is_packed(call):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel} for packed sequences (cu_seq_lens or restarting position_ids); "
            "pad the batch, or load the model with attn_implementation='sdpa'"
        )
    if family == "flash" and options.get("position_bias") is not None:
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: whether it honours 'position_bias' is not known; "
            "load the model with attn_implementation='eager' or 'sdpa'"
        )


def _is_packed(call: AttentionCall) -> bool:
    """Flash kernels cut a lone row into sequences where lengths are given or positions do not simply count up."""
    if call.options.get("cu_seq_lens_q") is not None:
        return True
    positions = call.options.get("position_ids")
    if positions is None or call.query.shape[0] != 1 or positions.shape[-1] == 1:
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def _checked(indices: Tensor, size: int, name: str, *, dims: tuple[int, ...]) -> Tensor:
    if indices.ndim not in dims:
        expected = " or ".join(f"{n}-D" for n in dims)
        raise InputError(f"{name} has shape {list(indices.shape)}, expected {expected} indices")
    few = indices.flatten() if indices.numel() <= 64 else torch.stack(indices.aminmax())
    listed = few.tolist()  # the device is waited for once
    low, high = min(listed, default=-1), max(listed, default=-1)
    if low < 0 or high >= size:
        wrong = f"contains {low if low < 0 else high}" if listed else "is empty"
        raise InputError(f"{name} {wrong}, expected some of 0 to {size - 1}")
    return indices


def owners_of(call: AttentionCall, heads: Tensor, n_shared: int) -> list[int]:
    """The key (or value) head that each of `heads` reads: query heads are dealt out in blocks, in order."""
    if call.n_heads % n_shared:
        raise Refusal(f"{call.n_heads} query heads do not divide over {n_shared} key/value heads; rows are not defined")
    share = call.n_heads // n_shared
    return [head // share for head in heads.tolist()]


def _by_owner(
    product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, shared: Tensor, owners: Sequence[int]
) -> Float[Tensor, "batch head query _"]:
    """`product(rows[:, i], shared[:, owners[i]])` with each run of heads of one owner folded into the query axis.

    So key and value heads are never repeated in memory for the query heads that read them, and not even copied where
    the owners count up without a gap (all heads, one head, one group).
    """
    runs = [len(list(run)) for _, run in itertools.groupby(owners)]
    if len(set(runs)) > 1:
        ends = list(itertools.accumulate(runs))
        parts = [
            _by_owner(product, rows[:, end - n : end], shared, owners[end - n : end])
            for n, end in zip(runs, ends, strict=True)
        ]
        return torch.cat(parts, dim=1)
    read = list(owners[:: runs[0]])
    if read == list(range(read[0], read[0] + len(read))):
        shared = shared[:, read[0] : read[0] + len(read)]
    else:
        shared = shared.index_select(1, torch.tensor(read, device=shared.device))
    batch, _, n_queries, width = rows.shape
    folded = rows.reshape(batch, len(read), runs[0] * n_queries, width)
    return product(folded, shared.to(rows.dtype)).reshape(batch, len(owners), n_queries, -1)


def _select(
    grid: Float[Tensor, "batch head query width"], heads: Tensor, queries: Tensor
) -> Float[Tensor, "batch head query width"]:
    """Pick queries, then heads, of a tensor whose axes may also be 1 and stand for all of theirs."""
    if grid.shape[2] > 1 and queries.ndim == 1:
        grid = grid.index_select(2, queries)
    elif grid.shape[2] > 1:
        grid = grid.expand(len(queries), -1, -1, -1)
        rows = torch.arange(len(queries), device=queries.device).unsqueeze(-1)
        grid = grid[rows, :, queries].transpose(1, 2)
    everything = heads.tolist() == list(range(grid.shape[1]))
    return grid if grid.shape[1] == 1 or everything else grid.index_select(1, heads.to(grid.device))


def _as_grid(given: Tensor, call: AttentionCall, name: str) -> Float[Tensor, "batch head query key"]:
    """Line a bias or mask up with the scores by the broadcasting rule, and crop what reaches beyond the keys."""
    n_rows = max(call.query.shape[0], call.key.shape[0])
    n_queries, n_keys = int(call.query.shape[2]), int(call.key.shape[2])
    grid = given.reshape((1,) * (4 - given.ndim) + tuple(given.shape)) if given.ndim < 4 else given
    fits = grid.ndim == 4 and all(
        size in (1, full) for size, full in zip(grid.shape[:3], (n_rows, call.n_heads, n_queries), strict=True)
    )
    if not fits or (grid.shape[3] != 1 and grid.shape[3] < n_keys):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: {name} of shape {list(given.shape)} does not broadcast to "
            f"[{n_rows}, {call.n_heads}, {n_queries}, {n_keys}] (batch, head, query, key)"
        )
    return grid[..., :n_keys]


def _mask_bias(call: AttentionCall, heads: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the mask adds to the chosen scores, broadcastable to them: -inf where masked. None where nothing is."""
    family, mask = kernel_family(call), call.mask
    if isinstance(mask, BlockMask):
        return _hide(~_block_mask_visible(call, mask, heads, queries), dtype)
    if family == "flash":
        return _hide(~_flash_visible(call, queries), dtype)
    if mask is None and family in ("eager", "flex"):
        return None
    if mask is None and family == "sdpa":
        if not _top_left_causal(call):
            return None
        keys = torch.arange(call.key.shape[2], device=queries.device)
        hidden = keys > queries.unsqueeze(-1)
        return _hide(hidden if queries.ndim == 1 else hidden.unsqueeze(1), dtype)
    if not isinstance(mask, Tensor):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: it was given a mask of type {type(mask).__name__} and its own "
            "rule for that is not known; load the model with attn_implementation='sdpa' or 'eager'"
        )
    chosen = _select(_as_grid(mask, call, "the mask"), heads, queries)
    if chosen.dtype == torch.bool and family not in ("eager", "flex"):
        return _hide(~chosen, dtype)
    chosen = chosen.to(dtype)  # eager and flex add whatever they are given, a boolean mask as 0 and 1
    return chosen.masked_fill(chosen <= MASKED_BELOW, -torch.inf)


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _is_causal(call: AttentionCall) -> bool:
    given = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if given is None else given)


def _top_left_causal(call: AttentionCall) -> bool:
    """sdpa without a mask is causal for more than one query, aligned at the first key whatever the number of keys.

    Keys beyond the queries (an empty static cache) are cropped by the kernel; causality hides them here.
    """
    return call.query.shape[2] > 1 and _is_causal(call)


def _flash_visible(call: AttentionCall, queries: Tensor) -> Bool[Tensor, "#batch 1 query key"]:
    """Flash kernels drop padding by a 2-D key mask, then align causality and window at the last query and key kept.

    A query whose own key was dropped returns 0, unless it is the only one: then it sees all that was kept.
    """
    n_queries, n_keys = int(call.query.shape[2]), int(call.key.shape[2])
    mask, causal = call.mask, _is_causal(call)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] > n_keys):
        form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise Refusal(f"rows cannot be rebuilt in {call.kernel}: mask {form}, expected [batch, up to {n_keys} keys]")
    kept = torch.ones(1, n_keys, dtype=torch.bool, device=queries.device) if mask is None else mask.bool()
    n_kept = int(kept.shape[1])
    if mask is not None and not causal and n_queries not in (1, n_kept):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: {n_queries} queries over {n_kept} padded keys, not causal; "
            "there the kernel unpads queries by the keys' mask; load the model with attn_implementation='sdpa'"
        )
    kept = torch.nn.functional.pad(kept, (0, n_keys - n_kept))
    n_rows = max(len(kept), len(queries) if queries.ndim == 2 else 1)
    columns = (n_kept - n_queries + queries).expand(n_rows, -1)
    kept = kept.expand(n_rows, -1)
    rank = kept.cumsum(-1) - 1
    own = columns.clamp(min=0)  # more queries than keys: the first ones lie before every key
    seen = kept.unsqueeze(1).expand(-1, columns.shape[1], -1)
    if mask is not None and n_queries > 1:
        seen = seen & kept.gather(1, own).unsqueeze(-1)
    if causal:
        seen = seen & (columns.unsqueeze(-1) >= torch.arange(n_keys, device=queries.device))
    window = call.options.get("sliding_window")
    if window is not None and n_keys > window:
        seen = seen & ((rank.gather(1, own).unsqueeze(-1) - rank.unsqueeze(1)).abs() < window)
    return seen.unsqueeze(1)


def _block_mask_visible(
    call: AttentionCall, mask: BlockMask, heads: Tensor, queries: Tensor
) -> Bool[Tensor, "#batch #head #query #key"]:
    """Ask the mask's own rule about the chosen queries; its block tables only say where it need not be asked."""
    n_rows, device = max(call.query.shape[0], call.key.shape[0]), queries.device
    seen: Tensor = mask.mask_mod(
        torch.arange(n_rows, device=device).view(-1, 1, 1, 1),
        heads.to(device).view(1, -1, 1, 1),
        queries.view(-1 if queries.ndim == 2 else 1, 1, queries.shape[-1], 1),
        torch.arange(call.key.shape[2], device=device).view(1, 1, 1, -1),
    )
    return seen


def sink_scores(
    call: AttentionCall, heads: Tensor, queries: Tensor, dtype: torch.dtype
) -> Float[Tensor, "batch head query"] | None:
    """The score of the learned sink: one per head (`s_aux`, `module.sinks`) or per head and query (`sinks`)."""
    if kernel_family(call) == "sdpa":  # it has no place for a sink and drops the option
        return None
    options = call.options
    given = (options.get("s_aux"), options.get("sinks"), getattr(call.module, "sinks", None))
    sink = next((candidate for candidate in given if isinstance(candidate, Tensor)), None)
    if sink is None:
        return None
    n_rows = max(call.query.shape[0], call.key.shape[0])
    expected = (n_rows, call.n_heads, call.query.shape[2], 1)
    grid = sink.reshape(1, -1, 1, 1) if sink.numel() == call.n_heads else sink
    if grid.ndim != 4 or any(size not in (1, full) for size, full in zip(grid.shape, expected, strict=True)):
        raise Refusal(
            f"rows cannot be rebuilt in {call.kernel}: learned sinks of shape {list(sink.shape)}, expected "
            f"[{call.n_heads}] or {list(expected)}"
        )
    return _select(grid, heads, queries).to(dtype).squeeze(-1).expand(n_rows, len(heads), queries.shape[-1])
