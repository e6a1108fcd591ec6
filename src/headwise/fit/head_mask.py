"""HeadMask (Sun et al. 2020, "Alleviating the Inequality of Attention Heads for Neural Machine Translation"): in every
step of training the output of N heads is put to 0, so that no head can be relied on alone.

    z_h <- 0   for the N heads of the step;   evaluation without a mask, and without a factor that makes up for it

    random       N heads drawn uniformly
    important    the N heads with the largest |dL/dxi_h|, xi_h a factor on head h, L the loss of the step's own batch

Reconstruction: how the paper computes and renews the importance is not known; here it is taken on the batch before the
step, without a mask (one more forward and backward). By default the last head of a layer is spared, of which the paper
says nothing. It masked 18 of the 144 heads of its encoder-decoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from headwise.errors import InputError
from headwise.fit.copy_training import TrainedCopy, train_on_tasks
from headwise.fit.important_heads import gate_gradients
from headwise.fit.tasks import Task
from headwise.fit.training import Moment, Schedule
from headwise.heads import Head, HeadSet, SiteId
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch

Choice = Literal["random", "important"]


@dataclass(frozen=True)
class HeadMask:
    """Which heads are masked in a step.

    Attributes:
        n: how many.
        choice: `random` or `important`.
        spare_layers: whether every layer keeps a head.
        seed: of the draws; a step's draw depends on it and the number of the step alone.

    Raises:
        InputError: a number that is none, or an unknown choice.
    """

    n: int
    choice: Choice = "random"
    spare_layers: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InputError(f"n={self.n!r} must be a whole number of heads, at least 1")
        if self.choice not in get_args(Choice):
            raise InputError(f"choice={self.choice!r} is not one of {', '.join(get_args(Choice))}")

    def heads(self, model: AttachedModel, task: Task, batch: Batch, step: int) -> HeadSet:
        """The heads of a step.

        Raises:
            InputError: the model has not as many that may be masked together.
        """
        every = list(model.heads().heads)
        most = len(every) - (len({head.site for head in every}) if self.spare_layers else 0)
        if self.n > most:
            raise InputError(f"n={self.n} of {len(every)} heads cannot be masked together here; {most} are the most")
        if self.choice == "random":
            random.Random(f"head-mask/{self.seed}/{step}").shuffle(every)
        else:
            gradients = {site: g.sum((0, 1)).abs() for site, g in gate_gradients(model, task, batch).items()}
            every.sort(key=lambda head: (-float(gradients[head.site][head.index]), head))
        return _first(every, self.n, self.spare_layers)

    def __call__(self, model: AttachedModel, task: Task, batch: Batch, step: int) -> AbstractContextManager[object]:
        """Inside the block the heads of the step write nothing; drawn once, also where layers are run again."""
        return model.editing(edit.zero(self.heads(model, task, batch, step)))


def train_head_masked(
    model: AttachedModel,
    tasks: Sequence[Task],
    mask: HeadMask,
    schedule: Schedule,
    *,
    batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Callable[[Moment], None] | None = None,
) -> TrainedCopy:
    """Train all weights of a copy of `model` under the mask; `train_on_tasks` without one is what to compare with.

    Raises:
        InputError: no tasks, or a mask of more heads than may be masked.
    """
    return train_on_tasks(
        model, tasks, schedule, around=mask, batch_size=batch_size, seed=seed, folder=folder, shown=shown
    )


def _first(order: Sequence[Head], n: int, spare_layers: bool) -> HeadSet:
    """The first n of them, each layer keeping a head if it is to."""
    left: dict[SiteId, int] = {}
    for head in order:
        left[head.site] = left.get(head.site, 0) + 1
    taken: list[Head] = []
    for head in order:
        if len(taken) < n and (left[head.site] > 1 or not spare_layers):
            left[head.site] -= 1
            taken.append(head)
    return HeadSet(tuple(taken))


__all__ = ["Choice", "HeadMask", "train_head_masked"]
