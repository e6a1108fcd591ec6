"""One-pass proxies of the retrieval score: scripted rows, the plain model on one item alone, and planted heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.retrieval_proxy import METHODS, PROXIES, copy_score, needle_hits, needle_mass
from headwise.probes import probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item
from headwise.zoo.planted import Planted, planted

(PROXY,) = METHODS
SEEDS = {"llama": 0, "llama-gqa": 1, "gpt2": 2}

# -- scripted rows -----------------------------------------------------------------------------------------------------

NEEDLE = torch.tensor([[False, True, True, False, False]])


def test_the_last_row_on_the_needle() -> None:
    rows = torch.tensor(
        [
            [0.1, 0.6, 0.2, 0.1, 0.0],
            [0.6, 0.2, 0.2, 0.0, 0.0],  # rests on the first token
            [0.0, 0.3, 0.3, 0.4, 0.0],  # more on the needle, and its strongest column is another
            [0.0, 0.1, 0.0, 0.9, 0.0],
        ]
    )[None, :, None]
    assert needle_hits(rows, NEEDLE)[0, :, 0].tolist() == [1, 0, 0, 0]
    assert needle_mass(rows, NEEDLE)[0, :, 0].tolist() == pytest.approx([0.8, 0.4, 0.6, 0.1])


def test_every_item_has_its_own_needle() -> None:
    rows = torch.eye(5)[[1, 1]][:, None, None]
    needles = torch.cat([NEEDLE, NEEDLE.roll(1, dims=1)])
    assert needle_hits(rows, needles).flatten().tolist() == [1, 0]
    assert needle_mass(rows, needles).flatten().tolist() == [1, 0]


def copied(top: Sequence[Sequence[int]], answer: Sequence[int], padding: int = 0) -> list[float]:
    prompt = torch.tensor([[3, 5, 6, 7, 5]])
    attended = torch.arange(5)[None] >= padding
    return copy_score(torch.tensor([top]), torch.tensor([answer]), prompt, attended)[0].tolist()


def test_what_a_given_answer_is_copied_from() -> None:
    assert copied([[1, 2, 3], [4, 2, 3], [0, 0, 0], [2, 3, 1]], [5, 6, 7]) == [1, 1, 0, 0]
    assert copied([[1, 2], [1, 0]], [5, 9]) == [1, 1]  # 9 is not in the prompt, so it is no attempt
    assert copied([[1, 0, 3]], [5, 6, -1]) == [0.5]  # a shorter answer than its neighbour's
    assert torch.tensor(copied([[1]], [9])).isnan().all()
    assert torch.tensor(copied([[0]], [3], padding=1)).isnan().all()  # 3 stands only where padding is


# -- the plain model, one item alone, and its own attention weights ----------------------------------------------------


@cache
def built(architecture: str) -> tuple[Planted, Any]:
    organism = planted(architecture, seed=SEEDS[architecture], attn="eager")  # type: ignore[arg-type]
    return organism, hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example)


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Any:
    yield
    built.cache_clear()


def alone(model: Any, item: EncodedItem) -> dict[str, Tensor]:
    """Each proxy of one item, `[layer, head]`, from prompt and answer in one row without padding."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*item.prompt, *item.answer]]), output_attentions=True)
    patterns = torch.stack([each[0] for each in output.attentions])  # layer, head, query, key
    end, needle = len(item.prompt), [column for place in item.spans["needle"] for column in place]
    last = patterns[:, :, end - 1]
    argmax = last.argmax(dim=-1)
    hits, attempts = torch.zeros(argmax.shape), 0
    for step, token in enumerate(item.answer):
        if token in item.prompt:
            attempts += 1
            best = patterns[:, :, end - 1 + step, :end].argmax(dim=-1)  # the row of the token before
            hits += torch.tensor(item.prompt)[best] == token
    return {
        "argmax": torch.isin(argmax, torch.tensor(needle)).double(),
        "mass": last[:, :, needle].sum(dim=-1),
        "copy": hits / attempts,
    }


def scores(model: Any, items: ItemSet, **settings: Any) -> Any:
    return find(PROXY, model, items, **settings).values["main"]


