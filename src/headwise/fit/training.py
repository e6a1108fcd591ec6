"""The one trainer of everything that is fitted in heads: few parameters, the rest of the model as it stands.

    order = Order(len(items), batch_size=8)
    trained = train(
        {"offset": offset},                                     # what is learned, by name
        lambda step: loss(batch_of(items, order.rows(step))),   # a scalar with a graph
        Schedule(steps=200, learning_rate=1e-2, validate_every=50),
        at_rest=model.model,                                    # nothing in it collects a gradient
        validate=lambda: measured(held_out),                    # lower is better; the best parameters are kept
    )

`train` knows nothing of models or items. The loss is a function of the parameters and of the number of the step alone,
so whatever is drawn (rows, masked heads) is drawn from that number: `Order` and `generator` do so. That is what makes a
training that was stopped go on as if it had not been, bit for bit, on the same machine and number of threads.

Of a tensor that is learned in part, give the part: a delta added to the model's own values by an edit or a functional
call. A zeroed gradient freezes nothing under weight decay or momentum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.fit.checkpoint import Checkpoint, Folder
from headwise.model.at_rest import weights_at_rest
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a training runs: AdamW, step by step.

    Attributes:
        steps: how many at most.
        learning_rate: one for all parameters, or one for each by name.
        decay: `constant`, or `linear` to zero behind the last step.
        weight_decay: AdamW's; 0 is Adam. It acts on a parameter in the steps in which it has a gradient.
        clip: largest norm of the gradient of all parameters together; None is no limit.
        validate_every: steps between two validations, where there is something to validate on. One comes before the
            first step and one behind the last.
        patience: validations in a row without a better one after which training stops; None is never.
    """

    steps: int
    learning_rate: float | Mapping[str, float] = 1e-2
    decay: Literal["constant", "linear"] = "constant"
    weight_decay: float = 0.0
    clip: float | None = None
    validate_every: int = 50
    patience: int | None = None

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "validate_every": self.validate_every, "patience": self.patience}
        for name, count in counts.items():
            if (count is not None or name == "steps") and (not isinstance(count, int) or count < 1):
                raise InputError(f"{name}={count!r} must be a whole number, at least 1")
        rates = self.learning_rate.values() if isinstance(self.learning_rate, Mapping) else (self.learning_rate,)
        if not all(isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0 for rate in rates):
            raise InputError(f"learning_rate={self.learning_rate!r} must be above 0, one number or one by name")
        if self.decay not in ("constant", "linear"):
            raise InputError(f"decay={self.decay!r} is neither 'constant' nor 'linear'")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay={self.weight_decay!r} must be a number from 0 on")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip={self.clip!r} must be above 0, or None for no limit")

    def rate(self, name: str, step: int) -> float:
        """The learning rate of a parameter in a step. Raises InputError for a name that has none."""
        if isinstance(self.learning_rate, Mapping) and name not in self.learning_rate:
            raise InputError(f"learning_rate has no entry for {name!r}; give one for each parameter, or one number")
        whole = self.learning_rate[name] if isinstance(self.learning_rate, Mapping) else self.learning_rate
        return whole * (1 - step / self.steps) if self.decay == "linear" else whole


@dataclass(frozen=True)
class Trained:
    """What came of a training; the parameters themselves hold the best values that were validated, or the last ones.

    Attributes:
        losses: of every step.
        validations: by step, how many were done before it.
        best_step: the steps after which the parameters were as they are now.
        stopped_early: whether patience ran out.
        n_parameters: how many numbers were learned.
    """

    losses: tuple[float, ...]
    validations: Mapping[int, float]
    best_step: int
    stopped_early: bool
    n_parameters: int


