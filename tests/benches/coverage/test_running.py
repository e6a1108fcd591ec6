"""A process for every row: time limits, crashes, interruption, and going on after it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from headwise.benches.coverage.result import Outcome, Result
from headwise.benches.coverage.rows import Row
from headwise.benches.coverage.running import WorkFile, run

ROWS = [Row(name, "causal", "Any") for name in ("good", "slow", "crashing", "raising", "last")]


def examined(row: Row) -> Result:
    if row.model_type == "slow":
        time.sleep(60)
    if row.model_type == "crashing":
        os.kill(os.getpid(), signal.SIGKILL)
    if row.model_type == "raising":
        raise RuntimeError("not a result")
    checks = {"a check": Outcome("pass", "bit-equal")}
    return Result(row.model_type, row.task, row.class_name, "right", sites=2, routes=("registry",), checks=checks)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_goes_wrong_in_a_row_stays_in_it(workers: int) -> None:
    told: list[str] = []
    found = {
        each.model_type: each
        for each in run(ROWS, examined, workers=workers, limit=1.5, done=lambda each: told.append(each.model_type))
    }
    assert set(told) == set(found) == {row.model_type for row in ROWS}
    assert found["good"] == examined(ROWS[0])
    assert found["last"].status == "right"
    assert (found["slow"].status, found["slow"].reason) == ("ended", "not done after 2 seconds")
    assert "SIGKILL" in found["crashing"].reason
    assert "exit 1" in found["raising"].reason


def test_interrupted_it_ends_what_it_started() -> None:
    started: list[int] = []

    def interrupt(result: Result) -> None:
        raise KeyboardInterrupt

    def noting(row: Row) -> Result:
        if row.model_type == "slow":
            time.sleep(60)
        return examined(row)

    original = os.fork

    def fork() -> int:
        pid = original()
        started.append(pid)
        return pid

    os.fork = fork
    try:
        with pytest.raises(KeyboardInterrupt):
            run(ROWS[:2], noting, workers=2, done=interrupt)
    finally:
        os.fork = original
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_work_file_gives_back_what_was_done_with_the_same_versions(tmp_path: Path) -> None:
    work = WorkFile(tmp_path / "work.jsonl", {"torch": "1"})
    assert work.read() == {}
    first, second = examined(ROWS[0]), examined(ROWS[4])
    work.add(first)
    work.add(second)
    with work.path.open("a") as file:
        file.write('{"versions": {"torch": "1"}, "result": {"model_type": "cut')
    assert work.read() == {first.key: first, second.key: second}
    assert WorkFile(work.path, {"torch": "2"}).read() == {}
    work.remove()
    assert not work.path.exists()