@pytest.mark.parametrize("architecture", SEEDS)
def test_batched_and_padded_is_alone(architecture: str) -> None:
    organism, model = built(architecture)
    items = encode(probe("needle"), organism.tokenizer, n=6)
    assert len({len(each.prompt) for each in items}) > 3  # rows of different length, so there is padding
    assert {len(each.answer) for each in items} == {3}
    found = {proxy: scores(model, items, proxy=proxy) for proxy in PROXIES}
    assert (scores(model, items) == found["argmax"]).all()
    for row, item in enumerate(items):
        expected = alone(organism.model, item)
        for proxy in PROXIES:
            assert found[proxy][row] == pytest.approx(expected[proxy].numpy(), abs=1e-4), (proxy, item.id)
    assert all(found[proxy].max() > 0.4 for proxy in PROXIES)


# -- planted heads -----------------------------------------------------------------------------------------------------


def by_hand(tokenizer: Any, given: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> ItemSet:
    """Items from ids: prompt, answer, columns of the needle."""
    items = []
    for index, (ids, answer, columns) in enumerate(given):
        item = Item(prompt=tokenizer.decode(list(ids)), answer=tokenizer.decode(list(answer)), id=f"item-{index}")
        items.append(EncodedItem(item, ids, answer, (), (), {"needle": (columns,)}, None))
    return ItemSet("by-hand", tuple(items), {}, "exact-match", tokenizer.pad_token_id or 0)


def called_for(organism: Planted, behaviour: Any) -> ItemSet:
    """Examples of a behaviour whose answer stands once in the prompt: that token is the needle."""
    drawn = organism.examples(behaviour, 8)
    return by_hand(organism.tokenizer, [(each.ids, (each.answer,), (each.ids.index(each.answer),)) for each in drawn])


def mean_of(model: Any, items: ItemSet, proxy: str) -> Tensor:
    return torch.tensor(scores(model, items, proxy=proxy)).mean(dim=0)


@pytest.mark.parametrize("architecture", SEEDS)
@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize(
    ("behaviour", "role"), [("keys", "key-copy"), ("conflict", "context"), ("repeat", "induction")]
)
def test_planted_heads_are_found_and_with_them_their_decoys(
    architecture: str, proxy: str, behaviour: str, role: str
) -> None:
    organism, model = built(architecture)
    above = (mean_of(model, called_for(organism, behaviour), proxy) > 0.5).nonzero().tolist()
    truth = organism.truth
    # A back-up's pattern rests on the first token while what it backs up is there.
    wanted = {*truth.heads(role).labels, *truth.decoys(role).labels} - {*truth.heads("backup").labels}
    assert {f"L{layer}H{head}" for layer, head in above} == wanted


def test_copying_is_told_from_finding_the_token_again() -> None:
    """The row that predicts a token is read, not its own, in which same-token heads look at its first place."""
    organism, model = built("llama-gqa")
    drawn = organism.examples("repeat", 8)
    given = []
    for each in drawn:
        source = each.ids.index(each.answer)
        given.append((each.ids[:-2], (*each.ids[-2:], each.answer), (source,)))  # three words of the list, in order
    mean = mean_of(model, by_hand(organism.tokenizer, given), "copy")
    for head in organism.truth.heads("induction").heads:
        assert mean[head.layer, head.index] == 1
    for head in organism.truth.heads("same-token").heads:
        assert mean[head.layer, head.index] < 0.5


# -- spans and refusals ------------------------------------------------------------------------------------------------


def test_copy_needs_no_span_and_the_others_any() -> None:
    organism, model = built("llama-gqa")
    hashes = encode(probe("hash"), organism.tokenizer, n=4)
    assert scores(model, hashes, proxy="copy").shape == scores(model, hashes, span="value").shape
    with pytest.raises(Refusal, match="no span 'needle'"):
        scores(model, hashes)


def test_an_item_without_an_attempt_has_no_score() -> None:
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys")
    absent = next(id for id in organism.lexicon.names if id not in items.items[0].prompt)
    mixed = replace(items, items=(replace(items.items[0], answer=(absent,)), items.items[1]))
    missing = torch.tensor(scores(model, mixed, proxy="copy")).isnan().flatten(1)
    assert missing.all(dim=1).tolist() == [True, False]
    assert missing.any(dim=1).tolist() == [True, False]


def test_mistakes_and_refusals() -> None:
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys")
    with pytest.raises(InputError, match="proxy='rank'"):
        scores(model, items, proxy="rank")
    with pytest.raises(Refusal, match="no answer"):
        scores(model, replace(items, items=(replace(items.items[0], answer=()),)))
    with hw.load("zoo:tiny-t5") as seq2seq:
        given = by_hand(seq2seq.tokenizer, [((20, 21, 22), (21,), (1,))])
        for proxy in PROXIES:
            with pytest.raises(Refusal, match="decoder-only"):
                scores(seq2seq, given, proxy=proxy)
