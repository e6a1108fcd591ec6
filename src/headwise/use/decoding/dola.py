"""Decoding by contrasting layers: what the last layer says, less what an earlier one would have said.

After Chuang et al. (2023), "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models". No head
is edited; it is what head-based decoding is compared with. One forward. Of candidate layers the one that diverges most
from the last is chosen, for every row and token anew:

    M = argmax_j D(p_N, p_j),     s = log p_N - log p_M,     s = -1000 where p_N(v) < 0.1 max p_N

p_N is softmax of the model's logits; p_j is softmax of the unembedding's logits of the stream before block j, so that
candidate 0 is the embedding. Two variants:

    released   the paper's code: p_j without the final norm, D = KL(m || p_N) + KL(m || p_j)
    normed     p_j through the final norm, D = (KL(p_N || m) + KL(p_j || m)) / 2, the Jensen-Shannon divergence

with m = (p_N + p_j) / 2. Candidates are the even layers of the upper half of the stack (`high`) or of the lower
(`low`); the paper takes a half by task. Where the embedding is tied to the unembedding, candidate 0 says the token that
was just read, so it diverges most and is of no use: name layers, such as `layers=(2, 4)`. The paper's penalty of 1.2 on
repeated tokens is `repetition_penalty=1.2` of `generate`.

transformers 5 loads its DoLa from its hub; this one needs nothing but the model. From the formulas, not from its text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.lens import Lens, lens
from headwise.model.running.rescoring import Streams
from headwise.use.decoding.contrast import checked_share, log_probabilities, plausible
from headwise.use.intervention import Beside, Intervention

RULED_OUT = -1000.0
"""What the paper's code gives to tokens that the filter takes out."""


@dataclass(frozen=True, eq=False, repr=False)
class DoLa(Intervention):
    """`with DoLa()(model): model.generate(..., repetition_penalty=1.2)`.

    Attributes:
        layers: `high` or `low`, the even layers of one half of the stack, or numbers of candidates from 0, the
            embedding, to one less than there are blocks.
        variant: `released`, as in the paper's code, or `normed`.
        relative_top: tokens with less than this share of the likeliest one's p are ruled out.
    """

    id: ClassVar[str] = "dola"
    layers: str | tuple[int, ...] = "high"
    variant: Literal["released", "normed"] = "released"
    relative_top: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.layers, str):
            try:
                layers = tuple(sorted({*self.layers}))
            except TypeError:
                layers = ()
            if not layers or not all(isinstance(each, int) and not isinstance(each, bool) for each in layers):
                raise InputError(f"{self.id}: layers={self.layers!r} is not 'high', 'low' or numbers such as (2, 4)")
            object.__setattr__(self, "layers", layers)
        elif self.layers not in ("high", "low"):
            raise InputError(f"{self.id}: layers={self.layers!r} is not 'high', 'low' or numbers such as (2, 4)")
        if self.variant not in ("released", "normed"):
            raise InputError(f"{self.id}: variant={self.variant!r} is not one of released, normed")
        object.__setattr__(self, "relative_top", checked_share(self.relative_top, f"{self.id}: relative_top"))

    def beside(self, model: AttachedModel) -> Beside:
        return _EarlyExits(blocks=self.candidates(model), settings=self)

    def candidates(self, model: AttachedModel) -> tuple[str, ...]:
        """Labels of the blocks before which the streams are taken.

        Raises:
            InputError: layers that the model does not have.
            Refusal: the model has no blocks.
        """
        stack = model.table.stacks[0]
        blocks = sorted(id for id in map(SiteId.parse, model.table.sublayers.blocks) if id.stack == stack)
        if not blocks:
            raise Refusal(f"no list of blocks was found in {model.name}, so it has no layers to contrast")
        halves = {"low": range(0, len(blocks) // 2, 2), "high": range(-(-(len(blocks) // 2) // 2) * 2, len(blocks), 2)}
        chosen = halves[self.layers] if isinstance(self.layers, str) else self.layers
        if not chosen:
            raise InputError(
                f"{self.id}: {model.name} has {len(blocks)} blocks and no even one in that half; name layers"
            )
        if min(chosen) < 0 or max(chosen) >= len(blocks):
            raise InputError(
                f"{self.id}: layers={chosen!r} for a model of {len(blocks)} blocks; take 0 to {len(blocks) - 1}"
            )
        return tuple(blocks[each].label for each in chosen)


@dataclass(frozen=True)
class _EarlyExits(Beside):
    """The logits beside are those of early layers of the same forward."""

    blocks: tuple[str, ...] = ()
    settings: DoLa | None = None

    def open(self, model: AttachedModel, given: Mapping[str, Any]) -> AbstractContextManager[Any]:
        assert self.settings is not None
        return model.rescoring(_Contrast(lens(model), self.settings), self.blocks)


@dataclass(frozen=True, eq=False)
class _Contrast:
    lens: Lens
    settings: DoLa

    def __call__(self, logits: Tensor, streams: Streams) -> Tensor:
        normed = self.settings.variant == "normed"
        final = log_probabilities(logits)
        exits = torch.stack([log_probabilities(self.lens.logits(each, normed=normed)) for each in streams.values()])
        apart = (jensen_shannon if normed else released_divergence)(final, exits)
        premature = exits.gather(0, apart.argmax(0)[None, ..., None].expand(1, *final.shape))[0]
        return plausible(final - premature, logits, self.settings.relative_top, RULED_OUT)


def released_divergence(
    final: Float[Tensor, "batch position vocab"], exits: Float[Tensor, "exit batch position vocab"]
) -> Float[Tensor, "exit batch position"]:
    """KL(m || p) + KL(m || q) of log-probabilities, m their mean, in nats: what the paper's code ranks layers by.

    Tokens that the model rules out (-inf) are left aside in both divergences.
    """
    mean = _log_mean(final, exits)
    return (mean.exp() * (2 * mean - final - exits)).masked_fill(final == -math.inf, 0.0).sum(-1)


def jensen_shannon(
    final: Float[Tensor, "batch position vocab"], exits: Float[Tensor, "exit batch position vocab"]
) -> Float[Tensor, "exit batch position"]:
    """(KL(p || m) + KL(q || m)) / 2 of log-probabilities, m their mean, in nats."""
    mean = _log_mean(final, exits)
    parts = final.exp() * (final - mean) + exits.exp() * (exits - mean)
    return parts.masked_fill((final == -math.inf) | (exits == -math.inf), 0.0).sum(-1) / 2


def _log_mean(final: Tensor, exits: Tensor) -> Tensor:
    """log of (p + q) / 2; never of 0, as where both are too small for fp32, which would make nan of the whole sum."""
    return torch.logaddexp(final, exits) - math.log(2)


INTERVENTIONS = (
    InterventionEntry(
        id=DoLa.id,
        title="Contrast the last layer's logits with those of an earlier one",
        page="use/decoding.md#dola",
        paper="Chuang et al., DoLa: Decoding by Contrasting Layers",
        year=2023,
        tier="B",
        status="exact",
        cost="1 forward, and an unembedding per candidate layer",
        made=DoLa,
    ),
)

__all__ = ["INTERVENTIONS", "DoLa", "jensen_shannon", "released_divergence"]
