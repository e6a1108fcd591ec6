"""The table of uses: what holds, what is stored and gone on with, on which items it is judged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.benches import specialising, use_row, use_rows, uses
from headwise.benches.specialising import Cell, Way, section
from headwise.benches.use_row import Bench, Row
from headwise.benches.use_rows import USES, Use
from headwise.benches.uses import Stored, page, rows_of
from headwise.errors import InputError, Refusal
from headwise.fit.training import Schedule
from headwise.heads import HeadSet
from headwise.probes import held_out, probe
from headwise.use import HeadRemoval
from headwise.use.evaluation import Comparison


@cache
def organism() -> hw.AttachedModel:
    return hw.load("zoo:organism")


GOOD = Row(("L1H2",), 32, 0.1, 0.9, 0.8, (0.6, 1.0), 0.7, (0.4, 1.0), 0.001)


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"p": math.nan}, True),
        ({"p": 0.06}, False),
        ({"interval": (-0.1, 1.0)}, False),
        ({"excess_interval": (-0.1, 1.0)}, False),
        ({"excess_interval": (math.nan, math.nan)}, False),
        ({"wanted": -1}, False),
        ({"wanted": -1, "interval": (-1.0, -0.1), "excess_interval": (-1.0, -0.1)}, True),
        ({"refused": "no heads"}, False),
    ],
)
def test_what_holds(changed: dict[str, Any], holds: bool) -> None:
    assert replace(GOOD, **changed).holds is holds


def test_a_row_is_what_was_compared() -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((4, 6))
    heads = (HeadSet(),) * 2
    found = Comparison("p", "m", "u", "higher", tuple("abcdef"), values[0], values[1], values[2:], heads, "layers")
    row = Row.of(found, HeadSet.parse("L1H2, L0H3"), wanted=-1, note="why")
    assert (row.heads, row.items, row.wanted, row.note) == (("L0H3", "L1H2"), 6, -1, "why")
    assert (row.clean, row.edited, row.change) == (values[0].mean(), values[1].mean(), found.change)
    assert (row.interval, row.excess, row.excess_interval) == (found.interval, found.excess, found.excess_interval)


def test_comparisons_are_joined_item_by_item() -> None:
    def of(probe: str, start: float) -> Comparison:
        values = start + np.arange(8.0).reshape(4, 2)
        return Comparison(probe, "m", "u", "higher", ("a", "b"), *values[:2], values[2:], (HeadSet(),) * 2, "given")

    both = use_row.joined([of("one", 0), of("other", 10)])
    assert both.item_ids == ("one/a", "one/b", "other/a", "other/b")
    assert both.clean.tolist() == [0, 1, 10, 11]
    assert both.edited.tolist() == [2, 3, 12, 13]
    assert both.controls.tolist() == [[4, 5, 14, 15], [6, 7, 16, 17]]


# -- kept, and gone on with -------------------------------------------------------------------------------------------


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    kept = Stored(tmp_path / "model")
    assert kept.row("a") is None
    kept.put("a", GOOD)
    assert kept.row("a") == GOOD
    kept.put("b", replace(GOOD, p=math.nan, excess_interval=(math.nan, math.nan)))
    again = kept.row("b")
    assert again is not None
    assert all(map(math.isnan, (again.p, *again.excess_interval)))
    assert not list(tmp_path.rglob("*.partial"))
    assert Stored(tmp_path / "model", seed=1).row("a") is None
    (tmp_path / "model" / "a.json").write_text("{}")
    with pytest.raises(InputError, match="holds no row"):
        kept.row("a")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two uses in place of all, one of which cannot be served; what was asked of them."""
    calls: list[str] = []

    def good(bench: Bench) -> Row:
        calls.append("good")
        return GOOD

    def bad(bench: Bench) -> Row:
        calls.append("bad")
        raise Refusal("there are no heads. And so on")

    found = {"good": Use("It works", "So.", good), "bad": Use("It does not", "So.", bad)}
    monkeypatch.setattr(uses, "USES", found)
    return calls


