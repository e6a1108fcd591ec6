"""Memory and context heads: against runs by hand, and where a model was made of both kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find import find, method
from headwise.find.memory_context import memory_context
from headwise.find.search import own_probe
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.encoding import ItemSet
from headwise.zoo.planted import Planted, planted

ROWS = (
    ([1, 9, 10, 11, 12], [1, 9, 30, 11, 12], [20], [[21]]),
    (
        [1, 9, 40, 41, 42, 43, 44, 9],
        [1, 9, 40, 51, 42, 43, 44, 9],
        [22, 23, 24],
        [[22, 25]],
    ),  # at the second token
    ([1, 33, 34], [1, 35, 34], [27], [[28]]),
)
TRUST = ({"trust": "memory"}, {"trust": "context"}, {"trust": "memory"})
REMEMBERED, TOLD, PLACE = (20, 25, 27), (21, 23, 28), (0, 1, 0)
LAST = SiteId(layer=2)


@pytest.mark.parametrize("heads", ["memory", "context"])
@pytest.mark.parametrize("by", ["difference", "own"])
def test_what_a_head_brings_is_what_the_logits_lose(
    tiny: AttachedModel,
    twinned: Callable[..., ItemSet],
    last_head_patched: Callable[..., Tensor],
    heads: Any,
    by: Any,
) -> None:
    items = twinned(*ROWS, attributes=TRUST)
    found = memory_context(tiny, items, heads=heads, by=by)[LAST]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, item in enumerate(items):
        own, other = (REMEMBERED, TOLD) if heads == "memory" else (TOLD, REMEMBERED)
        for head in range(4):
            clean, patched = (last_head_patched(tiny, item, which)[PLACE[row]] for which in (None, head))
            lost = (clean - patched).double()
            expected[row, head] = lost[own[row]] - (lost[other[row]] if by == "difference" else 0)
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_two_kinds_are_told_apart_by_the_sign(tiny: AttachedModel, twinned: Callable[..., ItemSet]) -> None:
    items = twinned(*ROWS, attributes=TRUST)
    memory, context = (memory_context(tiny, items, heads=kind) for kind in ("memory", "context"))
    own = [memory_context(tiny, items, heads=kind, by="own") for kind in ("memory", "context")]
    for site in memory:
        torch.testing.assert_close(memory[site], -context[site])
        torch.testing.assert_close(memory[site], own[0][site] - own[1][site], rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2"])
def both(request: pytest.FixtureRequest) -> Planted:
    return planted(request.param, heads=4, circuits=("memory", "context"), seed=1)


@pytest.fixture
def model(both: Planted) -> Iterator[AttachedModel]:
    with hw.attach(both.model, both.tokenizer, example=both.example) as attached:
        yield attached


def test_planted_memory_and_context_heads_are_found(both: Planted, model: AttachedModel) -> None:
    """Every memory head knows one relation, and the context head says what the text says."""
    items = encode(probe("conflict").over(twin="subject-and-told"), both.tokenizer, n=12)
    asked = {each.item.attributes["relation"] for each in items}
    assert len(asked) > 1
    memory = find("memory-context", model, items)
    assert memory.top(len(asked)) <= both.truth.heads("memory")
    assert memory.ranked()[len(asked) - 1].score > 10 * abs(memory.ranked()[len(asked)].score)
    assert find("memory-context", model, items, heads="context").top(1) == both.truth.heads("context")
    told = find("memory-context", model, items, heads="context", by="own").ranked()
    (context,) = both.truth.heads("context")
    assert told[0].head == context
    assert told[0].score > 5 * abs(told[1].score)


def test_with_another_instruction_alone_heads_that_follow_none_change_nothing(
    both: Planted, model: AttachedModel
) -> None:
    items = encode(probe("conflict"), both.tokenizer, n=6)
    found = find("memory-context", model, items, norms="frozen", feed_forward="frozen")
    assert max(abs(each.score) for each in found.ranked()) < 2 * both.truth.background


def test_items_have_to_say_what_is_remembered(tiny: AttachedModel, twinned: Callable[..., ItemSet]) -> None:
    items = twinned(*ROWS, attributes=TRUST)
    bare = twinned(*ROWS)
    several = replace(items, items=(replace(items.items[0], foils=((21,), (22,))), *items.items[1:]))
    begun = replace(items, items=(replace(items.items[0], foils=((20, 21),)), *items.items[1:]))
    for given, said in ((bare, "attribute trust"), (several, "one foil"), (begun, "nowhere differ in a token")):
        with pytest.raises(InputError, match=f"item item-0.*{said}"):
            find("memory-context", tiny, given)
    with pytest.raises(InputError, match="memory, context"):
        find("memory-context", tiny, items, heads="text")
    with pytest.raises(InputError, match="difference, own"):
        find("memory-context", tiny, items, by="share")


def test_its_own_items_have_the_twins_of_the_paper() -> None:
    tokenizer = hw.load("zoo:organism").tokenizer
    own = encode(own_probe(method("memory-context")), tokenizer, n=8)
    given = encode(probe("conflict"), tokenizer, n=8)
    assert all(each.twin is not None and each.twin.answer not in (each.answer, *each.foils) for each in own)
    assert all(each.twin is not None and each.twin.answer == each.foils[0] for each in given)
