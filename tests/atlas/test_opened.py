"""Reading an atlas: verdicts, off-target, doses, examples, tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.numpy import load_file

import headwise as hw
from headwise.atlas import Atlas
from headwise.atlas.tables import CONTROLS, EFFECTS, ITEMS, SCORES, VERDICTS
from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.stream import Probe
from headwise.verify.judging import judge


def test_verdicts_are_those_of_the_evidence(finished: Atlas) -> None:
    (verdict,) = finished.judged()
    again = judge(finished.evidence("repeat"))
    assert verdict.family.key == "repeat/logit-difference/zero/all"
    assert verdict.size == 9  # eight heads and one set
    np.testing.assert_equal([each.q for each in verdict.singles], [each.q for each in again.singles])
    assert [each.ruling for each in verdict.joints] == [each.ruling for each in again.joints]


def test_opened_again_it_says_the_same(finished: Atlas) -> None:
    again = Atlas.open(finished.folder)
    assert again.complete
    assert again.left == ()
    one, other = again.evidence("repeat"), finished.evidence("repeat")
    assert one.values.tobytes() == other.values.tobytes()
    assert one.joints[0].control_values.tobytes() == other.joints[0].control_values.tobytes()
    assert "8 heads, 1 behaviours, 2 methods, 16 of 16 cells" in repr(again)


def test_off_target_is_the_change_of_the_loss_on_plain_text(finished: Atlas, model: AttachedModel) -> None:
    table = finished.off_target
    assert list(table["heads"]) == [*model.heads("main").labels, "L0H0, L0H1"]
    assert list(table["method"]) == [""] * 8 + ["by-place"]
    assert set(table["unit"]) == {"nats per token"}
    items = encode(probe("text"), model.tokenizer, n=16, seed=0, max_tokens=256)
    clean = hw.measure(model, items)[8:].double()
    out = hw.measure(model, items, edits=[hw.edit.zero("L0H0, L0H1")])[8:].double()
    row = table.iloc[-1]
    assert row["change"] == pytest.approx(float((out - clean).mean()), abs=1e-4)
    assert row["low"] <= row["change"] <= row["high"]
    assert row["n_items"] == 8


def test_the_full_dose_is_the_knock_out(finished: Atlas) -> None:
    dose = finished.dose("repeat")
    assert dose is not None
    evidence = finished.evidence("repeat")
    assert dose.doses == (0.25, 0.5, 0.75, 1.0)
    if dose.name == "map":
        row = evidence.heads.heads.index(dose.heads.heads[0])
        full = evidence.drops(evidence.values)[row]
    else:
        full = evidence.drops(evidence.joints[0].values)
    np.testing.assert_allclose(dose.dose_drops[-1], full, atol=1e-4)


def test_the_growing_set_begins_with_the_head_that_costs_most_and_ends_with_all(finished: Atlas) -> None:
    dose, evidence = finished.dose("repeat"), finished.evidence("repeat")
    assert dose is not None
    effects = evidence.drops(evidence.values).mean(axis=1)
    best = int(effects.argmax())
    assert dose.growing[0] == evidence.heads.heads[best]
    assert dose.sizes == (1, 2, 3, 4, 6, 8)
    np.testing.assert_allclose(dose.growing_drops[0], evidence.drops(evidence.values)[best], atol=1e-4)
    assert set(dose.growing) == set(evidence.heads.heads)


def test_kept_only_takes_all_other_heads_out(finished: Atlas, model: AttachedModel, short: Probe) -> None:
    dose, evidence = finished.dose("repeat"), finished.evidence("repeat")
    assert dose is not None
    items = encode(short, model.tokenizer, n=16, seed=0)
    others = model.heads("main") - dose.heads
    out = hw.measure(model, items, edits=[hw.edit.zero(others)]).double().numpy()
    left = np.array([out[items.ids.index(id)] for id in evidence.item_ids])
    np.testing.assert_allclose(dose.kept_only, evidence.clean - left, atol=1e-4)


def test_examples_hold_the_row_that_predicts_the_answer(finished: Atlas, model: AttachedModel, short: Probe) -> None:
    examples = finished.examples("repeat")
    assert len(examples) == 3
    items = {each.id: each for each in encode(short, model.tokenizer, n=16, seed=0)}
    for example in examples:
        item = items[example.item]
        assert example.answer == item.item.answer
        assert len(example.tokens) == len(item.prompt) == example.weights.shape[1]
        row = torch.tensor([item.prompt])
        with torch.no_grad(), model.reading(hw.read.rows(heads=example.heads, queries=[-1])) as got:
            model(input_ids=row)
        expected = torch.cat([got.rows[site][0, :, 0] for site in example.heads.sites])
        np.testing.assert_allclose(example.weights, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(example.weights.sum(axis=1), 1, atol=1e-4)


def test_the_induction_heads_are_among_those_that_are_shown(finished: Atlas) -> None:
    effects = finished.evidence("repeat").drops(finished.evidence("repeat").values).mean(axis=1)
    heads = finished.evidence("repeat").heads.heads
    assert heads[int(effects.argmax())] in finished.examples("repeat")[0].heads


def test_unknown_names(finished: Atlas) -> None:
    with pytest.raises(InputError, match="no behaviour 'ioi'; it has repeat"):
        finished.evidence("ioi")
    with pytest.raises(InputError, match="no behaviour 'text'"):
        finished.dose("text")
    with pytest.raises(InputError, match="no cell find/induction/repeat"):
        finished.scores("induction", "repeat")


def test_what_is_verified_names_the_methods_that_chose_it(finished: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    (verdict,) = finished.judged()
    ruled = {"L0H0": "verified", "L1H1": "verified"}
    singles = tuple(replace(each, ruling=ruled.get(each.head.label, "not verified")) for each in verdict.singles)  # type: ignore[arg-type]
    monkeypatch.setattr(Atlas, "judged", lambda self: [replace(verdict, singles=singles)])
    found = {(each.head.label, each.method, each.probe) for each in finished.verified()}
    assert found == {("L0H0", "by-place", "repeat"), ("L1H1", "knock-out", "repeat")}


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_on_disk_are_the_tables(finished: Atlas) -> None:
    tables = finished.tables()
    columns = {"scores": SCORES, "effects": EFFECTS, "controls": CONTROLS, "verdicts": VERDICTS, "items": ITEMS}
    for name, table in tables.items():
        stored = pandas.read_parquet(finished.folder / "tables" / f"{name}.parquet")
        pandas.testing.assert_frame_equal(stored, table, check_dtype=False)
        assert list(table.columns) == columns.get(name, list(table.columns))


def test_what_the_tables_hold(finished: Atlas) -> None:
    tables, evidence = finished.tables(), finished.evidence("repeat")
    n = len(evidence.item_ids)
    assert len(tables["scores"]) == 8 * 8
    assert len(tables["effects"]) == 9 * n
    assert len(tables["controls"]) == 4
    assert len(tables["verdicts"]) == 9
    assert len(tables["items"]) == 2 * 16
    assert int(tables["items"].query("probe == 'repeat'")["counts"].sum()) == n
    effects = tables["effects"].groupby(["set", "heads"])["drop"].mean()
    verdicts = tables["verdicts"].set_index(["set", "heads"])["effect"]
    pandas.testing.assert_series_equal(effects.sort_index(), verdicts.sort_index(), check_names=False)


def test_cells_are_read_without_headwise(finished: Atlas) -> None:
    about = json.loads((finished.folder / "cells/map/repeat/L1.json").read_text(encoding="utf-8"))
    arrays = load_file(finished.folder / "cells/map/repeat/L1.safetensors")
    assert about["about"]["heads"] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert arrays["values"].shape == (4, len(finished.evidence("repeat").item_ids))


@pytest.mark.slow
def test_on_a_planted_model_what_is_planted_is_verified(tmp_path: Path, run: Callable[..., Atlas]) -> None:
    from headwise.zoo.planted import planted_named

    truth = planted_named("planted", seed=0).truth
    with hw.load("zoo:planted") as model:
        atlas = run(tmp_path / "atlas", model, probes=["ioi"], items=32)
    (verdict,) = atlas.judged()
    assert verdict.verified == HeadSet.parse(truth.with_effect("ioi", "total"))
    assert {each.head for each in atlas.verified()} == set(map(Head.parse, verdict.verified.labels))
