"""The page of figures: tables, goals, charts, and that the committed page is what the committed figures make."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headwise import catalogue
from headwise.benches import page
from headwise.benches.page import FIGURES, LAYOUTS, PAGE, PART, Filed, Layout, least, main, most, panels, table, written
from headwise.benches.plot import Panel, Point, drawn
from headwise.errors import InputError

ROOT = Path(__file__).parents[2]


def filed(**figures: float) -> Filed:
    named = {key.replace("__", "."): value for key, value in figures.items()}
    return Filed("headwise bench x --json", {"torch": "2.13.0"}, "2 cores, CPU", named)


def test_columns_goals_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout({"a": "first", "b": "second"}, {"a.ratio": least(2), "b.ratio": least(2), "only": most(1e-12)})
    monkeypatch.setattr(page, "LAYOUTS", {"x": layout})
    found = table("x", filed(a__ratio=2.0, a__noise=math.nan, b__ratio=1.994, only=3e-15, more=1234567.0))
    assert found == (
        "| quantity | first | second | goal |\n"
        "| --- | --- | --- | --- |\n"
        "| `ratio` | 2.00 | **1.99** | at least 2 |\n"
        "| `noise` | \u2013 |  |  |\n"
        "\n"
        "| quantity | measured | goal |\n"
        "| --- | --- | --- |\n"
        "| `only` | 3.00e-15 | at most 1e-12 |\n"
        "| `more` | 1,230,000 |  |\n"
        "\n"
        "`headwise bench x --json`, 2 cores, CPU, torch 2.13.0.\n"
    )


def test_goals_that_differ_stand_beside_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LAYOUTS", {"x": Layout({"a": "A", "b": "B"}, {"a.r": least(1.3), "b.r": least(2)})})
    assert "| `r` | 1.50 | **1.50** | at least 1.3 / at least 2 |" in table("x", filed(a__r=1.5, b__r=1.5))


def test_a_bench_without_a_layout_has_one_row_for_each_figure() -> None:
    assert table("overhead", filed(time__idle=1.0)).startswith("| quantity | measured |\n| --- | --- |\n| `time.idle`")


def test_settings_that_were_varied_are_a_chart_and_no_rows() -> None:
    of_sweep = filed(tokens_64__ratio=2.0, tokens_8__ratio=1.5, layers_3__ratio=1.2, gpt2__seconds=30.0)
    assert panels(of_sweep, LAYOUTS["sweep"]) == [
        Panel("tokens T", (Point(8, 1.5), Point(64, 2.0))),
        Panel("layers L", (Point(3, 1.2),)),
    ]
    found = table("sweep", of_sweep)
    assert "tokens_64" not in found
    assert "![Ratio by tokens T: 8.00: 1.50, 64.0: 2.00; by layers L: 3.00: 1.20](bench-sweep.svg)" in found
    assert "![" not in table("sweep", filed(gpt2__seconds=30.0))


def test_a_chart_has_its_points_where_they_belong() -> None:
    panel = Panel("tokens T", (Point(16, 1.0), Point(32, 2.0), Point(64, 0.5)))
    root = ElementTree.fromstring(drawn([panel, Panel("items N", (Point(2, 3.0),))]))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 4
    x, y = ([float(each.attrib[name]) for each in circles[:3]] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # powers of two
    assert y[2] > y[0] > y[1]
    assert (y[2] - y[0]) / (y[0] - y[1]) == pytest.approx(0.5, abs=0.02)
    one = next(each for each in root.iter() if each.attrib.get("class") == "one")
    assert float(one.attrib["y1"]) == y[0]
    assert {"tokens T", "items N", "16", "64"} <= {each.text for each in root.iter()}


def test_only_what_is_between_the_marks_is_written() -> None:
    text = "Before.\n<!-- figures: direct -->\nold\n<!-- end -->\nBetween.\n<!-- figures: x -->\n<!-- end -->\nAfter.\n"
    found = written(text, {"direct": filed(gpt2__forwards=1.01)})
    assert "old" not in found
    assert "| `forwards` | 1.01 | at most 1.05 |" in found
    assert [line for line in found.splitlines() if line in ("Before.", "Between.", "After.")] == [
        "Before.",
        "Between.",
        "After.",
    ]
    assert found.endswith("<!-- figures: x -->\n\nNot yet measured.\n\n<!-- end -->\nAfter.\n")
    assert written(found, {"direct": filed(gpt2__forwards=1.01)}) == found


def test_figures_come_back_as_they_were_filed(tmp_path: Path) -> None:
    before = filed(a=1.5, b=math.nan)
    before.write(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["figures"] == {"a": 1.5, "b": None}
    after = Filed.read(tmp_path / "x.json")
    assert (after.command, after.versions, after.machine) == (before.command, before.versions, before.machine)
    assert after.figures["a"] == 1.5
    assert math.isnan(after.figures["b"])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match=r"x\.json holds no figures of a bench"):
        Filed.read(tmp_path / "x.json")


def test_one_command_runs_benches_and_makes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = catalogue.BenchEntry(
        id="sweep",
        title="t",
        page="benchmarks.md#sweep",
        run=lambda seed=0: {"gpt2.seconds": 3.0, "tokens_8.ratio": 2.0},
    )
    catalogue.entries("benches")
    monkeypatch.setitem(catalogue._registered["benches"], "sweep", entry)
    (tmp_path / "docs").mkdir()
    assert main([], root=tmp_path) == 2
    assert "benchmarks.md is not there" in capsys.readouterr().err
    (tmp_path / PAGE).write_text("<!-- figures: sweep -->\n<!-- end -->\n")
    assert main(["sweep"], root=tmp_path) == 0
    made = (tmp_path / PAGE).read_text()
    assert "| `seconds` | 3.00 |" in made
    assert "headwise bench sweep --json" in made
    assert "<svg" in (tmp_path / "docs" / "bench-sweep.svg").read_text()
    assert main([], root=tmp_path) == 0
    assert (tmp_path / PAGE).read_text() == made
    assert main(["sweeep"], root=tmp_path) == 2
    assert "did you mean" in capsys.readouterr().err


def test_every_goal_is_of_a_bench_that_there_is() -> None:
    assert set(LAYOUTS) <= {each.id for each in catalogue.entries("benches")}


def test_the_committed_page_is_what_the_committed_figures_make() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    ids = [found[2] for found in PART.finditer(text)]
    assert set(LAYOUTS) <= set(ids)
    files = {id: ROOT / FIGURES / f"{id}.json" for id in ids}
    filed = {id: Filed.read(path) for id, path in files.items() if path.is_file()}
    assert written(text, filed) == text, "run python -m headwise.benches.page"
    for id, each in filed.items():
        if charts := panels(each, LAYOUTS.get(id, Layout())):
            assert (ROOT / "docs" / f"bench-{id}.svg").read_text(encoding="utf-8") == drawn(charts)
