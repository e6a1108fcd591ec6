"""Probe files with pictures on the command line: they go wherever a probe does, and what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headwise.cli import main
from headwise.cli.atlas import _listed
from headwise.verify.verifying import half_for_finding

COMMANDS = (
    ("find", "sink", "{model}", "--probe", "{file}"),
    ("verify", "{model}", "--heads", "L0H0", "--probe", "{file}"),
    ("atlas", "{model}", "--probes", "{file},repeat", "--out", "{out}"),
)


def written(folder: Path, **changed: Any) -> Path:
    """Thirty items with a picture each; `changed` are fields of the second one."""
    lines: list[dict[str, Any]] = []
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        prompt = f"<image> what is {10 + number} in?"
        lines.append({"prompt": prompt, "answer": " a", "foils": [" b"], "images": [f"{number}.png"]})
    lines[1] |= changed
    path = folder / "garden.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in lines), encoding="utf-8")
    return path


def called(command: tuple[str, ...], model: str, file: Path) -> list[str]:
    return [each.format(model=model, file=file, out=file.parent / "out") for each in command]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": ["nowhere.png"]}, ("line 2", "'images'", "nowhere.png does not exist")),
        ({"images": ["1.png", "2.png"]}, ("line 2", "1 marks <image> and the item 2 pictures")),
        ({"images": ["garden.jsonl"]}, ("line 2", "'images'", "cannot be read")),
        ({"regions": {"tree": [0, 0, 0, 40, 20]}}, ("line 2", "'tree'", "32 x 32")),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_before_a_model_is_loaded(
    command: tuple[str, ...],
    changed: dict[str, Any],
    said: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(called(command, "zoo:no-such-model", written(tmp_path, **changed))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in said:
        assert part in line


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_model_that_sees_nothing(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(called(command, "zoo:tiny-llama", written(tmp_path))) == 2
    told = capsys.readouterr()
    assert told.out == ""
    line = told.err.strip().splitlines()[-1]
    assert "it has pictures, and the model has no processor for them; load a model that sees" in line
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_json_has_the_shape_that_it_has_for_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    assert main([*called(COMMANDS[0], "zoo:tiny-llava", file), "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert set(found) == {"method", "model", "scores", "top"}
    assert set(found["scores"]) == {"main"}
    assert f"on {len(half_for_finding(file))} items of garden" in told.err


def test_names_have_commas_between_them_and_files_may_have_blanks() -> None:
    assert _listed(None) is None
    assert _listed("ioi, repeat needle") == ["ioi", "repeat", "needle"]
    assert _listed("my garden.jsonl,ioi ,a.csv") == ["my garden.jsonl", "ioi", "a.csv"]
