"""A copy of a model trained on several tasks at once; which heads take which task's gradient can be said.

    L = sum_t L_t,      dL/dW[slice of head h] = sum over the tasks t that h takes part in of dL_t/dW[slice of h]

A step takes one batch of every task. Weights of heads are trained slice by slice: what belongs to a head that no task
trains is no parameter at all, so it keeps its bits under weight decay and momentum. Within a task the slices of heads
that do not take its gradient are held fixed in the graph. Trained without dropout, in the mode the model is in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.fit.slices import head_slices
from headwise.fit.taken_back import taken_back
from headwise.fit.tasks import Task
from headwise.fit.training import Moment, Order, Schedule, Trained, batch_of, train
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel, attach
from headwise.model.identity import weights_hash
from headwise.model.weights import replaced
from headwise.probes.batch import Batch

Around = Callable[[AttachedModel, Task, Batch, int], AbstractContextManager[object]]
"""What is open while a step's loss of a task is computed and taken back: the copy, the task, its batch, the step."""


@dataclass(frozen=True, eq=False)
class TrainedCopy:
    """A trained copy.

    Attributes:
        model: the copy, attached; `model.model.save_pretrained(folder)` keeps it.
        tasks: the tasks with their readouts as they are now.
        trained: losses and number of parameters.
    """

    model: AttachedModel
    tasks: tuple[Task, ...]
    trained: Trained

    def accuracy(self) -> dict[str, float]:
        """By task, on its held-out items."""
        return {task.name: task.accuracy(self.model) for task in self.tasks}


def train_on_tasks(
    model: AttachedModel,
    tasks: Sequence[Task],
    schedule: Schedule,
    *,
    only: Mapping[str, HeadSet] | None = None,
    others: bool = True,
    batch_size: int = 8,
    first_step: int = 0,
    around: Around | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Callable[[Moment], None] | None = None,
) -> TrainedCopy:
    """Train a copy of `model`; the model and the tasks that are given stay as they are.

    Args:
        only: by task, the heads whose weights take its gradient; None is all heads for all tasks.
        others: whether what belongs to no head (embeddings, MLPs, norms, output biases, readouts) is trained, too, by
            all tasks. Readouts are trained in any case.
        first_step: the step of the order of items to begin with, where training goes on.
        around: opened around each task's loss; a folder is gone on with under one that looks the same.
        seed: of the order of items.
        folder, shown: as in `train`.

    Raises:
        InputError: no tasks, two of one name, a task without heads, heads that the model does not have.
        Refusal: layers that no part of can be trained.
    """
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise InputError(f"train_on_tasks takes one or more tasks of different names, not {names}")
    if only is not None and only.keys() != set(names):
        raise InputError(f"only= names {sorted(only)}, and the tasks are {sorted(names)}; give heads for each of them")
    made = copied(model)
    tasks = tuple(replace(task, readout=copy.deepcopy(task.readout)) for task in tasks)
    weights = _Weights.of(made, only, others)
    readouts = {
        f"{task.name}.readout.{name}": parameter
        for task in tasks
        if task.readout is not None
        for name, parameter in task.readout.named_parameters()
    }
    parameters = {**weights.parameters, **readouts}
    orders = {task.name: Order(len(task.items), batch_size, f"{seed}/{task.name}") for task in tasks}

    def loss(step: int) -> Tensor:
        return torch.stack([of_task(task, step) for task in tasks]).sum()

    def of_task(task: Task, step: int) -> Tensor:
        batch = batch_of(task.items, orders[task.name].rows(first_step + step))
        opened = nullcontext() if around is None else around(made, task, batch, step)
        with opened, replaced(made, weights.during(task.name)):
            return taken_back(task.losses(made, batch).mean(), parameters.values())

    trained = train(
        parameters,
        loss,
        schedule,
        at_rest=made.model,
        folder=folder,
        settings={
            "method": "tasks",
            "weights": None if folder is None else weights_hash(model.model),
            "tasks": {task.name: list(task.items.ids) for task in tasks},
            "only": None if only is None else {name: list(heads.labels) for name, heads in only.items()},
            "others": others,
            "around": None if around is None else repr(around),
            "batch_size": batch_size,
            "first_step": first_step,
            "seed": seed,
        },
        shown=shown,
    )
    weights.put_in_place()
    return TrainedCopy(made, tasks, trained)


def copied(model: AttachedModel) -> AttachedModel:
    """An attached copy, with weights of its own. Raises PlanConflict where a plan is open on the model."""
    with model.aside():  # hooks would be copied along
        own = copy.deepcopy(model.model)
    return attach(own, model.tokenizer, processor=model.processor, example=model.example, name=model.name)


@dataclass(frozen=True, eq=False)
class _Weights:
    """What of a model is trained, and the weights it runs with during each task.

    Attributes:
        parameters: what is trained, by name; of a weight that is trained in part, that part.
        places: by name of such a weight, the axis and the indices of its part.
        taking: by task and weight, which entries of the part take the task's gradient.
    """

    model: AttachedModel
    parameters: dict[str, nn.Parameter]
    places: dict[str, tuple[int, Tensor]]
    taking: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, model: AttachedModel, only: Mapping[str, HeadSet] | None, others: bool) -> _Weights:
        whole = dict(model.model.named_parameters())
        if only is None and others:
            return cls(model, whole, {}, {})
        of_heads = _places(model, model.heads())
        rest = {name: parameter for name, parameter in whole.items() if name not in of_heads} if others else {}
        wanted = {name: model.heads(heads) for name, heads in (only or {"": model.heads()}).items()}
        union = HeadSet(tuple({head for heads in wanted.values() for head in heads}))
        places = _places(model, union)
        parts = {name: whole[name].detach().index_select(axis, rows) for name, (axis, rows) in places.items()}
        taking = {}
        for task, heads in (wanted if only is not None else {}).items():
            own = _places(model, heads)
            taking[task] = {
                name: torch.isin(rows, own[name][1]) if name in own else torch.zeros_like(rows, dtype=torch.bool)
                for name, (_, rows) in places.items()
            }
        return cls(model, {name: nn.Parameter(part) for name, part in parts.items()} | rest, places, taking)

    def during(self, task: str) -> dict[str, Tensor]:
        """The weights that a task's loss is computed with, so that only its own heads are reached by its gradient."""
        made = {}
        for name, (axis, rows) in self.places.items():
            part: Tensor = self.parameters[name]
            if task in self.taking:
                shape = [-1 if each == axis else 1 for each in range(part.dim())]
                part = torch.where(self.taking[task][name].view(shape), part, part.detach())
            made[name] = self.model.model.get_parameter(name).detach().index_copy(axis, rows, part)
        return made

    def put_in_place(self) -> None:
        """Write the trained parts into the weights."""
        with torch.no_grad():
            for name, (axis, rows) in self.places.items():
                self.model.model.get_parameter(name).index_copy_(axis, rows, self.parameters[name])


def _places(model: AttachedModel, heads: HeadSet) -> dict[str, tuple[int, Tensor]]:
    """By name of the parameter, the axis and the indices of what belongs to the heads."""
    return {
        name: (axis, part.indices.to(model.device))
        for part in head_slices(model, heads)
        for name, axis in part.parameters.items()
    }


__all__ = ["Around", "TrainedCopy", "copied", "train_on_tasks"]
