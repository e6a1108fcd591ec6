"""Whether a method finds the same heads again: scores from several seeds, or models, held against one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from headwise.errors import InputError
from headwise.scores import HeadScores


@dataclass(frozen=True, slots=True)
class Stability:
    """Agreement of every pair of several scores, on the mean of the pairs.

    Attributes:
        jaccard: overlap of the top `k` heads, shared ones over all; `jaccard_by_chance` that of two sets of `k` drawn
            at random.
        spearman: rank correlation of all heads; by chance it is 0. NaN if no pair has one; pairs without one (all heads
            alike) are left out.
    """

    jaccard: float
    jaccard_by_chance: float
    spearman: float
    k: int
    n_heads: int
    pairs: int


def stability(scores_by_seed: Sequence[HeadScores], k: int) -> Stability:
    """How well scores of the same method agree.

    Raises:
        InputError: fewer than two scores; `k` out of range; scores without a head in common.
    """
    if len(scores_by_seed) < 2:
        raise InputError(f"stability compares scores of several seeds, 2 or more; it was given {len(scores_by_seed)}")
    found = [one.compare(other, k) for one, other in combinations(scores_by_seed, 2)]
    ranks = [each.spearman for each in found if np.isfinite(each.spearman)]
    return Stability(
        jaccard=float(np.mean([each.jaccard for each in found])),
        jaccard_by_chance=float(np.mean([each.jaccard_by_chance for each in found])),
        spearman=float(np.mean(ranks)) if ranks else float("nan"),
        k=k,
        n_heads=min(each.n_heads for each in found),
        pairs=len(found),
    )
