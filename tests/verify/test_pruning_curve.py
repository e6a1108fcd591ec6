"""Pruning curves on a planted model, step by step against knock-outs one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError
from headwise.find import find
from headwise.heads import Head, HeadSet, SiteId
from headwise.probes import ItemSet, encode, probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.item import Item
from headwise.scores import HeadScores, Provenance
from headwise.sweep import KnockOut, measure_sets
from headwise.verify import PruningCurve, one_head_per_layer, pruning_curve, reestimated_scores
from headwise.zoo.planted import Planted, planted


@cache
def built() -> tuple[Planted, hw.AttachedModel]:
    """Three of its sixteen heads have an effect on `ioi`."""
    organism = planted(layers=4, heads=4, circuits=("indirect-object",), seed=1)
    return organism, hw.attach(organism.model, organism.tokenizer, example=organism.example)


def model() -> hw.AttachedModel:
    return built()[1]


def true_heads() -> HeadSet:
    return built()[0].truth.with_effect("ioi", "total")


@cache
def items() -> ItemSet:
    return encode(probe("ioi"), model().tokenizer, n=6, seed=0)


def scores_of(values: np.ndarray, *ids: str) -> HeadScores:
    sites = tuple(SiteId(layer=layer) for layer in range(len(values)))
    return HeadScores({"main": values[None]}, {"main": sites}, ids or ("other",), Provenance("own"))


@cache
def by_truth() -> HeadScores:
    """The heads that have an effect have a score of 10 and more, the others their number."""
    values = np.arange(16.0).reshape(4, 4) / 16
    for rank, head in enumerate(true_heads().heads):
        values[head.layer, head.index] = 10 + rank
    return scores_of(values)


@cache
def curve() -> PruningCurve:
    return pruning_curve(model(), items(), by_truth(), steps=4, orders=3, seed=5)


def test_the_heads_that_matter_go_last() -> None:
    """Of 16 heads 4 go at a step: nothing is lost until the last one, everything at the first of the reverse."""
    found = curve()
    assert found.removed == (0, 4, 8, 12, 16)
    assert found.order[-3:] == true_heads().heads
    least, most = found.least_first.mean(axis=1), found.most_first.mean(axis=1)
    whole = least[0]
    assert whole > 4
    assert np.abs(least[1:4] - whole).max() < 0.15 * whole
    assert abs(least[4]) < 0.2 * whole
    assert most[1] < 0.3 * whole
    assert found.removable(0.2 * float(whole)) == 12
    assert found.removable(-1.0) == 0 or found.removable(0.0) <= 12
    assert found.removable(1e6) == 16


def test_every_point_is_a_knock_out() -> None:
    found = curve()
    for values, order in ((found.least_first, found.order), (found.most_first, found.order[::-1])):
        sets = [HeadSet(order[:count]) for count in found.removed]
        expected = torch.cat([measure_sets(model(), items(), [each], KnockOut()) for each in sets])
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(found.at_random[:, 0], found.least_first[[0]].repeat(3, axis=0))
    assert np.array_equal(found.at_random[:, -1], found.least_first[[-1]].repeat(3, axis=0))


def test_random_orders_take_as_many_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.verify import pruning_curve as function

    seen: list[list[HeadSet]] = []

    def counted(model: object, items: ItemSet, sets: list[HeadSet], *rest: object) -> torch.Tensor:
        seen.append(sets)
        return torch.zeros(len(sets), len(items))

    monkeypatch.setitem(function.__globals__, "measure_sets", counted)
    pruning_curve(model(), items(), by_truth(), steps=4, orders=3, seed=5)
    (sets,) = seen
    assert sets[:2] == [HeadSet(), model().heads("main")]
    least, most, *drawn = (sets[2 + 3 * place : 5 + 3 * place] for place in range(5))

    def layers(heads: HeadSet) -> list[int]:
        return sorted(head.layer for head in heads.heads)

    for order in drawn:
        assert [layers(each) for each in order] == [layers(each) for each in least]
        assert order[0] < order[1] < order[2]
        assert order != least
    assert drawn[0] != drawn[1]
    assert [len(each) for each in most] == [4, 8, 12]
    assert most[0] == model().heads("main") - least[2]
    pruning_curve(model(), items(), by_truth(), steps=4, orders=3, seed=5)
    assert seen[1] == sets
    pruning_curve(model(), items(), by_truth(), steps=4, orders=3, seed=6)
    assert seen[2] != sets


def test_without_scores_it_is_the_gradient_on_the_same_items() -> None:
    found = pruning_curve(model(), items(), steps=2, orders=0)
    importance = find("gate-gradient", model(), items())
    ranked = [each.head for each in importance.ranked()]
    assert found.order == tuple(ranked[::-1])
    assert (found.shared, curve().shared) == (len(items()), 0)
    assert found.at_random.shape == (0, 3, len(items()))
    assert "random" not in set(found.to_pandas()["order"])
    assert str(found).splitlines()[0] == "ioi/logit-difference/zero/all, 16 heads, 6 items (logits)"


def test_the_table_has_every_value() -> None:
    found = curve()
    frame = found.to_pandas()
    assert len(frame) == (2 + 3) * 5 * 6
    assert list(frame.columns) == ["order", "draw", "removed", "share", "item", "value"]
    row = frame[(frame["order"] == "random") & (frame["draw"] == 1) & (frame["removed"] == 8)]
    assert list(row["item"]) == list(items().ids)
    np.testing.assert_array_equal(row["value"], found.at_random[1, 2])
    assert set(row["share"]) == {0.5}
    printed = str(found).splitlines()
    assert len(printed) == 2 + 5
    assert printed[4].split()[:2] == ["8", "50%"]
    assert float(printed[4].split()[2]) == pytest.approx(found.least_first[2].mean(), rel=0.01)


def test_a_metric_that_is_better_low_loses_by_rising() -> None:
    found = pruning_curve(model(), items(), by_truth(), steps=4, orders=0, measured="cross-entropy")
    assert found.sign == -1
    assert found.least_first[4].mean() > found.least_first[0].mean() + 1
    risen = float(found.least_first[3].mean() - found.least_first[0].mean())
    assert found.removable(max(risen, 0.0) + 0.1) == 12


def tiny_items() -> ItemSet:
    prompts = ([1, 9, 10, 11, 12], [1, 30, 31], [1, 9, 40, 41, 42, 9])
    rows = [
        EncodedItem(Item(prompt="", answer="", id=f"item-{i}"), tuple(prompt), (20 + i,), (), ((50,),), {}, None)
        for i, prompt in enumerate(prompts)
    ]
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_estimated_anew_with_those_before_out(name: str) -> None:
    """Twelve heads in three steps; the second step's scores are those with four heads taken out by hand. The first
    step is that of scores made once, and the rest is not."""
    with hw.load(f"zoo:tiny-{name}") as tiny:
        rows = tiny_items()
        once = [each.head for each in find("gate-gradient", tiny, rows).ranked()][::-1]
        again = [each.head for each in reestimated_scores(tiny, rows, steps=3).ranked()][::-1]
        assert set(again) == set(once)
        assert again[:4] == once[:4]
        with tiny.editing(hw.edit.zero(HeadSet(tuple(again[:4])))):
            second = [each.head for each in find("gate-gradient", tiny, rows).ranked()][::-1]
        assert again[4:8] == [head for head in second if head not in again[:4]][:4]
        found = pruning_curve(tiny, rows, reestimated_scores(tiny, rows, steps=3), steps=3, orders=0)
        assert list(found.order) == again


def test_one_head_is_chosen_on_some_items_and_tested_on_others() -> None:
    testing = encode(probe("ioi"), model().tokenizer, n=12, seed=1)
    testing = testing.only([each.id not in items().ids for each in testing], "it chooses heads")
    found = one_head_per_layer(model(), items(), testing)
    kept = {each.kept.layer: each.kept for each in found}
    assert sorted(kept) == [0, 1, 2, 3]
    assert set(true_heads().heads) <= set(kept.values())
    clean = float(measure_sets(model(), testing, [HeadSet()], KnockOut()).mean())
    for each in found:
        others = HeadSet(tuple(Head.of(each.kept.layer, i) for i in range(4) if i != each.kept.index))
        exact = measure_sets(model(), testing, [others], KnockOut())[0]
        np.testing.assert_allclose(each.values, exact.numpy(), rtol=1e-4, atol=1e-4)
        assert float(each.values.mean()) > 0.8 * clean


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match="steps=0: 16 heads can be removed in 1 to 16 steps"):
        pruning_curve(model(), items(), by_truth(), steps=0)
    with pytest.raises(InputError, match="steps=17"):
        reestimated_scores(model(), items(), steps=17)
    with pytest.raises(InputError, match="scope 'last'"):
        reestimated_scores(model(), items(), knock_out=KnockOut(scope="last"))
    with pytest.raises(InputError, match="orders=-1 is no number"):
        pruning_curve(model(), items(), by_truth(), orders=-1)
    with pytest.raises(InputError, match="L3H0 has no score"):
        pruning_curve(model(), items(), scores_of(np.ones((3, 4))))
    with pytest.raises(InputError, match="is there to choose heads and to test them"):
        one_head_per_layer(model(), items(), items())
    nothing = replace(items(), items=())
    with pytest.raises(InputError, match="needs items"):
        pruning_curve(model(), nothing, by_truth())
