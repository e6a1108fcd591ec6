"""Rows in files, and the page that is made of them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from headwise.benches import looking
from headwise.benches.looking import PARTS, Part, figures, parts_of
from headwise.benches.looking.items import Bench
from headwise.benches.looking.page import page
from headwise.benches.looking.row import Row
from headwise.benches.looking.stored import Stored
from headwise.errors import InputError, Refusal

GOOD = Row("r", ("L1H2",), 32, 0.1, 0.9, 0.8, (0.6, 1.0), 0.7, (0.4, 1.0), 8, note="why")
PLAIN = Row("p", (), 4, 0.5, 0.75, 0.25, (0.1, 0.4))
REFUSED = Row("n", refused="there are no heads. And so on")


class Named:
    """A model of which the table takes the name alone."""

    name = "a model"


BENCH = Bench(Named())  # type: ignore[arg-type]


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    kept = Stored(tmp_path / "model")
    assert kept.rows("a") is None
    kept.put("a", [GOOD, PLAIN, REFUSED])
    again = kept.rows("a")
    assert again is not None
    assert again[0] == GOOD
    for row, read in zip((PLAIN, REFUSED), again[1:], strict=True):
        for each in fields(Row):
            own, other = getattr(row, each.name), getattr(read, each.name)
            assert own == other or str(own) == str(other), each.name  # NaN is not equal to itself
    assert Stored(tmp_path / "model", seed=1).rows("a") is None
    assert not list(tmp_path.rglob("*.partial"))
    (tmp_path / "model" / "a.json").write_text("{}")
    with pytest.raises(InputError, match="holds no rows"):
        kept.rows("a")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two parts in place of all, one of which cannot be served; what was asked of them."""
    calls: list[str] = []

    def good(bench: Bench) -> list[Row]:
        calls.append("good")
        return [GOOD, PLAIN]

    def bad(bench: Bench) -> list[Row]:
        calls.append("bad")
        raise Refusal("there are no heads")

    monkeypatch.setattr(looking, "PARTS", {"good": Part("It works", "So.", good), "bad": Part("Not", "So.", bad)})
    return calls


def test_a_run_that_was_stopped_goes_on(asked: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    stored = Stored(tmp_path)
    first = parts_of(BENCH, said.append, stored)
    assert asked == ["good", "bad"]
    assert first["good"] == [GOOD, PLAIN]
    assert [row.refused for row in first["bad"]] == ["there are no heads"]
    assert said[-1] == "a model: bad: 0 of 1 rows hold"
    again = parts_of(BENCH, said.append, stored)
    assert asked == ["good", "bad"]
    assert again["good"][0] == GOOD
    assert json.loads((tmp_path / "bad.json").read_text())["rows"][0]["without"] is None


def test_figures_are_named_by_part_and_row() -> None:
    found = figures({"gaze": [GOOD, REFUSED]})
    assert found["gaze.r.edited"] == 0.9
    assert found["gaze.r.beyond"] == 0.7
    assert found["gaze.r.holds"] == 1.0
    assert found["gaze.n.holds"] == 0.0
    assert math.isnan(found["gaze.n.change"])


def test_the_page_counts_models() -> None:
    worse = replace(GOOD, beyond=-0.1, beyond_interval=(-0.2, 0.1), note="")
    kept = Row("k", (), 4, 0.5, 0.49, -0.01, (-0.02, 0.0), wanted=0)
    text = page(
        {"one": {"gaze": [GOOD, PLAIN, kept]}, "two": {"gaze": [worse, PLAIN, kept]}, "three": {"gaze": [REFUSED]}}
    )
    assert "| r | 2 of 2 | 1 of 2 | +0.800, +0.800 |" in text
    assert "| p | 2 of 2 | no controls | +0.250, +0.250 |" in text
    assert "| k | kept in 2 of 2 | 2 of 2 | -0.010, -0.010 |" in text
    assert "| n | 0 of 1 | 0 of 1 | none |" in text
    assert "In no model: p; n." in text
    line = "| one | L1H2 | 32 | 0.100 | 0.900 | +0.800 [+0.600, +1.000] | +0.700 [+0.400, +1.000] | yes |"
    assert line in text
    assert "- one: why" in text
    assert "| three | none: there are no heads | | | | | | no |" in text
    assert all(f"## {id}\n" in text for id in PARTS)
