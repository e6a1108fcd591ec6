"""`headwise verify`: what it passes on, what it prints, and what it says of typing mistakes; once for real."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import headwise.verify
from headwise.cli import main
from headwise.errors import Refusal
from headwise.verify.verifying import half_for_testing
from headwise.zoo.planted import planted_named

RESULT = {
    "joint": {"effect": 5.25, "excess": 5.0, "ci": [4.0, 6.0], "p": 0.001, "q": 0.004, "controls": [0.1, 0.4]},
    "single": [{"head": "L1H2", "effect": 2.5, "p": None, "q": 0.02}],
    "verdict": "verified",
    "units": "logits",
    "mode": "zero",
    "scope": "all",
    "items": 30,
    "family_size": 33,
    "off_target": None,
}


@dataclass
class Asked:
    """What the stand-in was called with."""

    heads: tuple[str, ...] = ()
    probe: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class Verdict:
    def to_json(self) -> dict[str, Any]:
        return RESULT

    def __str__(self) -> str:
        return "L1H2 on ioi: verified"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()

    def verify(model: Any, heads: Any, *, probe: Any, **options: Any) -> Verdict:
        if asked.error:
            raise asked.error
        asked.heads, asked.probe, asked.options = heads.labels, probe, options
        return Verdict()

    monkeypatch.setattr(headwise.verify, "verify", verify)
    return asked


def test_json_is_the_verdict_s_own(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "zoo:planted", "--heads", "L1H2", "--probe", "ioi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_the_table_has_the_set_and_every_head(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "zoo:planted", "--heads", "L1H2", "--probe", "ioi"]) == 0
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert rows == [["together", "5.25", "0.001", "0.004"], ["L1H2", "2.5", "", "0.02"]]
    assert out.rstrip().endswith("L1H2 on ioi: verified")
    assert err.splitlines() == ["headwise: loading zoo:planted", "headwise: testing L1H2 on ioi"]


def test_every_option_reaches_the_test(asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--metric", "exact-match", "--mode", "uniform", "--scope", "last", "--items", "16", "--seed", "3"]
    assert main(["verify", "zoo:planted", "--heads", "L3H4, 1.2", *options, "--off-target", "none"]) == 0
    assert asked.heads == ("L1H2", "L3H4")
    assert asked.probe.id == "needle"
    assert asked.options == {
        "metric": "exact-match",
        "mode": "uniform",
        "scope": "last",
        "items": 16,
        "off_target": None,
        "seed": 3,
    }
    file = tmp_path / "mine.csv"
    file.write_text("prompt,answer\n" + "".join(f"{i} and,{i}\n" for i in range(40)))
    assert main(["verify", "zoo:planted", "--heads", "L1H2", "--probe", str(file)]) == 0
    assert asked.probe == file
    assert asked.options["off_target"] == "text"
    n = len(half_for_testing(file))
    assert 8 <= n < 40
    said = f"testing L1H2 on {n} items of {file}, the half of the file that is for testing heads"
    assert capsys.readouterr().err.splitlines()[-1] == f"headwise: {said}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--heads", "L1Q2"], "'L1Q2' is not a head label"),
        (["--heads", ","], "--heads names no heads"),
        (["--heads", "L9H0"], "L9"),
        (["--heads", "L1G2"], "KV group"),
        ([], "--heads"),
        (["--heads", "L1H2", "--probe", "nedle"], "no probe 'nedle'; did you mean needle or"),
        (["--heads", "L1H2", "--off-target", "txt"], "no probe 'txt'; did you mean text?"),
        (["--heads", "L1H2", "--metric", "exactmatch"], "did you mean exact-match"),
        (["--heads", "L1H2", "--mode", "nil"], "no knock-out mode 'nil'; choose from zero, mean, resample, uniform"),
    ],
)
def test_typing_mistakes_are_one_line(
    asked: Asked, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "zoo:planted", *arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err.splitlines()[-1]


def test_the_words_and_the_file_are_checked_before_a_model_is_loaded(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, few = tmp_path / "mine.jsonl", tmp_path / "few.jsonl"
    rows = [{"prompt": f"{i} and", "answer": f"{i}", "spans": {"start": f"{i}"}} for i in range(40)]
    file.write_text("\n".join(json.dumps(each) for each in rows))
    few.write_text(json.dumps(rows[0]))
    for arguments, line in (
        (["--scope", "decod"], "scope='decod' is not one of all, prompt, decode, last, span:NAME"),
        (["--scope", "span:nedle"], "not every item has a span 'nedle'; there is"),
        (["--probe", str(file), "--scope", "span:stop"], "not every item has a span 'stop'; there is start"),
        (["--probe", str(file), "--metric", "exact"], "no metric 'exact'"),
        (["--probe", str(tmp_path / "no.csv")], "no.csv does not exist"),
        (["--probe", str(few)], "of its 1 items are in the testing half"),
    ):
        assert main(["verify", "zoo:no-such-model", "--heads", "L1H2", *arguments]) == 2
        (only,) = capsys.readouterr().err.splitlines()
        assert line in only
    assert main(["verify", "zoo:planted", "--heads", "L1H2", "--probe", str(file), "--scope", "span:start"]) == 0


def test_what_cannot_be_served_is_one_line(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    asked.error = Refusal("the metric has no chance level")
    assert main(["verify", "zoo:planted", "--heads", "L1H2", "--json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "headwise: the metric has no chance level")


@pytest.mark.slow
def test_heads_of_a_planted_model_are_verified(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ",".join(planted_named("planted").truth.with_effect("ioi", "total").labels)
    arguments = ["verify", "zoo:planted", "--heads", heads, "--probe", "ioi", "--items", "24", "--json"]
    assert main(arguments) == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got) == set(RESULT)
    assert got["verdict"] == "verified"
    assert [each["head"] for each in got["single"]] == heads.split(",")
    assert all(each["q"] <= 0.05 for each in got["single"])
    assert got["off_target"]["probe"] == "text"
