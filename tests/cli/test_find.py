"""`headwise find`: what it prints, how it names heads, what it says of typing mistakes. The method is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import catalogue
from headwise.cli import main
from headwise.cli.find import grids
from headwise.find import Method
from headwise.find.method import Scored, scored_sites
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet, encode, probe
from headwise.scores import HeadScores, Provenance
from headwise.verify.verifying import half_for_finding

SEEN: list[ItemSet] = []


def score(model: AttachedModel, items: ItemSet) -> Scored:
    """10 * layer + head, and a little more on every other item; no score for the heads of L1."""
    SEEN.append(items)
    found = {}
    for site in scored_sites(model):
        row = torch.full((8,), torch.nan) if site.layer == 1 else 10.0 * site.layer + torch.arange(8)
        found[site] = row + 0.1 * (torch.arange(len(items)) % 2)[:, None]
    return found


@pytest.fixture(autouse=True)
def place_value(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.entries("methods")
    registered = {kind: dict(entries) for kind, entries in catalogue._registered.items()}
    monkeypatch.setattr(catalogue, "_registered", registered)
    catalogue.register(
        Method(
            id="place-value",
            title="where a head stands",
            page="cli.md",
            paper="none",
            year=2026,
            tier="C",
            status="exact",
            needs=(),
            cost="nothing",
            probe="ioi",
            score=score,
        )
    )
    SEEN.clear()


def test_json_has_every_head_and_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", "place-value", "zoo:planted", "--items", "4", "--top", "2", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    got = json.loads(out)
    assert set(got) == {"method", "model", "scores", "top"}
    assert (got["method"], got["model"]) == ("place-value", hw.load("zoo:planted").name)
    assert [len(row) for row in got["scores"]["main"]] == [8, 8, 8, 8]
    assert got["scores"]["main"][1] == [None] * 8
    assert got["scores"]["main"][2][3] == pytest.approx(23.05)
    assert [each["head"] for each in got["top"]] == ["L3H7", "L3H6"]
    assert got["top"][0]["score"] == pytest.approx(37.05)


def test_the_table_says_that_scores_are_descriptive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", "place-value", "zoo:planted", "--items", "4", "--top", "3"]) == 0
    out, err = capsys.readouterr()
    assert "Descriptive: not verified" in out
    rows = [line.split("│")[1:4] for line in out.splitlines() if "L3H" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["L3H7", "37.05", "0.0289"],
        ["L3H6", "36.05", "0.0289"],
        ["L3H5", "35.05", "0.0289"],
    ]
    assert "24 heads have a score, mean over 4 items of ioi" in out
    assert err.splitlines() == ["headwise: loading zoo:planted", "headwise: running place-value on 4 items of ioi"]


def test_more_heads_than_there_are_is_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", "place-value", "zoo:planted", "--items", "2", "--top", "1000", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["top"]) == 24


def test_another_probe_and_seed_reach_the_items(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--probe", "facts"], ["--probe", "facts", "--seed", "1"]):
        assert main(["find", "place-value", "zoo:planted", "--items", "3", *arguments, "--json"]) == 0
    own, facts, other = SEEN
    assert (own.probe, facts.probe, len(own)) == ("ioi", "facts", 3)
    assert facts.ids != other.ids


def test_a_file_is_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [each.item for each in encode(probe("repeat"), hw.load("zoo:planted").tokenizer, n=30)]
    file.write_text("\n".join(json.dumps({"prompt": each.prompt, "answer": each.answer}) for each in rows))
    assert main(["find", "place-value", "zoo:planted", "--probe", str(file), "--json"]) == 0
    half = tuple(each.id for each in half_for_finding(file))
    assert 0 < len(half) < 30
    assert (SEEN[0].probe, SEEN[0].ids) == ("mine", half)
    said = f"on {len(half)} items of mine, the half of the file that is for finding heads"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_what_is_wrong_in_a_file_is_found_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one"}\n')
    for path, line in ((tmp_path / "no.csv", "no.csv"), (file, "line 1, field 'answer'")):
        assert main(["find", "place-value", "zoo:no-such-model", "--probe", str(path)]) == 2
        (only,) = capsys.readouterr().err.splitlines()
        assert line in only


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["place-valu", "zoo:planted"], "no method 'place-valu'; did you mean place-value?"),
        (["place-value", "zoo:planted", "--probe", "fact"], "no probe 'fact'; did you mean facts or conflict?"),
        (["place-value", "zoo:plantd"], "did you mean planted"),
        (["place-value", "zoo:planted", "--items", "0"], "Invalid value for '--items'"),
    ],
)
def test_typing_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", *arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err.splitlines()[-1]


def test_layers_without_attention_and_second_calls_have_their_places() -> None:
    sites = (SiteId(layer=1), SiteId(layer=3), SiteId(layer=3, call=1))
    values = np.array([[[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]])
    scores = HeadScores({"main": values}, {"main": sites}, ("a",), Provenance("m"))
    assert grids(scores) == {"main": [[], [1, 2], [], [3, None]], "main@1": [[], [], [], [5, 6]]}