def test_a_run_that_was_stopped_goes_on(asked: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    stored = Stored(tmp_path)
    first = rows_of(Bench(organism()), said.append, stored)
    assert asked == ["good", "bad"]
    assert first["bad"].refused == "there are no heads. And so on"
    (tmp_path / "bad.json").unlink()
    assert rows_of(Bench(organism()), said.append, stored) == first
    assert asked == ["good", "bad", "bad"]
    assert any("holds" in line for line in said)


def test_the_page_says_in_how_many_models(asked: list[str]) -> None:
    rows = {"good": GOOD, "bad": Row(refused="there are no heads. And so on")}
    text = page({"one": rows, "other": rows | {"good": replace(GOOD, p=0.3, note="of note")}}, {})
    assert "| [good](#good) | 1 of 2 | It works |" in text
    assert "| [bad](#bad) | 0 of 2 | It does not |" in text
    assert (
        "| one | L1H2 | 32 | 0.100 | 0.900 | +0.800 [+0.600, +1.000] | +0.700 [+0.400, +1.000] | 0.001 | yes |" in text
    )
    assert "| one | none: there are no heads | | | | | | | no |" in text
    assert "- other: of note" in text


def test_the_command_writes_the_page(asked: list[str], tmp_path: Path) -> None:
    where, folder = tmp_path / "uses.md", tmp_path / "rows"
    uses.main([str(where), "zoo:organism", "--folder", str(folder)])
    assert "| zoo:organism | L1H2 |" in where.read_text()
    assert (folder / "zoo-organism" / "good.json").is_file()
    uses.main([str(where), "zoo:organism", "--folder", str(folder)])
    assert asked == ["good", "bad"]


def test_the_figures_of_the_bench(asked: list[str]) -> None:
    figures = uses.measure()
    assert figures["good.holds"] == 1
    assert figures["good.excess"] == 0.7
    assert figures["bad.holds"] == 0
    assert math.isnan(figures["bad.clean"])


# -- the items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refusal", "conflict", "dated"])
def test_parts_share_no_item_and_only_unseen_ones_judge(name: str) -> None:
    parts = Bench(organism()).parts(probe(name))
    assert [len(each) for each in (parts.finding, parts.choosing)] == [use_row.FINDING, use_row.CHOOSING]
    prompts = [{each.item.prompt for each in part} for part in (parts.finding, parts.choosing, parts.judging)]
    assert not prompts[0] & prompts[1]
    assert not prompts[2] & (prompts[0] | prompts[1])
    assert all(held_out(each.item) for each in parts.judging)
    assert not any(held_out(each.item) for part in (parts.finding, parts.choosing) for each in part)
    assert parts.judging.metric == "logit-difference"


def test_the_other_answer_is_wanted() -> None:
    parts = Bench(organism()).parts(probe("refusal").over(wish="refuse"))
    swapped = use_rows._foil_wanted(parts.finding)
    before, after = (hw.measure(organism(), each, "logit-difference") for each in (parts.finding, swapped))
    assert torch.allclose(before, -after)


def test_heads_are_ranked_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the items that find; the first head of the ranking costs more than the last."""
    bench = Bench(organism())
    asked = probe("ioi")
    ranked, items = bench.ranked(asked), bench.parts(asked).finding
    clean, first, last = (
        float(hw.measure(organism(), items, under=each).mean()) if each else float(hw.measure(organism(), items).mean())
        for each in (None, HeadRemoval(HeadSet(ranked.heads[:1])), HeadRemoval(HeadSet(ranked.heads[-1:])))
    )
    assert clean - first > clean - last - 1e-6
    assert "verified alone" in ranked.note
    assert bench.ranked(asked) is ranked


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", USES)
def test_every_use_gives_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, on the organism: a row, or a refusal that says why."""
    monkeypatch.setattr(use_row, "CONTROLS", 2)
    monkeypatch.setattr(use_rows, "CONTROLS", 2)
    monkeypatch.setattr(use_rows, "TRAINED_CONTROLS", 1)
    for name_of in ("INJECTING", "ADAPTING"):
        monkeypatch.setattr(use_rows, name_of, Schedule(steps=2))
    row = USES[name].row(Bench(organism()))
    assert row.items >= 8
    assert row.heads
    assert math.isfinite(row.change)


# -- important-head training ------------------------------------------------------------------------------------------


def test_the_section_of_what_was_trained() -> None:
    cells = [Cell(Way(0.5, 10), Way(0.9, 30 + seed), Way(0.7, 20)) for seed in range(3)]
    text = section({"organism": cells})
    assert "| organism | 3 | accuracy | 0.500 | 0.700 | 0.900 | +0.200 [+0.200, +0.200] |" in text
    assert "| organism | 3 | dissociation | 10.000 | 20.000 | 31.000 | +11.000 [+8.516, +13.484] |" in text
    assert section({}) == ""


def test_cells_are_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def cell(setting: object, seed: int) -> Cell:
        made.append(seed)
        if setting is specialising.SETTINGS["minilm"]:
            raise Refusal("not installed")
        return Cell(Way(0.5, 1), Way(0.6, 2), Way(0.7, 3 + seed))

    monkeypatch.setattr(specialising, "cell", cell)
    specialising.main(["--folder", str(tmp_path), "--seeds", "2"])
    assert made == [0, 1, 0]
    specialising.main(["--folder", str(tmp_path), "--seeds", "2"])
    assert made == [0, 1, 0, 0]
    assert [each.plain.dissociation for each in specialising.stored(tmp_path)["organism"]] == [3, 4]
    assert json.loads((tmp_path / "organism-0.json").read_text())["plain"] == {"accuracy": 0.7, "dissociation": 3}


def test_the_tasks_of_a_seed_are_new_and_parted() -> None:
    one, other = (specialising.written(organism(), seed) for seed in (0, 1))
    for task in one:
        assert len(task.items) == specialising.TRAINED
        assert not set(task.items.ids) & set(task.held_out.ids)
    assert one[1].items.ids != other[1].items.ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["organism", "minilm"])
def test_a_cell_of_each_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on a few items."""
    if name == "minilm":
        pytest.importorskip(specialising.MINILM)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(specialising, "TRAINED", 16)
    monkeypatch.setattr(specialising, "JUDGED", 16)
    short = replace(specialising.SETTINGS[name], schedule=Schedule(steps=4, learning_rate=1e-4), share=0.1)
    found = specialising.cell(short, 0)
    for way in (found.before, found.important, found.plain):
        assert 0 <= way.accuracy <= 1
        assert math.isfinite(way.dissociation)
