"""Runs: what is measured, what is kept, how they go on."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.atlas import Atlas
from headwise.atlas.cell import Cell
from headwise.atlas.progress import Silent
from headwise.atlas.report.reading import report_of
from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet, encode
from headwise.probes.stream import Probe
from headwise.scores import Provenance
from headwise.sweep import measure_sets
from headwise.zoo.planted import planted


def kept(folder: Path) -> dict[str, bytes]:
    """All files that count: not the log, not the lock."""
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file() and each.name not in ("log.jsonl", ".lock")
    }


def logged(folder: Path, event: str) -> list[str]:
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line.get("cell", "") for line in lines if line["event"] == event]


def test_the_map_is_the_metric_with_each_head_out(finished: Atlas, model: AttachedModel, short: Probe) -> None:
    items = encode(short, model.tokenizer, n=16, seed=0)
    evidence = finished.evidence("repeat")
    assert set(evidence.item_ids) <= set(items.ids[8:])
    assert evidence.heads == model.heads("main")
    for row, head in enumerate(evidence.heads.heads):
        alone = hw.measure(model, items, edits=[hw.edit.zero(head.label)]).double().numpy()
        expected = [alone[items.ids.index(id)] for id in evidence.item_ids]
        np.testing.assert_allclose(evidence.values[row], expected, atol=1e-4)


def test_the_joint_cell_holds_the_best_heads_and_matched_controls(
    finished: Atlas, model: AttachedModel, short: Probe
) -> None:
    (joint,) = finished.evidence("repeat").joints
    assert joint.name == "by-place"
    assert joint.heads == finished.chosen("by-place", "repeat") == HeadSet.parse("L0H0, L0H1")
    assert len(joint.controls.sets) == 4
    assert all(len(each) == 2 and not each & joint.heads for each in joint.controls.sets)
    items = encode(short, model.tokenizer, n=16, seed=0)
    together = hw.measure(model, items, edits=[hw.edit.zero(joint.controls.sets[0])]).double().numpy()
    expected = [together[items.ids.index(id)] for id in finished.evidence("repeat").item_ids]
    np.testing.assert_allclose(joint.control_values[0], expected, atol=1e-4)


def test_heads_are_found_on_one_half_and_tested_on_the_other(finished: Atlas) -> None:
    card = finished.manifest.probe("repeat")
    assert finished.scores("by-place", "repeat").item_ids == card.finding
    assert set(finished.evidence("repeat").item_ids) <= set(card.testing)


def test_a_method_that_scores_nothing_is_a_refusal_and_no_error(finished: Atlas) -> None:
    assert list(finished.refused) == ["find/silent/repeat"]
    assert "gives no head a score" in finished.refused["find/silent/repeat"]
    assert finished.scored == (("by-place", "repeat"),)
    with pytest.raises(InputError, match="find/silent/repeat was not measured: silent gives no head a score"):
        finished.scores("silent", "repeat")


def test_a_head_that_stands_out_alone_needs_no_control_sets(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method]
) -> None:
    def best(model: AttachedModel, items: ItemSet) -> Scored:
        scores = {site: torch.zeros(len(items), 4) for site in scored_sites(model)}
        scores[scored_sites(model)[1]][:, 2] = 1.0
        return scores

    atlas = run(tmp_path / "atlas", methods=[method("best", best)])
    assert atlas.chosen("best", "repeat") == HeadSet.parse("L1H2")
    assert atlas.evidence("repeat").joints == ()
    assert atlas.store.read(Cell(kind="joint", method="best", probe="repeat")).about["alone"] is True


def test_the_same_heads_by_several_methods_are_one_claim_and_are_measured_once(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method], finished: Atlas
) -> None:
    folder, others = tmp_path / "atlas", ["by-place", "copy", "again"]
    with pytest.raises(KeyboardInterrupt):
        run(folder, methods=[method(id) for id in others], watching=Stopping(12, KeyboardInterrupt))
    assert not Atlas.open(folder).store.has(Cell(kind="joint", method="again", probe="repeat"))
    atlas = run(folder, methods=[method(id) for id in others])
    for id in others[1:]:
        stored = atlas.store.read(Cell(kind="joint", method=id, probe="repeat"))
        assert stored.about == {"heads": ["L0H0", "L0H1"], "alone": False, "same_as": "joint/by-place/repeat"}
        assert not stored.arrays
    (joint,) = atlas.evidence("repeat").joints
    assert joint.name == "by-place, copy, again"
    np.testing.assert_equal(joint.values, finished.evidence("repeat").joints[0].values)
    ((verdict,), (alone,)) = atlas.judged(), finished.judged()
    assert verdict.size == alone.size == 9
    np.testing.assert_equal([each.q for each in verdict.singles], [each.q for each in alone.singles])
    (claim,) = report_of(atlas).behaviours[0].joints
    assert claim.chosen_by == "named by by-place, copy and again"
    assert [each.probe for each in claim.off] == ["text"]
    undisturbed = tmp_path / "undisturbed"
    run(undisturbed, methods=[method(id) for id in others])
    assert kept(folder) == kept(undisturbed)


def test_a_knock_out_that_the_model_cannot_give_refuses_its_behaviour_and_no_other(
    run: Callable[..., Atlas], tmp_path: Path, short: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(model: AttachedModel, items: ItemSet, sets: list[HeadSet], *more: object) -> torch.Tensor:
        if items.probe == "other" and any(sets):
            raise Refusal("scope 'decode' meets no position of other")
        return measure_sets(model, items, sets, *more)  # type: ignore[arg-type]

    for place in ("headwise.atlas.measuring.measure_sets", "headwise.verify.gathering.measure_sets"):
        monkeypatch.setattr(place, refusing)
    atlas = run(tmp_path / "atlas", probes=[replace(short, id="other"), short])
    assert atlas.complete
    assert atlas.refused["other"] == "scope 'decode' meets no position of other"
    assert "dose/other" not in atlas.refused
    assert atlas.judgeable == ("repeat",)
    assert [each.family.probe for each in atlas.judged()] == ["repeat"]
    assert set(atlas.tables()["effects"]["probe"]) == {"repeat"}
    assert atlas.dose("other") is None
    assert atlas.examples("other") == ()
    report = report_of(atlas)
    assert [each.probe for each in report.behaviours] == ["repeat"]
    assert "other" in [each.what for each in report.refused]
    with pytest.raises(InputError, match="the map of other could not be measured: scope"):
        atlas.evidence("other")


def test_a_run_under_other_versions_is_refused(
    run: Callable[..., Atlas], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "atlas"
    with pytest.raises(KeyboardInterrupt):
        run(folder, watching=Stopping(1, KeyboardInterrupt))
    now = {**Provenance.versions_now(), "torch": "1.0"}
    monkeypatch.setattr(Provenance, "versions_now", staticmethod(lambda: now))
    with pytest.raises(InputError, match=r"torch is .* there and 1\.0 here; choose .* same settings and versions"):
        run(folder)


def test_the_same_call_measures_nothing_twice(run: Callable[..., Atlas], tmp_path: Path) -> None:
    folder = tmp_path / "atlas"
    first = run(folder)
    before, cells = kept(folder), logged(folder, "cell")
    assert sorted(cells) == sorted(cell.id for cell in first.cells)
    assert run(folder).complete
    assert kept(folder) == before
    assert logged(folder, "cell") == cells


def test_one_more_method_adds_only_its_cells(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method]
) -> None:
    folder = tmp_path / "atlas"
    before = run(folder)
    old, cells, sizes = kept(folder), logged(folder, "cell"), [each.size for each in before.judged()]
    silent = method("silent", lambda model, items: {})

    def others(model: AttachedModel, items: ItemSet) -> Scored:
        scores = {site: torch.zeros(len(items), 4) for site in scored_sites(model)}
        scores[scored_sites(model)[1]][:, :2] = 1.0
        return scores

    after = run(folder, methods=[method("by-place"), silent, method("three", others)])
    added = logged(folder, "cell")[len(cells) :]
    assert added == ["find/three/repeat", "joint/three/repeat", "offtarget/three/repeat"]
    assert after.manifest.cells == (*before.manifest.cells, *added)
    new = kept(folder)
    assert all(new[name] == content for name, content in old.items() if name.startswith("cells/"))
    assert [each.size for each in after.judged()] == [size + 1 for size in sizes]


def test_what_was_left_out_of_the_call_stays_in_the_atlas(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    def registered(named: str | Method) -> Method:
        return named if isinstance(named, Method) else method(named, lambda model, items: {})

    monkeypatch.setattr("headwise.atlas.asking.method_named", registered)
    folder = tmp_path / "atlas"
    before = run(folder)
    assert run(folder, methods=[method("by-place")]).manifest == before.manifest


def test_a_method_with_other_settings_is_another_method(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method]
) -> None:
    def by_other_place(model: AttachedModel, items: ItemSet, *, best: int = 3) -> Scored:
        raise AssertionError

    folder = tmp_path / "atlas"
    run(folder, methods=[method("by-place")])
    with pytest.raises(
        InputError, match=r"by-place has the settings \{'best': 2\} in this atlas and \{'best': 3\} here"
    ):
        run(folder, methods=[method("by-place", by_other_place)])


def test_one_more_probe_keeps_the_settings_of_those_that_are_there(run: Callable[..., Atlas], tmp_path: Path) -> None:
    folder = tmp_path / "atlas"
    before = run(folder)
    after = run(folder, probes=["ioi"])
    assert after.manifest.probe("repeat") == before.manifest.probe("repeat")
    assert {"ioi", "repeat"} <= set(after.probes)


class Stopping(Silent):
    """Raises after so many cells."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def began(self, cell: Cell) -> None:
        if not self.left:
            raise self.error
        self.left -= 1


