"""Many rows, each in a process of its own with a time limit; what is done is kept, so that a run can be taken up again.

The processes are forked from one that has imported everything, so that imports are paid for once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headwise.benches.coverage.result import Result, ended
from headwise.benches.coverage.rows import Row

LIMIT = 240.0
"""Seconds after which a row is ended: far more than any takes, on a machine that is busy with other things, too."""


@dataclass
class _Child:
    row: Row
    pid: int
    pipe: int
    began: float
    written: bytes = b""


def run(
    rows: Sequence[Row],
    examine: Callable[[Row], Result],
    *,
    workers: int = 1,
    limit: float = LIMIT,
    done: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """Examine every row, `workers` of them at a time; `done` is told each result as it comes.

    Interrupted, it ends the processes that it started and raises KeyboardInterrupt; what `done` was told is kept by it.
    """
    waiting, running = list(reversed(rows)), dict[int, _Child]()
    found: list[Result] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                child = _started(waiting.pop(), examine)
                running[child.pipe] = child
            ready, _, _ = select.select(list(running), [], [], 0.5)
            for child in list(running.values()):
                piece = os.read(child.pipe, 1 << 16) if child.pipe in ready else None
                if piece:
                    child.written += piece
                elif piece == b"" or time.monotonic() - child.began > limit:
                    found.append(_finished(running.pop(child.pipe), limit))
                    done(found[-1])
    finally:
        for child in running.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            os.close(child.pipe)
    return found


def _started(row: Row, examine: Callable[[Row], Result]) -> _Child:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_child(row, examine, reading, writing)
    os.close(writing)
    return _Child(row, pid, reading, time.monotonic())


def _be_the_child(row: Row, examine: Callable[[Row], Result], reading: int, writing: int) -> None:
    """Examine one row and leave; never returns into the caller's stack."""
    code = 1
    try:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(examine(row).to_json()).encode())
        code = 0
    finally:
        os._exit(code)


def _finished(child: _Child, limit: float) -> Result:
    seconds = time.monotonic() - child.began
    if seconds > limit:
        os.kill(child.pid, signal.SIGKILL)
    _, state = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    if seconds > limit:
        return ended(child.row, f"not done after {limit:.0f} seconds", round(seconds, 2))
    if os.WIFSIGNALED(state) or not child.written:
        how = signal.Signals(os.WTERMSIG(state)).name if os.WIFSIGNALED(state) else f"exit {os.WEXITSTATUS(state)}"
        return ended(child.row, f"its process ended early ({how})", round(seconds, 2))
    return Result.from_json(json.loads(child.written))


# -- taking up a run -----------------------------------------------------------------------------------------


class WorkFile:
    """Results as lines of JSON; the last line of a row counts, and a line cut short by a crash is passed over."""

    def __init__(self, path: Path, versions: dict[str, str]) -> None:
        self.path = path
        self.versions = versions

    def read(self) -> dict[str, Result]:
        """What an interrupted run with the same versions left, by key."""
        kept: dict[str, Result] = {}
        if not self.path.exists():
            return kept
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                read: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if read.get("versions") == self.versions:
                result = Result.from_json(read["result"])
                kept[result.key] = result
        return kept

    def add(self, result: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"versions": self.versions, "result": result.to_json()}) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def bar(total: int, console: Console) -> Iterator[Callable[[Result], None]]:
    """A progress bar with the remaining time; what goes wrong is printed above it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("models", total=total)
        began, count = time.monotonic(), 0

        def step(result: Result) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=1, description=result.model_type[:24].ljust(24))
            if result.status in ("wrong", "ended"):
                console.print(f"{result.status}: {result.key}: {result.reason[:160]}")
            elif not console.is_terminal and count % 25 == 0:
                left = (time.monotonic() - began) / count * (total - count)
                console.print(f"{count} of {total}, about {left / 60:.0f} minutes left")

        yield step
