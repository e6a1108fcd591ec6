"""The token before: closed forms on scripted patterns, and planted heads."""

from __future__ import annotations

from typing import Any

import torch

from headwise.find import find
from headwise.find.previous_token import METHODS, previous_token
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted


def test_the_mass_on_the_token_before_is_the_score(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    """Head k puts k twentieths on the token before and the rest on itself."""
    items = made(range(10, 18), range(10, 23))
    with scripted(tiny, lambda head, t: {t - 1: head / 20, t: 1 - head / 20} if t else {t: 1.0}):
        found = by_head(previous_token(tiny, items))
    torch.testing.assert_close(found, (torch.arange(12).double() / 20).expand(2, -1), atol=1e-5, rtol=0)


def test_a_head_that_looks_two_back_or_rests_has_what_falls_there(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    n = 9
    with scripted(tiny, lambda head, t: {max(t - 2, 0): 1.0} if head % 2 else {0: 1.0}):
        found = by_head(previous_token(tiny, made(range(10, 10 + n))))
    # Both are on the first token at t = 1, the one query of n - 1 where that is the token before.
    torch.testing.assert_close(found, torch.full_like(found, 1 / (n - 1)), atol=1e-5, rtol=0)


def test_the_planted_heads_come_first(organism: Planted, attached: AttachedModel) -> None:
    scores = find(METHODS[0], attached, items=4)
    wanted = organism.truth.heads("previous-token")
    ranked = scores.ranked()
    assert scores.top(len(wanted)) == wanted
    assert ranked[len(wanted) - 1].score > 0.99
    assert ranked[len(wanted)].score < 0.5