@dataclass(frozen=True)
class Moment:
    """Where a training is, as it is told while it runs."""

    step: int
    steps: int
    loss: float
    best: float | None


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    at_rest: nn.Module | None = None,
    validate: Callable[[], float] | None = None,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    save_every: float = 30.0,
    shown: Callable[[Moment], None] | None = None,
) -> Trained:
    """Learn `parameters` by gradient descent on `loss`.

    Args:
        parameters: what is learned, by name; changed in place. A parameter that has no gradient in a step stays as it
            is in that step.
        loss: gives the loss of a step, counted from 0, as a scalar with a graph; called with gradients on.
        at_rest: a module in which nothing else collects a gradient meanwhile. Parameters of its own that are among
            `parameters` do. Afterwards every parameter is as it was in this respect, also when an exception passes.
        validate: gives a number of which lower is better; called without gradients. The parameters of the best
            validation are put in place at the end.
        folder: where to keep checkpoints; one that is there is gone on from.
        settings: what else the training hangs on (seed, items, heads), as JSON; a folder made with other settings is
            refused.
        save_every: seconds between two checkpoints; the last state is saved too, and that of an interruption.
        shown: is told after every step (`fit.Bar` draws it); None is silence.

    Raises:
        InputError: no parameters; a loss that is no scalar, or does not depend on them; a folder of another training.
        Refusal: a loss or a validation that is not finite.
    """
    _check(parameters)
    for name in parameters:
        schedule.rate(name, 0)
    place = None if folder is None else Folder(Path(folder), _described(parameters, schedule, settings))
    with _learning(parameters, at_rest):
        run = _Run(parameters, loss, schedule, validate)
        if place is not None and (found := place.read()) is not None:
            run.take_up(found)
        saved_at = time.monotonic()
        try:
            for moment in run.moments():
                if shown is not None:
                    shown(moment)
                if place is not None and time.monotonic() - saved_at >= save_every:
                    place.write(run.checkpoint())
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            # In the middle of a step what there is belongs to no step, and the checkpoint before it stands.
            if place is not None and run.whole:
                place.write(run.checkpoint())
            raise
        if place is not None:
            place.write(run.checkpoint())
        return run.finish()


