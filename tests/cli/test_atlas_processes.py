"""`headwise atlas` in processes of its own: two on one folder, Ctrl-C, and files that the disk does not take."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ASKED = ("zoo:planted", "--probes", "ioi", "--methods", "direct-logit", "--items", "32", "--controls", "8")
PROGRAM = "import sys; from headwise.cli import main; sys.exit(main())"

Limit = Callable[[], None]


def started(out: Path, limit: Limit | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "atlas", *ASKED, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=limit,
    )


def run(out: Path, limit: Limit | None = None) -> tuple[int, str, str]:
    """Exit code, stdout, and the last line of stderr."""
    with started(out, limit) as process:
        told, said = process.communicate()
    return process.returncode, told, said.splitlines()[-1]


def kept(folder: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file() and each.name not in ("log.jsonl", ".lock", "report.html")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "atlas"
    code, told, _ = run(out)
    assert code == 0
    assert str(out / "report.html") in told
    return out


@pytest.mark.slow
def test_two_processes_on_one_folder_and_ctrl_c(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "atlas"
    with started(out) as first:
        assert first.stderr is not None
        try:
            said = ""
            while "cells; about" not in said:  # it has the folder, and its first cell is to come
                said = first.stderr.readline()
                assert said, "it ended before it began"
            first.send_signal(signal.SIGSTOP)
            code, told, refusal = run(out)
            assert (code, told) == (2, "")
            assert refusal == (
                f"headwise: process {first.pid} is at work on {out}; wait until it has finished, or choose another "
                "--out"
            )
        finally:
            first.send_signal(signal.SIGCONT)
            first.send_signal(signal.SIGINT)
        told, said = first.communicate()
    assert (first.returncode, told) == (130, "")
    assert said.splitlines()[-1] == (
        f"headwise: stopped; what is finished is kept in {out}, and the same command goes on with it"
    )
    assert run(out)[0] == 0
    assert kept(out) == kept(undisturbed)


@pytest.mark.slow
def test_files_that_the_disk_does_not_take(tmp_path: Path, undisturbed: Path) -> None:
    """No file may be as large as the largest cell: what was finished before stays, and the next run goes on."""
    out = tmp_path / "atlas"
    sizes = {name: len(content) for name, content in kept(undisturbed).items()}
    largest = max((name for name in sizes if name.startswith("cells/")), key=lambda name: sizes[name])
    limit = sizes[largest] - 1
    assert sizes["manifest.json"] <= limit, "the run would end before its first cell"

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, told, refusal = run(out, bounded)
    assert (code, told) == (2, "")
    assert refusal == (
        f"headwise: {out / largest} cannot be written (File too large); what was finished before is kept: make room or "
        "choose another --out, and run the same command again"
    )
    before = kept(out)
    assert any(name.startswith("cells/") for name in before)
    assert all(kept(undisturbed)[name] == content for name, content in before.items())
    assert run(out)[0] == 0
    assert kept(out) == kept(undisturbed)
