"""Heads of a concept scaled in what the model writes: who chose, who judges, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import headwise as hw
from headwise.errors import InputError
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.use.attention.zero_tuning import parted
from headwise.use.directions.head_pursuit import _counts, _kept, pursue_concept, written_by


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.load("zoo:organism") as attached:
        yield attached


@pytest.fixture(scope="module")
def facts(model: AttachedModel) -> ItemSet:
    return hw.encode(hw.probe("facts"), model.tokenizer, n=24)


@pytest.fixture(scope="module")
def concept(facts: ItemSet) -> str:
    return " ".join(dict.fromkeys(each.item.answer.strip() for each in facts))


def test_words_of_the_concept_and_what_is_left_of_the_others() -> None:
    plain = [["a", "red", "star", "and", "a", "blue", "ring"], ["red"], []]
    changed = [["a", "star", "star", "and", "green"], ["red", "red"], ["blue"]]
    assert _counts(plain, ["red", "blue", "green"]).tolist() == [2.0, 1.0, 0.0]
    assert _counts(changed, ["red", "blue", "green"]).tolist() == [1.0, 2.0, 1.0]
    kept = _kept(plain, changed, ["red", "blue", "green"])
    assert float(kept[0]) == pytest.approx(3 / 5)  # a star and, of a star and a ring
    assert kept[1:].isnan().all()


def test_heads_are_chosen_on_one_half_and_judged_on_the_other(
    model: AttachedModel, facts: ItemSet, concept: str
) -> None:
    found = pursue_concept(model, facts, concept, heads=4, controls=2, new_tokens=4)
    assert not {each.prompt for each in found.tuning} & {each.prompt for each in found.judging}
    assert len(found.tuning) + len(found.judging) == len(facts)
    scores = hw.find("head-pursuit", model, found.tuning, concept=concept, at="concept")
    assert found.intervention.heads == scores.top(4)
    words = concept.lower().split()
    for number, each in enumerate(found.judging):
        ids = torch.tensor([each.prompt])
        for intervention, counted in ((None, found.written), (found.intervention, found.changed)):
            written = written_by(model, ItemSet("one", (each,), {}, facts.metric, facts.pad), intervention, 4)
            assert float(counted[number]) == sum(word in words for word in written[0])
        said = model.tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
        assert float(found.written[number]) <= sum(word in said.lower() for word in words)
    assert float(found.changed.mean()) < float(found.written.mean())
    assert found.controls.shape == found.controls_kept.shape == (2, len(found.judging))


def test_at_alpha_1_nothing_changes(model: AttachedModel, facts: ItemSet, concept: str) -> None:
    found = pursue_concept(model, facts, concept, heads=2, alpha=1.0, controls=1, new_tokens=3)
    assert torch.equal(found.changed, found.written)
    assert torch.equal(found.controls[0], found.written)
    assert found.kept[~found.kept.isnan()].eq(1).all()


def test_pictures_tell_prompts_of_the_same_words_apart() -> None:
    with hw.load("zoo:tiny-llava") as model:
        items = hw.encode(hw.probe("listing"), model, n=6)
        assert len({each.item.prompt for each in items}) == 1
        first, second = parted(items)
        assert [each.id for each in first] == [each.id for each in items][::2]
        assert [each.id for each in second] == [each.id for each in items][1::2]


def test_what_cannot_be_meant_is_refused(model: AttachedModel, facts: ItemSet) -> None:
    with pytest.raises(InputError, match="numbers from 1"):
        pursue_concept(model, facts, "Rome", heads=0)
    with pytest.raises(InputError, match="no answer"):
        pursue_concept(model, facts, "the")
