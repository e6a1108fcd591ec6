"""A site: one attention module of a model, what was measured of it, and what may be done there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from headwise.heads import Head, HeadSet, KVGroup, SiteId

Kind = Literal["self", "cross"]


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether an operation is safe on a site, as measured when the model was attached; `reason` says why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Site:
    """One attention module, or one of its calls where it attends more than once in a forward.

    Attributes:
        id: stack, layer and call; its label is `L4`, `encoder.L2`, `L3@1`.
        module: qualified name of the attention module in the attached model.
        kind: `self`, or `cross` (keys from another sequence).
        n_heads, n_kv_heads: query heads and key/value heads.
        qk_dim, head_dim: width of a query/key and of a value (they differ under latent attention).
        d_model: width of what the output projection returns; 0 where no projection was found.
        kernel: name of the attention function that the model chose.
        tower: qualified name of the nearest enclosing pretrained model ("" is the attached model itself).
        projection: qualified name of the output projection, where its input is separable into heads.
        gated: the projection's input is not z but z after a gate: `point` matters.
        columns: `[head, head_dim]` columns of the projection's input that are head h's, where they are not
            the plain `h * head_dim ...` blocks.
        chunked: the module splits its sequence and calls the kernel once per piece.
        causal: whether a query of this site sees only keys up to itself.
        capabilities: `z`, `rows`, `separable`, `projection`, `cache`, each measured.
    """

    id: SiteId
    module: str
    kind: Kind
    n_heads: int
    n_kv_heads: int
    qk_dim: int
    head_dim: int
    d_model: int
    kernel: str
    tower: str
    projection: str | None
    gated: bool
    columns: Tensor | None
    chunked: bool
    causal: bool
    capabilities: Mapping[str, Capability] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.id.label

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads(self) -> HeadSet:
        return HeadSet(tuple(Head(self.id, index) for index in range(self.n_heads)))

    @property
    def groups(self) -> HeadSet:
        return HeadSet(tuple(KVGroup(self.id, index) for index in range(self.n_kv_heads)), "group")
