"""A cache of columns that many copies of the same rows share, for runs that begin behind them.

Edits at the last token, or in a span, change no key and no value in front of them. A run for many sets of such edits
needs these columns once, not once per set: a layer joins them with the keys of the run when it is asked, and keeps
nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class SharedLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]  # transformers is not typed everywhere
    """Keys and values of `[row, head, column, dim]` that every copy of the rows has in front of its own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _behind(self.keys, key_states), _behind(self.values, value_states)


def can_be_shared(cache: Any) -> bool:
    """Whether every layer of a cache holds all columns, each where it belongs."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def shared_cache(cache: Any, columns: int) -> DynamicCache:
    """The first columns of a cache that `can_be_shared`, for as many copies of its rows as a run brings."""
    shared = DynamicCache()
    shared.layers = [SharedLayer(layer.keys[:, :, :columns], layer.values[:, :, :columns]) for layer in cache.layers]
    return shared


def _behind(
    shared: Float[Tensor, "row head column dim"], new: Float[Tensor, "batch head query dim"]
) -> Float[Tensor, "batch head key dim"]:
    rows, heads, columns, width = shared.shape
    copies = len(new) // rows
    joined = torch.empty(copies, rows, heads, columns + new.shape[2], width, dtype=new.dtype, device=new.device)
    joined[..., :columns, :] = shared
    joined[..., columns:, :] = new.reshape(copies, rows, *new.shape[1:])
    return joined.flatten(0, 1)
