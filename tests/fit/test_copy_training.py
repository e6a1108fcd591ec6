"""Copies trained on tasks: which heads a task's gradient reaches, what stays, and the model given is left alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.fit.copy_training import _Weights, train_on_tasks
from headwise.fit.slices import head_slices
from headwise.fit.tasks import Task, classifying
from headwise.fit.training import Order, Schedule, batch_of
from headwise.model.weights import replaced
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item

DECAYED = Schedule(steps=3, learning_rate=1e-2, weight_decay=0.5)


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def items_of(model: hw.AttachedModel, name: str, start: int = 0) -> ItemSet:
    words = {"animals": ("cat", "dog"), "colours": ("red", "blue")}[name]
    items = [
        Item(id=f"{name}/{start + n}", prompt=f"the {words[n % 2]} {'very ' * (n % 3)}thing", answer=f" {words[n % 2]}")
        for n in range(6)
    ]
    return hw.encode(items, model.tokenizer, name=name)


def two_tasks(model: hw.AttachedModel) -> list[Task]:
    return [Task(name, items_of(model, name), items_of(model, name, 100)) for name in ("animals", "colours")]


def slices_at_zero(model: hw.AttachedModel, heads: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with what belongs to the heads put to 0."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for part in head_slices(model, model.heads(heads)):
        for name, axis in part.parameters.items():
            state[name] = state[name].index_fill(axis, part.indices, 0.0)
    return state


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_task_reaches_its_own_heads_and_shared_ones_get_the_sum(name: str) -> None:
    with attached(name) as model:
        tasks = two_tasks(model)
        only = {"animals": model.heads("L0H0,L1H2"), "colours": model.heads("L0H3,L1H2")}
        weights = _Weights.of(model, only, others=True)

        def gradients(model_runs: dict[str, Task]) -> dict[str, Tensor]:
            for parameter in weights.parameters.values():
                parameter.grad = None
            for task_name, task in model_runs.items():
                with replaced(model, weights.during(task_name)):
                    task.losses(model, batch_of(task.items, (0, 1, 2))).sum().backward()
            return {
                key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in weights.parameters.items()
            }

        by_name = {task.name: task for task in tasks}
        one, other = (gradients({key: task}) for key, task in by_name.items())
        both = gradients(by_name)
        plain = {}
        for key, task in by_name.items():  # the same by the whole weights, none held fixed
            model.model.zero_grad(set_to_none=True)
            task.losses(model, batch_of(task.items, (0, 1, 2))).sum().backward()
            plain[key] = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
        model.model.zero_grad(set_to_none=True)
        held = 0
        for parameter, (axis, rows) in weights.places.items():
            for found, key in ((one, "animals"), (other, "colours")):
                takes = weights.taking[key][parameter]
                whole = plain[key][parameter].index_select(axis, rows)
                taken, left = takes.nonzero()[:, 0], (~takes).nonzero()[:, 0]
                assert not found[parameter].index_select(axis, left).any()  # exactly none
                torch.testing.assert_close(found[parameter].index_select(axis, taken), whole.index_select(axis, taken))
                held += int(left.numel() > 0 and bool(whole.index_select(axis, left).any()))
            torch.testing.assert_close(both[parameter], one[parameter] + other[parameter])
        assert held > 2  # and there was something to hold back
        assert set(weights.parameters) >= {key for key in plain["animals"] if "attn" not in key}


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("others", [False, True])
def test_heads_of_no_task_keep_their_bits_under_weight_decay(name: str, others: bool) -> None:
    with attached(name) as model:
        only = {"animals": model.heads("L0H0"), "colours": model.heads("L2H1")}
        before = copy.deepcopy(model.model.state_dict())
        found = train_on_tasks(model, two_tasks(model), DECAYED, only=only, others=others, batch_size=2)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.model.state_dict().items())
        after = found.model.model.state_dict()
        for part in head_slices(model, model.heads("L0H0,L2H1")):
            key = f"{part.module}.weight"
            assert not torch.equal(after[key], before[key])
        of_heads = {key for part in head_slices(model, model.heads()) for key in part.parameters}
        kept, was = slices_at_zero(model, "L0H0,L2H1", after), slices_at_zero(model, "L0H0,L2H1", before)
        changed = {key for key in kept if not torch.equal(kept[key], was[key])}
        assert not changed & of_heads
        assert bool(changed) == others
        assert found.model.model.training == model.model.training
        found.model.detach()


def test_all_heads_for_all_tasks_is_plain_training() -> None:
    with attached("tiny-llama") as model:
        tasks, everything = two_tasks(model), model.heads()
        plain = train_on_tasks(model, tasks, DECAYED, batch_size=2)
        every = train_on_tasks(model, tasks, DECAYED, batch_size=2, only={task.name: everything for task in tasks})
        assert plain.trained.n_parameters == every.trained.n_parameters
        for key, tensor in plain.model.model.state_dict().items():
            torch.testing.assert_close(tensor, every.model.model.state_dict()[key], atol=1e-6, rtol=1e-4)
        by_hand = copy.deepcopy(model.model)
        optimiser = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.5)
        with hw.attach(by_hand, model.tokenizer) as other:
            for step in range(3):
                optimiser.zero_grad()
                for task in tasks:
                    rows = Order(len(task.items), 2, f"0/{task.name}").rows(step)
                    task.losses(other, batch_of(task.items, rows)).mean().backward()
                optimiser.step()
        for key, tensor in by_hand.state_dict().items():
            torch.testing.assert_close(plain.model.model.state_dict()[key], tensor, atol=1e-6, rtol=1e-4)
        plain.model.detach()
        every.model.detach()


def test_readouts_are_trained_on_a_copy() -> None:
    with attached("tiny-bert") as model:
        task = classifying(model, "animals", items_of(model, "animals"), items_of(model, "animals", 100))
        before = task.readout.weight.detach().clone()
        schedule = Schedule(steps=30, learning_rate=3e-3)
        found = train_on_tasks(model, [task], schedule, only={"animals": model.heads("L2H0")}, others=False)
        assert torch.equal(task.readout.weight, before)
        assert not torch.equal(found.tasks[0].readout.weight, before)
        assert found.trained.losses[-1] < found.trained.losses[0]
        assert set(found.accuracy()) == {"animals"}
        found.model.detach()


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    with attached("tiny-llama") as model:
        tasks, schedule = two_tasks(model), Schedule(steps=4, learning_rate=1e-3)
        whole = train_on_tasks(model, tasks, schedule, batch_size=2)

        class Stopped(Exception):
            pass

        def stop(moment: object) -> None:
            if moment.step == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_on_tasks(model, tasks, schedule, batch_size=2, folder=tmp_path / "run", shown=stop)
        resumed = train_on_tasks(model, tasks, schedule, batch_size=2, folder=tmp_path / "run")
        assert resumed.trained.losses == whole.trained.losses
        state = resumed.model.model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in whole.model.model.state_dict().items())
        with pytest.raises(InputError, match="another"):
            train_on_tasks(model, tasks, schedule, batch_size=2, others=False, folder=tmp_path / "run")
        whole.model.detach()
        resumed.model.detach()


def test_what_is_opened_around_a_loss_is_open_in_it() -> None:
    with attached("tiny-llama") as model:
        seen = []

        def around(copy: hw.AttachedModel, task: Task, batch: Batch, step: int) -> nullcontext[None]:
            seen.append((copy is model, task.name, step, len(batch.items)))
            return nullcontext()

        train_on_tasks(model, two_tasks(model), Schedule(steps=2), batch_size=3, around=around).model.detach()
        assert seen == [(False, name, step, 3) for step in (0, 1) for name in ("animals", "colours")]


def test_bad_calls_are_refused() -> None:
    with attached("tiny-llama") as model:
        tasks = two_tasks(model)
        with pytest.raises(InputError, match="one or more tasks of different names"):
            train_on_tasks(model, [tasks[0], tasks[0]], DECAYED)
        with pytest.raises(InputError, match="give heads for each of them"):
            train_on_tasks(model, tasks, DECAYED, only={"animals": model.heads("L0H0")})
