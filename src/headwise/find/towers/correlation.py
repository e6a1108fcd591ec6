"""Correlations along the last axis, of values and of ranks, NaN where one side is constant; and how sure a mean is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from headwise.errors import InputError

ROUNDING = 1e-6
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` values, and the percentile bootstrap interval of it."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Float[np.ndarray, " n"], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of values and its bootstrap interval; NaN are left out.

    Raises `InputError` for no values, and a level that is not between 0 and 1.
    """
    there = np.asarray(values, dtype=np.float64)
    there = there[np.isfinite(there)]
    if not there.size or not 0 < level < 1 or draws < 1:
        raise InputError(
            f"{there.size} values, level={level}, draws={draws}: give values, a level between 0 and 1, and draws"
        )
    generator = np.random.default_rng(seed)
    means = np.array([there[generator.integers(there.size, size=there.size)].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(there.mean()), float(low), float(high), there.size)


def pearson(x: Float[Tensor, "*row n"], y: Float[Tensor, "*row n"]) -> Float[Tensor, "*row"]:
    """Pearson's correlation, in float64. The other axes are broadcast."""
    (x, x_spread), (y, y_spread) = _centred(x), _centred(y)
    return (x * y).sum(-1) / (x_spread * y_spread)


def spearman(x: Float[Tensor, "*row n"], y: Float[Tensor, "*row n"]) -> Float[Tensor, "*row"]:
    """Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _centred(values: Float[Tensor, "*row n"]) -> tuple[Float[Tensor, "*row n"], Float[Tensor, "*row"]]:
    """Values less their mean, and the length of that; NaN where they differ by the rounding of fp32 alone."""
    values = values.double()
    centred = values - values.mean(-1, keepdim=True)
    spread = centred.norm(dim=-1)
    return centred, torch.where(spread > ROUNDING * values.norm(dim=-1), spread, torch.nan)


def _ranks(values: Float[Tensor, "*row n"]) -> Float[Tensor, "*row n"]:
    return torch.from_numpy(stats.rankdata(values.detach().cpu().double().numpy(), axis=-1))
