"""Agreement of several scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.scores import HeadScores, Provenance
from headwise.verify.stability import stability


def scores(means: Sequence[float], seed: int) -> HeadScores:
    values = np.array(means, dtype=float).reshape(1, 1, -1)
    return HeadScores({"main": values}, {"main": (SiteId(layer=0),)}, (f"item-{seed}",), Provenance("test"))


def test_the_mean_over_pairs() -> None:
    found = stability([scores([4, 3, 2, 1], 0), scores([4, 3, 1, 2], 1), scores([1, 2, 3, 4], 2)], k=2)
    assert found.jaccard == pytest.approx((1 + 0 + 0) / 3)
    assert found.spearman == pytest.approx((0.8 - 1.0 - 0.8) / 3)
    # Two sets of 2 of 4: they share 0, 1, 2 heads in 1, 4, 1 of 6 cases.
    assert found.jaccard_by_chance == pytest.approx((0 * 1 + (1 / 3) * 4 + 1 * 1) / 6)
    assert (found.k, found.n_heads, found.pairs) == (2, 4, 3)


def test_scores_that_rank_all_heads_alike_have_no_rank_correlation() -> None:
    alike = stability([scores([1, 1, 1], 0), scores([1, 1, 1], 1)], k=1)
    assert np.isnan(alike.spearman)
    mixed = stability([scores([1, 1, 1], 0), scores([1, 2, 3], 1), scores([1, 2, 3], 2)], k=1)
    assert mixed.spearman == pytest.approx(1.0)


def test_one_score_is_no_comparison() -> None:
    with pytest.raises(InputError, match="2 or more"):
        stability([scores([1, 2], 0)], k=1)
