"""Soft Injection fitted: embeddings, what a fit cannot change, the best validation, functions without examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import headwise as hw
from headwise.errors import InputError
from headwise.fit import Schedule
from headwise.fit.function_task import FunctionTask, function_task
from headwise.fit.soft_injection import SCHEDULE, fit_injection, permuted, task_embedding
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.use import SoftInjection


@pytest.fixture(scope="module")
def task(organism: AttachedModel) -> FunctionTask:
    return function_task("plural", organism.tokenizer, prompts=10)


def test_the_embedding_is_the_mean_of_prompts_run_alone(tiny: AttachedModel, questions: ItemSet) -> None:
    heads = HeadSet.parse("L0H3, L2H0, L2H1", "head")
    few = replace(questions, items=questions.items[:5])
    found = [task_embedding(tiny, few, heads, batch_size=size) for size in (1, 4)]
    for head in heads:
        alone = []
        for each in few:
            with torch.no_grad(), tiny.reading(hw.read.z(heads=head)) as got:
                tiny.model(input_ids=torch.tensor([each.prompt]))
            alone.append(got.z[head.site][0, -1, 0])
        for embedding in found:
            assert embedding.keys() == set(heads.labels)
            assert torch.allclose(embedding[head.label], torch.stack(alone).mean(0), atol=1e-5)
    assert task_embedding(tiny, few).keys() == set(tiny.heads().labels)


def test_where_the_prompts_are_those_of_the_embedding_the_mean_stays_whatever_is_mixed(
    tiny: AttachedModel, questions: ItemSet
) -> None:
    few = replace(questions, items=questions.items[:6])
    last = HeadSet.parse("L2H0, L2H1, L2H2, L2H3", "head")
    embedding = task_embedding(tiny, few, last)
    for alpha in (0.3, 1.0):
        with SoftInjection(embedding, alpha)(tiny):
            again = task_embedding(tiny, few, last)
        for label in last.labels:
            assert torch.allclose(again[label], embedding[label], atol=1e-5)
    one = replace(few, items=few.items[:1])
    with SoftInjection(task_embedding(tiny, one), 0.8)(tiny, prompt_length=len(one.items[0].prompt)):
        mixed = hw.measure(tiny, one, "answer-log-probability")
    assert mixed.item() == pytest.approx(hw.measure(tiny, one, "answer-log-probability").item(), abs=1e-4)


def test_a_function_is_done_without_examples(organism: AttachedModel, task: FunctionTask) -> None:
    before = {name: tensor.clone() for name, tensor in organism.model.state_dict().items()}
    assert hw.measure(organism, task.test, "exact-match").mean() < 0.5
    embedding = task_embedding(organism, task.shown)
    fitted = fit_injection(
        organism,
        task.fit,
        embedding,
        validation=task.validation,
        schedule=replace(SCHEDULE, steps=60, validate_every=20),
    )
    with fitted.injection(organism):
        assert hw.measure(organism, task.test, "exact-match").mean() == 1.0
    validations = fitted.trained.validations
    assert validations[fitted.trained.best_step] == min(validations.values()) < 0.2 * validations[0]
    for injection, step in ((SoftInjection(embedding), 0), (fitted.injection, fitted.trained.best_step)):
        edits = injection.edits(organism)
        measured = hw.measure(organism, task.validation, "cross-entropy", edits=edits).mean().item()
        assert validations[step] == pytest.approx(measured, abs=1e-4)
    assert len(fitted.scores.heads) == fitted.trained.n_parameters == 72
    for each in fitted.scores.ranked():
        assert fitted.injection.alpha[each.head.label] == pytest.approx(each.score)
    assert all(torch.equal(tensor, before[name]) for name, tensor in organism.model.state_dict().items())


def test_the_best_validation_wins_not_the_last(organism: AttachedModel, task: FunctionTask) -> None:
    embedding = task_embedding(organism, task.shown)
    rough = Schedule(steps=12, learning_rate=3.0, validate_every=2)
    long = fit_injection(organism, task.fit, embedding, validation=task.validation, schedule=rough)
    best = long.trained.best_step
    assert 0 < best < 12
    short = fit_injection(organism, task.fit, embedding, schedule=replace(rough, steps=best))
    assert long.injection.alpha == short.injection.alpha
    patient = replace(rough, steps=100, patience=2)
    stopped = fit_injection(organism, task.fit, embedding, validation=task.validation, schedule=patient)
    assert stopped.trained.stopped_early
    assert len(stopped.trained.losses) < 100


def test_a_batch_is_the_mean_of_its_items(organism: AttachedModel, task: FunctionTask) -> None:
    """Prompts of one token more or less stand beside padding, and the token that is edited is each one's own."""
    embedding = task_embedding(organism, task.shown)
    mixed = replace(task.fit, items=(*task.fit.items[:3], *(task.shown.items[:1])))
    assert len({len(each.prompt) for each in mixed}) > 1
    one = Schedule(steps=1, learning_rate=0.2)
    together = fit_injection(organism, mixed, embedding, schedule=one, batch_size=4).trained.losses[0]
    alone = [
        fit_injection(organism, replace(mixed, items=(each,)), embedding, schedule=one).trained.losses[0]
        for each in mixed
    ]
    assert together == pytest.approx(sum(alone) / 4, abs=1e-4)


def test_permuted_embeddings_are_the_same_ones_and_none_in_its_place() -> None:
    embedding = {f"L{layer}H{head}": torch.tensor([layer, head]).float() for layer in range(3) for head in range(4)}
    for seed in range(5):
        other = permuted(embedding, seed)
        assert other.keys() == embedding.keys()
        assert all(not torch.equal(other[label], embedding[label]) for label in embedding)
        assert sorted(map(tuple, map(torch.Tensor.tolist, other.values()))) == sorted(
            map(tuple, map(torch.Tensor.tolist, embedding.values()))
        )
    assert any(not torch.equal(permuted(embedding, 0)[label], permuted(embedding, 1)[label]) for label in embedding)
    with pytest.raises(InputError, match="cannot change places"):
        permuted({"L0H0": torch.zeros(2)})
    with pytest.raises(InputError, match="cannot change places"):
        permuted({"L0H0": torch.zeros(2), "L0H1": torch.zeros(3)})


def test_the_paper_s_schedule() -> None:
    assert (SCHEDULE.steps, SCHEDULE.learning_rate, SCHEDULE.validate_every) == (400, 0.2, 50)
    assert SCHEDULE.weight_decay == 0.0


def test_what_cannot_be_meant_is_refused(organism: AttachedModel, task: FunctionTask) -> None:
    with pytest.raises(InputError, match="no items"):
        task_embedding(organism, replace(task.shown, items=()))
    with pytest.raises(InputError, match="have 3 dimensions"):
        fit_injection(organism, task.fit, {"L0H0": torch.zeros(3)})
    with pytest.raises(InputError, match="in the validation and trained on"):
        fit_injection(organism, task.fit, task_embedding(organism, task.shown), validation=task.fit)
