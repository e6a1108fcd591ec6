"""Cells of small models side by side: a process with one thread for each thread that torch would use.

The matrices of a small model are too small to share out, so two processes measure nearly twice as much as two threads.
Cells of one behaviour hang on one another and stay in their order, in one process; behaviours do not hang on one
another until pairs of them are measured. Whichever process measures a cell, it comes out as with one process.

Processes are forked, so they share the weights and take the model as it stands. The one they come from measures
nothing: it tells who watches how they go, and ends them when it is interrupted.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from headwise.atlas.cell import Cell
from headwise.errors import Refusal
from headwise.model.attached import AttachedModel

LARGEST = 50_000_000
"""Most weights of a model that is small in this sense."""

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the one it comes from ends."""

Lane = Sequence[Cell]
"""Cells that are measured one after the other, in one process."""
Step = tuple[Literal["began", "finished"], Cell, str]
"""What happened to a cell, and why it was refused (empty where it was not)."""
Steps = Generator[Step, None, None]


def processes_for(model: AttachedModel) -> int:
    """As many as torch has threads for a small model on the CPU; 1 for others, and where forking is not safe."""
    small = sum(each.numel() for each in model.model.parameters()) <= LARGEST
    # Autograd on an accelerator does not survive a fork; a daemon is allowed no processes.
    safe = sys.platform == "linux" and not torch.accelerator.is_available()
    if not small or not safe or model.device.type != "cpu" or multiprocessing.current_process().daemon:
        return 1
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))


def stages(cells: Sequence[Cell]) -> list[list[Lane]]:
    """Lanes that can be measured side by side, stage after stage; the order of `cells` holds in each lane."""
    by_stage: list[dict[str, list[Cell]]] = [{}, {}, {}]
    for cell in cells:
        stage = {"fresh": 1, "crossed": 2, "masked": 2}.get(cell.kind, 0)
        by_stage[stage].setdefault(cell.probe, []).append(cell)
    return [list(lanes.values()) for lanes in by_stage if lanes]


def one_by_one(cells: Sequence[Cell], measure: Callable[[Cell], str]) -> Steps:
    for cell in cells:
        yield "began", cell, ""
        yield "finished", cell, measure(cell)


def side_by_side(
    cells: Sequence[Cell], measure: Callable[[Cell], str], seconds: Callable[[Cell], float], count: int
) -> Steps:
    """Have cells measured by `count` processes, longest lane first; `seconds` is what a cell may take.

    Raises:
        Refusal: a process died. What one of them raises is raised here.
    """
    in_stages = [sorted(lanes, key=lambda lane: -sum(map(seconds, lane))) for lanes in stages(cells)]
    lanes = [lane for stage in in_stages for lane in stage]
    with _processes(lambda number: one_by_one(lanes[number], measure), min(count, max(map(len, in_stages)))) as pipes:
        first = 0
        for stage in in_stages:
            yield from _spread(range(first, first + len(stage)), pipes)
            first += len(stage)


def _spread(numbers: Sequence[int], pipes: Sequence[Connection]) -> Steps:
    """Have lanes measured, the next one by whoever is done with one."""
    waiting, busy = list(numbers), set(pipes)
    for pipe in pipes:
        _send_next(pipe, waiting, busy)
    while busy:
        for pipe in [each for each in wait(list(busy)) if isinstance(each, Connection)]:
            try:
                told = pipe.recv()
            except (EOFError, OSError):
                raise _killed() from None
            if isinstance(told, Exception):
                raise told
            if told is None:
                _send_next(pipe, waiting, busy)
            else:
                yield told


def _send_next(pipe: Connection, waiting: list[int], busy: set[Connection]) -> None:
    if not waiting:
        busy.discard(pipe)
        return
    try:
        pipe.send(waiting.pop(0))
    except OSError:
        raise _killed() from None


def _killed() -> Refusal:
    return Refusal(
        "a process of the atlas was killed, out of memory perhaps; what was finished is kept: run the same command "
        "again, with OMP_NUM_THREADS=1 for one process"
    )


@contextmanager
def _processes(measured: Callable[[int], Steps], count: int) -> Iterator[list[Connection]]:
    """Processes that measure the lanes whose numbers they are sent; killed at the end, which harms no finished cell."""
    context = multiprocessing.get_context("fork")
    with ExitStack() as opened:
        pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, [*pipes, ours], measured), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            opened.callback(_end, process, ours)
        yield pipes


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.kill()  # whatever it does with gentler signals, which it has from the one it comes from
    process.join()


def _work(pipe: Connection, of_others: Sequence[Connection], measured: Callable[[int], Steps]) -> None:
    """What a process does: lanes until it is ended, or until the one it comes from is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who watches ends the others
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # its lock on the folder ends with it
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those of a bar that another process draws
    for each in of_others:
        each.close()  # or a process that is gone would not be noticed
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, EOFError):  # the other end of the pipe is gone
        while True:
            for told in _to_tell(measured(pipe.recv())):
                pipe.send(told)


def _to_tell(steps: Steps) -> Iterator[Step | Exception | None]:
    """The steps of a lane, and None or what was raised at its end."""
    try:
        yield from steps
    except Exception as error:
        yield _picklable(error)
    else:
        yield None


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    error.add_note("".join(traceback.format_exception(error)))
    return error
