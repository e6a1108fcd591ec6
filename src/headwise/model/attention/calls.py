"""What the seam saw of one call of an attention function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of an attention function, as transformers made it: after rotary embedding and after the cache.

    `mask` is what the kernel was given (bool or additive `[batch, 1 or head, query, key]`, a 2-D key mask for flash
    kernels, a `BlockMask` for flex, or None). `options` are the keyword arguments of the call, untouched: `scaling`,
    `softcap`, `position_bias`, `s_aux`, `is_causal`, `sliding_window`, `dropout` and what else the model passes.
    `kernel` is the name of the base function (`sdpa_attention_forward`, `eager_attention_forward`, ...).
    """

    module: nn.Module
    query: Float[Tensor, "batch head query qk_dim"]
    key: Float[Tensor, "batch kv_head key qk_dim"]
    value: Float[Tensor, "batch kv_head key head_dim"]
    mask: Any
    options: Mapping[str, Any]
    kernel: str

    def of_rows(self, rows: slice) -> AttentionCall:
        """The part of the call that concerns some rows of the batch."""

        def part(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and len(value) == len(self.query) else value

        by_row = ("position_bias", "position_ids", "own_scores")
        per_row = {name: part(self.options[name]) for name in by_row if name in self.options}
        return replace(
            self,
            query=self.query[rows],
            key=self.key[rows],
            value=self.value[rows],
            mask=part(self.mask),
            options={**self.options, **per_row},
        )

    @property
    def n_heads(self) -> int:
        return int(self.query.shape[1])

    @property
    def n_kv_heads(self) -> int:
        return int(self.key.shape[1])

    @property
    def own_scores(self) -> Float[Tensor, "batch head query key"] | None:
        """The scores that the model took its softmax of, where it computes its attention in code of its own."""
        scores: Tensor | None = self.options.get("own_scores")
        return scores

    @property
    def scale(self) -> float:
        """The factor on q.k, by the kernel's own rule: `scaling` if given, else qk_dim ** -0.5."""
        given = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if given is None else given)


def kernel_name(base: Callable[..., Any]) -> str:
    """What an attention function calls itself, also where it is no plain function."""
    return getattr(base, "__name__", type(base).__name__)
