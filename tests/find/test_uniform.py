"""Overlap with equal attention: closed forms, plain sums over patterns, windows, and planted heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headwise as hw
from headwise.find import find
from headwise.find.uniform import METHODS, uniform
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted

LENGTHS = (8, 13)


def test_equal_attention_has_one_and_single_tokens_have_their_share(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    """Even heads are uniform, odd ones on one token each."""
    with scripted(tiny, lambda head, t: {0: 1.0} if head % 2 else dict.fromkeys(range(t + 1), 1 / (t + 1))):
        found = by_head(uniform(tiny, made(*(range(10, 10 + n) for n in LENGTHS))))
    for row, n in enumerate(LENGTHS):
        single = sum(1 / (t + 1) for t in range(1, n)) / (n - 1)  # the first token has no choice
        expected = torch.tensor([single if head % 2 else 1.0 for head in range(12)]).double()
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_it_is_one_less_the_total_variation(
    request: pytest.FixtureRequest, made: Any, pattern: Any, by_head: Any, name: str
) -> None:
    model = request.getfixturevalue(name)
    suffix, shift = ((102,), 1000) if name == "minilm" else ((), 0)
    rows = [[shift + each for each in row] for row in (range(10, 16), range(30, 39))]
    found = by_head(uniform(model, made(*rows, suffix=suffix)))
    for row, ids in enumerate(rows):
        weights = pattern(model, [*ids, *suffix])
        n = weights.shape[-1]
        seen = torch.ones(n, n).bool() if suffix else torch.ones(n, n).tril().bool()
        even = seen.double() / seen.sum(-1, keepdim=True)
        overlap = 1 - (weights - even).abs().sum(-1) / 2
        expected = overlap[:, : len(ids)] if suffix else overlap[:, 1:]
        torch.testing.assert_close(found[row], expected.mean(-1), atol=1e-5, rtol=0)


def test_a_window_hides_what_is_beyond_it(made: Any) -> None:
    """Where scores are all equal, attention is even over the window, and so uniform."""
    with hw.load("zoo:tiny-mistral") as model:
        window = model.model.config.sliding_window
        items = made(range(10, 10 + 3 * window))
        with model.editing(hw.edit.set(model.heads("main"), 0.0, "score")):
            found = uniform(model, items)
            with model.reading(hw.read.rows("L0", queries=[-1])) as got:
                row = torch.tensor([items.items[0].prompt])
                model(input_ids=row)
    assert (got.rows["L0"] > 0).sum(-1).eq(window).all()
    for values in found.values():
        torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)


def test_the_planted_head_comes_first(organism: Planted, attached: AttachedModel) -> None:
    scores = find(METHODS[0], attached, items=4)
    assert scores.top(1) == organism.truth.heads("uniform")
    assert scores.ranked()[0].score > 0.999
    for role in ("sink", "previous-token", "offset-3"):
        assert all(scores.of(head).mean() < 0.2 for head in organism.truth.heads(role))


def test_one_token_gives_no_score(tiny: AttachedModel, made: Any, by_head: Any) -> None:
    found = by_head(uniform(tiny, made([10], [10, 11])))
    assert found[0].isnan().all()
    assert not found[1].isnan().any()
