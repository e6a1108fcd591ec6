"""Pairs of behaviours in an atlas: measured on fresh items, resumed like other cells, told in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headwise as hw
from headwise.atlas import Atlas, Settings, atlas, planning
from headwise.atlas.cell import Cell
from headwise.atlas.planning import plan
from headwise.atlas.progress import Silent
from headwise.atlas.report.reading import report_of
from headwise.atlas.summary import summary
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.verify.crossing import heads_behind
from headwise.verify.functional_dissociation import functional_dissociation
from headwise.zoo.planted import Planted, planted

PROBES = ["ioi", "facts"]


@pytest.fixture(scope="module")
def organism() -> Planted:
    return planted("llama", circuits=("indirect-object", "memory"), seed=3)


@pytest.fixture(scope="module")
def two(organism: Planted) -> Iterator[AttachedModel]:
    with hw.attach(organism.model, organism.tokenizer, example=organism.example, name="two") as attached:
        yield attached


@pytest.fixture(scope="module")
def make(two: AttachedModel, method: Callable[..., Method]) -> Callable[..., Atlas]:
    def start(folder: Path, **changed: Any) -> Atlas:
        known = {"probes": PROBES, "methods": [method("by-place")], "items": 24, "controls": 20, "watching": Silent()}
        return atlas(two, folder, **{**known, **changed})

    return start


@pytest.fixture(scope="module")
def paired(make: Callable[..., Atlas], tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return make(tmp_path_factory.mktemp("paired") / "atlas")


@pytest.mark.slow
def test_functional_dissociation_is_that_of_the_same_items_and_heads(paired: Atlas, two: AttachedModel) -> None:
    drawn = {name: hw.encode(hw.probe(name), two.tokenizer, n=24, seed=0) for name in PROBES}
    finding = {name: each.only([place < 12 for place in range(24)], "tests") for name, each in drawn.items()}
    testing = {name: each.only([12 <= place < 20 for place in range(24)], "finds") for name, each in drawn.items()}
    importance = {name: hw.find("gate-gradient", two, each, per="token") for name, each in finding.items()}
    expected = functional_dissociation(two, importance, testing)
    found = paired.functional_dissociation()
    assert [each.alpha for each in found] == [0.2, 0.3, 0.4]
    for one, other in zip(found, expected, strict=True):
        assert (one.behaviours, one.n_heads) == (other.behaviours, other.n_heads)
        for name in ("base", "performance", "original", "scale_free", "random_performance", "random_scale_free"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9, err_msg=name)
    assert max(each.scale_free.mean() for each in found) > 20
    table = paired.tables()["functional"]
    assert list(table["probe"]) == PROBES * 3
    matrix = report_of(paired).matrix
    assert matrix is not None
    assert [each.n_heads for each in matrix.masked] == [each.n_heads for each in expected]
    assert matrix.masked[0].scale_free == pytest.approx(expected[0].scale_free.mean())


class UpTo(Silent):
    """Stops before the first cell of a kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def began(self, cell: Cell) -> None:
        if cell.kind == self.kind:
            raise KeyboardInterrupt


def kept(folder: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file() and each.name not in ("log.jsonl", ".lock")
    }


@pytest.mark.slow
def test_two_planted_behaviours_are_a_double_dissociation(paired: Atlas, organism: Planted) -> None:
    (pair,) = paired.specialisation().pairs
    assert (pair.first, pair.second) == ("ioi", "facts")
    assert pair.double
    crossed = {each.behaviour: each for each in paired.crossed()}
    verdicts = {each.family.probe: each for each in paired.judged()}
    for name, each in crossed.items():
        assert each.heads == heads_behind(verdicts[name])
        assert each.heads <= organism.truth.with_effect(name, "total")


@pytest.mark.slow
def test_the_items_found_and_tested_no_head_and_the_numbers_are_those_of_a_knock_out(
    paired: Atlas, two: AttachedModel
) -> None:
    manifest = paired.manifest
    for each in paired.crossed():
        for probe, ids in each.item_ids.items():
            card = manifest.probe(probe)
            assert len(ids) == manifest.settings.fresh == 8
            assert not set(ids) & {*card.finding, *card.testing}
            drawn = hw.encode(hw.probe(probe), two.tokenizer, n=64, seed=f"dissociation/{manifest.settings.seed}")
            items = drawn.only([id in set(ids) for id in drawn.ids], "another one")
            assert items.ids == ids
            out = hw.measure(two, items, edits=[hw.edit.zero(each.heads)])
            np.testing.assert_allclose(each.values[probe], out.numpy(), atol=1e-3)
            control = hw.measure(two, items, edits=[hw.edit.zero(each.controls.sets[3])])
            np.testing.assert_allclose(each.control_values[probe][3], control.numpy(), atol=1e-3)


