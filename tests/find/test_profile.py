"""Row statistics: closed forms on scripted patterns, plain means over patterns, and planted heads."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from headwise.errors import InputError
from headwise.find import find
from headwise.find.profile import METHODS, profile
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted

LENGTHS = (8, 13)


def spread(head: int, t: int) -> dict[int, float]:
    """Head k is even over itself and the k tokens before, or over all where there are fewer."""
    reach = min(head, t) + 1
    return {t - back: 1 / reach for back in range(reach)}


EXPECTED = {
    "entropy": lambda head, t: log(min(head, t) + 1),
    "max": lambda head, t: 1 / (min(head, t) + 1),
    "sink_mass": lambda head, t: 1 / (t + 1) if t <= head else 0.0,
    "mean_distance": lambda head, t: min(head, t) / 2,
}


@pytest.mark.parametrize("statistic", EXPECTED)
def test_closed_forms(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any, statistic: Any) -> None:
    with scripted(tiny, spread):
        found = by_head(profile(tiny, made(*(range(10, 10 + n) for n in LENGTHS)), statistic=statistic))
    for row, n in enumerate(LENGTHS):
        expected = [sum(EXPECTED[statistic](head, t) for t in range(n)) / n for head in range(12)]
        torch.testing.assert_close(found[row], torch.tensor(expected).double(), atol=1e-4, rtol=0)


def test_distances_ahead_are_negative_in_an_encoder(
    minilm: AttachedModel, made: Any, pattern: Any, by_head: Any
) -> None:
    ids = [101, 7592, 2088, 2003, 2204]
    found = by_head(profile(minilm, made(ids, ids[:3], suffix=(102,)), statistic="mean_distance"))
    weights = pattern(minilm, [*ids, 102])
    places = torch.arange(6).double()
    distances = (weights * (places[:, None] - places)).sum(-1)
    torch.testing.assert_close(found[0], distances[:, :5].mean(-1), atol=1e-4, rtol=0)
    assert found.min() < 0


def test_the_uniform_head_has_most_entropy(organism: Planted, attached: AttachedModel) -> None:
    even = organism.truth.heads("uniform")
    assert find(METHODS[0], attached, items=4).top(1) == even
    one_token = find(METHODS[0], attached, items=4, statistic="max")
    assert min(one_token.mean()["main"].flat) == pytest.approx(one_token.of(next(iter(even))).mean())


def test_distance_of_the_planted_offsets(organism: Planted, attached: AttachedModel) -> None:
    scores = find(METHODS[0], attached, items=4, statistic="mean_distance")
    for offset in (3, 4):
        # The first few tokens rest on the first one, which is nearer.
        (head,) = organism.truth.heads(f"offset-{offset}")
        assert scores.of(head).mean() == pytest.approx(offset, abs=0.25)


def test_an_unknown_statistic_is_refused(tiny: AttachedModel, made: Any) -> None:
    with pytest.raises(InputError, match="statistic='kurtosis' is unknown; choose from entropy"):
        find(METHODS[0], tiny, made([10, 11]), statistic="kurtosis")
