"""The first token: closed forms on scripted patterns, plain means over patterns, and planted heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.find import find
from headwise.find.sink import METHODS, sink
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted


def test_the_mass_on_the_first_token_is_the_score(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    """Head k puts k twentieths on the first token and the rest on itself; the first row has no choice."""
    rows = [range(10, 18), range(10, 23)]
    with scripted(tiny, lambda head, t: {0: head / 20, t: 1 - head / 20} if t else {t: 1.0}):
        found = by_head(sink(tiny, made(*rows)))
    for row, ids in enumerate(rows):
        expected = (1 + (len(ids) - 1) * torch.arange(12).double() / 20) / len(ids)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_the_second_token_is_no_sink(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    with scripted(tiny, lambda head, t: {min(t, 1): 1.0}):
        found = by_head(sink(tiny, made(range(10, 18), range(10, 23))))
    torch.testing.assert_close(found, torch.tensor([[1 / 8], [1 / 13]]).double().expand(2, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_it_is_the_mean_of_the_first_column(
    request: pytest.FixtureRequest, made: Any, pattern: Any, by_head: Any, name: str
) -> None:
    model = request.getfixturevalue(name)
    suffix, shift = ((102,), 1000) if name == "minilm" else ((), 0)
    rows = [[shift + each for each in row] for row in (range(10, 16), range(30, 39))]
    found = by_head(sink(model, made(*rows, suffix=suffix)))
    for row, ids in enumerate(rows):
        expected = pattern(model, [*ids, *suffix])[:, : len(ids), 0].mean(-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_the_planted_head_rests_on_the_first_token_and_random_ones_do_not(
    organism: Planted, attached: AttachedModel
) -> None:
    scores = find(METHODS[0], attached, items=4)
    means = {each.head.label: each.score for each in scores.ranked()}
    assert all(means[label] > 0.99 for label in organism.truth.heads("sink").labels)
    known = {each.head for each in organism.truth.heads_known}
    assert max(score for label, score in means.items() if label not in known) < 0.7
    for role in ("uniform", "previous-token", "offset-3"):
        assert all(means[label] < 0.2 for label in organism.truth.heads(role).labels)
