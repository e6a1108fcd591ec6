"""Parameters of heads: gradients through edits, what stays frozen, folders, scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.fit import Moment, Schedule, Trained
from headwise.fit.objective import AnswerLoss, Preference
from headwise.fit.per_head import by_label, fit_edits, fitted_scores, head_dim, per_head
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet

HEADS = HeadSet.parse("L0H1, L1H2, L2H3", "head")


def edits_of(a: nn.Parameter, v: nn.Parameter, m: nn.Parameter) -> list[hw.edit.Edit]:
    value = torch.linspace(-1, 1, v.numel()).reshape(v.shape)
    return [
        hw.edit.scale(HEADS, 1 + a),
        hw.edit.add(HEADS, v),
        hw.edit.mix(HEADS, value, torch.sigmoid(m), scope="prompt", queries=[-1]),
    ]


@pytest.mark.parametrize("name", ["zoo:tiny-llama", "zoo:organism"])
def test_gradients_through_edits_are_those_of_differences(name: str) -> None:
    model = hw.load(name, dtype="float64")
    items = hw.encode(hw.probe("ioi"), model.tokenizer, n=3)
    loss = AnswerLoss().on(model, items)
    a, v = per_head(model, HEADS, std=0.1, seed=0), per_head(model, HEADS, std=0.1, seed=1)
    m = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert a.dtype == torch.float64
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss((0, 1, 2), edits_of(a, v, m)), [a, v, m])
    for parameter, gradient in zip((a, v, m), gradients, strict=True):
        at = (1,) * parameter.dim()
        step, values = 1e-2, []  # the norms of the model are in fp32
        for sign in (1, -1):
            with torch.no_grad():
                parameter[at] += sign * step
                values.append(loss((0, 1, 2), edits_of(a, v, m)).item())
                parameter[at] -= sign * step
        assert gradient[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=5e-3, abs=1e-6)
        assert gradient[at].abs() > 1e-5


def test_parameters_in_fp32_learn_in_a_model_in_bf16(questions: ItemSet) -> None:
    half, whole = hw.load("zoo:tiny-llama", dtype="bfloat16"), hw.load("zoo:tiny-llama")
    found = []
    for model in (half, whole):
        a, v = per_head(model, HEADS, std=0.1, seed=0), per_head(model, HEADS, std=0.1, seed=1)
        assert a.dtype == torch.float32
        with torch.enable_grad():
            loss = AnswerLoss().on(model, questions)((0, 1, 2, 3), edits_of(a, v, nn.Parameter(torch.zeros(3))))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [a, v])]))
    assert found[0].dtype == torch.float32
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


def test_the_weights_stay_bit_for_bit_under_weight_decay(tiny: AttachedModel, questions: ItemSet) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()}
    offset = per_head(tiny, HEADS, std=1e-3, seed=0)
    first = offset.detach().clone()
    schedule = Schedule(steps=4, learning_rate=0.1, weight_decay=0.5)
    trained = fit_edits(tiny, questions, {"offset": offset}, lambda: [hw.edit.add(HEADS, offset)], schedule)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert asked == {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()}
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert not torch.equal(offset, first)
    assert trained.n_parameters == 36
    assert trained.losses[-1] < trained.losses[0]
    assert not tiny.planned


def test_a_penalty_draws_in_training_and_is_no_part_of_the_validation(tiny: AttachedModel, questions: ItemSet) -> None:
    train, held = replace(questions, items=questions.items[:8]), replace(questions, items=questions.items[8:12])
    found = []
    for strength in (0.0, 100.0):
        offset = per_head(tiny, HEADS, std=1.0, seed=0)
        trained = fit_edits(
            tiny,
            train,
            {"offset": offset},
            lambda offset=offset: [hw.edit.add(HEADS, offset)],
            Schedule(steps=10, learning_rate=0.05),
            penalty=lambda offset=offset, strength=strength: strength * offset.abs().sum(),
            validation=held,
        )
        found.append(trained)
    assert found[0].validations[0] == found[1].validations[0]
    assert found[1].losses[0] > found[0].losses[0] + 100


def test_validation_on_what_is_trained_on_is_refused(tiny: AttachedModel, questions: ItemSet) -> None:
    offset = per_head(tiny, HEADS, std=1.0, seed=0)
    one = Schedule(steps=1)
    with pytest.raises(InputError, match="in the validation and trained on"):
        fit_edits(tiny, questions, {"x": offset}, lambda: [hw.edit.add(HEADS, offset)], one, validation=questions)
    with pytest.raises(InputError, match="no items"):
        fit_edits(tiny, replace(questions, items=()), {"x": offset}, list, one)


def test_a_folder_knows_the_model_the_items_and_the_objective(
    tiny: AttachedModel, questions: ItemSet, tmp_path: Path
) -> None:
    def fit(model: AttachedModel = tiny, items: ItemSet = questions, **more: object) -> torch.Tensor:
        offset = per_head(model, HEADS, std=1e-3, seed=0)
        fit_edits(
            model,
            items,
            {"offset": offset},
            lambda: [hw.edit.add(HEADS, offset)],
            Schedule(steps=3),
            folder=tmp_path / "run",
            **more,  # type: ignore[arg-type]
        )
        return offset.detach()

    first = fit()
    assert torch.equal(first, fit())
    with pytest.raises(InputError, match="another items"):
        fit(items=replace(questions, items=questions.items[::-1]))
    with pytest.raises(InputError, match="another objective"):
        fit(objective=Preference())
    with pytest.raises(InputError, match="another seed"):
        fit(seed=1)
    other = hw.load("zoo:tiny-llama")
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(0.01)
    with pytest.raises(InputError, match="another weights"):
        fit(model=other)


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(
    tiny: AttachedModel, questions: ItemSet, tmp_path: Path
) -> None:
    train, held = replace(questions, items=questions.items[:16]), replace(questions, items=questions.items[16:20])

    def fit(folder: Path | None, stop_at: int | None = None) -> tuple[Trained, torch.Tensor]:
        def stop(moment: Moment) -> None:
            if moment.step == stop_at:
                raise KeyboardInterrupt

        offset = per_head(tiny, HEADS, std=1e-3, seed=0)
        schedule = Schedule(steps=6, learning_rate=0.1, validate_every=2, weight_decay=0.1, clip=0.5, decay="linear")
        edits = lambda: [hw.edit.add(HEADS, offset)]  # noqa: E731
        trained = fit_edits(
            tiny, train, {"offset": offset}, edits, schedule, validation=held, folder=folder, shown=stop
        )
        return trained, offset.detach()

    whole, values = fit(None)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_at=3)
    assert not tiny.planned
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())
    again, resumed = fit(tmp_path)
    assert again == whole
    assert torch.equal(resumed, values)


def test_fitted_numbers_become_scores(tiny: AttachedModel, questions: ItemSet) -> None:
    scores = fitted_scores(tiny, "lofit", {"L0H1": 0.5, "L2H0": 3.0, "L2H2": 1.0}, questions, 0, l1=0.1)
    assert [str(each.head) for each in scores.ranked()] == ["L2H0", "L2H2", "L0H1"]
    assert scores.heads.labels == ("L0H1", "L2H0", "L2H2")
    assert scores.provenance.settings["l1"] == 0.1


def test_vectors_are_drawn_by_seed_and_kept_by_label(tiny: AttachedModel) -> None:
    assert head_dim(tiny, HEADS) == 12
    drawn = per_head(tiny, HEADS, std=2.0, seed=0)
    assert torch.equal(drawn, per_head(tiny, HEADS, std=2.0, seed=0))
    assert not torch.equal(drawn, per_head(tiny, HEADS, std=2.0, seed=1))
    assert 1.0 < drawn.std() < 3.0
    kept = by_label(HEADS, drawn)
    assert torch.equal(kept["L1H2"], drawn[1])
    assert not kept["L1H2"].requires_grad


def test_heads_of_different_widths_are_refused(tiny: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(tiny.site("L0"), head_dim=99)
    site = tiny.site
    monkeypatch.setattr(tiny, "site", lambda label: wide if label == "L0" else site(label))
    with pytest.raises(Refusal, match=r"\[12, 99\] dimensions"):
        per_head(tiny, HEADS, std=1.0, seed=0)
