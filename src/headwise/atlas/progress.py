"""What a run of an atlas says while it works, on stderr: beforehand what it will do, then how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status

from headwise.atlas.cell import Cell
from headwise.atlas.planning import Plan
from headwise.atlas.report.numerals import counted

EVERY = 30.0
"""Seconds between two lines where there is no terminal to draw a bar on."""


class Silent:
    """Says nothing."""

    def planning(self, probe: str, place: int, of: int) -> None: ...

    def planned(self, plan: Plan, left: Sequence[Cell]) -> None: ...

    def began(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, refused: str) -> None: ...


class Shown:
    """A bar with the remaining time on a terminal, a line every half minute elsewhere; to be used in a `with`."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.status: Status | None = None
        self.task = TaskID(0)
        self.plan: Plan | None = None
        self.work = self.done = 0.0
        self.n = self.n_left = 0
        self.began_at = self.said_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_status()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _end_status(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None

    def planning(self, probe: str, place: int, of: int) -> None:
        """On a terminal the line changes with the probe; elsewhere there is one."""
        if not place and not self.console.is_terminal:
            self.console.print(f"headwise: planning: writing and timing the items of {of} probes")
        if self.console.is_terminal:
            line = f"planning: writing and timing the items of {probe}, {place + 1} of {of}"
            if self.status is None:
                self.status = self.console.status(line)
                self.status.start()
            self.status.update(line)

    def planned(self, plan: Plan, left: Sequence[Cell]) -> None:
        self._end_status()
        for line in announcement(plan, left):
            self.console.print(f"headwise: {line}")
        self.plan, self.n_left = plan, len(left)
        self.work = sum(map(plan.seconds, left))
        self.began_at = self.said_at = time.monotonic()
        if left and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=self.work)
            self.bar.start()

    def began(self, cell: Cell) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=f"{self.n + 1} of {self.n_left}  {cell.id}")

    def finished(self, cell: Cell, refused: str) -> None:
        assert self.plan is not None
        step = self.plan.seconds(cell)
        self.n, self.done = self.n + 1, self.done + step
        if self.bar is not None:
            self.bar.advance(self.task, step)
        elif time.monotonic() - self.said_at >= EVERY:
            self.said_at = time.monotonic()
            passed = self.said_at - self.began_at
            left = passed * (self.work - self.done) / self.done if self.done else self.work / self.plan.processes
            self.console.print(f"headwise: {self.n} of {self.n_left} cells, about {duration(left)} left")


def announcement(plan: Plan, left: Sequence[Cell]) -> list[str]:
    """What a run will do, before it does it."""
    manifest = plan.manifest
    model, settings = manifest.model, manifest.settings
    behaviours = ", ".join(each.id for each in manifest.behaviours)
    methods = ", ".join(each.id for each in manifest.methods) or "none"
    lines = [
        f"{model.name}: {len(model.heads)} heads, {model.parameters / 1e6:.1f} million weights, {model.dtype}, "
        f"{counted(plan.processes, 'process', 'processes')} of {counted(manifest.threads, 'thread')}",
        f"behaviours: {behaviours}; off target: {manifest.off_target or 'none'}",
        f"methods: {methods}",
        f"{settings.items} items per probe, half to find heads and half to test them; knock-outs by {settings.mode} at "
        f"{settings.scope}, {settings.controls} control sets",
    ]
    lines += [f"{id}: {how}" for id, how in plan.shortened.items()]
    without = [f"{id} ({reason})" for id, reason in manifest.left_out.items() if "/" not in id]
    if without:
        lines.append(f"left out: {'; '.join(without)}")
    finished = len(plan.cells) - len(left)
    have = f", {finished} are there already" if finished else ""
    if left:
        most = duration(sum(map(plan.seconds, left)) / plan.processes)
        lines.append(f"{len(plan.cells)} cells{have}; about {most}, less where the model does not solve a probe")
    else:
        lines.append(f"all {len(plan.cells)} cells are there already")
    return lines


def duration(seconds: float) -> str:
    """`40 s`, `6 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
