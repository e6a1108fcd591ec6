"""Important-head training (IAT) after Li et al. 2023, "Interpreting and Exploiting Functional Specialization in
Multi-Head Attention under Multi-task Learning": in the last part of a training on several tasks, a task's gradient goes
to its own most important heads alone.

    I_h(t) = sum over tokens |<z_h, dL_t/dz_h>| / number of tokens
    heads of t: the top 30 percent by I(t), over all layers together
    from step 0.9 N on: dL/dW[slice of h] = sum over the t that h is a head of, of dL_t/dW[slice of h]

W are the rows of q, k and v and the columns of the output that belong to a head. Start, share and the formula are the
released code's (github.com/ZNLP/FunctionalSpecializationInMHA). Reconstruction: a step takes one batch of every task,
where the code takes the tasks in turn; the optimiser's moments begin anew at the switch, for the plain training it is
compared with as well; tasks are probes, or classes read off an embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError
from headwise.fit.copy_training import TrainedCopy, copied, train_on_tasks
from headwise.fit.tasks import Task
from headwise.fit.training import Moment, Schedule, Trained
from headwise.heads import Head, HeadSet, SiteId
from headwise.model import edit, read
from headwise.model.at_rest import weights_at_rest
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.verify.functional_dissociation import DRAWS, FunctionalDissociation, draws_of, scored, share_of

SHARE = 0.3
START = 0.9


@dataclass(frozen=True, eq=False)
class Judged:
    """A trained model on held-out items.

    Attributes:
        copy: the model, its tasks and how it was trained.
        accuracy: by task.
        dissociation: D of each task at the share of heads that was trained; see `verify.functional_dissociation`.
    """

    copy: TrainedCopy
    accuracy: Mapping[str, float]
    dissociation: FunctionalDissociation


@dataclass(frozen=True, eq=False)
class ImportantHeadTraining:
    """Important-head training beside plain training of the same start, steps, batches and seed.

    Attributes:
        heads: by task, the heads that took its gradient.
        before: the model at the switch; `important` and `plain`: after the last steps, in the one way and the other.
    """

    heads: Mapping[str, HeadSet]
    before: Judged
    important: Judged
    plain: Judged


def train_important_heads(
    model: AttachedModel,
    tasks: Sequence[Task],
    schedule: Schedule,
    *,
    start: float = START,
    share: float = SHARE,
    shared: bool = True,
    others: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    shown: Callable[[Moment], None] | None = None,
) -> ImportantHeadTraining:
    """Train copies of `model` on two tasks or more: plainly up to `start`, then in both ways.

    Args:
        schedule: of the whole training; a linear decay runs out in each of its two parts.
        start: share of the steps after which a task's gradient goes to its own heads alone; 0 is from the first on.
        share: share of all heads that are a task's own.
        shared: whether heads of several tasks take the gradients of all of them; else they take none.
        others: whether what belongs to no head is trained, too, before and after the switch.

    Raises:
        InputError: fewer than two tasks, shares that are none, no steps left behind the switch.
        Refusal: layers that no part of can be trained; a model that does not solve a task at all.
    """
    if len(tasks) < 2:
        raise InputError(f"important heads are told apart between tasks; give two or more, not {len(tasks)}")
    plain_steps = round(start * schedule.steps)
    if not 0 <= start < 1 or plain_steps >= schedule.steps:
        raise InputError(f"start={start:g} of {schedule.steps} steps leaves none for important heads; lower it")
    if plain_steps:
        common = train_on_tasks(
            model,
            tasks,
            replace(schedule, steps=plain_steps),
            others=others,
            batch_size=batch_size,
            seed=seed,
            shown=shown,
        )
    else:
        common = TrainedCopy(copied(model), tuple(tasks), Trained((), {}, 0, False, 0))
    heads = important_heads(common.model, common.tasks, share=share, shared=shared)

    def judged(found: TrainedCopy) -> Judged:
        return Judged(found, found.accuracy(), specialisation(found.model, found.tasks, share=share, seed=seed))

    def gone_on(only: Mapping[str, HeadSet] | None) -> Judged:
        last = replace(schedule, steps=schedule.steps - plain_steps)
        return judged(
            train_on_tasks(
                common.model,
                common.tasks,
                last,
                only=only,
                others=others,
                batch_size=batch_size,
                first_step=plain_steps,
                seed=seed,
                shown=shown,
            )
        )

    return ImportantHeadTraining(heads, judged(common), gone_on(heads), gone_on(None))


def important_heads(
    model: AttachedModel, tasks: Sequence[Task], *, share: float = SHARE, shared: bool = True
) -> dict[str, HeadSet]:
    """By task, the `share` of all heads with the largest I on its training items.

    Without `shared` heads of several tasks are left out of each.

    Raises:
        InputError: a share that is none; with `shared=False`, a task that has no head to itself.
    """
    n = share_of(share, model.heads().heads)
    found = {}
    for task in tasks:
        scores = importance(model, task)
        found[task.name] = HeadSet(tuple(sorted(scores, key=lambda head: (-scores[head], head))[:n]))
    if shared:
        return found
    own = {}
    for name, heads in found.items():
        elsewhere = [members for other, members in found.items() if other != name]
        own[name] = HeadSet(tuple(head for head in heads if not any(head in members for members in elsewhere)))
        if not own[name]:
            raise InputError(f"all important heads of {name} are shared with another task; use shared=True")
    return own


def importance(model: AttachedModel, task: Task, *, batch_size: int = 16) -> dict[Head, float]:
    """I of every head: mean over the tokens of the task's training items of |<z, dL/dz>|, in nats."""
    totals: dict[Head, float] = defaultdict(float)
    tokens = 0
    for batch in task.items.batches(batch_size):
        for site, gradient in gate_gradients(model, task, batch).items():
            per_head = gradient.abs().flatten(0, 1).sum(0).tolist()
            for head, amount in zip(model.table.site(site).heads.heads, per_head, strict=True):
                totals[head] += amount
        behind = [len(batch.suffix) if task.readout else max(len(each.answer) - 1, 0) for each in batch.items]
        tokens += sum(len(each.prompt) for each in batch.items) + sum(behind)
    return {head: total / tokens for head, total in totals.items()}


