"""`headwise list`: every kind, one kind, none."""

from __future__ import annotations

import json

import pytest

from headwise import catalogue
from headwise.catalogue import Entry, MethodEntry, register
from headwise.cli import main


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of three entries."""
    monkeypatch.setattr(catalogue, "_registered", {kind: {} for kind in catalogue.KINDS})
    monkeypatch.setattr(catalogue, "_gathered", True)
    register(Entry(id="tiny-b", kind="models", title="The second [model]", page="zoo.md"))
    register(Entry(id="tiny-a", kind="models", title="The first", page="zoo.md"))
    register(
        MethodEntry(
            id="copying",
            title="Copying",
            page="methods/copying.md",
            paper="A paper",
            year=2021,
            tier="C",
            status="reconstruction",
            needs=("twin",),
            cost="one forward",
        )
    )


def test_every_kind_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    items = json.loads(out)["items"]
    assert [(item["kind"], item["id"]) for item in items] == [
        ("methods", "copying"),
        ("models", "tiny-a"),
        ("models", "tiny-b"),
    ]
    assert set(items[1]) == {"id", "kind", "title", "page"}
    assert items[0]["tier"] == "C"
    assert items[0]["needs"] == ["twin"]


def test_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    out = capsys.readouterr().out
    assert "tiny-a" in out
    assert "The second [model]" in out
    assert "copying" not in out


def test_a_kind_with_nothing_in_it_says_so_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "probes"]) == 0
    assert capsys.readouterr() == ("", "headwise: no probes in this version yet\n")
    assert main(["list", "probes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": []}
