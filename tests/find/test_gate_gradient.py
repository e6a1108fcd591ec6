"""Gate gradients against autograd on a gate put in by hand, against finite differences, and on planted heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find import find
from headwise.find.gate_gradient import METHODS, gate_gradient
from headwise.heads import HeadSet, SiteId
from headwise.metrics import cross_entropy
from headwise.model.attached import AttachedModel
from headwise.model.direct import plain_matrix
from headwise.probes import encode, probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.probes.outcome import observe
from headwise.scores import HeadScores
from headwise.sweep import KnockOut, measure_sets
from headwise.zoo.planted import Example, Planted, planted

PROMPTS = ([1, 9, 10, 11, 12], [1, 30, 31], [1, 9, 40, 41, 42, 43, 44, 9])
ANSWERS = ([20], [22, 23, 24], [27, 28])


def item_set(prompts: Sequence[Sequence[int]] = PROMPTS, answers: Sequence[Sequence[int]] = ANSWERS) -> ItemSet:
    rows = [
        EncodedItem(Item(prompt="", answer="", id=f"item-{i}"), tuple(prompt), tuple(answer), (), (), {}, None)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


def of_examples(examples: Sequence[Example]) -> ItemSet:
    items = item_set([each.ids for each in examples], [[each.answer] for each in examples])
    foils = [((each.foil,),) for each in examples]
    return replace(items, items=tuple(replace(item, foils=foil) for item, foil in zip(items, foils, strict=True)))


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def joined(scored: Any) -> Tensor:
    return torch.cat([scored[site].double() for site in sorted(scored)], dim=1)


def by_hand(model: AttachedModel, items: ItemSet, *, each_token: bool) -> list[Tensor]:
    """Of each item `[head, token]`: the loss's gradient at factors on z, put in with an edit; or one for all tokens."""
    found = []
    for each in items:
        (batch,) = replace(items, items=(each,)).batches(1)
        columns = batch.input_ids.shape[1] if each_token else 1
        gates = {site.id: torch.ones(1, columns, site.n_heads, 1, requires_grad=True) for site in model.sites}
        with model.editing(hw.edit.scale(model.heads("main"), gate_of(gates))):
            loss = cross_entropy(observe(model, batch, wants={"logits"}, gradients=True))
        grads = torch.autograd.grad(loss.sum(), list(gates.values()))
        found.append(torch.cat([grad[0, :, :, 0] for grad in grads], dim=1).T)
    return found


def gate_of(gates: Mapping[SiteId, Tensor]) -> Callable[[Tensor, Any], Tensor]:
    return lambda z, here: gates[here.site].expand_as(z)


def test_equals_autograd_on_a_gate(model: AttachedModel) -> None:
    items = item_set()
    expected = torch.cat(by_hand(model, items, each_token=False), dim=1).T.abs()
    assert expected.max() > 1e-3
    torch.testing.assert_close(joined(gate_gradient(model, items)).float(), expected, rtol=1e-3, atol=1e-6)


def test_per_token_takes_the_absolute_value_at_each_token(model: AttachedModel) -> None:
    items = item_set()
    at_tokens = by_hand(model, items, each_token=True)
    expected = torch.stack([gradients.abs().sum(1) / gradients.shape[1] for gradients in at_tokens])
    scored = joined(gate_gradient(model, items, per="token")).float()
    torch.testing.assert_close(scored, expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(scored.argsort(), joined(gate_gradient(model, items)).argsort())


def test_equals_a_small_step_of_the_gate(model: AttachedModel) -> None:
    """The loss itself, at gates a little above and below 1."""
    items, step = item_set(), 0.05
    scored = gate_gradient(model, items)
    for label in ("L0H1", "L2H3"):
        losses = [
            hw.measure(model, items, "cross-entropy", edits=[hw.edit.scale(label, 1 + sign * step)]).double()
            for sign in (1, -1)
        ]
        slope = (losses[0] - losses[1]).abs() / (2 * step)
        found = scored[model.site(label[:2]).id][:, int(label[3])]
        torch.testing.assert_close(found, slope, rtol=0.05, atol=1e-3)


def test_normalised_layers_have_mean_scores_of_length_one(model: AttachedModel) -> None:
    items = item_set()
    plain, normalised = gate_gradient(model, items), gate_gradient(model, items, normalise=True)
    for site in model.sites:
        length = plain[site.id].mean(0).square().sum().sqrt()
        torch.testing.assert_close(normalised[site.id], plain[site.id] / length)
        assert float(normalised[site.id].mean(0).norm()) == pytest.approx(1)


def test_batches_do_not_matter(model: AttachedModel) -> None:
    items = item_set()
    for per in ("example", "token"):
        together = joined(gate_gradient(model, items, per=per))  # type: ignore[arg-type]
        alone = [joined(gate_gradient(model, replace(items, items=(each,)), per=per)) for each in items]  # type: ignore[arg-type]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-6)


def test_leaves_the_weights_alone(model: AttachedModel) -> None:
    gate_gradient(model, item_set())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.model.parameters())


def test_hooks_on_the_unembedding_stay_in_the_graph(model: AttachedModel) -> None:
    """A plain unembedding is taken out of the graph; what others do before and behind it is not."""
    items = item_set()
    unembedding = model.model.get_output_embeddings()  # type: ignore[operator]
    with ExitStack() as hooks:
        shrink = unembedding.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
        grow = unembedding.register_forward_hook(lambda module, args, output: 3.0 * output)
        for each in (shrink, grow):
            hooks.callback(each.remove)
        expected = torch.cat(by_hand(model, items, each_token=False), dim=1).T.abs()
        found = joined(gate_gradient(model, items)).float()
    assert not torch.allclose(found, joined(gate_gradient(model, items)).float(), rtol=0.05)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert not unembedding._forward_hooks
    assert not unembedding._forward_pre_hooks


