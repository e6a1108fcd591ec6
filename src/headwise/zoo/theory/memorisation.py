"""Memorisation rank: how many examples one attention layer can learn by heart with its values alone.

Mahdavi, Liao, Thrampoulidis, "Memorization Capacity of Multi-Head Attention in Transformers", 2024: H heads over
contexts of n tokens memorise of the order of H n examples. With one shared context the count is exact: what T queries
see through random heads spans min(T, H (n - 1) + 1) dimensions, whatever the size of the heads.

    task = MemorisationTask(heads=3, context=5)
    task.rank(queries=40)                                # 13
    layer = MemorisationAttention(task)
    layer.fit(task.draw(13, seed=1))                     # 13 random labels, by least squares: exact
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError

# Singular values below this share of the largest count as zero; those that are zero come out near 1e-16.
RANK_CUTOFF = 1e-12


@dataclass(frozen=True, slots=True)
class MemorisationItems:
    """Queries over the layer's one context, with a random number to remember for each; fp64."""

    query: Float[Tensor, "item d"]
    label: Float[Tensor, " item"]


@dataclass(frozen=True, slots=True)
class MemorisationTask:
    """H = `heads` of size `head_size` over one context of n = `context` random tokens in `d` dimensions.

    Raises InputError unless every number is at least 1.
    """

    heads: int = 3
    context: int = 5
    d: int = 8
    head_size: int = 8

    def __post_init__(self) -> None:
        if min(self.heads, self.context, self.d, self.head_size) < 1:
            raise InputError(f"not every number of {self} is at least 1: choose at least one of each")

    def rank(self, queries: int) -> int:
        """The rank of what `queries` random queries attend to, all heads side by side; the number of labels that fit.

        For n <= d: min(T, H (n - 1) + 1). Each head's rows lie in an affine space of n - 1 dimensions, as they sum to
        1, and that one constant is the same for all heads. For n > d: min(T, H d), since a head then sees the rows
        through d directions, none of which is constant (derived here; the paper has n < d). An upper bound for all
        weights, reached by almost all; also by heads smaller than n - 1, where `guaranteed` is less. Small heads make
        it ill conditioned, and at some size rounding hides it.
        """
        widest = self.heads * (self.context - 1) + 1 if self.context <= self.d else self.heads * self.d
        return min(queries, widest)

    def guaranteed(self, queries: int) -> int:
        """The number of labels that the paper's theorem promises: min(T, H (min(n, head_size) - 1) + 1), for n <= d.

        Raises InputError for n > d, which the theorem leaves out.
        """
        if self.context > self.d:
            raise InputError(f"the theorem needs context <= d, got {self.context} > {self.d}; choose a larger d")
        return min(queries, self.heads * (min(self.context, self.head_size) - 1) + 1)

    def unexplained(self, queries: int) -> float:
        """The mean share of independent Gaussian labels that the best values leave over, 1 - rank / T, exactly.

        Least squares projects T labels without a preferred direction on a space of `rank` dimensions. Raises
        InputError for fewer than one query.
        """
        if queries < 1:
            raise InputError(f"no share of {queries} labels: choose at least one query")
        return 1 - self.rank(queries) / queries

    def draw(self, items: int, *, seed: int) -> MemorisationItems:
        """`items` Gaussian queries with Gaussian labels, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(items, self.d, generator=generator, dtype=torch.float64)
        return MemorisationItems(query, torch.randn(items, generator=generator, dtype=torch.float64))


class MemorisationAttention(nn.Module):
    """Random frozen softmax heads over one context E; only what they write, `ov`, is fitted.

        s_i^(h) = e_i^T KQ^(h) x        p^(h) = softmax(s^(h))        label = sum_h OV^(h) . sum_i p_i^(h) e_i

    KQ^(h) = W_K^T W_Q / sqrt(head_size), of rank `head_size` at most. `ov` starts at zero.
    """

    context: Float[Tensor, "token d"]
    kq: Float[Tensor, "head key_entry query_entry"]
    ov: Float[Tensor, "head d"]

    def __init__(self, task: MemorisationTask, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        maps = (task.heads, task.head_size, task.d)
        w_q = torch.randn(maps, generator=generator, dtype=torch.float64)
        w_k = torch.randn(maps, generator=generator, dtype=torch.float64)
        context = torch.randn(task.context, task.d, generator=generator, dtype=torch.float64)
        # Scores of unit variance: a sum over head_size of products of two sums over d.
        self.register_buffer("kq", w_k.transpose(1, 2) @ w_q / (task.d * math.sqrt(task.head_size)))
        self.register_buffer("context", context)
        self.register_buffer("ov", torch.zeros(task.heads, task.d, dtype=torch.float64))

    def pattern(self, items: MemorisationItems) -> Float[Tensor, "item head token"]:
        """p^(h), each query's attention over the context; rows sum to 1."""
        return torch.einsum("ne,hef,bf->bhn", self.context, self.kq, items.query).softmax(-1)

    def attended(self, items: MemorisationItems) -> Float[Tensor, "item head d"]:
        """sum_i p_i^(h) e_i; with heads and entries side by side this is the matrix of the predicted rank."""
        return self.pattern(items) @ self.context

    def writes(self, items: MemorisationItems) -> Float[Tensor, "item head"]:
        """What each head adds to the label."""
        return torch.einsum("bhe,he->bh", self.attended(items), self.ov)

    def forward(self, items: MemorisationItems) -> Float[Tensor, " item"]:
        return self.writes(items).sum(1)

    def fit(self, items: MemorisationItems) -> None:
        """Sets `ov` to the shortest values that are best in the least squares sense for these labels."""
        seen = self.attended(items).flatten(1)
        # gelsd drops directions below the cut-off: without it, the constant that heads share would be fitted to noise.
        solved = torch.linalg.lstsq(seen, items.label[:, None], rcond=RANK_CUTOFF, driver="gelsd").solution
        self.ov.copy_(solved.view_as(self.ov))


def measured_rank(layer: MemorisationAttention, items: MemorisationItems) -> int:
    """The rank of what these queries attend to: singular values above 1e-12 of the largest."""
    seen = torch.linalg.svdvals(layer.attended(items).flatten(1))
    return int((seen > RANK_CUTOFF * seen[0]).sum())
