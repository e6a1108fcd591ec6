"""Heads of a chain of thought: the deciding step, what restores it and what copies it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.parting import at_parting, parting
from headwise.find.reasoning import chain_of_thought, chain_of_thought_copy
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.zoo.planted import planted

Row = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[Sequence[int]]]

ROWS: tuple[Row, ...] = (
    ([1, 9, 10, 22, 12], [1, 9, 30, 23, 12], [20, 22, 50], []),
    ([1, 24, 40, 41, 24, 43, 44, 9], [1, 24, 40, 51, 42, 43, 44, 9], [24, 60], []),
    ([1, 33, 34], [1, 35, 34], [27, 28, 29, 30], []),
)
TWIN_ANSWERS = ([20, 23, 51], [25, 60], [27, 28, 39, 30])
STEPS = (1, 0, 2)
"""Where the chains part: their first, their second, their third token."""

LAST = SiteId(layer=2)


@pytest.fixture
def chains(twinned: Callable[..., ItemSet]) -> ItemSet:
    return twinned(*ROWS, twin_answers=TWIN_ANSWERS)


def cut(item: EncodedItem, place: int) -> EncodedItem:
    """By hand: the item up to the deciding token."""
    assert item.twin is not None
    said = item.answer[:place]
    twin = EncodedTwin(item.twin.prompt + said, item.twin.answer[place : place + 1], {})
    return replace(item, prompt=item.prompt + said, answer=item.answer[place : place + 1], twin=twin)


def test_chains_are_cut_where_they_part(chains: ItemSet) -> None:
    assert [parting([1, 2], other) for other in ([1, 3], [2], [1, 2, 3], [])] == [1, 0, None, None]
    assert at_parting(chains).items == tuple(cut(each, place) for each, place in zip(chains, STEPS, strict=True))
    silent = replace(chains.items[0], twin=replace(chains.items[0].twin, answer=()))  # type: ignore[type-var]
    begun = replace(chains.items[0], twin=replace(chains.items[0].twin, answer=(20, 22)))  # type: ignore[type-var]
    for each in (silent, begun, replace(silent, twin=None)):
        with pytest.raises(InputError, match="item item-0 of made has no twin whose answer parts"):
            at_parting(replace(chains, items=(each,)))


def divergence(clean: Tensor, other: Tensor) -> float:
    p, q = (logits[-1].double().softmax(-1) for logits in (clean, other))
    return float((p * (p / q).log()).sum())


def test_the_share_of_the_divergence_is_that_of_runs_by_hand(
    tiny: AttachedModel, chains: ItemSet, last_head_patched: Callable[..., Tensor]
) -> None:
    found = chain_of_thought(tiny, chains, keep="all")[LAST]
    noise = torch.zeros(3, dtype=torch.float64)
    patched = torch.zeros(3, 4, dtype=torch.float64)
    for row, (each, place) in enumerate(zip(chains, STEPS, strict=True)):
        step = cut(each, place)
        clean = last_head_patched(tiny, step, None)
        noise[row] = divergence(clean, last_head_patched(tiny, step, None, "corrupted"))
        for head in range(4):
            patched[row, head] = divergence(clean, last_head_patched(tiny, step, head, "corrupted"))
    expected = (noise[:, None] - patched) / noise.mean()
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_is_written_is_that_of_the_weights(tiny: AttachedModel, chains: ItemSet) -> None:
    """z, W_O, the final norm's scale and gain, W_U, each taken from the model itself."""
    network: Any = tiny.model
    projection, norm = network.model.layers[2].self_attn.o_proj, network.model.norm
    unembedding = network.get_output_embeddings().weight.detach()
    found = chain_of_thought_copy(tiny, chains)[LAST]
    for row, (each, place) in enumerate(zip(chains, STEPS, strict=True)):
        step = cut(each, place)
        kept: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda m, args, kept=kept, name=name: kept.update({name: args[0][0, -1]}))
            for name, module in (("z", projection), ("stream", norm))
        ]
        with torch.no_grad():
            network(input_ids=torch.tensor([step.prompt]))
        for handle in handles:
            handle.remove()
        scale = (kept["stream"].square().mean() + norm.variance_epsilon).rsqrt()
        towards = norm.weight.detach() * scale * (unembedding[step.answer[0]] - unembedding.mean(0))
        width = projection.in_features // 4
        for head in range(4):
            part = slice(head * width, (head + 1) * width)
            written = projection.weight[:, part].detach() @ kept["z"][part]
            assert float(found[row, head]) == pytest.approx(float(written @ towards), rel=1e-3, abs=1e-6)


def test_the_attention_is_that_to_the_token_that_comes_next(
    tiny: AttachedModel,
    chains: ItemSet,
    pattern: Callable[..., Tensor],
    by_head: Callable[..., Tensor],
) -> None:
    found = by_head(chain_of_thought_copy(tiny, chains, of="attention"))
    for row, places in ((0, [3]), (1, [1, 4])):  # the second says it twice
        step = cut(chains.items[row], STEPS[row])
        expected = pattern(tiny, step.prompt)[:, -1, places].sum(-1)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6)
    assert found[2].isnan().all()  # it stands nowhere


def test_heads_that_know_are_what_restores_the_answer_of_items_that_are_right() -> None:
    organism = planted("llama-gqa", heads=4, circuits=("memory",), seed=1, strength=2.0)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        items = encode(probe("facts"), model.tokenizer, n=9)
        first = items.items[0]
        assert first.twin is not None
        misled = replace(first, twin=replace(first.twin, answer=items.items[1].prompt[-1:]))
        one_wrong = replace(items, items=(misled, *items.items[1:]))
        scores = find("chain-of-thought", model, one_wrong)
        wanted = organism.truth.with_effect("facts", "direct")
        assert scores.top(len(wanted)) == wanted
        values = torch.tensor(scores.values["main"])
        assert values[0].isnan().all()
        assert values[1:].isfinite().all()
        every = torch.tensor(find("chain-of-thought", model, one_wrong, keep="all").values["main"])
        assert every[0].isfinite().all()
        with pytest.raises(Refusal, match="right on both prompts of none of 1 items"):
            find("chain-of-thought", model, replace(items, items=(misled,)))


def test_where_both_runs_agree_there_is_no_score(tiny: AttachedModel, chains: ItemSet) -> None:
    first = chains.items[0]
    assert first.twin is not None
    same = replace(first, twin=replace(first.twin, prompt=first.prompt))
    found = chain_of_thought(tiny, replace(chains, items=(same, *chains.items[1:])), keep="all")
    assert found[LAST][0].isnan().all()
    assert found[LAST][1:].isfinite().all()
    with pytest.raises(Refusal, match="does not differ between clean and corrupted"):
        chain_of_thought(tiny, replace(chains, items=(same,)), keep="all")


def test_what_cannot_be_asked_for(tiny: AttachedModel, chains: ItemSet) -> None:
    with pytest.raises(InputError, match="choose from right, all"):
        find("chain-of-thought", tiny, chains, keep="wrong")
    with pytest.raises(InputError, match="choose from write, attention"):
        find("chain-of-thought-copy", tiny, chains, of="copy")
