"""`headwise doctor`: what it passes on, what it prints, and when it fails. The examination itself is a stand-in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import pytest

from headwise.cli import main
from headwise.errors import InputError


@dataclass
class Check:
    name: str
    status: str
    detail: str


@dataclass
class SiteReport:
    label: str
    capabilities: dict[str, str | bool]


@dataclass
class Report:
    """The face of `headwise.model.proving.doctor.DoctorReport`."""

    model: str = "some/model"
    checks: tuple[Check, ...] = (Check("no-op", "pass", "bit-identical"), Check("gqa", "n/a", "8 groups of [1] head"))
    sites: tuple[SiteReport, ...] = (
        SiteReport("L0", {"z": True, "rows": "no: sinks", "cache": False}),
        SiteReport("encoder.L1", {"z": True}),
    )
    summary: str = "Everything measured here is safe to use."

    @property
    def passed(self) -> bool:
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "passed": self.passed, **asdict(self)}


@dataclass
class Bench:
    """What the stand-ins were called with, and what they answer."""

    report: Report = field(default_factory=Report)
    loaded: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    error: Exception | None = None


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()

    def load(name: str, **options: object) -> str:
        print("a model file that prints")
        if bench.error:
            raise bench.error
        bench.loaded.append((name, options))
        return f"attached {name}"

    def examine(attached: str, *, seed: int, began: Callable[[str], None]) -> Report:
        began("no-op")
        assert attached.startswith("attached ")
        bench.drawn.append(seed)
        return bench.report

    loading, doctor = ModuleType("headwise.loading"), ModuleType("headwise.model.proving.doctor")
    loading.load, doctor.examine = load, examine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "headwise.loading", loading)
    monkeypatch.setitem(sys.modules, "headwise.model.proving.doctor", doctor)
    return bench


def test_the_tables_hold_every_check_site_and_the_summary(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "some/model"]) == 0
    out, err = capsys.readouterr()
    for text in ("some/model", "no-op", "pass", "n/a", "8 groups of [1] head", "encoder.L1", "no: sinks", "yes"):
        assert text in out
    assert out.rstrip().endswith("Everything measured here is safe to use.")
    assert err.splitlines() == [
        "headwise: loading some/model",
        "a model file that prints",
        "headwise: checking: no-op",
    ]


def test_json_is_exactly_one_object_on_stdout(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "some/model", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    got = json.loads(out)
    assert (got["model"], got["passed"]) == ("some/model", True)
    assert got["checks"][1] == {"name": "gqa", "status": "n/a", "detail": "8 groups of [1] head"}
    assert got["sites"][0] == {"label": "L0", "capabilities": {"z": True, "rows": "no: sinks", "cache": False}}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_failed_check_is_exit_code_1_and_still_printed(
    bench: Bench, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    bench.report.checks += (Check("writes", "fail", "off by 0.1"),)
    assert main(["doctor", "some/model", *form]) == 1
    assert "off by 0.1" in capsys.readouterr().out


def test_every_option_reaches_the_loading(bench: Bench) -> None:
    options = ["--device", "cpu", "--dtype", "bfloat16", "--revision", "v1", "--attn", "eager"]
    assert main(["doctor", "m", *options, "--allow-pickle", "--trust-remote-code"]) == 0
    assert main(["doctor", "m"]) == 0
    given, default = (options for _, options in bench.loaded)
    assert given == {
        "device": "cpu",
        "dtype": "bfloat16",
        "revision": "v1",
        "attn": "eager",
        "allow_pickle": True,
        "trust_remote_code": True,
    }
    assert default == dict.fromkeys(("device", "dtype", "revision", "attn")) | {
        "allow_pickle": False,
        "trust_remote_code": False,
    }


def test_the_seed_decides_what_is_drawn(bench: Bench) -> None:
    for arguments in ([], ["--seed", "0"], ["--seed", "1"]):
        assert main(["doctor", "m", *arguments]) == 0
    default, zero, one = bench.drawn
    assert (default, zero, one) == (0, 0, 1)


def test_bad_input_leaves_stdout_empty(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.error = InputError("m has no config.json")
    assert main(["doctor", "m", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "headwise: m has no config.json"
