"""LoFiT on a teacher that is the model itself with offsets in two heads, its controls, and its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.fit.localized_tuning import SELECTING, TUNING, LoFiT, RankedHeads, Recipe, lofit, rank_heads, tune_offsets
from headwise.fit.objective import Objective, Preference
from headwise.fit.training import batch_of
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import Item
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe
from headwise.use.scaling import HeadOffset

PLANTED = HeadSet.parse("L0H1, L2H2", "head")
QUICK = Recipe(learning_rate=3e-2, l1=1e-3, epochs=1)


@dataclass(frozen=True)
class Teacher(Objective):
    """Divergence from the logits of a teacher, the model under an offset of its own."""

    offset: HeadOffset

    def on(self, model: AttachedModel, items: ItemSet) -> Callable[..., Tensor]:
        def logits(rows: tuple[int, ...], edits: Sequence[hw.edit.Edit]) -> Tensor:
            batch = batch_of(items, rows)
            with model.editing(*edits):
                outcome = observe(model, batch, wants={"logits"}, gradients=torch.is_grad_enabled())
            assert outcome.logits is not None
            return log_softmax(outcome.logits[outcome.predicting], dim=-1)

        @cache
        def taught(rows: tuple[int, ...]) -> Tensor:
            with torch.no_grad():
                return logits(rows, self.offset.edits(model))

        return lambda rows, edits: kl_div(logits(rows, edits), taught(rows), log_target=True, reduction="batchmean")


@pytest.fixture(scope="module")
def constant() -> AttachedModel:
    """A GPT-2 in which the planted heads write something constant besides, so that a scale can undo an offset."""
    model = hw.load("zoo:tiny-gpt2")
    for seed, head in enumerate(PLANTED):
        with torch.no_grad():
            biases = model.model.transformer.h[head.layer].attn.c_attn.bias.view(3, 4, 12)
            biases[2, head.index] = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def words(constant: AttachedModel) -> ItemSet:
    draw = Random(0)

    def word(n: int) -> str:
        return "".join(draw.choice("abcdefghij") for _ in range(n))

    items = [Item(id=f"item-{i}", prompt=word(draw.randint(6, 10)), answer=f" {word(6)}") for i in range(32)]
    return hw.encode(items, constant.tokenizer)


@pytest.fixture(scope="module")
def planted(constant: AttachedModel) -> HeadOffset:
    """What the planted heads write constantly, taken away."""
    biases = {h: constant.model.transformer.h[h.layer].attn.c_attn.bias.view(3, 4, 12)[2, h.index] for h in PLANTED}
    return HeadOffset({head.label: -bias.detach() for head, bias in biases.items()})


@pytest.fixture(scope="module")
def fitted(constant: AttachedModel, words: ItemSet, planted: HeadOffset) -> LoFiT:
    return lofit(
        constant,
        words,
        2,
        objective=Teacher(planted),
        selecting=Recipe(learning_rate=3e-2, l1=3e-3, epochs=50),
        tuning=Recipe(learning_rate=1e-1, epochs=50),
    )


@pytest.mark.slow
def test_the_first_stage_finds_the_heads_that_the_teacher_moved(fitted: LoFiT) -> None:
    assert fitted.ranked.top(2) == PLANTED
    assert fitted.heads == PLANTED
    ranked = fitted.ranked.scores.ranked()
    assert ranked[1].score > 1.5 * ranked[2].score
    factors = fitted.ranked.scaling.factor
    assert isinstance(factors, dict)
    for each in ranked:
        assert each.score == pytest.approx((factors[each.head.label] - 1).norm().item(), rel=1e-5)


@pytest.mark.slow
def test_the_second_stage_recovers_what_the_teacher_writes(
    constant: AttachedModel, fitted: LoFiT, planted: HeadOffset
) -> None:
    for head in PLANTED:
        o = constant.model.transformer.h[head.layer].attn.c_proj.weight[head.index * 12 : (head.index + 1) * 12]
        wanted, found = planted.offset[head.label] @ o, fitted.offset.offset[head.label] @ o
        assert (wanted - found).norm() < 0.15 * wanted.norm()
    assert fitted.tuned.trained.losses[-1] < 1e-2 * fitted.tuned.trained.losses[0]


@pytest.mark.slow
def test_the_result_is_an_intervention_that_does_as_the_teacher(
    constant: AttachedModel, words: ItemSet, fitted: LoFiT, planted: HeadOffset
) -> None:
    plain = hw.measure(constant, words)
    with planted(constant):
        taught = hw.measure(constant, words)
    with fitted.offset(constant):
        learned = hw.measure(constant, words)
    assert (taught - learned).abs().mean() < 0.1 * (taught - plain).abs().mean()


def test_it_counts_its_parameters_and_leaves_the_weights(tiny: AttachedModel, questions: ItemSet) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    decaying = replace(QUICK, weight_decay=0.3)
    found = lofit(tiny, questions, 3, selecting=decaying, tuning=decaying)
    assert found.ranked.trained.n_parameters == 12 * 12
    assert found.n_parameters == found.tuned.trained.n_parameters == 3 * 12
    assert len(found.tuned.trained.losses) == 3  # 24 items, 8 at a time
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())


# -- controls ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tiny: AttachedModel, questions: ItemSet) -> RankedHeads:
    return rank_heads(tiny, questions, QUICK)


def test_controls_have_as_many_parameters(tiny: AttachedModel, questions: ItemSet, ranked: RankedHeads) -> None:
    def with_control(control: str | None) -> LoFiT:
        return lofit(tiny, questions, 2, control=control, ranked=ranked, tuning=QUICK)  # type: ignore[arg-type]

    plain = with_control(None)
    top, bottom = ranked.top(2), ranked.bottom(2)
    for control in ("random-heads", "bottom-heads", "random-directions"):
        found = with_control(control)
        assert found.control == control
        assert found.n_parameters == plain.n_parameters == 24
        layers = sorted(head.layer for head in found.heads)
        if control == "random-heads":
            assert not set(found.heads) & set(top)
            assert layers == sorted(head.layer for head in top)
        elif control == "bottom-heads":
            assert found.heads == bottom
            assert not set(bottom) & set(top)
        else:
            assert found.heads == top
            for label, vector in found.offset.offset.items():
                learned = plain.offset.offset[label]
                assert vector.norm() == pytest.approx(learned.norm().item(), rel=1e-5)
                assert torch.cosine_similarity(vector, learned, dim=0).abs() < 0.9
    lowest = sorted(each.score for each in ranked.scores.ranked())[:2]
    assert [each.score for each in ranked.scores.ranked() if each.head in set(bottom)] == lowest[::-1]


def test_a_share_of_the_heads_is_the_default(tiny: AttachedModel, questions: ItemSet, ranked: RankedHeads) -> None:
    assert len(lofit(tiny, questions, ranked=ranked, tuning=QUICK).heads) == 1  # 3 percent of 12


def test_what_cannot_be_meant_is_refused(tiny: AttachedModel, questions: ItemSet, ranked: RankedHeads) -> None:
    with pytest.raises(InputError, match="control='random'"):
        lofit(tiny, questions, 2, control="random", ranked=ranked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k=13"):
        lofit(tiny, questions, 13, ranked=ranked)
    with pytest.raises(Refusal, match="no other heads"):
        lofit(tiny, questions, 12, control="random-heads", ranked=ranked)
    with pytest.raises(InputError):
        tune_offsets(tiny, questions, HeadSet.parse("L9H0", "head"))


# -- objectives, validation, folders ----------------------------------------------------------------------------------


def test_preference_makes_answers_likelier_than_foils(tiny: AttachedModel, questions: ItemSet) -> None:
    found = tune_offsets(
        tiny, questions, PLANTED, Recipe(learning_rate=0.3, epochs=4), objective=Preference(0.5), seed=1
    )
    assert found.trained.losses[0] == pytest.approx(0.693, abs=0.02)

    def margin() -> Tensor:
        foils = replace(
            questions,
            items=tuple(replace(each, answer=each.foils[0], foils=(each.answer,)) for each in questions),
        )
        each = [hw.measure(tiny, items, "answer-log-probability") for items in (questions, foils)]
        return each[0] - each[1]

    plain = margin()
    with found.offset(tiny):
        assert (margin() - plain).mean() > 0.5


def test_the_best_pass_on_other_items_is_kept(tiny: AttachedModel, questions: ItemSet) -> None:
    train, held = replace(questions, items=questions.items[:16]), replace(questions, items=questions.items[16:])
    harmful = Recipe(learning_rate=30.0, epochs=2)
    found = tune_offsets(tiny, train, PLANTED, harmful, validation=held)
    assert list(found.trained.validations) == [0, 2, 4]
    assert found.trained.best_step == 0
    assert max(vector.abs().max() for vector in found.offset.offset.values()) < 0.01


def test_a_folder_holds_both_stages(tiny: AttachedModel, questions: ItemSet, tmp_path: Path) -> None:
    found = [lofit(tiny, questions, 2, selecting=QUICK, tuning=QUICK, folder=tmp_path / "run") for _ in range(2)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["heads", "offsets"]
    assert found[0].tuned.trained == found[1].tuned.trained
    for label, vector in found[0].offset.offset.items():
        assert torch.equal(vector, found[1].offset.offset[label])


def test_the_recipes_are_the_papers() -> None:
    assert (SELECTING.learning_rate, SELECTING.l1, TUNING.learning_rate, TUNING.l1) == (5e-3, 1e-3, 1e-2, 0.0)
    schedule = SELECTING.schedule(300, 0)
    assert (schedule.steps, schedule.validate_every, schedule.decay, schedule.clip) == (188, 38, "linear", 1.0)
