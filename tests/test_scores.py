"""Scores per item: means and errors with gaps, selection, reliability on planted scores, storage, the picture."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from scipy import stats

import headwise
from headwise.errors import InputError
from headwise.heads import Head, HeadSet, SiteId
from headwise.scores import HeadScores, Provenance, ScoredHead

NAN = float("nan")
MADE_BY = Provenance("retrieval", settings={"top": 1}, model="gpt2", revision="abc", probe="needle", seed=0)


def scores_of(values, stack="main", layers=None, items=None, made_by=MADE_BY) -> HeadScores:
    """Scores of one stack from an array `[item, site, head]`."""
    values = np.asarray(values)
    layers = range(values.shape[1]) if layers is None else layers
    items = [f"item-{i}" for i in range(values.shape[0])] if items is None else items
    return HeadScores({stack: values}, {stack: tuple(SiteId(stack=stack, layer=n) for n in layers)}, items, made_by)


@pytest.fixture
def small() -> HeadScores:
    """Two stacks, three items. L4 has one head only; L2H1 has no score on the last item; means are below.

    main    L2: 2.0, 3.0    L4: 5.0, -     encoder L0: 2.0, -1.0
    """
    return HeadScores(
        {
            "encoder": np.array([[[2.0, -1.0]], [[2.0, -1.0]], [[2.0, -1.0]]], dtype=np.float32),
            "main": np.array([[[1, 2], [4, NAN]], [[2, 4], [5, NAN]], [[3, NAN], [6, NAN]]], dtype=np.float32),
        },
        {
            "encoder": (SiteId(stack="encoder", layer=0),),
            "main": (SiteId(layer=2), SiteId(layer=4)),
        },
        ("a", "b", "c"),
        MADE_BY,
    )


# --- means, errors, selection -----------------------------------------------------------------------------------------


def test_mean_error_and_count_leave_gaps_out(small):
    np.testing.assert_array_equal(small.mean()["main"], [[2.0, 3.0], [5.0, NAN]])
    np.testing.assert_array_equal(small.count()["main"], [[3, 2], [3, 0]])
    # s = 1 over 3 items; s = sqrt(2) over 2 items
    np.testing.assert_allclose(small.standard_error()["main"], [[3**-0.5, 1.0], [3**-0.5, NAN]])
    np.testing.assert_array_equal(small.standard_error()["encoder"], [[0.0, 0.0]])
    assert np.isnan(small.select("a").standard_error()["main"]).all()


def test_mean_and_error_agree_with_scipy_on_random_gaps():
    generator = np.random.default_rng(3)
    values = generator.normal(loc=1000.0, size=(40, 3, 5))
    values[generator.random(values.shape) < 0.3] = NAN
    scores = scores_of(values)
    np.testing.assert_allclose(scores.mean()["main"], pd.DataFrame(values.reshape(40, -1)).mean().values.reshape(3, 5))
    np.testing.assert_allclose(scores.standard_error()["main"], stats.sem(values, axis=0, nan_policy="omit"))


def test_mean_of_low_precision_scores_is_taken_in_fp64():
    scores = scores_of(np.full((5000, 1, 1), 100, dtype=np.float16))
    assert scores.mean()["main"].item() == 100.0


def test_the_stacks_come_in_canonical_order_and_only_scored_heads_count(small):
    assert small.stacks == ("main", "encoder")
    assert small.heads.labels == ("L2H0", "L2H1", "L4H0", "encoder.L0H0", "encoder.L0H1")


def test_scores_of_one_head(small):
    np.testing.assert_array_equal(small.of("L2H1"), np.array([2, 4, NAN], dtype=np.float32))
    np.testing.assert_array_equal(small.of(Head.of(0, 1, "encoder")), [-1, -1, -1])
    for absent in ("L4H1", "L4H2", "L3H0", "vision.L0H0"):
        with pytest.raises(InputError, match=f"{absent} has no scores here"):
            small.of(absent)


def test_ranked_is_descending_with_ties_in_canonical_order(small):
    assert [(each.head.label, each.score) for each in small.ranked()] == [
        ("L4H0", 5.0),
        ("L2H1", 3.0),
        ("L2H0", 2.0),
        ("encoder.L0H0", 2.0),
        ("encoder.L0H1", -1.0),
    ]
    assert small.top_scores(1) == (ScoredHead(Head.of(4, 0), 5.0, pytest.approx(3**-0.5)),)
    assert small.top(3).labels == ("L2H0", "L2H1", "L4H0")
    assert small.top(1, stack="encoder").labels == ("encoder.L0H0",)
    assert small.top(5) == small.heads
    all_equal = scores_of(np.ones((2, 3, 4)))
    assert all_equal.top(5).labels == ("L0H0", "L0H1", "L0H2", "L0H3", "L1H0")


def test_thresholds_are_strict(small):
    assert small.above(2.0).labels == ("L2H1", "L4H0")
    assert small.below(2.0).labels == ("encoder.L0H1",)
    assert small.above(2.0, stack="encoder") == HeadSet()
    assert small.quantile(0.5) == 2.0
    assert small.quantile(0.75, stack="main") == 4.0
    assert small.above(small.quantile(0.75)).labels == ("L4H0",)


def test_select_keeps_the_order_asked_for(small):
    chosen = small.select(["c", "a"])
    assert chosen.item_ids == ("c", "a")
    np.testing.assert_array_equal(chosen.of("L2H0"), [3, 1])
    assert chosen.mean()["main"][0, 1] == 2.0
    assert chosen.provenance == small.provenance


def test_long_table(small):
    table = small.to_pandas()
    assert list(table.columns) == ["item", "stack", "layer", "call", "head", "label", "score"]
    assert len(table) == 3 * 5
    assert table.iloc[7].tolist() == ["b", "main", 4, 0, 0, "L4H0", 5.0]
    assert table.score.isna().sum() == 1
    means = table.groupby("label").score.mean()
    assert means.to_dict() == {each.head.label: each.score for each in small.ranked()}


def test_repr_names_method_and_shapes_only(small):
    assert repr(small) == "HeadScores(retrieval: 3 items; main 2 sites x 2, encoder 1 sites x 2)"


def test_scores_cannot_be_changed_from_outside():
    values = np.zeros((2, 1, 2))
    scores = scores_of(values)
    values[:] = 7
    assert scores.mean()["main"].tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="read-only"):
        scores.values["main"][0, 0, 0] = 1


# --- reliability and comparison ---------------------------------------------------------------------------------------


def test_split_half_tells_planted_scores_from_noise():
    generator = np.random.default_rng(0)
    strength, noise = generator.normal(size=(6, 8)), generator.normal(size=(64, 6, 8))
    planted, none = scores_of(strength + noise).split_half(seed=1), scores_of(noise).split_half(seed=1)
    # Halves of 32 items: reliability 1 / (1 + 1/32) = 0.970, of all 64: 0.985; ranks cost a little.
    assert planted.correlation == pytest.approx(0.97, abs=0.03)
    assert planted.corrected == pytest.approx(2 * planted.correlation / (1 + planted.correlation))
    assert abs(none.correlation) < 0.2
    assert (planted.n_heads, planted.n_items, planted.splits, planted.undefined) == (48, 64, 100, 0)


def test_spearman_brown_estimates_the_reliability_of_twice_the_items():
    generator = np.random.default_rng(5)
    strength = 0.15 * generator.normal(size=(20, 20))
    all_items = scores_of(strength + generator.normal(size=(200, 20, 20)))
    half = all_items.select(all_items.item_ids[:100]).split_half(seed=2)
    whole = all_items.split_half(seed=2)
    assert half.corrected == pytest.approx(whole.correlation, abs=0.06)
    assert half.correlation < whole.correlation - 0.08


def test_split_half_of_two_items_is_their_rank_correlation():
    values = np.random.default_rng(1).normal(size=(2, 3, 4))
    expected = stats.spearmanr(values[0].ravel(), values[1].ravel()).statistic
    assert scores_of(values).split_half(seed=0, splits=5).correlation == pytest.approx(expected)


def test_split_half_is_repeatable_and_copes_with_gaps_and_constants():
    generator = np.random.default_rng(2)
    values = generator.normal(size=(10, 2, 4))
    values[:, 1, 3] = NAN
    values[:9, 0, 0] = NAN
    scores = scores_of(values)
    assert scores.split_half(seed=4) == scores.split_half(seed=4) != scores.split_half(seed=5)
    assert scores.split_half(seed=4).n_heads == 7
    constant = scores_of(np.ones((4, 1, 5))).split_half(seed=0, splits=7)
    assert np.isnan(constant.correlation)
    assert np.isnan(constant.corrected)
    assert constant.undefined == 7


def test_a_negative_split_half_is_not_corrected():
    opposed = np.stack([np.arange(5.0), -np.arange(5.0)])[:, None, :]
    result = scores_of(opposed).split_half(seed=0, splits=3)
    assert result.correlation == result.corrected == pytest.approx(-1.0)


def test_comparison_joins_items_and_heads():
    # On the common items b, c the heads of the left have the means 1, 2, 3, 4; item a would reverse them.
    left = scores_of([[[90, 50, 30, 10]], [[1, 2, 3, 4]], [[1, 2, 3, 4]]], items=["a", "b", "c"])
    right = scores_of([[[1, 3, 2, 4]], [[1, 3, 2, 4]], [[9, 0, 0, 0]]], items=["c", "b", "z"])
    result = left.compare(right, k=2)
    assert (result.n_items, result.n_heads, result.k) == (2, 4, 2)
    assert result.spearman == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert result.kendall == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert result.jaccard == pytest.approx(1 / 3)  # {2, 3} and {1, 3}
    # Of 6 draws one shares both heads, four share one, one none: (1 + 4/3) / 6
    assert result.jaccard_by_chance == pytest.approx((1 + 4 / 3) / 6)
    assert right.compare(left, k=2) == result


def test_comparison_takes_a_heads_mean_over_items_that_both_score():
    left = scores_of([[[1.0, 2.0, 3.0]], [[99.0, 2.0, 3.0]]])
    right = scores_of([[[1.0, 2.0, 3.0]], [[NAN, 2.0, 3.0]]])
    assert left.compare(right, k=1).spearman == pytest.approx(1.0)
    nowhere_together = scores_of([[[NAN, 2.0, 3.0]], [[1.0, 2.0, 3.0]]]).compare(right, k=1)
    assert nowhere_together.n_heads == 2


def test_comparison_without_common_items_says_so():
    left = scores_of([[[1.0, 2.0, 3.0]]], items=["a"])
    right = scores_of([[[1.0, 5.0, 3.0, 9.0]], [[1.0, 5.0, 3.0, 9.0]]], items=["x", "y"])
    result = left.compare(right, k=1)
    assert (result.n_items, result.n_heads, result.jaccard) == (0, 3, 0.0)
    assert result.spearman == pytest.approx(0.5)


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_saved_scores_come_back_bit_for_bit(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(dtype)
    values[0, 1, 3], values[1, 0, 0] = NAN, -0.0
    scores = scores_of(values, stack="encoder", layers=[1, 5], items=["a", "β", 'c "quoted"'])
    scores.save(tmp_path / "new" / "folder")
    loaded = HeadScores.load(tmp_path / "new" / "folder")
    assert loaded.values["encoder"].dtype == dtype
    assert loaded.values["encoder"].tobytes() == values.tobytes()
    assert (loaded.sites, loaded.item_ids, loaded.provenance) == (scores.sites, scores.item_ids, scores.provenance)


def test_the_files_are_read_without_this_library(small, tmp_path):
    small.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["scores.json", "scores.safetensors"]
    description = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert description["format_version"] == 1
    assert description["sites"] == {"main": ["L2", "L4"], "encoder": ["encoder.L0"]}
    assert description["item_ids"] == ["a", "b", "c"]
    assert description["provenance"]["model"] == "gpt2"
    tensors = load_file(tmp_path / description["tensors"]["file"])
    np.testing.assert_array_equal(tensors["main"], small.values["main"])


def test_a_save_cut_off_in_the_middle_is_noticed_and_leaves_no_litter(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    real_replace = os.replace

    def dies_before_json(source, target):
        if str(target).endswith(".json"):
            raise OSError("killed")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", dies_before_json)
    with pytest.raises(OSError, match="killed"):
        small.select(["b"]).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["scores.json", "scores.safetensors"]
    with pytest.raises(InputError, match=r"scores\.safetensors is not the file that scores\.json names"):
        HeadScores.load(tmp_path)


def edit_json(folder, **changes):
    path = folder / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "scores.json").unlink(), "holds no saved scores"),
        (lambda folder: (folder / "scores.safetensors").unlink(), "holds no saved scores"),
        (lambda folder: (folder / "scores.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "scores.json").write_text("[]"), "does not describe headwise scores"),
        (lambda folder: edit_json(folder, format_version=2), "format_version 2, this headwise reads 1"),
        (lambda folder: edit_json(folder, item_ids=["a"]), "has the shape"),
        (lambda folder: edit_json(folder, sites={"main": ["L2", "L4"]}), "values has the stacks"),
        (lambda folder: edit_json(folder, tensors={}), "damaged scores"),
        (lambda folder: edit_json(folder, provenance={"method": "x"}), "provenance has the fields"),
    ],
)
def test_damaged_files_are_one_clear_line(small, tmp_path, damage, message):
    small.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        HeadScores.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_provenance_round_trip():
    assert Provenance.from_dict(json.loads(json.dumps(MADE_BY.to_dict()))) == MADE_BY
    assert {"python", "torch", "transformers", "numpy"} <= set(MADE_BY.versions)
    assert MADE_BY.versions["numpy"] == np.__version__
    assert Provenance("x", settings={"layers": (1, 2), 3: None}).settings == {"layers": [1, 2], "3": None}
    assert replace(MADE_BY, seed=1) != MADE_BY
    for unwritable in ({"a": object()}, {"a": NAN}):
        with pytest.raises(InputError, match="are not JSON"):
            Provenance("x", settings=unwritable)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: scores_of(np.zeros((2, 3))[None, :, :, None]), "has the shape"),
        (lambda s: scores_of(np.zeros((2, 3, 4)), layers=[0, 1]), r"shape \(2, 3, 4\); expected .* = \(2, 2, any\)"),
        (lambda s: scores_of(np.zeros((2, 3, 0))), "has the shape"),
        (lambda s: scores_of(np.zeros((1, 2, 2)), layers=[1, 0]), "in ascending order"),
        (lambda s: scores_of(np.zeros((1, 2, 2)), layers=[1, 1]), "L1 more than once"),
        (lambda s: scores_of(np.zeros((2, 1, 1)), items=["a", "a"]), "item_ids holds 'a' more than once"),
        (lambda s: scores_of(np.zeros((2, 1, 1)), items=[1, 2]), "must be strings"),
        (lambda s: scores_of(np.zeros((0, 1, 1))), "scores need items"),
        (lambda s: scores_of([[["high"]]]), "has the dtype"),
        (lambda s: scores_of([[[0.0, np.inf]]]), "score of L0H1 on item 'item-0' is infinite"),
        (lambda s: HeadScores(s.values, {"main": s.sites["main"]}, s.item_ids, MADE_BY), "values has the stacks"),
        (lambda s: HeadScores({"main": s.values["encoder"]}, {"main": s.sites["encoder"]}, "abc", MADE_BY), "SiteIds"),
        (lambda s: s.top(6), "k=6 heads cannot be chosen; 5 heads have a score"),
        (lambda s: s.top(0), "k=0"),
        (lambda s: s.top(4, stack="main"), "3 heads have a score"),
        (lambda s: s.top(1, stack="vision"), "stack='vision' has no scores here; use 'main' or 'encoder'"),
        (lambda s: s.quantile(1.5), "q=1.5"),
        (lambda s: s.select(["a", "q"]), "items 'q' are not among the 3 items"),
        (lambda s: s.select([]), "scores need items"),
        (lambda s: s.select(["a", "a"]), "more than once"),
        (lambda s: s.select("a").split_half(seed=0), "1 items"),
        (lambda s: s.split_half(seed=0, splits=0), "splits=0"),
        (lambda s: s.split_half(seed=0, stack="encoder"), "2 scored heads"),
        (lambda s: s.compare(scores_of(np.ones((1, 1, 1)), layers=[9]), k=1), "no head is scored in both"),
        (lambda s: s.compare(s, k=6), "k=6 is out of range; 5 heads"),
    ],
)
def test_a_mistake_is_named_in_one_line(small, make, message):
    with pytest.raises(InputError, match=message) as caught:
        make(small)
    assert "\n" not in str(caught.value)


# --- the picture ------------------------------------------------------------------------------------------------------


def cells_of(scores: HeadScores) -> dict[str, str]:
    """Colour of each cell by the head's label, read from the hover text."""
    page = ElementTree.fromstring(scores._repr_html_())
    rects = [rect for rect in page.iter("rect") if rect.find("title") is not None]
    return {rect.find("title").text.split(":")[0]: rect.get("fill") for rect in rects}