def on_the_attention(block: Any) -> Any:
    return block.self_attn.register_forward_hook(lambda module, args, output: (2.0 * output[0], *output[1:]))


def on_the_feed_forward(block: Any) -> Any:
    return block.mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, 1))


@pytest.mark.parametrize("change", [on_the_attention, on_the_feed_forward])
def test_what_is_put_on_the_last_block_later_counts(change: Callable[[Any], Any]) -> None:
    """The last block is run short only while that gives what it gave when the model was measured."""
    with hw.load("zoo:tiny-llama") as model:
        items = item_set()
        before = joined(gate_gradient(model, items))
        change(model.model.model.layers[-1])  # type: ignore[union-attr, index]
        found = joined(gate_gradient(model, items))
        expected = torch.cat(by_hand(model, items, each_token=False), dim=1).T.abs()
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(found, before, rtol=0.05)


def test_an_unembedding_that_is_no_plain_matrix_stays_in_the_graph(model: AttachedModel) -> None:
    items = item_set()
    plain = joined(gate_gradient(model, items))
    unembedding: Any = model.model.get_output_embeddings()  # type: ignore[operator]
    unembedding.forward = partial(type(unembedding).forward, unembedding)
    try:
        assert plain_matrix(unembedding) is None
        torch.testing.assert_close(joined(gate_gradient(model, items)), plain, rtol=1e-4, atol=1e-7)
    finally:
        del unembedding.forward
    assert plain_matrix(unembedding) is not None


def test_what_it_cannot_do_it_says(model: AttachedModel) -> None:
    with pytest.raises(InputError, match=r"per='layer' is not known; choose from example, token"):
        gate_gradient(model, item_set(), per="layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no gradient"):
        gate_gradient(model, item_set(), loss="exact-match")
    with pytest.raises(InputError, match="has no gradient here"):
        gate_gradient(model, item_set(), loss="exact-match-generated")


def test_is_the_effect_of_zeroing_where_the_loss_is_linear(organism: Planted, attached: AttachedModel) -> None:
    """The answer's logit is close to linear in what the writing heads of a planted model write: gradient = effect."""
    examples = organism.examples("repeat", 8, seed=5)
    items = of_examples(examples)
    scores = find(METHODS[0], attached, items, loss="logit-difference")
    writers = [HeadSet((head,)) for head in organism.truth.heads("induction")]
    clean, *without = measure_sets(attached, items, [HeadSet(), *writers], KnockOut(), "logit-difference")
    for head, values in zip(organism.truth.heads("induction"), without, strict=True):
        found = scores.values["main"][:, head.site.layer, head.index].mean()
        assert found == pytest.approx(float((clean - values).mean()), rel=0.15)


@pytest.mark.parametrize("behaviour", ["repeat", "ioi"])
def test_finds_the_planted_heads_and_no_decoy(organism: Planted, attached: AttachedModel, behaviour: Any) -> None:
    """Roles that write, and roles that work through them, have the largest gradients; decoys next to none.

    Measured on the logit difference: the loss of an answer that is nearly certain has no gradient.
    """
    examples = organism.examples(behaviour, 8, seed=5)
    items = of_examples(examples)
    scores: HeadScores = find(METHODS[0], attached, items, loss="logit-difference")
    values = {
        f"{site.label}H{head}": float(scores.values["main"][:, layer, head].mean())
        for layer, site in enumerate(scores.sites["main"])
        for head in range(scores.values["main"].shape[2])
    }
    truth = organism.truth
    direct = set(truth.with_effect(behaviour, "direct").labels)
    silent = set(values) - direct - set(truth.with_effect(behaviour, "total").labels)
    assert min(values[label] for label in direct) > 3 * max(values[label] for label in silent)
    assert all(values[label] < 0.3 for label in truth.decoys().labels)


def test_what_is_put_behind_the_blocks_after_the_first_call_is_noticed() -> None:
    organism = planted("llama", layers=4, heads=4, circuits=("induction",), seed=0)
    items = encode(probe("repeat").over(words=(6,)), organism.tokenizer, n=3)
    model = hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)
    first = find("gate-gradient", model, items)
    again = find("gate-gradient", model, items)  # tries the last block alone
    assert np.array_equal(first.values["main"], again.values["main"])
    norm = model.model.get_submodule("model.norm")
    norm.register_forward_hook(lambda module, args, output: output + args[0].mean(1, keepdim=True))  # mixes columns
    mixed = find("gate-gradient", model, items)
    assert not np.allclose(mixed.values["main"], first.values["main"], atol=1e-6)
    model.detach()
    fresh = hw.attach(organism.model, organism.tokenizer, example=organism.example)
    assert np.allclose(mixed.values["main"], find("gate-gradient", fresh, items).values["main"], atol=1e-12)


def test_a_model_of_another_dtype_since_the_first_call_is_tried_anew() -> None:
    organism = planted("gpt2", layers=4, heads=4, circuits=("induction",), seed=0)
    items = encode(probe("repeat").over(words=(6,)), organism.tokenizer, n=3)
    model = hw.attach(organism.model, organism.tokenizer, example=organism.example)
    single = find("gate-gradient", model, items)
    organism.model.double()
    assert np.allclose(find("gate-gradient", model, items).values["main"], single.values["main"], rtol=1e-3, atol=1e-5)
