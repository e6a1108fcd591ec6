"""`race` on planted models: the heads of the exact map, for part of its forwards."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.metrics import Metric, metric
from headwise.probes import ItemSet, encode, probe
from headwise.scores import HeadScores, Provenance
from headwise.sweep import KnockOut, Patch, matched_sets, measure_sets
from headwise.sweep.knockout import reference_of
from headwise.sweep.measuring import measure_at
from headwise.verify import gather, judge, racing
from headwise.verify.racing import Race, race
from headwise.verify.verifying import unseen_items
from headwise.zoo.planted import Planted, planted

ITEMS = 24


@cache
def built() -> tuple[Planted, hw.AttachedModel]:
    """Three of its sixteen heads have an effect on `ioi`; two of these work through saturated attention."""
    organism = planted(layers=4, heads=4, circuits=("indirect-object",), seed=1)
    return organism, hw.attach(organism.model, organism.tokenizer, example=organism.example)


def model() -> hw.AttachedModel:
    return built()[1]


def true_heads() -> HeadSet:
    return built()[0].truth.with_effect("ioi", "total")


@cache
def items() -> ItemSet:
    return encode(probe("ioi"), model().tokenizer, n=ITEMS, seed=0)


@cache
def exact() -> np.ndarray:
    heads = model().heads().heads
    clean, *values = measure_sets(model(), items(), [HeadSet(), *(HeadSet((each,)) for each in heads)], KnockOut())
    return np.array([(clean - each).numpy() for each in values])


@cache
def raced() -> Race:
    return race(model(), items(), k=3)


def screen(*first: str) -> HeadScores:
    values = np.zeros((1, 4, 4))
    for label in first:
        head = HeadSet.parse(label).heads[0]
        values[0, head.layer, head.index] = 1
    return HeadScores({"main": values}, {"main": tuple(SiteId(layer=i) for i in range(4))}, ("a",), Provenance("own"))


def test_it_keeps_the_heads_that_have_an_effect() -> None:
    assert raced().kept == true_heads()
    assert not raced().tied


def test_estimates_and_intervals_are_of_the_exact_map() -> None:
    means = exact().mean(axis=1)
    for head, mean in zip(raced().heads, means, strict=True):
        assert head.interval[0] - 1e-4 <= mean <= head.interval[1] + 1e-4
        if head.items == ITEMS:
            assert head.estimate == pytest.approx(mean, abs=1e-4)
    weakest = min(each.interval[0] for each in raced().heads if each.decision == "kept")
    assert all(each.interval[1] <= weakest + raced().epsilon for each in raced().heads if each.decision != "kept")


def test_most_of_the_map_is_not_run() -> None:
    spent = [each.items for each in raced().heads]
    assert np.median(spent) <= 8
    assert min(spent) >= 1  # no head is left out by the screen alone


def test_forwards_are_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[int, int, int]] = []

    def counted(model: Any, items: ItemSet, sets: Any, *rest: Any) -> tuple[torch.Tensor, int]:
        run.append((len(sets), len(items), sum(len(each) for each in sets)))
        return measure_at(model, items, sets, *rest)

    monkeypatch.setattr(racing, "measure_at", counted)
    found = race(model(), items(), k=3)
    knock_outs = sum(sets * n for sets, n, heads in run if heads)
    assert knock_outs == sum(each.items for each in found.heads)
    # Beside them: the clean run, as much again for a chance level, and forwards with a backward on 8 items.
    assert found.forwards == knock_outs + 2 * ITEMS + 2 * 8
    assert found.map_forwards == 17 * ITEMS
    assert len(run) <= 12
    assert max(sets for sets, _, _ in run) > 8  # many heads in one call


def test_a_screen_that_names_other_heads_costs_little_and_changes_nothing() -> None:
    misled = race(model(), items(), k=3, screen=screen("L1H1", "L2H2", "L3H3"))
    assert misled.kept == true_heads()
    led = race(model(), items(), k=3, screen=screen(*true_heads().labels))
    assert led.kept == true_heads()
    assert max(led.forwards, misled.forwards) < 0.7 * led.map_forwards


def test_the_same_seed_gives_the_same_race_and_another_one_another_order() -> None:
    again = race(model(), items(), k=3)
    assert again.heads == raced().heads
    other = race(model(), items(), k=3, seed=5)
    assert other.kept == raced().kept
    assert other.heads != raced().heads


def test_what_counts_is_in_units_of_what_there_is_to_lose() -> None:
    clean = measure_sets(model(), items(), [HeadSet()], KnockOut())[0]
    assert raced().reach == pytest.approx(float(clean.mean()))  # the chance of a logit difference is 0
    assert raced().epsilon == pytest.approx(0.1 * raced().reach)
    assert raced().largest == pytest.approx(2 * raced().reach)
    halved = race(model(), items(), k=3, largest=0.5)
    assert max(each.estimate for each in halved.heads if each.items) <= 0.5 * halved.reach + 1e-6
    assert all(np.isfinite(each.estimate) == (each.items > 0) for each in halved.heads)
    assert sum(each.beyond for each in halved.heads) > 0
    assert "went beyond it" in halved.guarantee
    assert "none was seen beyond" in raced().guarantee


def test_a_metric_that_is_better_low_keeps_the_same_heads() -> None:
    found = race(model(), items(), k=3, measured="cross-entropy")
    assert found.kept == true_heads()
    assert found.family.metric == "cross-entropy"


def test_means_take_their_reference_and_keep_their_name() -> None:
    reference = reference_of(model(), encode(probe("ioi"), model().tokenizer, n=8, seed="reference"))
    found = race(model(), items(), k=3, knock_out=KnockOut("mean", "all", reference))
    assert found.family.key == "ioi/logit-difference/mean/all"
    assert found.kept == true_heads()


def test_a_head_left_out_as_good_as_the_weakest_is_tied() -> None:
    found = race(model(), items(), k=1, epsilon=0.5)
    assert len(found.kept) == 1
    assert found.tied == true_heads() - found.kept
    assert all(each.estimate >= found.heads[0].estimate or each.decision != "kept" for each in found.heads)
    for each in found.heads:
        if each.decision == "eliminated":
            assert each.estimate < min(one.estimate for one in found.heads if one.decision != "eliminated")


def test_the_cost_with_verdicts_in_closed_form() -> None:
    found = replace(raced(), forwards=100)
    # 16 heads and a clean run on 24 items; a verdict is 10 control sets and the head, on 8 items.
    assert found.share(testing=8, controls=10) == pytest.approx((100 + 3 * 88) / (17 * 24 + 16 * 88))


def test_the_heads_kept_are_verified_on_other_items_with_few_controls() -> None:
    testing = unseen_items(model(), "ioi", 16, items(), 0)
    assert not set(testing.ids) & set(raced().finding)
    drawn = matched_sets(raced().kept, model().heads(), 4, seed=0).sets
    controls = HeadSet(tuple(head for each in drawn for head in each))
    evidence = gather(model(), testing, KnockOut(), joints={}, heads=raced().kept | controls, finding=raced().finding)
    rulings = {each.head.label: each.ruling for each in judge(evidence).singles}
    assert {label for label, ruling in rulings.items() if ruling == "verified"} == set(true_heads().labels)


def test_it_prints_what_it_found_and_what_it_promises() -> None:
    text = str(raced())
    first = text.splitlines()[0]
    assert first == "top 3 of 16 heads on ioi/logit-difference/zero/all, 24 items"
    for label in true_heads().labels:
        assert f"  {label} " in text
    assert "13 others eliminated, after " in text
    assert f"{raced().forwards} forwards" in text
    assert " ".join(text.split()).endswith(raced().guarantee)
    assert raced().guarantee.startswith("With probability 0.95 over the order of the items")
    assert max(map(len, text.splitlines())) <= 118


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"k": 0}, "k=0 heads of 16"),
        ({"k": 16}, "from 1 to 15"),
        ({"k": True}, "k=True"),
        ({"error": 0.0}, "error=0.0 is a probability"),
        ({"error": 1.0}, "error=1.0 is a probability"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"epsilon": 2.0}, "give 0 <= epsilon < largest"),
        ({"largest": float("nan")}, "largest=nan"),
        ({"measured": "no-such-metric"}, "no metric"),
    ],
)
def test_what_cannot_be_asked(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        race(model(), items(), **{"k": 3, **changed})


def test_items_must_be_there_and_differ() -> None:
    with pytest.raises(InputError, match="a race needs items"):
        race(model(), replace(items(), items=()), k=3)
    twice = replace(items(), items=(*items().items[:3], items().items[0]))
    with pytest.raises(InputError, match="is there twice"):
        race(model(), twice, k=3)


def test_a_screen_of_other_heads_is_no_screen() -> None:
    other = HeadScores(
        {"encoder": np.ones((1, 1, 2))}, {"encoder": (SiteId(stack="encoder", layer=0),)}, ("a",), Provenance("own")
    )
    with pytest.raises(InputError, match="scores none of the heads"):
        race(model(), items(), k=3, screen=other)


def test_resample_is_refused() -> None:
    reference = reference_of(model(), items())
    with pytest.raises(Refusal, match="depend on which items run together"):
        race(model(), items(), k=3, knock_out=KnockOut("resample", "all", reference))


def test_a_model_with_nothing_to_lose_is_refused() -> None:
    worse = replace(metric("logit-difference"), function=lambda outcome, clean: -_differences(outcome, clean))
    with pytest.raises(Refusal, match="is not better than chance"):
        race(model(), items(), k=3, measured=worse)


def _differences(outcome: Any, clean: Any) -> torch.Tensor:
    return metric("logit-difference").function(outcome, clean)


def test_a_metric_without_a_number_is_refused() -> None:
    def broken(where: float) -> Metric:
        def function(outcome: Any, clean: Any) -> torch.Tensor:
            values = _differences(outcome, clean)
            return torch.where(values < where, torch.nan, values)

        return replace(metric("logit-difference"), function=function)

    with pytest.raises(Refusal, match=r"gives no number with L\dH\d out"):
        race(model(), items(), k=3, measured=broken(2.0))
    with pytest.raises(Refusal, match="without a knock-out"):
        race(model(), items(), k=3, measured=broken(1e9))


def test_items_without_answers_need_a_screen_of_their_own() -> None:
    silent = replace(items(), items=tuple(replace(each, answer=()) for each in items().items))
    with pytest.raises(Refusal, match="cannot be screened by gate-gradient"):
        racing._screened(model(), silent)


@pytest.mark.parametrize("seed", range(4))
def test_a_scope_that_only_some_items_have_is_no_matter_of_the_order(seed: int) -> None:
    """One answer in three has a second token; the first items of an order may have none."""
    given = encode(probe("ioi"), model().tokenizer, n=12)
    longer = tuple(
        replace(each, answer=each.answer * 2) if place % 3 == 0 else each for place, each in enumerate(given.items)
    )
    how = KnockOut("zero", "decode")
    found = race(model(), replace(given, items=longer), k=1, knock_out=how, seed=seed)
    assert all(abs(each.estimate) < 1e-4 for each in found.heads if each.items), "behind the answer's first token"
    with pytest.raises(Refusal, match="scope 'decode' has no position in any of the 12 items"):
        race(model(), given, k=1, knock_out=how, seed=seed)


def test_a_race_takes_no_patch() -> None:
    with pytest.raises(InputError, match="takes a KnockOut, not a Patch"):
        race(model(), items(), k=3, knock_out=Patch())  # type: ignore[arg-type]
