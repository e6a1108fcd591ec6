"""Fixed offsets: closed forms on scripted patterns, plain sums over patterns, and planted heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headwise as hw
from headwise.errors import InputError
from headwise.find import find
from headwise.find.offset import METHODS, mass_at_offset
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted


def back(head: int, t: int) -> dict[int, float]:
    """Head k looks k tokens back, and at the first token where the text is too short for that."""
    return {max(t - head, 0): 1.0}


@pytest.mark.parametrize("offset", [0, 1, 2, 5])
def test_the_head_that_looks_so_far_back_has_all(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any, offset: int
) -> None:
    n = 11
    items = made(range(10, 10 + n), range(10, 10 + n + 4))
    with scripted(tiny, back):
        found = by_head(mass_at_offset(tiny, items, offset=offset))
    # A head that looks further back is on the first token when t = offset, and meets it once among n - offset queries.
    for row, length in enumerate((n, n + 4)):
        once = 1 / (length - offset)
        expected = [1.0 if k == offset else once if k > offset else 0.0 for k in range(12)]
        torch.testing.assert_close(found[row], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_half_the_mass_is_half_the_score(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    with scripted(tiny, lambda head, t: {t: 0.25, t - 3: 0.75} if t >= 3 else {t: 1.0}):
        found = by_head(mass_at_offset(tiny, made(range(10, 20)), offset=3))
    torch.testing.assert_close(found, torch.full_like(found, 0.75), atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [-1, 0, 2])
def test_it_is_a_diagonal_of_the_pattern_in_an_encoder(
    minilm: AttachedModel, made: Any, pattern: Any, by_head: Any, offset: int
) -> None:
    rows = [[101, 7592, 2088, 2003, 2204], [101, 2023, 3899, 2038]]
    found = by_head(mass_at_offset(minilm, made(*rows, suffix=(102,)), offset=offset))
    for row, ids in enumerate(rows):
        weights = pattern(minilm, [*ids, 102])
        pairs = [(t, t - offset) for t in range(len(ids)) if 0 <= t - offset < len(ids) + 1]
        expected = torch.stack([weights[:, t, s] for t, s in pairs]).mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [2, 3, 4])
def test_the_planted_head_comes_first(organism: Planted, attached: AttachedModel, offset: int) -> None:
    scores = find(METHODS[0], attached, items=4, offset=offset)
    planted_heads = organism.truth.heads(f"offset-{offset}")
    first, *others = scores.ranked()
    assert scores.top(len(planted_heads)) == planted_heads
    assert first.score > 0.99
    assert others[0].score < 0.5


def test_an_item_shorter_than_the_offset_has_no_score(tiny: AttachedModel, made: Any, by_head: Any) -> None:
    found = by_head(mass_at_offset(tiny, made([10, 11, 12], range(10, 20)), offset=5))
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


@pytest.mark.parametrize("offset", [1.0, True, "2"])
def test_an_offset_is_a_whole_number(tiny: AttachedModel, made: Any, offset: Any) -> None:
    with pytest.raises(InputError, match=r"offset=.* must be a whole number"):
        find(METHODS[0], tiny, made([10, 11, 12]), offset=offset)


def test_the_default_is_two_back(tiny: AttachedModel, made: Any) -> None:
    items = made(range(10, 20))
    default, two = find(METHODS[0], tiny, items), find(METHODS[0], tiny, items, offset=2)
    assert isinstance(default, hw.HeadScores)
    assert (default.values["main"] == two.values["main"]).all()
