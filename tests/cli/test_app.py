"""The program as a whole: exit codes, one line per error, nothing heavy at start."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise import __version__, catalogue
from headwise.catalogue import BenchEntry
from headwise.cli import main
from headwise.errors import InputError, Refusal


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., dict[str, float]]], list[str]]:
    """Makes a function the bench `probe` and gives the arguments that run it."""

    def make(run: Callable[..., dict[str, float]]) -> list[str]:
        entry = BenchEntry(id="probe", title="For tests", page="cli.md", run=run)
        monkeypatch.setitem(catalogue._registered["benches"], "probe", entry)
        return ["bench", "probe"]

    return make


def raises(error: BaseException) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such head"), 2, "headwise: no such head"),
        (Refusal("this site\ncannot"), 2, "headwise: this site cannot"),
        (ZeroDivisionError("by zero"), 3, "headwise: an error in headwise itself: ZeroDivisionError: by zero; add"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_error_is_one_line_on_stderr_and_an_exit_code(
    bench: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
    form: list[str],
) -> None:
    assert main([*bench(raises(error)), *form]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(line)
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [InputError("mistake"), ZeroDivisionError("ours")])
@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_traceback_is_there_when_asked_for(
    bench: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    way: str,
) -> None:
    arguments = bench(raises(error))
    if way == "option":
        arguments.append("--traceback")
    else:
        monkeypatch.setenv("HEADWISE_TRACEBACK", "1")
    assert main(arguments) in (2, 3)
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert f"raise error\n{type(error).__module__.replace('builtins', '').removesuffix('.')}" in err
    assert err.splitlines()[-1].startswith("headwise: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["xyzzy"], "No such command 'xyzzy'; see `headwise --help`"),
        (["replicat"], "Did you mean 'replicate'? See `headwise --help`"),
        (["doctor"], "Missing argument 'model'; see `headwise doctor --help`"),
        (["doctor", "gpt2", "--sede", "1"], "No such option: --sede"),
        (["bench", "x", "--seed", "many"], "Invalid value for '--seed'"),
        (["list", "head"], "unknown kind 'head'"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"headwise {__version__}\n"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in ("doctor", "list", "bench", "Exit codes"))


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from headwise.cli import main; main(['doctor', '--help']); "
        "sys.exit(sorted({'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_installed_program_is_this_main() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["headwise"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


SLEEPER = """
import sys, time
from headwise import catalogue
from headwise.cli import main
def sleep():
    print("asleep", file=sys.stderr, flush=True)
    time.sleep(60)
catalogue.ROOMS = ()
catalogue.register(catalogue.BenchEntry(id="sleep", title="t", page="p.md", run=sleep))
sys.exit(main(["bench", "sleep"]))
"""


def test_an_interrupt_is_one_line() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "asleep" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert rest == "headwise: stopped\n"


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_reader_that_goes_away_is_no_error(form: str) -> None:
    code = f"import sys; from headwise.cli import main; sys.exit(main('list models {form}'.split()))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0, err
    # What other libraries say as they are imported is not ours.
    assert not [line for line in err.splitlines() if line.startswith(("headwise:", "Traceback", "Exception", "Broken"))]
