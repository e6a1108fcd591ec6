"""Cells side by side: in which order, what comes of it, and what happens when a process ends early."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from headwise.atlas import Atlas
from headwise.atlas.cell import Cell
from headwise.atlas.processes import LARGEST, processes_for, side_by_side, stages
from headwise.atlas.progress import Silent
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes import probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")

CELLS = [
    Cell.parse(id)
    for id in (
        "clean/one",
        "clean/two",
        "find/some/one",
        "find/some/two",
        "map/one/L0",
        "fresh/one",
        "fresh/two",
        "crossed/one/one",
        "crossed/one/two",
        "crossed/two/one",
        "masked/one",
        "dose/one",
    )
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def kept(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted((folder / "cells").rglob("*.*"))}


def test_behaviours_part_and_pairs_of_them_come_last() -> None:
    assert [[[cell.id for cell in lane] for lane in stage] for stage in stages(CELLS)] == [
        [["clean/one", "find/some/one", "map/one/L0", "dose/one"], ["clean/two", "find/some/two"]],
        [["fresh/one"], ["fresh/two"]],
        [["crossed/one/one", "crossed/two/one", "masked/one"], ["crossed/one/two"]],
    ]


def test_all_are_measured_in_order_and_no_stage_begins_before_the_last_one_ended(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def measure(cell: Cell) -> str:
        with notes.open("a") as file:
            file.write(f"{cell.id} {os.getpid()}\n")
        time.sleep(0.01)
        return "no" if cell.kind == "dose" else ""

    steps = list(side_by_side(CELLS, measure, lambda cell: 1.0, 2))
    finished = {cell.id: refused for what, cell, refused in steps if what == "finished"}
    assert finished == {cell.id: "no" if cell.kind == "dose" else "" for cell in CELLS}
    assert len(steps) == 2 * len(CELLS)
    written = [line.split() for line in notes.read_text().splitlines()]
    measured = [id for id, _ in written]
    assert len({process for _, process in written} - {str(os.getpid())}) == 2
    for stage in stages(CELLS):
        inside = {cell.id for lane in stage for cell in lane}
        assert set(measured[: len(inside)]) == inside
        for lane in stage:
            own = [cell.id for cell in lane]
            assert [id for id in measured if id in own] == own
        measured = measured[len(inside) :]


def test_what_a_process_raises_is_raised_and_the_others_end() -> None:
    def measure(cell: Cell) -> str:
        if cell.id == "find/some/two":
            raise InputError("this cell cannot be measured")
        time.sleep(30)
        return ""

    began = time.monotonic()
    with pytest.raises(InputError, match="this cell cannot be measured"):
        for _ in side_by_side(CELLS[2:4], measure, lambda cell: 1.0, 2):
            pass
    assert time.monotonic() - began < 20
    assert not psutil.Process().children()


def test_a_process_that_is_killed_is_a_refusal() -> None:
    def measure(cell: Cell) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    with pytest.raises(Refusal, match="was killed, out of memory perhaps"):
        list(side_by_side(CELLS, measure, lambda cell: 1.0, 2))


def test_they_end_where_signals_are_handled_otherwise() -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        assert len(list(side_by_side(CELLS, lambda cell: "", lambda cell: 1.0, 2))) == 2 * len(CELLS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not asked
    assert not psutil.Process().children()


def test_processes_do_not_outlive_the_one_they_come_from(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from headwise.atlas.cell import Cell
from headwise.atlas.processes import side_by_side

def measure(cell):
    time.sleep(0.1)
    return ""

cells = [Cell.parse(f"find/m{number}/{probe}") for probe in ("one", "two") for number in range(400)]
for _ in side_by_side(cells, measure, lambda cell: 1.0, 2):
    Path(sys.argv[1]).touch()
"""
    begun = tmp_path / "begun"
    process = psutil.Process(subprocess.Popen([sys.executable, "-c", script, str(begun)]).pid)
    while not begun.exists():
        assert process.is_running()
        time.sleep(0.1)
    children = process.children()
    assert len(children) == 2
    process.kill()
    process.wait(10)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_only_small_models_on_the_cpu(model: AttachedModel, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes_for(model) == (1 if torch.cuda.is_available() else 2)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert processes_for(model) == 1  # which may have no processes
    monkeypatch.undo()
    monkeypatch.setattr("headwise.atlas.processes.LARGEST", 10)
    assert LARGEST > 10
    assert processes_for(model) == 1


def test_cells_come_out_as_with_one_process(run: Callable[..., Atlas], tmp_path: Path, two_threads: None) -> None:
    probes = [probe("repeat").over(words=(8,)), "choice"]
    side = run(tmp_path / "side", probes=probes)
    assert side.complete
    assert side.manifest.threads == 1
    torch.set_num_threads(1)
    alone = run(tmp_path / "alone", probes=probes)
    assert kept(side.folder) == kept(alone.folder)


def test_one_behaviour_is_left_to_threads(run: Callable[..., Atlas], tmp_path: Path, two_threads: None) -> None:
    assert run(tmp_path / "atlas").manifest.threads == 2


def test_an_interrupted_run_goes_on(run: Callable[..., Atlas], tmp_path: Path, two_threads: None) -> None:
    class Stopping(Silent):
        def finished(self, cell: Cell, refused: str) -> None:
            raise KeyboardInterrupt

    folder, probes = tmp_path / "atlas", [probe("repeat").over(words=(8,)), "choice"]
    with pytest.raises(KeyboardInterrupt):
        run(folder, probes=probes, watching=Stopping())
    assert not psutil.Process().children()
    assert Atlas.open(folder).manifest.threads == 1
    assert not Atlas.open(folder).complete
    assert run(folder, probes=probes).complete
