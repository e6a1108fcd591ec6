"""A scope in words: where among the positions, and in a denoising loop at which steps and in which branch.

span:text                                   a place, as everywhere
steps:0-9      steps:0,3,5-7     steps:10-  steps of the loop, counted from 0, both ends included
branch:conditional                          one branch of guidance
span:text steps:0-9 branch:conditional      all of it together
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from headwise.errors import InputError
from headwise.model.positions import check_scope

_STEPS, _BRANCH = "steps:", "branch:"


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope taken apart. `steps` are stretches from a first to a last step (None: no last); None is every step."""

    place: str = "all"
    steps: tuple[tuple[int, int | None], ...] | None = None
    branch: str | None = None

    @property
    def timed(self) -> bool:
        """Whether it means something in a denoising loop only."""
        return self.steps is not None or self.branch is not None

    @property
    def first_step(self) -> int:
        return 0 if self.steps is None else min(first for first, _ in self.steps)

    def holds_step(self, step: int) -> bool:
        return self.steps is None or any(first <= step and (last is None or step <= last) for first, last in self.steps)


@lru_cache(maxsize=256)
def parse_scope(scope: str) -> Scope:
    """Read a scope's words, with blanks between them.

    Raises:
        InputError: a word that is none, or two of one sort.
    """
    words = scope.split() if isinstance(scope, str) else []
    steps = [word for word in words if word.startswith(_STEPS)]
    branches = [word for word in words if word.startswith(_BRANCH)]
    places = [word for word in words if word not in steps and word not in branches]
    for found, sort in ((steps, "steps"), (branches, "branch"), (places, "place")):
        if len(found) > 1:
            raise InputError(f"scope={scope!r} names more than one {sort}: {' and '.join(found)}; give one of each")
    if not steps and not branches:
        check_scope(scope)
        return Scope(scope)
    place = places[0] if places else "all"
    check_scope(place)
    branch = branches[0].removeprefix(_BRANCH) if branches else None
    if branch == "":
        raise InputError(f"scope={scope!r} names no branch; write branch:NAME, such as branch:conditional")
    return Scope(place, _stretches(steps[0], scope) if steps else None, branch)


def _stretches(word: str, scope: str) -> tuple[tuple[int, int | None], ...]:
    stretches: list[tuple[int, int | None]] = []
    for part in word.removeprefix(_STEPS).split(","):
        found = re.fullmatch(r"(\d+)(?:(-)(\d*))?", part)
        if found is None:
            raise InputError(
                f"scope={scope!r}: {part!r} is no stretch of steps; write steps:0-9, steps:0,3,5 or steps:10-"
            )
        first = int(found[1])
        last = first if found[2] is None else int(found[3]) if found[3] else None
        if last is not None and last < first:
            raise InputError(f"scope={scope!r}: {part!r} ends before it begins; steps are counted from 0 upwards")
        stretches.append((first, last))
    return tuple(stretches)
