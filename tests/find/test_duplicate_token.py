"""Earlier occurrences of the same token: closed forms, plain sums over patterns, and planted heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headwise.find import find
from headwise.find.duplicate_token import METHODS, duplicate_token
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted

LIST = [1, 10, 11, 12, 13, 10, 11, 12, 13]  # bos, four tokens, the same again


def test_heads_that_look_one_list_back_have_all(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    """Head k looks k tokens back: the fourth one is on the same token, whose neighbours are on others."""
    with scripted(tiny, lambda head, t: {max(t - head, 0): 1.0}):
        found = by_head(duplicate_token(tiny, made(LIST)))
    torch.testing.assert_close(found[0], (torch.arange(12) == 4).double(), atol=1e-5, rtol=0)


def test_every_earlier_occurrence_counts_and_the_token_itself_does_not(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    ids = [10, 11, 10, 11, 10]
    with scripted(tiny, lambda head, t: dict.fromkeys(range(t + 1), 1 / (t + 1))):
        found = by_head(duplicate_token(tiny, made(ids)))
    expected = (1 / 3 + 1 / 4 + 2 / 5) / 3
    torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-5, rtol=0)


def test_special_tokens_are_neither_query_nor_key(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    with scripted(tiny, lambda head, t: {max(t - 1, 0): 1.0}):
        found = by_head(duplicate_token(tiny, made([1, 1, 10, 10], [1, 1, 10, 11])))
    assert (found[0] - 1).abs().max() < 1e-5
    assert found[1].isnan().all()


def test_padding_with_an_ordinary_token_is_no_occurrence(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    items = replace(made([10, 11, 10], [12, 13, 10, 11, 14, 11]), pad=10)
    with scripted(tiny, lambda head, t: {max(t - 2, 0): 1.0}):
        found = by_head(duplicate_token(tiny, items))
    # Were the padding a token, the first 10 of the short item would come again, and look elsewhere.
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


def test_the_span_of_the_second_saying_says_which_queries_count(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    """Only the last token looks back; in the span of two tokens it is half of the queries, elsewhere a quarter."""
    with scripted(tiny, lambda head, t: {4: 1.0} if t == 8 else {t: 1.0}):
        found = by_head(duplicate_token(tiny, made(LIST, LIST, repeated=[[7, 8], None])))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.25]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_it_is_a_sum_over_the_pattern(
    request: pytest.FixtureRequest, made: Any, pattern: Any, by_head: Any, name: str
) -> None:
    model = request.getfixturevalue(name)
    suffix = (102,) if name == "minilm" else ()
    rows = [[1000, 1001, 1000, 1002, 1000, 1001], [1003, 1003, 1004]]
    rows = rows if suffix else [[each - 980 for each in row] for row in rows]
    found = by_head(duplicate_token(model, made(*rows, suffix=suffix)))
    for row, ids in enumerate(rows):
        weights = pattern(model, [*ids, *suffix])
        earlier = {t: [s for s in range(t) if ids[s] == ids[t]] for t in range(len(ids))}
        per_query = [weights[:, t, keys].sum(-1) for t, keys in earlier.items() if keys]
        torch.testing.assert_close(found[row], torch.stack(per_query).mean(0), atol=1e-5, rtol=0)


def test_the_planted_head_comes_first(organism: Planted, attached: AttachedModel) -> None:
    scores = find(METHODS[0], attached, items=4)
    wanted = organism.truth.heads("duplicate-token")
    ranked = scores.ranked()
    assert scores.top(len(wanted)) == wanted
    assert ranked[len(wanted) - 1].score > 0.99
    assert ranked[len(wanted)].score < 0.5