def test_an_interrupted_run_is_readable_and_goes_on(run: Callable[..., Atlas], tmp_path: Path, finished: Atlas) -> None:
    folder = tmp_path / "atlas"
    with pytest.raises(KeyboardInterrupt):
        run(folder, watching=Stopping(5, KeyboardInterrupt))
    part = Atlas.open(folder)
    assert not part.complete
    assert len(part.left) == len(part.cells) - 5
    assert part.judged() == []
    assert part.scored == (("by-place", "repeat"),)
    assert part.dose("repeat") is None
    assert part.examples("repeat") == ()
    done = logged(folder, "cell")
    assert run(folder).complete
    assert len(set(logged(folder, "cell"))) == len(logged(folder, "cell")) == len(part.cells)
    assert logged(folder, "cell")[:5] == done
    assert kept(folder) == kept(finished.folder)


def test_a_full_disk_leaves_an_atlas_that_goes_on(
    run: Callable[..., Atlas], tmp_path: Path, finished: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flush, calls = tmp_path / "atlas", os.fsync, iter(range(10_000))

    def full(handle: int) -> None:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refusal, match="No space left on device"):
        run(folder)
    assert Atlas.open(folder).left
    monkeypatch.setattr(os, "fsync", flush)
    run(folder)
    assert kept(folder) == kept(finished.folder)