@pytest.mark.slow
def test_they_are_in_the_report_the_tables_and_the_summary(paired: Atlas) -> None:
    matrix = report_of(paired).matrix
    assert matrix is not None
    assert matrix.dissociated == (("ioi", "facts"),)
    behaviours = report_of(paired).behaviours
    assert all(each.fresh is not None and each.fresh.holds and each.fresh.n_items == 8 for each in behaviours)
    assert [(each.heads_of, each.other) for each in matrix.pairs] == [("ioi", "facts"), ("facts", "ioi")]
    table = paired.tables()["pairs"]
    assert list(table["heads_of"]) == ["ioi", "facts"]
    assert list(table["double"]) == [True, True]
    alone = paired.tables()["together"]
    assert list(alone["probe"]) == ["ioi", "facts"]
    assert alone["holds"].all()
    assert (alone["share"] > 0.9).all()
    said = "1 of 1 pair of behaviours rest on different heads (double dissociation): ioi and facts."
    assert said in summary(paired, Path("report.html"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crossed", "masked"])
def test_stopped_before_them_or_behind_them_they_go_on_bit_for_bit(
    make: Callable[..., Atlas], tmp_path: Path, paired: Atlas, kind: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "atlas", watching=UpTo(kind))
    part = Atlas.open(tmp_path / "atlas")
    assert len(part.specialisation().pairs) == (kind == "masked")
    make(tmp_path / "atlas")
    assert kept(tmp_path / "atlas") == kept(paired.folder)


@pytest.mark.slow
def test_one_more_behaviour_adds_its_pairs_and_measures_no_other_again(
    make: Callable[..., Atlas], tmp_path: Path, paired: Atlas
) -> None:
    folder = tmp_path / "atlas"
    make(folder, probes=["ioi"])
    assert [cell.id for cell in Atlas.open(folder).cells if cell.kind == "crossed"] == ["crossed/ioi/ioi"]
    grown = make(folder, probes=["facts"])
    assert [cell.id for cell in grown.cells if cell.kind == "crossed"] == [
        "crossed/ioi/ioi",
        "crossed/ioi/facts",
        "crossed/facts/ioi",
        "crossed/facts/facts",
    ]
    assert grown.specialisation().pairs[0].double
    assert len(grown.functional_dissociation()) == 3
    # A cell that is measured anew comes out as it was, whatever was added since.
    before = kept(folder)
    (folder / "cells" / "fresh" / "ioi.json").unlink()
    for name in ("crossed/ioi/facts.json", "crossed/ioi/facts.safetensors"):
        (folder / "cells" / name).unlink()
    make(folder, probes=["facts"])
    assert kept(folder) == before


def test_what_a_model_does_not_solve_has_no_pairs_and_is_refused_once(
    model: AttachedModel, make: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method]
) -> None:
    short = hw.probe("repeat").over(words=(8,))
    found = atlas(
        model,
        tmp_path / "atlas",
        probes=["choice", short],
        methods=[method("by-place")],
        items=16,
        controls=4,
        watching=Silent(),
    )
    assert found.complete
    assert "choice" in found.refused
    assert not [id for id in found.refused if id.startswith(("fresh/", "crossed/"))]
    assert found.crossed() == [] or [each.behaviour for each in found.crossed()] == ["repeat"]
    assert found.specialisation().pairs == ()
    assert list(found.tables()["pairs"].columns)[:2] == ["heads_of", "against"]


def test_every_pair_of_the_first_behaviours_is_planned_with_its_cost(
    two: AttachedModel, method: Callable[..., Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_CROSSED", 2)
    planned = plan(two, Settings(items=16, controls=4), ["ioi", "facts", "repeat"], [method("by-place")], None)
    cells = [cell for cell in planned.cells if cell.kind in ("fresh", "crossed")]
    assert [cell.id for cell in cells] == [
        "fresh/ioi",
        "fresh/facts",
        "crossed/ioi/ioi",
        "crossed/ioi/facts",
        "crossed/facts/ioi",
        "crossed/facts/facts",
    ]
    assert planned.manifest.left_out["fresh/repeat"].startswith("pairs of behaviours are tried among the first 2;")
    testing = planned.items["facts"].testing
    tokens = sum(len(each.prompt) + len(each.answer) for each in testing)
    assert planned.tokens(cells[3]) == (2 + 4) * tokens  # 8 fresh items, and 8 that test
    assert planned.tokens(cells[1]) == 3 * tokens


def test_an_id_of_a_pair_names_both_behaviours() -> None:
    cell = Cell(kind="crossed", heads_of="ioi", probe="facts")
    assert cell.id == "crossed/ioi/facts"
    assert Cell.parse("crossed/ioi/facts") == cell
