"""The command in the report: parsed by the command line again, it plans the same atlas."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import headwise
import headwise.atlas.report
import headwise.atlas.running
import headwise.atlas.summary
from headwise.atlas import Atlas, Manifest
from headwise.atlas.report.command import beyond_command, command_of
from headwise.atlas.report.reading import report_of
from headwise.cli import main
from headwise.zoo.planted import planted


@pytest.fixture
def planning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An atlas ends with its manifest, before the first cell."""
    monkeypatch.setattr(headwise.atlas.running, "_run", lambda measuring, watcher: None)
    monkeypatch.setattr(headwise.atlas.report, "write_report", lambda made: made.folder)
    monkeypatch.setattr(headwise.atlas.summary, "summary", lambda made, path: ())


def planned(*arguments: str) -> Manifest:
    assert main(["atlas", *arguments]) == 0
    return Atlas.open(arguments[arguments.index("--out") + 1]).manifest


@pytest.mark.usefixtures("planning_only")
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--items 16 --seed 7 --mode mean --scope last --max-tokens 99 --controls 9 --off-target repeat --dtype float64 "
        "--attn eager",
    ],
    ids=["defaults", "nothing-as-usual"],
)
def test_the_command_parsed_back_plans_the_same_atlas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    def small(name: str, **how: object) -> object:
        organism = planted("llama", layers=2, heads=4, circuits=("induction",), seed=0)
        if how["attn"]:
            organism.model.set_attn_implementation(how["attn"])
        dtype = {None: "float", "float32": "float", "float64": "double"}[how["dtype"]]  # type: ignore[index]
        model = getattr(organism.model, dtype)()
        return headwise.attach(model, organism.tokenizer, example=organism.example, name=name)

    monkeypatch.setattr("headwise.loading.load", small)
    asked = f"'small model' --probes ioi,choice --methods induction,gate-gradient --out {tmp_path / 'first'} {options}"
    first = planned(*shlex.split(asked))
    program, command, *again = shlex.split(command_of(first, str(tmp_path / "second")))
    assert (program, command) == ("headwise", "atlas")
    assert planned(*again) == first
    assert beyond_command(first) == ""


def test_the_revision_is_in_the_command_where_there_is_one(finished: Atlas) -> None:
    manifest = finished.manifest
    assert "--revision" not in command_of(manifest, "here")
    dated = replace(manifest, model=replace(manifest.model, revision="abc"))
    assert command_of(dated, "here").endswith(" --revision abc")


def test_what_a_command_cannot_say_is_said_beside_it(finished: Atlas) -> None:
    said = "give these in Python (headwise.atlas): by-place; silent; repeat with words 8"
    assert beyond_command(finished.manifest) == said
    assert [each.value for each in report_of(finished).origin if each.name == "Beyond the command"] == [said]