class _Run:
    """The state of a training between two steps, and how it goes on."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[int], Tensor],
        schedule: Schedule,
        validate: Callable[[], float] | None,
    ) -> None:
        self.parameters, self.loss, self.schedule, self.validate = parameters, loss, schedule, validate
        self.optimiser = torch.optim.AdamW(
            [{"params": [parameter], "name": name} for name, parameter in parameters.items()],
            lr=1.0,
            weight_decay=schedule.weight_decay,
        )
        self.losses: list[float] = []
        self.validations: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}
        self.whole = True

    @property
    def best_step(self) -> int:
        return min(self.validations, key=self.validations.__getitem__) if self.validations else len(self.losses)

    @property
    def stopped_early(self) -> bool:
        if self.schedule.patience is None or not self.validations:
            return False
        return sum(step > self.best_step for step in self.validations) >= self.schedule.patience

    def moments(self) -> Iterator[Moment]:
        self._validate()
        while len(self.losses) < self.schedule.steps and not self.stopped_early:
            self._step()
            self._validate()
            best = self.validations[self.best_step] if self.validations else None
            yield Moment(len(self.losses), self.schedule.steps, self.losses[-1], best)

    def finish(self) -> Trained:
        with torch.no_grad():
            for name, values in self.best.items():
                self.parameters[name].copy_(values)
        n = sum(parameter.numel() for parameter in self.parameters.values())
        return Trained(tuple(self.losses), dict(self.validations), self.best_step, self.stopped_early, n)

    def _step(self) -> None:
        step = len(self.losses)
        self.optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss(step)
        value = _checked(loss, step)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.schedule.clip is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.schedule.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(group["name"], step)
        self.whole = False
        self.optimiser.step()
        self.losses.append(value)
        self.whole = True

    def _validate(self) -> None:
        step, last = len(self.losses), len(self.losses) == self.schedule.steps
        if self.validate is None or step in self.validations or not (last or step % self.schedule.validate_every == 0):
            return
        with torch.no_grad():
            value = float(self.validate())
        if not math.isfinite(value):
            raise Refusal(f"the validation after {step} steps is {value}; lower the learning rate, or check the items")
        if value < min(self.validations.values(), default=math.inf):
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.validations[step] = value

    def checkpoint(self) -> Checkpoint:
        moments = {
            f"{name}/{kind}": value
            for name, parameter in self.parameters.items()
            for kind, value in self.optimiser.state[parameter].items()
        }
        now = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return Checkpoint(now, self.best, moments, tuple(self.losses), dict(self.validations))

    def take_up(self, found: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.parameters[name])
                prefix = f"{name}/"
                # The count of steps stays on the CPU, where the optimiser looks at it without waiting.
                self.optimiser.state[parameter] = {
                    key.removeprefix(prefix): value if key == f"{name}/step" else value.to(parameter.device)
                    for key, value in found.moments.items()
                    if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
                }
        self.best = {name: value.to(self.parameters[name].device) for name, value in found.best.items()}
        self.losses, self.validations = list(found.losses), dict(found.validations)


@dataclass(frozen=True)
class Order:
    """Which of `n` examples each step takes: pass after pass, each in a random order of its own.

    A batch may reach from one pass into the next. For several tasks in turn give each its own order:
    `orders[names[step % len(names)]].rows(step // len(names))`.
    """

    n: int
    batch_size: int = 8
    seed: int | str = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise InputError(f"a batch of {self.batch_size} of {self.n} examples cannot be drawn; give at least one")

    def rows(self, step: int) -> tuple[int, ...]:
        """Indices of the examples of a step; the same for the same step."""
        first = step * self.batch_size
        return tuple(
            _passed(self.n, f"{self.seed}", place // self.n)[place % self.n]
            for place in range(first, first + self.batch_size)
        )

    def steps(self, epochs: float) -> int:
        """How many steps so many passes take, the last one rounded up."""
        return max(1, math.ceil(epochs * self.n / self.batch_size))


@lru_cache(maxsize=16)
def _passed(n: int, seed: str, number: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=generator("order", seed, number)).tolist())


def generator(*parts: object) -> torch.Generator:
    """A generator seeded by `parts`, such as a name, a seed and the number of a step: the same for the same ones."""
    return torch.Generator().manual_seed(crc32(repr(parts).encode()))


def batch_of(items: ItemSet, rows: tuple[int, ...], *, answers: bool = True) -> Batch:
    """Some items as rows of one forward, in the order of `rows`."""
    chosen = replace(items, items=tuple(items.items[row] for row in rows))
    return items.batch(chosen.items, answers=answers)


@contextmanager
def _learning(parameters: Mapping[str, nn.Parameter], at_rest: nn.Module | None) -> Iterator[None]:
    """Inside, `parameters` collect gradients and nothing else of `at_rest` does; their gradients are let go after."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    with ExitStack() as blocks:
        if at_rest is not None:
            blocks.enter_context(weights_at_rest(at_rest))
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(True)
                parameter.grad = None
            yield
        finally:
            for parameter, asked, gradient in before:
                parameter.requires_grad_(asked)
                parameter.grad = gradient


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise InputError("train was given no parameters; give at least one")
    for name, parameter in parameters.items():
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            raise InputError(f"parameter {name!r} is a {type(parameter).__name__}; give an nn.Parameter of floats")
        if "/" in name:
            raise InputError(f"parameter name {name!r} has a '/'; leave it out")


def _checked(loss: Any, step: int) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss of step {step} is not a scalar tensor; give one number with its graph")
    if not loss.requires_grad:
        raise InputError(f"the loss of step {step} does not depend on any of the parameters; use them in it")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Refusal(f"the loss of step {step} is {value}; lower the learning rate, or check the items of that step")
    return value


def _described(
    parameters: Mapping[str, nn.Parameter], schedule: Schedule, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    rate = schedule.learning_rate
    return {
        "parameters": {name: [*parameter.shape, str(parameter.dtype)] for name, parameter in parameters.items()},
        "schedule": {**vars(schedule), "learning_rate": dict(rate) if isinstance(rate, Mapping) else rate},
        "settings": dict(settings or {}),
    }


__all__ = ["Moment", "Order", "Schedule", "Trained", "batch_of", "generator", "train"]
