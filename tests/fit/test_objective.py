"""Objectives against closed forms, by hand and against the model's own logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.fit.objective import AnswerLoss, Preference, first_token, mean_loss, preference_loss
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet


def log_probability(model: AttachedModel, each: EncodedItem, answer: tuple[int, ...]) -> float:
    """Of one continuation alone, without padding, by the model itself."""
    ids = torch.tensor([each.prompt + answer])
    with torch.no_grad():
        logits = model.model(input_ids=ids).logits[0]
    start = len(each.prompt) - 1
    return sum(log_softmax(logits[start + t], -1)[token].item() for t, token in enumerate(answer))


def test_preference_loss_of_a_case_worked_by_hand() -> None:
    chosen, rejected = torch.tensor([0.2, -1.0]), torch.tensor([-0.4, 0.5])
    expected = [-math.log(1 / (1 + math.exp(-0.5 * margin))) for margin in (0.6, -1.5)]
    assert preference_loss(chosen, rejected, 0.5).tolist() == pytest.approx(expected, rel=1e-6)


def test_without_an_edit_nothing_is_preferred(tiny: AttachedModel, questions: ItemSet) -> None:
    loss = Preference(0.5).on(tiny, questions)
    assert loss((0, 3, 5), ()).item() == pytest.approx(math.log(2), abs=1e-5)
    ones = hw.edit.scale(tiny.heads(), 1.0)
    assert loss((0, 3, 5), [ones]).item() == pytest.approx(math.log(2), abs=1e-5)


def test_preference_is_the_closed_form_on_the_models_own_log_probabilities(
    tiny: AttachedModel, questions: ItemSet
) -> None:
    edits = [hw.edit.scale("L1H2, L2H0", 3.0)]
    two = replace(questions.items[2], foils=(*questions.items[2].foils, questions.items[5].foils[0]))
    two = replace(two, item=replace(two.item, foils=(*two.item.foils, questions.items[5].item.foils[0])))
    items = replace(questions, items=(questions.items[0], two, questions.items[4]))
    by_hand = []
    for each in (items.items[0], items.items[1]):
        for foil in each.foils:
            plain = log_probability(tiny, each, each.answer) - log_probability(tiny, each, foil)
            with tiny.editing(*edits):
                edited = log_probability(tiny, each, each.answer) - log_probability(tiny, each, foil)
            by_hand.append(math.log1p(math.exp(-0.7 * (edited - plain))))
    expected = (by_hand[0] + (by_hand[1] + by_hand[2]) / 2) / 2
    loss = Preference(0.7).on(tiny, items)
    assert loss((0, 1), edits).item() == pytest.approx(expected, abs=1e-4)
    # The order of the rows, and what else is in the batch, do not count.
    assert loss((1, 0), edits).item() == pytest.approx(expected, abs=1e-4)
    assert mean_loss(loss, 2, edits, batch_size=1) == pytest.approx(expected, abs=1e-4)


def test_the_answers_loss_is_that_of_each_item_alone(tiny: AttachedModel, questions: ItemSet) -> None:
    loss = AnswerLoss().on(tiny, questions)
    alone = [
        -log_probability(tiny, each, each.answer) / len(each.answer) for each in (questions.items[i] for i in (1, 2, 7))
    ]
    assert len({len(questions.items[i].prompt) for i in (1, 2, 7)}) > 1  # so that there is left padding
    assert loss((1, 2, 7), ()).item() == pytest.approx(sum(alone) / 3, abs=1e-4)
    assert mean_loss(loss, 5, (), batch_size=2) == pytest.approx(loss((0, 1, 2, 3, 4), ()).item(), abs=1e-5)


def test_a_graph_is_kept_only_where_gradients_are_on(tiny: AttachedModel, questions: ItemSet) -> None:
    scale = torch.ones(1, 12, requires_grad=True)
    for objective in (AnswerLoss(), Preference()):
        loss = objective.on(tiny, questions)
        with torch.enable_grad():
            assert loss((0,), [hw.edit.scale("L0H1", scale)]).requires_grad
        with torch.no_grad():
            assert not loss((0,), [hw.edit.scale("L0H1", scale)]).requires_grad


def test_answers_are_cut_to_the_token_that_decides(tiny: AttachedModel, questions: ItemSet) -> None:
    cut = first_token(questions)
    assert [each.answer for each in cut] == [each.answer[:1] for each in questions]
    assert cut.ids == questions.ids
    each = questions.items[0]
    expected = -log_probability(tiny, each, each.answer[:1])
    assert AnswerLoss().on(tiny, cut)((0,), ()).item() == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_meant_is_refused(tiny: AttachedModel, questions: ItemSet) -> None:
    without = replace(questions, items=tuple(replace(each, foils=()) for each in questions))
    with pytest.raises(InputError, match="no foil to prefer"):
        Preference().on(tiny, without)
    with pytest.raises(InputError, match="beta=0"):
        Preference(0)
    with pytest.raises(InputError, match="no answer"):
        first_token(replace(questions, items=(replace(questions.items[0], answer=()),)))
    encoder = hw.load("zoo:tiny-bert")
    with pytest.raises(Refusal), torch.no_grad():
        AnswerLoss().on(encoder, questions)((0,), ())
