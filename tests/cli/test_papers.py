"""`headwise papers`: what can be run stands with its command, the rest without."""

from __future__ import annotations

import json

import pytest

from headwise.cli import main
from headwise.replications import papers


def test_json_is_one_object_with_every_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    found = json.loads(out)["papers"]
    assert [each["title"] for each in found] == [paper.title for paper in papers()]
    by_title = {each["title"]: each for each in found}
    scan = by_title["Scan and Snap"]
    assert scan["state"] == "done"
    assert scan["offers"] == [{"command": "headwise.zoo.theory.ScanSnapTask", "checked": "fixture from theory"}]
    assert (by_title["LoFiT"]["state"], by_title["LoFiT"]["offers"]) == ("not yet", [])
    assert by_title["Mixture of Tunable Experts"]["state"] == "no attention heads"


def test_the_tables_part_what_can_be_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["papers"]) == 0
    out = capsys.readouterr().out
    done, rest = out.split("what cannot")
    assert "headwise replicate retrieval-llama-2-7b-80k MODEL (not yet run)" in done
    assert "LoFiT" in rest
    assert "LoFiT" not in done
    n_done = sum(paper.state == "done" for paper in papers())
    assert out.rstrip().endswith(f"{len(papers())} papers; of {n_done} something can be run")
