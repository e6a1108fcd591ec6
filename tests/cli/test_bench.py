"""`headwise bench`: numbers under dotted keys, and no setting that is quietly dropped."""

from __future__ import annotations

import json
import math

import pytest

from headwise import catalogue
from headwise.catalogue import BenchEntry, register
from headwise.cli import main


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue with one bench, which takes two of the settings."""

    def run(seed: int = 7, dtype: str = "float32") -> dict[str, float]:
        print("something on stdout")
        return {
            "needle.seed": seed,
            "needle.bits": {"float32": 32, "bfloat16": 16}[dtype],
            "needle.undefined": math.nan,
        }

    monkeypatch.setattr(catalogue, "_registered", {kind: {} for kind in catalogue.KINDS})
    monkeypatch.setattr(catalogue, "_gathered", True)
    register(BenchEntry(id="needle", title="Needle", page="cli.md", run=run))


def test_json_is_one_flat_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "needle", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"needle.seed": 7, "needle.bits": 32, "needle.undefined": None}


def test_settings_reach_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "needle", "--seed", "0", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out.split()
    assert out[out.index("needle.seed") + 2] == "0"
    assert out[out.index("needle.bits") + 2] == "16"


def test_a_setting_that_it_does_not_take_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "needle", "--attn", "eager"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "headwise: bench 'needle' does not take --attn; it takes --seed, --dtype\n"


def test_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nedle"]) == 2
    assert capsys.readouterr().err == "headwise: no bench 'nedle'; did you mean needle?\n"