@pytest.mark.parametrize(
    ("changed", "said"), [({"seed": 1}, "seed is 0 there and 1 here"), ({"items": 18}, "items is 16 there and 18 here")]
)
def test_other_settings_are_refused(
    run: Callable[..., Atlas], tmp_path: Path, changed: dict[str, int], said: str
) -> None:
    folder = tmp_path / "atlas"
    run(folder)
    before = kept(folder)
    with pytest.raises(InputError, match=said):
        run(folder, **changed)
    assert kept(folder) == before


def test_another_model_is_refused(run: Callable[..., Atlas], tmp_path: Path) -> None:
    folder = tmp_path / "atlas"
    run(folder)
    other = planted("llama", layers=2, heads=4, circuits=("induction",), seed=1)
    with (
        hw.attach(other.model, other.tokenizer, example=other.example, name="other") as attached,
        pytest.raises(InputError, match=r"its model is 'small', this one is 'other' \(the weights differ\)"),
    ):
        run(folder, attached)


def test_a_probe_that_the_model_does_not_solve_is_refused_and_counted(
    run: Callable[..., Atlas], tmp_path: Path, short: Probe
) -> None:
    atlas = run(tmp_path / "atlas", probes=["choice", short])
    assert atlas.complete
    assert "half of them are needed" in atlas.refused["choice"]
    verdicts = {each.family.probe: each for each in atlas.judged()}
    assert verdicts["choice"].refusal
    assert verdicts["choice"].verified == HeadSet()
    assert not verdicts["repeat"].refusal
    assert not [each for each in atlas.scored if each[1] == "choice"]


def test_as_many_threads_as_the_cells_that_are_there(run: Callable[..., Atlas], tmp_path: Path) -> None:
    folder, before, seen = tmp_path / "atlas", torch.get_num_threads(), []

    class Looking(Silent):
        def began(self, cell: Cell) -> None:
            seen.append(torch.get_num_threads())

    with pytest.raises(KeyboardInterrupt):
        run(folder, watching=Stopping(1, KeyboardInterrupt))
    torch.set_num_threads(before + 1)
    try:
        run(folder, watching=Looking())
        assert set(seen) == {before}
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["mean", "resample", "uniform"])
def test_every_mode_runs(run: Callable[..., Atlas], tmp_path: Path, mode: str) -> None:
    atlas = run(tmp_path / "atlas", mode=mode)
    assert atlas.complete
    assert [each.family.mode for each in atlas.judged()] == [mode]


def test_only_an_attached_model(tmp_path: Path, run: Callable[..., Atlas]) -> None:
    with pytest.raises(InputError, match="takes an attached model"):
        run(tmp_path / "atlas", torch.nn.Linear(1, 1))
