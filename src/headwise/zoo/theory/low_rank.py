"""The low-rank bottleneck: which attention patterns a head of a given size can show.

Bhojanapalli et al., "Low-Rank Bottleneck in Multi-head Attention Models", 2020: over n tokens, a head of size n or more
can show every positive pattern, a smaller one cannot. Up to the row shifts that softmax does not see, n - 1 is enough.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError


def head_for_pattern(
    x: Float[Tensor, "token d"], pattern: Float[Tensor, "query key"], size: int
) -> Float[Tensor, "d d"]:
    """KQ of rank `size` or less such that softmax(x KQ x^T) is the pattern, or the nearest in its scores.

    KQ = x^+ S x^+T, S the best approximation of rank `size` of log P without its row means. Exact at
    size >= rank of that matrix, which is at most n - 1; needs n linearly independent tokens.

    Raises InputError if the tokens are dependent, the pattern is no positive row-stochastic [n, n], or size < 0.
    """
    if x.shape[0] > x.shape[1] or int(torch.linalg.matrix_rank(x)) < x.shape[0]:
        raise InputError(f"the {x.shape[0]} tokens of width {x.shape[1]} are dependent; choose independent ones")
    u, s, v = _scores(pattern, x.shape[0], size)
    kept = (u[:, :size] * s[:size]) @ v[:size]
    inverse = torch.linalg.pinv(x)
    kq: Tensor = inverse @ kept @ inverse.T
    return kq


def bottleneck_error(pattern: Float[Tensor, "query key"], size: int) -> float:
    """The least Frobenius error of the scores, row shifts aside, that any head of this size makes of the pattern.

    sqrt(sum_{i > size} s_i^2), s the singular values of log P without its row means; exact (Eckart and Young).

    Raises InputError if the pattern is not positive, square and row-stochastic, or size < 0.
    """
    _, s, _ = _scores(pattern, pattern.shape[0], size)
    return float(s[size:].square().sum().sqrt())


def _scores(pattern: Tensor, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.ones(tokens, dtype=pattern.dtype)
    if pattern.shape != (tokens, tokens) or not bool((pattern > 0).all()) or not pattern.sum(1).allclose(rows):
        raise InputError(
            f"no positive row-stochastic pattern over {tokens} tokens, got shape {list(pattern.shape)}; "
            "give one [query, key] with rows that sum to 1"
        )
    if size < 0:
        raise InputError(f"head size {size} is negative; choose 0 or more")
    scores = pattern.log()
    u, s, v = torch.linalg.svd(scores - scores.mean(1, keepdim=True))
    return u, s, v
