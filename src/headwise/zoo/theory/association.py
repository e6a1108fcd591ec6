"""Associative capacity: how many key-value pairs a head holds before they drown one another.

Qiao, "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025, reads linear attention as a
Hebbian memory S = sum_j v_j k_j^T. With random unit keys its mean error grows linearly in the number of pairs. A
softmax head over the same pairs is under no such law (Ramsauer et al., "Hopfield Networks is All You Need", 2021).

    task = AssociationTask(pairs=16, key_size=16)
    task.error                                       # 0.9375
    items = task.draw(2000, seed=0)
    retrieval_error(HebbianHeads()(items), items)    # 0.94
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError


@dataclass(frozen=True, slots=True)
class AssociationItems:
    """Pairs to hold: each head has unit keys of its own, all heads hold the same values."""

    keys: Float[Tensor, "item head pair key"]
    values: Float[Tensor, "item pair value"]


@dataclass(frozen=True, slots=True)
class AssociationTask:
    """N = `pairs` random unit keys of `key_size` = d_k per head, H = `heads`, and N Gaussian values.

    Predicted for `HebbianHeads`, as the ratio E |retrieved - v_j|^2 / E |v_j|^2:

        error = (N - 1) / (H d_k)

    Exact for every N and d_k: the crosstalk into pair j is sum_{i != j} v_i (k_i . k_j), E (k_i . k_j)^2 = 1 / d_k, and
    everything else has mean zero; the crosstalk of H heads with independent keys is independent and is averaged.
    What the paper bounds is the worst case, where error-free retrieval ends at the order of sqrt(d_k) pairs.

    Raises InputError unless every number is at least 1.
    """

    pairs: int
    key_size: int
    value_size: int = 16
    heads: int = 1

    def __post_init__(self) -> None:
        if min(self.pairs, self.key_size, self.value_size, self.heads) < 1:
            raise InputError(f"not every number of {self} is at least 1: choose at least one of each")

    @property
    def error(self) -> float:
        return (self.pairs - 1) / (self.heads * self.key_size)

    def draw(self, items: int, *, seed: int) -> AssociationItems:
        """`items` memories, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(items, self.heads, self.pairs, self.key_size, generator=generator)
        values = torch.randn(items, self.pairs, self.value_size, generator=generator)
        return AssociationItems(keys / keys.norm(dim=-1, keepdim=True), values)


def hebbian_capacity(error: float, *, key_size: int, heads: int = 1) -> int:
    """The most pairs `HebbianHeads` hold at a mean error of at most `error`: floor(1 + error H d_k).

    Raises InputError for a negative error or sizes below 1.
    """
    if error < 0 or key_size < 1 or heads < 1:
        raise InputError(
            f"no capacity for error={error}, key_size={key_size}, heads={heads}: choose error >= 0 and sizes >= 1"
        )
    # A rounding error must not cost a whole pair: (N - 1) / (H d_k) times H d_k can fall just short of N - 1.
    return math.floor(1 + error * heads * key_size + 1e-9)


class HebbianHeads(nn.Module):
    """Linear attention heads, z_j^(h) = sum_i v_i (k_i^(h) . k_j^(h)), averaged over heads; nothing to learn."""

    def memory(self, items: AssociationItems) -> Float[Tensor, "item head value key"]:
        """S^(h) = sum_j v_j k_j^(h)T, the state that a recurrent form of the head would carry."""
        return torch.einsum("bpv,bhpk->bhvk", items.values, items.keys)

    def pattern(self, items: AssociationItems) -> Float[Tensor, "item head query pair"]:
        """k_i . k_j, not normalised: 1 on the diagonal, crosstalk elsewhere."""
        return items.keys @ items.keys.transpose(-1, -2)

    def writes(self, items: AssociationItems) -> Float[Tensor, "item head query value"]:
        """What each head adds to the retrieved values: S^(h) k_j^(h) / H."""
        return torch.einsum("bhvk,bhpk->bhpv", self.memory(items), items.keys) / items.keys.shape[1]

    def forward(self, items: AssociationItems) -> Float[Tensor, "item query value"]:
        return self.writes(items).sum(1)


class SoftmaxHeads(nn.Module):
    """Softmax heads over the same pairs, scores beta k_i . k_j, averaged over heads."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def pattern(self, items: AssociationItems) -> Float[Tensor, "item head query pair"]:
        return (self.beta * items.keys @ items.keys.transpose(-1, -2)).softmax(-1)

    def writes(self, items: AssociationItems) -> Float[Tensor, "item head query value"]:
        """What each head adds to the retrieved values."""
        return self.pattern(items) @ items.values[:, None] / items.keys.shape[1]

    def forward(self, items: AssociationItems) -> Float[Tensor, "item query value"]:
        return self.writes(items).sum(1)


def softmax_error_bound(pairs: int, *, beta: float, overlap: float) -> float:
    """The error ratio that `SoftmaxHeads` do not exceed while no two keys of a head overlap by more than `overlap`.

    The right pair has attention p >= 1 / (1 + (N - 1) exp(-beta (1 - overlap))), and given the keys the mean error is
    (1 - p)^2 plus the squares of the other weights, at most 2 (1 - p)^2 (derived here). d_k does
    not occur in it: at a fixed overlap the number of pairs may grow as exp(beta). Averaging over heads only lowers the
    error. It bounds the mean over values, not each single one.

    Raises InputError unless pairs >= 1, beta >= 0 and -1 <= overlap <= 1.
    """
    if pairs < 1 or beta < 0 or not -1 <= overlap <= 1:
        raise InputError(
            f"no bound for pairs={pairs}, beta={beta}, overlap={overlap}: "
            "choose pairs >= 1, beta >= 0 and an overlap between -1 and 1"
        )
    others = (pairs - 1) * math.exp(-beta * (1 - overlap))
    return 2 * (others / (1 + others)) ** 2


def retrieval_error(retrieved: Float[Tensor, "item query value"], items: AssociationItems) -> float:
    """|retrieved - v|^2 over |v|^2, each summed over all items and pairs first."""
    return float((retrieved - items.values).square().sum() / items.values.square().sum())