def test_the_heat_map_is_self_contained_and_leaves_absent_heads_blank(small):
    page = small._repr_html_()
    ElementTree.fromstring(page)
    assert not re.search(r"<script|https?:|url\(| id=", page)
    assert "retrieval · gpt2 · needle · mean over 3 items" in page
    assert "<title>L2H1: 3 ± 1 (n=2)</title>" in page
    assert 'fill="currentColor"' in page
    assert tuple(cells_of(small)) == small.heads.labels


def test_colours_diverge_around_zero_only_when_signs_differ():
    # The scale is symmetric, -2 to 2: -1 is the second stop of five, 0 the third, 0.5 half-way to the fourth.
    assert list(cells_of(scores_of([[[-1.0, 0.0, 0.5, 2.0]]])).values()) == ["#92c5de", "#e8e8e8", "#eec6b5", "#b2182b"]
    assert list(cells_of(scores_of([[[1.0, 2.0, 3.0]]])).values()) == ["#440154", "#21918c", "#fde725"]
    assert list(cells_of(scores_of([[[-3.0, -1.0]]])).values()) == ["#440154", "#fde725"]
    assert list(cells_of(scores_of([[[4.0, 4.0]]])).values()) == ["#21918c", "#21918c"]


def test_names_are_escaped_and_nothing_scored_is_said():
    scores = scores_of([[[NAN]]], made_by=Provenance("<b>", model="a&b"))
    assert "&lt;b&gt; · a&amp;b" in scores._repr_html_()
    assert "no scores" in scores._repr_html_()
    assert scores.heads == HeadSet()


def test_the_version_of_headwise_is_that_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from its source it is not installed, or another version of it is."""

    def version(package: str) -> str:
        if package == "headwise":
            raise metadata.PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(headwise, "__version__", "7.0")
    assert Provenance.versions_now()["headwise"] == "7.0"
    assert Provenance.versions_now()["torch"] == "1.2.3"
