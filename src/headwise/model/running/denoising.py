"""A denoising loop: which of its steps a call of the model is, and where its branches of guidance are.

A step is told from the timestep that the model is given: calls in a row with one timestep are one step (schedulers of
second order, and guidance by two calls, call more than once), another timestep is the next step. When the timestep
comes back to the loop's first one, a new loop begins and steps count from 0 again; one that turns back to anywhere else
is an error, because it cannot be known what it begins.

Only a call that came to its end counts: after an exception the next call at that timestep takes its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from headwise.errors import InputError
from headwise.model.scopes import Scope

Guidance = Literal["batch", "calls"]
BRANCHES = ("unconditional", "conditional")


@dataclass(eq=False)
class Denoising:
    """A loop as it goes on; the handle that `model.denoising()` gives.

    Attributes:
        guidance: `batch`, the branches are equal parts of the rows of one call; `calls`, each has a call of its own in
            every step; None, there are none.
        branches: names of the branches in their order.
        n_steps: how many steps the loop is to have, where that was said.
        timesteps: the timestep of each step that came, in order.
        calls: how many calls of the model came to their end in the loop.
    """

    guidance: Guidance | None
    branches: tuple[str, ...]
    n_steps: int | None
    timesteps: list[float] = field(default_factory=list)
    calls: int = 0
    _done: int = 0  # calls of this step that came to their end
    _turn: int = 0  # which call of its step the latest one is
    _going_on: bool = False  # whether a call is going on, or the latest one ended in an exception

    @property
    def step(self) -> int:
        """The step that goes on, counted from 0; -1 before the first."""
        return len(self.timesteps) - 1

    @property
    def branch(self) -> str | None:
        """The branch of the latest call, where every branch has a call of its own."""
        return self.branches[self._turn % len(self.branches)] if self.guidance == "calls" else None

    def enter(self, arguments: Mapping[str, Any]) -> bool:
        """A call of the model begins; whether it begins a loop, too.

        Raises:
            InputError: no timestep, different ones for the rows, one that turns back, a step more than there are to be,
                or a step before it that had no whole number of calls for every branch.
        """
        timestep = _one_timestep(arguments.get("timestep"))
        begins = not self.calls or timestep == self.timesteps[0] != self.timesteps[-1]
        if begins:
            self.close()
            self.timesteps[:] = [timestep]
            self.calls = self._done = 0
        elif timestep != self.timesteps[-1]:
            self._check_next(timestep)
            self.timesteps.append(timestep)
            self._done = 0
        self._turn = self._done
        self._going_on = True
        return begins

    def leave(self) -> None:
        """The call that was entered came to its end; one that ends in an exception is not left."""
        self._going_on = False
        self._done += 1
        self.calls += 1

    def close(self) -> None:
        """The loop ends.

        Raises:
            InputError: its last step had no whole number of calls for every branch, and no exception broke it off.
        """
        if not self._going_on:
            self._check_turns()

    def _check_next(self, timestep: float) -> None:
        """Raise InputError where the step that goes on cannot end, or this timestep cannot follow it."""
        self._check_turns()
        last = self.timesteps[-1]
        if len(self.timesteps) > 1 and (timestep < last) != (self.timesteps[1] < self.timesteps[0]):
            raise InputError(
                f"timestep {timestep:g} comes after {last:g} and turns back in a loop that began with "
                f"{self.timesteps[0]:g} and {self.timesteps[1]:g}; steps cannot be counted so: give every loop a "
                "model.denoising() block of its own"
            )
        if self.n_steps is not None and len(self.timesteps) == self.n_steps:
            raise InputError(
                f"timestep {timestep:g} begins step {self.n_steps}, and the loop was said to have {self.n_steps} steps "
                "(counted from 0); give model.denoising() the right steps=, or leave it out"
            )

    def _check_turns(self) -> None:
        """Raise InputError where a branch cannot be told from the turn of its call within the step."""
        if self.guidance == "calls" and self._done % len(self.branches):
            raise InputError(
                f"step {self.step} (timestep {self.timesteps[-1]:g}) had {self._done} call{'s' * (self._done > 1)} "
                f"for {len(self.branches)} branches ({', '.join(self.branches)}); guidance='calls' takes one call of "
                "each in every step: else leave guidance= out and open model.editing() around the calls that it is for"
            )

    def holds(self, scope: Scope) -> bool:
        """Whether a scope is of this step, and of a branch that this call has rows of."""
        return scope.holds_step(self.step) and scope.branch in (None, self.branch or scope.branch)

    def rows_of(self, branch: str, n_rows: int) -> slice:
        """The rows of a branch, where the branches are parts of the batch.

        Raises:
            InputError: the rows cannot be parted equally.
        """
        share, left = divmod(n_rows, len(self.branches))
        if left:
            raise InputError(
                f"guidance='batch' with {len(self.branches)} branches, and the model was given {n_rows} rows; without "
                "guidance open model.denoising(guidance=None)"
            )
        start = self.branches.index(branch) * share
        return slice(start, start + share)

    def check(self, scope: Scope, what: str) -> None:
        """Raise InputError for a scope that no call of this loop can be in."""
        if self.n_steps is not None and scope.first_step >= self.n_steps:
            raise InputError(f"{what} is for step {scope.first_step}, and the loop has {self.n_steps}, counted from 0")
        if scope.branch is None:
            return
        if self.guidance is None:
            raise InputError(
                f"{what} is for a branch of guidance; say how the loop has them, model.denoising(guidance='batch') for "
                "one call with all of them or 'calls' for one call each"
            )
        if scope.branch not in self.branches:
            raise InputError(f"{what}: there is no branch {scope.branch!r}; there are {', '.join(self.branches)}")

    def why_never(self, scope: Scope) -> str:
        """What there was instead of a scope that never came."""
        if not any(scope.holds_step(step) for step in range(len(self.timesteps))):
            return f"the loop had {len(self.timesteps)} steps, counted from 0"
        return f"no call of its steps was of branch {scope.branch}"


def checked_denoising(guidance: Any, branches: Sequence[str], steps: Any) -> Denoising:
    """A loop as asked for.

    Raises:
        InputError: a form of guidance, branches or a number of steps that cannot be meant.
    """
    if guidance not in (None, "batch", "calls"):
        raise InputError(
            f"guidance={guidance!r} is not 'batch' (one call, rows side by side), 'calls' (one each) or None"
        )
    names = tuple(branches) if not isinstance(branches, str) else (branches,)
    if len(set(names)) != len(names) or not names or not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise InputError(f"branches={branches!r} does not name branches; give different plain words in their order")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps={steps!r} is not a number of steps, such as 20")
    return Denoising(guidance, names, steps)


def require_loop(denoising: Denoising | None, when: Scope, what: str) -> None:
    """Raise InputError for steps or a branch where no loop is open, or that its calls cannot be of."""
    if denoising is not None:
        denoising.check(when, what)
    elif when.timed:
        raise InputError(
            f"{what}: steps and branches are those of a denoising loop; open one around this block, with "
            "model.denoising(): ..."
        )


def _one_timestep(timestep: Any) -> float:
    if timestep is None:
        raise InputError(
            "the model was called without timestep=, from which steps are told; model.denoising() is for denoisers"
        )
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = {float(value) for value in timestep.detach().reshape(-1).tolist()}
    if len(values) != 1:
        raise InputError(f"the rows of one call are at {len(values)} timesteps; a step of a denoising loop has one")
    return values.pop()
