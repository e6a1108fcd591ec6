"""HeadMask: as many heads as were said in every step, none of them in evaluation, the same ones in backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.fit.copy_training import train_on_tasks
from headwise.fit.head_mask import HeadMask, train_head_masked
from headwise.fit.tasks import Task
from headwise.fit.training import Schedule, batch_of
from headwise.probes.item import Item


def attached(name: str = "tiny-llama") -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def task_of(model: hw.AttachedModel) -> Task:
    words = ("cat", "dog", "owl", "ant")
    items = [[Item(id=f"{s}{w}", prompt=f"{s} {w}", answer=f" {w}") for w in words] for s in ("the", "a")]
    return Task("animals", *(hw.encode(each, model.tokenizer, name="animals") for each in items))


def silent(model: hw.AttachedModel, mask: HeadMask, step: int) -> set[str]:
    """Heads whose z is 0 everywhere while the mask of a step is on."""
    task = task_of(model)
    batch = batch_of(task.items, (0, 1))
    with mask(model, task, batch, step), model.reading(hw.read.z()) as got:
        task.losses(model, batch)
    return {f"{label}H{h}" for label, z in got.z.items() for h in range(z.shape[2]) if not z[:, :, h].any()}


@pytest.mark.parametrize("choice", ["random", "important"])
@pytest.mark.parametrize("n", [1, 5])
def test_exactly_n_heads_are_silent_in_a_step(choice: Any, n: int) -> None:
    with attached() as model:
        mask, task = HeadMask(n, choice), task_of(model)
        for step in range(3):
            wanted = mask.heads(model, task, batch_of(task.items, (0, 1)), step)
            assert silent(model, mask, step) == set(wanted.labels)
            assert len(wanted) == n


def test_draws_are_uniform_and_their_own_in_each_step() -> None:
    with attached() as model:
        task = task_of(model)
        batch = batch_of(task.items, (0, 1))
        drawn = [HeadMask(4).heads(model, task, batch, step) for step in range(600)]
        counts = Counter(label for each in drawn for label in each.labels)
        assert set(counts) == set(model.heads().labels)
        assert all(abs(count - 200) < 5 * (200 * 2 / 3) ** 0.5 for count in counts.values())
        assert [HeadMask(4).heads(model, task, batch, step) for step in range(5)] == drawn[:5]
        assert [HeadMask(4, seed=1).heads(model, task, batch, step) for step in range(5)] != drawn[:5]


def test_the_important_ones_have_the_largest_derivative_by_a_factor() -> None:
    with attached() as model:
        task = task_of(model)
        batch = batch_of(task.items, (0, 1, 2))
        sizes = {}
        for label in model.heads().labels:
            factor = torch.ones(1, requires_grad=True)
            with model.editing(hw.edit.set(label, lambda z, here, factor=factor: z * factor)):
                task.losses(model, batch).sum().backward()
            sizes[label] = float(factor.grad.abs())
        model.model.zero_grad(set_to_none=True)
        ranked = sorted(sizes, key=lambda label: -sizes[label])
        free = HeadMask(4, "important", spare_layers=False).heads(model, task, batch, 0)
        assert set(free.labels) == set(ranked[:4])
        assert all(parameter.grad is None for parameter in model.model.parameters())


def test_every_layer_keeps_a_head_unless_it_is_said() -> None:
    with attached() as model:
        task = task_of(model)
        batch = batch_of(task.items, (0, 1))
        for choice in ("random", "important"):
            for step in range(20):
                drawn = HeadMask(9, choice).heads(model, task, batch, step)
                assert max(Counter(head.site for head in drawn).values()) == 3
                if choice == "important":
                    break
        assert len(HeadMask(12, spare_layers=False).heads(model, task, batch, 0)) == 12
        with pytest.raises(InputError, match="n=10 of 12 heads cannot be masked together here; 9 are the most"):
            HeadMask(10).heads(model, task, batch, 0)


def test_training_is_under_the_mask_and_the_trained_copy_is_without() -> None:
    with attached() as model:
        task, schedule = task_of(model), Schedule(steps=3, learning_rate=1e-3)
        plain = train_on_tasks(model, [task], schedule, batch_size=2)
        masked = train_head_masked(model, [task], HeadMask(4), schedule, batch_size=2)
        assert plain.trained.losses[0] != masked.trained.losses[0]
        with masked.model.reading(hw.read.z()) as got:
            masked.model(**model.example)
        assert all(bool(z[:, :, h].any()) for z in got.z.values() for h in range(z.shape[2]))
        assert not masked.model.planned
        plain.model.detach()
        masked.model.detach()


@pytest.mark.parametrize("choice", ["random", "important"])
def test_gradient_checkpointing_repeats_the_same_mask(choice: Any) -> None:
    found = []
    for checkpointing in (False, True):
        with attached() as model:
            model.model.train()
            if checkpointing:
                model.model.gradient_checkpointing_enable({"use_reentrant": False})
            trained = train_head_masked(
                model, [task_of(model)], HeadMask(4, choice), Schedule(steps=3, learning_rate=1e-3), batch_size=2
            )
            found.append(trained.model.model.state_dict())
            trained.model.detach()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_bad_masks_are_refused() -> None:
    with pytest.raises(InputError, match="n=0 must be"):
        HeadMask(0)
    with pytest.raises(InputError, match="choice='impt' is not one of random, important"):
        HeadMask(2, "impt")  # type: ignore[arg-type]
