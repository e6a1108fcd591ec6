"""`headwise atlas`: what it passes on, what it prints, how it ends. The run itself is a stand-in, but for one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import headwise.atlas
import headwise.atlas.report
import headwise.atlas.summary
import headwise.loading
from headwise.atlas.opened import VerifiedHead
from headwise.cli import main
from headwise.cli.atlas import DEFAULT_MODEL, folder_of
from headwise.errors import InputError
from headwise.heads import Head, HeadSet


@dataclass
class Calls:
    loaded: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    unwritable: bool = False


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def load(name: str, **options: Any) -> str:
        calls.loaded = {"model": name, **options}
        return f"attached {name}"

    def atlas(model: str, out: Path, **options: Any) -> Any:
        calls.asked = {"model": model, "out": out, **options}
        if calls.error is not None:
            raise calls.error
        card = SimpleNamespace(name="some/model", heads=HeadSet.parse("L0H0, L0H1, L1H0"))
        found = (VerifiedHead(Head.parse("L1H0"), "induction", "repeat", 2.5, 0.01),)
        return SimpleNamespace(manifest=SimpleNamespace(model=card), folder=out, verified=lambda: found)

    def write_report(made: Any) -> Path:
        if calls.unwritable:
            raise OSError(28, "No space left on device", "report.html")
        return Path(made.folder) / "report.html"

    monkeypatch.setattr(headwise.loading, "load", load)
    monkeypatch.setattr(headwise.atlas, "atlas", atlas)
    monkeypatch.setattr(headwise.atlas.report, "write_report", write_report)
    monkeypatch.setattr(headwise.atlas.summary, "summary", lambda made, path: (f"report in {path}",))
    return calls


def test_with_json_it_prints_one_object_of_exactly_these_keys(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atlas", "gpt2", "--out", "here", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found.pop("seconds") >= 0
    assert found == {
        "model": "some/model",
        "atlas": "here",
        "n_heads": 3,
        "verified": [{"head": "L1H0", "method": "induction", "probe": "repeat", "effect": 2.5, "q": 0.01}],
    }
    assert "headwise: loading gpt2" in told.err


def test_without_it_the_summary(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atlas", "gpt2", "--out", "here"]) == 0
    assert capsys.readouterr().out == f"report in {Path('here/report.html')}\n"


def test_nothing_given_is_the_default_model_with_the_default_settings(calls: Calls) -> None:
    assert main(["atlas"]) == 0
    assert calls.loaded["model"] == DEFAULT_MODEL
    assert calls.asked == {
        "model": f"attached {DEFAULT_MODEL}",
        "out": folder_of(DEFAULT_MODEL),
        "probes": None,
        "methods": None,
        "items": 64,
        "seed": 0,
        "mode": "zero",
        "scope": "all",
        "max_tokens": 256,
        "controls": 50,
        "off_target": "text",
    }


def test_every_option_is_passed_on(calls: Calls) -> None:
    options = (
        "--probes ioi,repeat --methods induction --items 32 --mode mean --scope last --max-tokens 99 --controls 60 "
        "--off-target repeat"
    )
    loading = "--seed 3 --device cpu --dtype float64 --revision main --attn eager --allow-pickle --trust-remote-code"
    assert main(["atlas", "gpt2", *options.split(), *loading.split()]) == 0
    asked = {
        name: calls.asked[name]
        for name in ("probes", "methods", "items", "mode", "scope", "max_tokens", "controls", "off_target")
    }
    assert asked == {
        "probes": ["ioi", "repeat"],
        "methods": ["induction"],
        "items": 32,
        "mode": "mean",
        "scope": "last",
        "max_tokens": 99,
        "controls": 60,
        "off_target": "repeat",
    }
    assert calls.asked["seed"] == 3
    assert calls.loaded == {
        "model": "gpt2",
        "device": "cpu",
        "dtype": "float64",
        "revision": "main",
        "attn": "eager",
        "allow_pickle": True,
        "trust_remote_code": True,
    }


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("zoo:planted", "atlas-planted"),
        ("openai-community/gpt2", "atlas-gpt2"),
        ("/models/my model/", "atlas-my-model"),
    ],
)
def test_the_folder_is_named_for_the_model(model: str, folder: str) -> None:
    assert folder_of(model) == Path(folder)


def test_a_mistake_is_one_line_and_2(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.error = InputError("no probe 'iol'; did you mean ioi?")
    assert main(["atlas", "--probes", "iol", "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1] == "headwise: no probe 'iol'; did you mean ioi?"


@pytest.mark.parametrize(("options", "folder"), [([], "atlas-organism"), (["--out", "here"], "here")])
def test_an_interruption_is_130_and_says_that_the_atlas_can_go_on(
    calls: Calls, capsys: pytest.CaptureFixture[str], options: list[str], folder: str
) -> None:
    calls.error = KeyboardInterrupt()
    assert main(["atlas", *options]) == 130
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "headwise: loading zoo:organism",
        f"headwise: stopped; what is finished is kept in {folder}, and the same command goes on with it",
    ]


def test_a_report_that_the_disk_does_not_take(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.unwritable = True
    assert main(["atlas", "--out", "here"]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "atlas"
    arguments = [
        "atlas",
        "zoo:planted",
        "--out",
        str(out),
        "--probes",
        "ioi",
        "--methods",
        "gate-gradient",
        "--items",
        "16",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "atlas", "n_heads", "verified", "seconds"}
    assert found["n_heads"] == 32
    assert (out / "report.html").is_file()
    assert main(arguments) == 0
    assert "report.html" in capsys.readouterr().out
