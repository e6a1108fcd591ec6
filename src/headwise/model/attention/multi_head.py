"""Torch's own multi-head attention in one call, projections and all, laid out as an attention call.

`F.multi_head_attention_forward` projects its inputs, attends, and projects z, and no function of torch that it is made
of can be seen from outside. It is therefore called a second time with the identity for every projection, on queries,
keys and values that were projected beforehand: what it then returns is z, by its own arithmetic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwise.model.attention.layouts import LaidOut

KERNEL = "multi_head"

_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)


def multi_head_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LaidOut | None:
    """A call of `F.multi_head_attention_forward`, laid out; None for one that adds keys of its own, or has no batch."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    adds_keys = given["add_zero_attn"] or any(given[name] is not None for name in _ADDED)
    if given["query"].dim() != 3 or adds_keys:
        return None
    n_heads, (_, n_rows, width) = given["num_heads"], given["query"].shape
    query, key, value = (
        _by_head(functional.linear(given[name], weight, bias), n_heads)
        for name, weight, bias in zip(("query", "key", "value"), *_projections(given), strict=True)
    )
    identity = torch.eye(width, dtype=query.dtype, device=query.device)
    identities = dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"), identity)
    bare = {**given, **identities, **dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))}

    def run(*edited: Tensor) -> tuple[Tensor, Any]:
        flat = {name: _by_position(x) for name, x in zip(("query", "key", "value"), edited, strict=True)}
        z, pattern = func(**{**bare, **flat, "use_separate_proj_weight": True})
        same = all(now is then for now, then in zip(edited, (query, key, value), strict=True))
        z = _by_head(z, n_heads).transpose(1, 2)
        return z, func(**given) if same else (projected(z), pattern)

    def projected(z: Tensor) -> Tensor:
        return functional.linear(_by_position(z.transpose(1, 2)), given["out_proj_weight"], given["out_proj_bias"])

    return LaidOut(
        kernel=KERNEL,
        query=query,
        key=key,
        value=value,
        mask=_mask(given, n_rows, n_heads, query),
        options={"is_causal": False, "dropout": given["dropout_p"] if given["training"] else 0.0},
        run=run,
        z_back=lambda z, output: (projected(z), *output[1:]),
    )


_ADDED = ("bias_k", "bias_v", "static_k", "static_v")


def _projections(given: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of queries, keys and values."""
    if given["use_separate_proj_weight"]:
        weights = tuple(given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    else:
        weights = given["in_proj_weight"].chunk(3)
    bias = given["in_proj_bias"]
    return weights, (None, None, None) if bias is None else bias.chunk(3)


def _mask(given: Mapping[str, Any], n_rows: int, n_heads: int, like: Tensor) -> Tensor:
    """What is added to the scores: padding, and the mask of queries and keys; in truth values True hides."""
    total = like.new_zeros(1, 1, 1, 1)
    for name in ("key_padding_mask", "attn_mask"):
        mask = given[name]
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
        if name == "key_padding_mask":
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.reshape(n_rows, n_heads, *mask.shape[1:])
        total = total + mask
    return total


def _by_head(x: Tensor, n_heads: int) -> Tensor:
    """`[position, batch, head * dim]` to `[batch, head, position, dim]`."""
    return x.reshape(*x.shape[:2], n_heads, -1).permute(1, 2, 0, 3)


def _by_position(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).flatten(2)
