"""PH3, value scaling and JUICE's choice of heads on planted models, where memory and context heads are known.

The planted model answers a conflict from the text: its context head writes more than its memory heads together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores
from headwise.use.knowledge.conflicts import answered_from
from headwise.use.knowledge.juice import JUICE, JustRunOnce
from headwise.use.knowledge.juice_heads import choose_juice, juice_heads
from headwise.use.knowledge.knowledge_pruning import PH3, SIZES, choose_pruned, favoured
from headwise.use.knowledge.value_scaling import FactualScaling, attributions, choose_scaled, of_like_attribution
from headwise.use.scaling import HeadScaling
from headwise.use.tuning import Reached, reached, tuned
from headwise.zoo.planted import Planted, planted


@cache
def made(architecture: str) -> Planted:
    return planted(circuits=("memory", "context"), seed=1, architecture=architecture)  # type: ignore[arg-type]


@pytest.fixture(params=["llama", "llama-gqa"], scope="module")
def known(request: pytest.FixtureRequest) -> Iterator[tuple[AttachedModel, Planted]]:
    built = made(request.param)
    with hw.attach(built.model, built.tokenizer, name=f"planted-{request.param}") as model:
        yield model, built


def conflicts(model: AttachedModel, n: int, seed: str, **settings: str) -> ItemSet:
    return hw.encode(hw.probe("conflict").over(trust="context", **settings), model.tokenizer, n=n, seed=seed)


def kind(model: AttachedModel, items: ItemSet, heads: str) -> HeadScores:
    """In two forwards: planted models have no feed-forward parts that matter here."""
    return hw.find("memory-context", model, items, heads=heads, feed_forward="frozen", norms="frozen")


def others(items: ItemSet, *used: ItemSet) -> ItemSet:
    gone = {id for each in used for id in each.ids}
    return items.only([id not in gone for id in items.ids], "used before")


def test_pruning_the_context_head_brings_back_memory(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    items = conflicts(model, 12, "find", twin="subject-and-told")
    scores = kind(model, items, "context")
    assert favoured(scores) == "memory"
    assert scores.top(1) == built.truth.heads("context")
    validation = others(conflicts(model, 16, "choose"), items)
    chosen = choose_pruned(model, scores, validation)
    assert isinstance(chosen.best, PH3)
    assert chosen.best.heads >= built.truth.heads("context")
    assert chosen.tried[0][0].settings["heads"] == built.truth.heads("context")
    assert chosen.tried[0][1].accuracy == 1.0
    assert (chosen.plain.accuracy, chosen.reached.accuracy) == (0.0, 1.0)
    assert chosen.helps
    assert len(chosen.tried) <= len(SIZES)
    held_out = answered_from(others(conflicts(model, 16, "judge"), items, validation), "memory")
    assert reached(model, chosen.best, held_out).accuracy == 1.0
    assert reached(model, PH3(built.truth.decoys("context")), held_out).accuracy == 0.0


def test_pruning_memory_heads_leaves_the_text(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    items = conflicts(model, 12, "find", twin="subject-and-told")
    scores = kind(model, items, "memory")
    assert favoured(scores) == "context"
    assert scores.top(3) == built.truth.heads("memory")
    # The model answers from the text already: pruning can make it surer, and no size is needed.
    chosen = choose_pruned(model, scores, others(conflicts(model, 8, "choose"), items), sizes=(3,))
    assert chosen.reached.accuracy == chosen.plain.accuracy == 1.0
    assert chosen.reached.confidence >= chosen.plain.confidence


def test_ph3_refuses_what_it_cannot_choose_from(known: tuple[AttachedModel, Planted]) -> None:
    model, _ = known
    items = conflicts(model, 6, "find", twin="subject-and-told")
    scores = kind(model, items, "context")
    with pytest.raises(InputError, match="among those that found the heads"):
        choose_pruned(model, scores, items)
    with pytest.raises(InputError, match="no numbers of heads"):
        choose_pruned(model, scores, others(conflicts(model, 6, "choose"), items), sizes=(0,))
    with pytest.raises(Refusal, match="nothing can be pruned"):
        choose_pruned(model, scores, others(conflicts(model, 6, "choose"), items), sizes=(999,))
    with pytest.raises(InputError, match="not by direct-logit"):
        choose_pruned(model, attributions(model, items), items)


def test_the_scaled_head_is_the_context_head_turned_down(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    items = conflicts(model, 12, "find")
    attributed = attributions(model, items)
    (context,) = built.truth.heads("context").labels
    assert attributed.ranked()[-1].head.label == context
    validation = others(conflicts(model, 16, "choose"), items)
    chosen = choose_scaled(model, attributed, validation, "memory")
    assert isinstance(chosen.best, FactualScaling)
    assert chosen.best.heads.labels == (context,)
    assert chosen.best.alpha < 1
    assert chosen.reached.accuracy == 1.0
    assert chosen.plain.accuracy == 0.0
    up = choose_scaled(model, attributed, validation, "context", factors=(2.0,))
    assert isinstance(up.best, FactualScaling)
    assert up.reached.accuracy == 1.0
    with pytest.raises(InputError, match="among those"):
        choose_scaled(model, attributed, items, "memory")
    found = kind(model, conflicts(model, 2, "x"), "context")
    with pytest.raises(InputError, match="not memory-context"):
        choose_scaled(model, found, validation, "memory")


def test_controls_of_a_scaled_head_are_those_of_like_attribution(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    attributed = attributions(model, conflicts(model, 6, "find"))
    heads = built.truth.heads("context")
    score = {each.head: each.score for each in attributed.ranked()}
    controls = of_like_attribution(attributed, heads, 4)
    (own,) = heads.heads
    apart = [abs(abs(score[each.heads[0]]) - abs(score[own])) for each in controls]
    assert apart == sorted(apart)
    assert heads not in controls
    left = set(score) - {own} - {each.heads[0] for each in controls}
    assert max(apart) <= min(abs(abs(score[each]) - abs(score[own])) for each in left)
    with pytest.raises(InputError, match="do not fit"):
        of_like_attribution(attributed, heads, len(score))
    with pytest.raises(InputError, match="of one head"):
        of_like_attribution(attributed, built.truth.heads("memory"), 1)


def test_juice_makes_memory_stronger_and_the_context_head_weaker(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    kinds = [answered_from(conflicts(model, 4, seed), "memory") for seed in ("a", "b")]
    found = juice_heads(model, kinds)
    (context,) = built.truth.heads("context").labels
    assert context in found.suppress(1).labels
    assert set(found.enhance(8).labels) & set(built.truth.heads("memory").labels)
    assert not found.enhance(32) & found.suppress(32)
    assert found.stability("suppress", 1)[context] == 1.0
    validation = answered_from(others(conflicts(model, 12, "choose"), *kinds), "memory")
    for method in (JUICE, JustRunOnce):
        chosen = choose_juice(model, found, validation, k=2, method=method, enhance_by=(0, 1), suppress_by=(0, 1))
        assert type(chosen.best) is method
        assert chosen.plain.accuracy == 0.0
        assert chosen.reached.accuracy == 1.0
    with pytest.raises(InputError, match="among those"):
        choose_juice(model, found, kinds[0])


def test_each_change_is_one_run_with_one_head_scaled(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    items = answered_from(conflicts(model, 3, "a"), "memory")
    found = juice_heads(model, [items], stronger=(2.0,), weaker=(-1.5,))
    place = found.heads.labels.index(built.truth.heads("context").labels[0])

    def sure(used: HeadScaling | None) -> float:
        return reached(model, used, items).confidence  # answers of one token, so that of the first is that of all

    assert all(len(each.answer) == 1 for each in items)
    for values, factor in ((found.stronger, 3.0), (found.weaker, -0.5)):
        changed = sure(HeadScaling(HeadSet((found.heads.heads[place],)), factor)) - sure(None)
        assert float(values[0][:, place].mean()) == pytest.approx(changed, abs=1e-5)


def test_a_head_is_chosen_only_where_it_helps_in_every_kind(known: tuple[AttachedModel, Planted]) -> None:
    model, _ = known
    memory, context = (answered_from(conflicts(model, 3, "a"), source) for source in ("memory", "context"))
    found = juice_heads(model, [memory, context], stronger=(3.0,), weaker=(-1.0,))
    table = found.to_pandas().set_index("head")
    for heads, side in ((found.enhance(99), "stronger"), (found.suppress(99), "weaker")):
        for label in heads.labels:
            assert table.loc[label, [f"{side}_0", f"{side}_1"]].min() > 0
    with pytest.raises(InputError, match="list of items"):
        juice_heads(model, memory)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="above 0"):
        juice_heads(model, [memory], weaker=(1.0,))
    with pytest.raises(InputError, match="no number of heads"):
        found.enhance(0)


def test_items_asked_for_one_source_keep_prompt_and_id(known: tuple[AttachedModel, Planted]) -> None:
    model, _ = known
    items = hw.encode(hw.probe("conflict"), model.tokenizer, n=12)
    memory = answered_from(items, "memory")
    assert memory.ids == items.ids
    for own, asked in zip(items, memory, strict=True):
        assert own.prompt == asked.prompt
        if own.item.attributes["trust"] == "memory":
            assert asked is own
        else:
            assert (asked.answer, asked.foils) == (own.foils[0], (own.answer,))
            assert (asked.item.answer, asked.item.foils) == (own.item.foils[0], (own.item.answer,))
            assert asked.item.attributes["instructed"] == "context"
    assert answered_from(memory, "context").items[0].answer in (items.items[0].answer, *items.items[0].foils)
    with pytest.raises(InputError, match="neither"):
        answered_from(items, "text")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attribute trust"):
        answered_from(hw.encode(hw.probe("facts"), model.tokenizer, n=2), "memory")


def test_the_best_is_by_accuracy_then_confidence_and_of_equals_the_first(known: tuple[AttachedModel, Planted]) -> None:
    model, built = known
    items = conflicts(model, 6, "a")
    heads = built.truth.heads("context")
    chosen = tuned(model, [HeadScaling(heads, g) for g in (0.0, 0.9, 1.2)], items)
    assert chosen.best is chosen.tried[2][0]  # all but the first are right; more of the head is surer
    rows = chosen.to_pandas()
    assert rows.intervention[0] == "none"
    assert rows.accuracy[1] < rows.accuracy[2] == rows.accuracy[3]
    assert tuned(model, [HeadScaling(heads, 1.0), HeadScaling(heads, 1.0)], items).best.settings["factor"] == 1.0
    same = [HeadScaling(heads, 1.0), HeadScaling(heads, 1.0)]
    assert tuned(model, same, items).best is same[0]
    assert not tuned(model, same, items).helps
    assert Reached(0.5, 0.1).order > Reached(0.4, 0.9).order
    with pytest.raises(InputError, match="needs interventions"):
        tuned(model, [], items)
