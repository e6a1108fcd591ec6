"""Knock-outs one by one: against the edits themselves, on planted heads, and with metrics of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.knock_out import METHODS, knock_out
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.scores import HeadScores
from headwise.sweep.knockout import reference_of
from headwise.zoo.planted import Planted


def item_set(specs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]], **more: Any) -> ItemSet:
    rows = [
        EncodedItem(
            Item(prompt="", answer="", id=f"item-{i}"), tuple(prompt), tuple(answer), (), tuple(map(tuple, foils)), {},
            None,
        )
        for i, (prompt, answer, foils) in enumerate(specs)
    ]  # fmt: skip
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0, **more)


ITEMS = item_set(
    [
        ([1, 9, 10, 11, 12], [20], [[21]]),
        ([1, 30, 31], [22, 23, 24], [[22, 25], [26]]),
        ([1, 9, 40, 41, 42, 43, 44, 9], [27, 28], [[27, 29]]),
    ]
)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def joined(scored: Any) -> Tensor:
    return torch.cat([scored[site].double() for site in sorted(scored)], dim=1)


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("scope", ["all", "last"])
def test_is_the_metric_less_that_under_each_edit(model: AttachedModel, mode: Any, scope: str) -> None:
    scored = knock_out(model, ITEMS, mode=mode, scope=scope)
    clean = hw.measure(model, ITEMS, "logit-difference").double()
    for label in ("L0H0", "L1H3", "L2H1"):
        edits = {
            "zero": lambda label: hw.edit.zero(label, scope=scope),
            "mean": lambda label: hw.edit.mean(label, reference_of(model, ITEMS), scope=scope),
            "uniform": lambda label: hw.edit.uniform(label, scope=scope),
        }
        without = hw.measure(model, ITEMS, "logit-difference", edits=[edits[mode](label)]).double()
        found = scored[model.site(label[:2]).id][:, int(label[3])]
        torch.testing.assert_close(found, clean - without, rtol=1e-3, atol=1e-4)
        assert found.abs().max() > 1e-3


def test_what_helps_is_positive_whichever_way_the_metric_goes(model: AttachedModel) -> None:
    """The loss goes up where the log-probability of the answer goes down."""
    items = replace(ITEMS, items=ITEMS.items[:1])
    higher = joined(knock_out(model, items, metric="answer-log-probability"))
    lower = joined(knock_out(model, items, metric="cross-entropy"))
    torch.testing.assert_close(higher, lower, rtol=1e-3, atol=1e-5)
    assert higher.abs().max() > 1e-3


def test_batches_do_not_matter(model: AttachedModel) -> None:
    together = joined(knock_out(model, ITEMS))
    alone = [joined(knock_out(model, replace(ITEMS, items=(each,)))) for each in ITEMS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_resampling_is_the_same_for_the_same_seed_and_other_for_another(model: AttachedModel) -> None:
    first, again, other = (joined(knock_out(model, ITEMS, mode="resample", seed=seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)


def means(scores: HeadScores) -> dict[str, float]:
    return {
        f"{site.label}H{head}": float(scores.values["main"][:, layer, head].mean())
        for layer, site in enumerate(scores.sites["main"])
        for head in range(scores.values["main"].shape[2])
    }


@pytest.mark.parametrize("behaviour", ["ioi", "conflict"])
def test_finds_what_matters_and_nothing_else(organism: Planted, attached: AttachedModel, behaviour: Any) -> None:
    examples = organism.examples(behaviour, 12, seed=5)
    items = item_set([(each.ids, [each.answer], [[each.foil]]) for each in examples])
    found = means(find(METHODS[0], attached, items))
    truth = organism.truth
    wanted = truth.with_effect(behaviour, "total").labels
    for label, value in found.items():
        if label not in wanted:
            assert abs(value) < truth.background, (label, value)
    for label in wanted:
        effect = truth.effect(label, behaviour)
        assert abs(found[label]) > truth.background, (label, found[label])
        if effect.size is not None:
            assert found[label] * effect.size > 0, label  # memory works against what the text says
    assert all(abs(found[label]) < truth.background for label in truth.decoys().labels)


def test_an_encoder_is_scored_by_its_embedding(minilm: AttachedModel) -> None:
    items = item_set([([7592, 2088], [], []), ([1996, 4937, 2938], [], [])])
    with pytest.raises(Refusal, match="use a metric of the embedding"):
        find(METHODS[0], minilm, items)
    scores = find(METHODS[0], minilm, items, metric="cosine-to-clean")
    values = scores.values["main"]
    assert values.shape == (2, 6, 12)
    clean = hw.measure(minilm, items, "cosine-to-clean")
    torch.testing.assert_close(clean, torch.ones(2))
    without = hw.measure(minilm, items, "cosine-to-clean", edits=[hw.edit.zero("L3H7")])
    assert values[:, 3, 7] == pytest.approx((1 - without).double().numpy(), abs=1e-5)
    assert values.min() > -1e-5
    assert values.max() > 1e-3


def test_unknown_settings_are_named(model: AttachedModel) -> None:
    with pytest.raises(InputError, match="no knock-out mode 'half'"):
        knock_out(model, ITEMS, mode="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no metric 'los'"):
        knock_out(model, ITEMS, metric="los")
    with pytest.raises(InputError, match="no setting 'heads'"):
        find(METHODS[0], model, ITEMS, heads="L0")
