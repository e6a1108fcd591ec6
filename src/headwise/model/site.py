"""A site: one attention module of a model, what was measured of it, and what may be done there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from headwise.heads import Head, HeadSet, KVGroup, SiteId

Kind = Literal["self", "cross", "joint"]
Route = Literal["registry", "watched"]
Entering = Literal["rows", "positions", "other"]


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether an operation is safe on a site, as measured when the model was attached; `reason` says why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, slots=True)
class Unserved:
    """A module that seems to attend and became no site: its qualified name, and why."""

    module: str
    reason: str


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One kind of tokens among a site's positions, where there are kinds: `image`, `text`.

    `projection` is the qualified name of the module that takes these positions' z in; None where nothing does, as
    behind the last block that has a use for its text.
    """

    name: str
    projection: str | None


@dataclass(frozen=True)
class Site:
    """One attention module, or one of its calls where it attends more than once in a forward.

    Attributes:
        id: stack, layer and call; its label is `L4`, `encoder.L2`, `L3@1`.
        module: qualified name of the attention module in the attached model.
        kind: `self`, `cross` (keys from another sequence), or `joint` (two kinds of tokens in one attention).
        n_heads, n_kv_heads: query heads and key/value heads.
        qk_dim, head_dim: width of a query/key and of a value (they differ under latent attention).
        d_model: width of what the output projection returns; 0 where no projection was found.
        kernel: name of the attention function that the model chose.
        tower: qualified name of the nearest enclosing pretrained model, or part that takes tokens as one does ("" is
            the attached model itself).
        projection: qualified name of the output projection, where its input is separable into heads.
        gated: the projection's input is not z but z after a gate: `point` matters.
        added: it is not even a gate: something is added to z on its way, so that a z of 0 is not a head's absence.
        columns: `[head, head_dim]` columns of the projection's input that are head h's, where they are not
            the plain `h * head_dim ...` blocks.
        chunked: the module splits its sequence and calls the kernel once per piece.
        route: how its attention is reached. `registry`: through the look-up of attention functions, in every call.
            `watched`: the model computes it in code of its own; its output projection is hooked, and what hooks there
            cannot serve is seen at torch's functions, which are watched while it is asked for.
        entering: what enters the projection is `[batch, position, ...]` (`rows`), or `[position, batch, ...]`
            (`positions`), or has another shape, which does not say which is which (`other`).
        causal: whether a query of this site sees only keys up to itself.
        spans: in a denoiser, the kinds of tokens that its queries are of, in their order; `key_spans` those of its
            keys. Where they go to two projections, `projection` is None and the spans name them.
        joined_in: qualified name of the module that is given the two kinds of tokens of joint attention apart.
        capabilities: `z`, `qk` (queries and keys can be seen), `v`, `rows`, `separable`, `projection`, `cache`,
            each measured.
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
    route: Route = "registry"
    added: bool = False
    entering: Entering = "rows"
    spans: tuple[TokenSpan, ...] = ()
    key_spans: tuple[str, ...] = ()
    joined_in: str | None = None
    capabilities: Mapping[str, Capability] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.id.label

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of tokens that its queries are of, in a denoiser."""
        return tuple(span.name for span in self.spans)

    @property
    def by_span(self) -> bool:
        """Whether the kinds of tokens go to projections of their own."""
        return self.projection is None and any(span.projection is not None for span in self.spans)

    @property
    def takers(self) -> tuple[str, ...]:
        """Qualified names of the modules that take its z in; one, but where the kinds of tokens are projected apart."""
        named = (self.projection,) if not self.by_span else tuple(span.projection for span in self.spans)
        return tuple(name for name in named if name is not None)

    @property
    def heads(self) -> HeadSet:
        return HeadSet(tuple(Head(self.id, index) for index in range(self.n_heads)))

    @property
    def groups(self) -> HeadSet:
        return HeadSet(tuple(KVGroup(self.id, index) for index in range(self.n_kv_heads)), "group")