def gate_gradients(model: AttachedModel, task: Task, batch: Batch) -> dict[SiteId, Float[Tensor, "item position head"]]:
    """<z, dL/dz> of every site, L the sum of the batch's losses: the derivative by a factor on each head."""
    readout = nullcontext() if task.readout is None else weights_at_rest(task.readout)
    gates = read.gate([site.label for site in model.sites])
    with weights_at_rest(model.model), readout, torch.enable_grad(), model.reading(gates) as got:
        task.losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    return {site.id: got.gate.grad[site.label].double() for site in model.sites}


def specialisation(
    model: AttachedModel, tasks: Sequence[Task], *, share: float = SHARE, draws: int = DRAWS, seed: int = 0
) -> FunctionalDissociation:
    """D of each task: what taking out its most important heads costs it more than the others.

    Heads are ranked on the tasks' training items, performance is accuracy on the held-out ones.

    Raises:
        InputError: fewer than two tasks, or one that the model does not solve at all.
    """
    names = tuple(task.name for task in tasks)
    heads = model.heads().heads
    own = important_heads(model, tasks, share=share)
    drawn = draws_of(heads, share, draws, seed)

    def without(out: HeadSet) -> Float[np.ndarray, " task"]:
        with model.editing(edit.zero(out)):
            return np.array([task.accuracy(model) for task in tasks])

    base = np.array([task.accuracy(model) for task in tasks])
    return scored(
        names,
        share,
        share_of(share, heads),
        base,
        np.stack([without(own[name]) for name in names]),
        np.stack([without(each) for each in drawn]),
    )


__all__ = [
    "ImportantHeadTraining",
    "Judged",
    "gate_gradients",
    "importance",
    "important_heads",
    "specialisation",
    "train_important_heads",
]
