"""How a training is shown while it runs: a bar on a terminal, a line every half minute elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headwise.fit.training import Moment

EVERY = 30.0
"""Seconds between two lines where there is no terminal to draw a bar on."""


class Bar:
    """What `train` tells, drawn: `with Bar("LoFiT") as bar: train(..., shown=bar)`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(file=sys.stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.task: TaskID | None = None
        self.began_at = self.said_at = time.monotonic()
        self.began_with: int | None = None

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, moment: Moment) -> None:
        best = "" if moment.best is None else f", best validation {moment.best:.4g}"
        line = f"{self.title}: step {moment.step} of {moment.steps}, loss {moment.loss:.4g}{best}"
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task(line, total=moment.steps)
            self.bar.update(self.task, description=line, completed=moment.step)
            return
        now = time.monotonic()
        if self.began_with is None:  # a training that is gone on from does not begin with its first step
            self.began_at, self.began_with = now, moment.step
        if now - self.said_at >= EVERY:
            self.said_at = now
            done = moment.step - self.began_with
            left = (now - self.began_at) * (moment.steps - moment.step) / done if done else 0.0
            self.console.print(f"headwise: {line}, about {left:.0f} s left")


__all__ = ["Bar"]
