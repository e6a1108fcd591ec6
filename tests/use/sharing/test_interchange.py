"""Files of Retrieval_Head and DuoAttention: written as theirs are, read back bit for bit, refused where off."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headwise as hw
from headwise.errors import InputError
from headwise.heads import HeadSet, SiteId
from headwise.scores import HeadScores, Provenance
from headwise.use.sharing.interchange import (
    DuoPattern,
    read_duo_attention,
    read_retrieval_head,
    write_duo_attention,
    write_retrieval_head,
)


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


def shape() -> tuple[int, int, int]:
    """Layers, heads, KV groups."""
    sites = llama().sites
    return len(sites), sites[0].n_heads, sites[0].n_kv_heads


def scores(trials: int = 3) -> HeadScores:
    layers, heads, _ = shape()
    values = np.random.default_rng(0).random((trials, layers, heads)) * 1.2
    sites = tuple(SiteId(layer=layer) for layer in range(layers))
    return HeadScores(
        {"main": values}, {"main": sites}, tuple(f"trial-{n}" for n in range(trials)), Provenance("retrieval")
    )


def test_the_model_has_groups_of_several_heads() -> None:
    assert shape()[1] > shape()[2] > 1


# -- Retrieval_Head -------------------------------------------------------------------------------------------------


def test_scores_go_there_and_back(tmp_path: Path) -> None:
    write_retrieval_head(scores(), tmp_path / "scores.json")
    form = json.loads((tmp_path / "scores.json").read_text())
    layers, heads, _ = shape()
    assert list(form) == [f"{layer}-{head}" for layer in range(layers) for head in range(heads)]
    assert form["1-2"] == scores().of("L1H2").tolist()
    found = read_retrieval_head(tmp_path / "scores.json", llama())
    assert np.array_equal(found.values["main"], scores().values["main"])
    assert found.item_ids == scores().item_ids
    assert found.top(3) == scores().top(3)


def test_a_file_as_they_write_it_is_read(tmp_path: Path) -> None:
    """Whole numbers among the scores, scores above 1, and no order of heads."""
    (tmp_path / "theirs.json").write_text('{"1-0": [0, 1.003], "0-1": [0, 0], "0-0": [0.25, 0.75], "1-1": [1, 0]}')
    found = read_retrieval_head(tmp_path / "theirs.json")
    assert found.of("L1H0").tolist() == [0, 1.003]
    assert found.of("L0H0").mean() == 0.5
    assert found.top(1) == HeadSet.parse("L1H0")


def test_layers_of_unequal_width_and_without_attention(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"0-0": [1], "2-0": [2], "2-1": [3]}')
    found = read_retrieval_head(tmp_path / "odd.json")
    assert found.heads == HeadSet.parse("L0H0, L2H0, L2H1")
    write_retrieval_head(found, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == {"0-0": [1], "2-0": [2], "2-1": [3]}


WRONG_SCORES: dict[str, tuple[str, str]] = {
    "ragged": ('{"0-0": [1, 2], "0-1": [1]}', "from 1 to 2 scores"),
    "empty": ("{}", "holds no scores"),
    "no trials": ('{"0-0": []}', "from 0 to 0 scores"),
    "a list": ("[1, 2]", "holds no scores"),
    "half": ('{"0-0": [1', "is not JSON"),
    "negative": ('{"0-0": [1, 2], "0-1": [1, -0.5]}', "L0H1 has the score -0.5"),
    "not finite": ('{"0-0": [Infinity]}', "scores are finite"),
    "not a number": ('{"0-0": ["1"]}', "'0-0' is no entry"),
    "true": ('{"0-0": [true]}', "'0-0' is no entry"),
    "another key": ('{"L0H0": [1]}', "'L0H0' is no entry"),
    "a head left out": ('{"0-0": [1], "0-2": [1]}', "lacks heads of L0"),
}


@pytest.mark.parametrize("wrong", WRONG_SCORES)
def test_wrong_scores_are_refused(wrong: str, tmp_path: Path) -> None:
    text, message = WRONG_SCORES[wrong]
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_retrieval_head(tmp_path / "wrong.json")
    assert "\n" not in str(error.value)


def test_scores_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_retrieval_head(scores(), tmp_path / "scores.json")
    form = json.loads((tmp_path / "scores.json").read_text())
    layers, heads, _ = shape()
    more = {**form, f"{layers}-0": [0, 0, 0]}
    fewer = {key: value for key, value in form.items() if key != f"0-{heads - 1}"}
    for changed, odd in ((more, f"L{layers}H0"), (fewer, f"L0H{heads - 1}")):
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=f"is not of zoo:tiny-llama: {odd}"):
            read_retrieval_head(tmp_path / "changed.json", llama())
    with pytest.raises(InputError, match="cannot be read"):
        read_retrieval_head(tmp_path / "nowhere.json")


def test_trials_that_do_not_count_are_left_out_and_half_trials_refused(tmp_path: Path) -> None:
    values = scores().values["main"].copy()
    values[1] = np.nan
    uncounted = HeadScores({"main": values}, scores().sites, scores().item_ids, scores().provenance)
    write_retrieval_head(uncounted, tmp_path / "scores.json")
    assert np.array_equal(read_retrieval_head(tmp_path / "scores.json").values["main"], values[[0, 2]])
    values[0, 1, 1] = np.nan
    half = HeadScores({"main": values}, scores().sites, scores().item_ids, scores().provenance)
    with pytest.raises(InputError, match="on 'trial-0' only some heads"):
        write_retrieval_head(half, tmp_path / "half.json")
    below = HeadScores({"main": -scores().values["main"]}, scores().sites, scores().item_ids, scores().provenance)
    with pytest.raises(InputError, match="are 0 or more"):
        write_retrieval_head(below, tmp_path / "below.json")
    other = HeadScores(
        {"encoder": np.ones((1, 1, 2))}, {"encoder": (SiteId(stack="encoder", layer=0),)}, ("a",), Provenance("x")
    )
    with pytest.raises(InputError, match="has one stack of layers"):
        write_retrieval_head(other, tmp_path / "other.json")


# -- DuoAttention ---------------------------------------------------------------------------------------------------


def alpha() -> np.ndarray:
    layers, _, groups = shape()
    return np.random.default_rng(1).random((layers, groups))


def test_a_pattern_goes_there_and_back(tmp_path: Path) -> None:
    write_duo_attention(DuoPattern(alpha(), 64, 512), tmp_path / "pattern")
    table = np.loadtxt(tmp_path / "pattern" / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert np.array_equal(table, alpha()), "as their reader reads it"
    found = read_duo_attention(tmp_path / "pattern", llama())
    assert np.array_equal(found.alpha, alpha())
    assert (found.sink, found.recent) == (64, 512)
    alone = read_duo_attention(tmp_path / "pattern" / "full_attention_heads.tsv")
    assert np.array_equal(alone.alpha, alpha())
    assert (alone.sink, alone.recent) == (128, 256)


def test_gates_a_little_outside_are_clipped_as_theirs_are(tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_text("-9.58e-05\t1.0\n0.5\t1.02\n")
    assert read_duo_attention(tmp_path / "table.tsv").alpha.tolist() == [[0, 1], [0.5, 1]]


def test_what_stays_full_is_the_upper_share_of_groups() -> None:
    pattern = DuoPattern(np.array([[0.9, 0.1], [0.4, 0.6]]))
    assert pattern.full(0.5) == HeadSet.parse("L0G0, L1G1", "group")
    assert pattern.full(0.75) == HeadSet.parse("L0G0", "group")
    assert len(pattern.full(0)) == 4
    assert len(pattern.full(1)) == 0
    assert len(DuoPattern(np.ones((2, 2))).full(0.5)) == 4, "equal gates stay together"
    with pytest.raises(InputError, match="is not a share"):
        pattern.full(2)


def test_a_pattern_as_scores_and_scores_as_a_pattern() -> None:
    """The heads of a group share its gate; a group has that of its best head."""
    _, heads, groups = shape()
    pattern = DuoPattern(alpha(), 64, 512)
    found = pattern.scores(llama())
    for head in range(heads):
        assert found.of(f"L1H{head}").tolist() == [alpha()[1, head // (heads // groups)]]
    assert np.array_equal(DuoPattern.of(found, llama()).alpha, alpha())
    values = found.values["main"].copy()
    values[0, 1, 1] = 1.0
    raised = HeadScores({"main": values}, found.sites, found.item_ids, found.provenance)
    assert DuoPattern.of(raised, llama()).alpha[1, 1 // (heads // groups)] == 1.0


WRONG_TABLES: dict[str, tuple[str, str]] = {
    "ragged": ("1\t0\n1\n", r"rows of \[1, 2\] columns"),
    "empty": ("\n", "rows of"),
    "words": ("1\tone\n", "no number"),
    "out of range": ("1\t1.2\n", "goes from 1 to 1.2"),
    "below range": ("1\t-0.5\n", "goes from -0.5 to 1"),
    "not finite": ("1\tnan\n", "gates are from 0 to 1"),
}


@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_wrong_tables_are_refused(wrong: str, tmp_path: Path) -> None:
    text, message = WRONG_TABLES[wrong]
    (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_duo_attention(tmp_path / "table.tsv")
    assert "\n" not in str(error.value)


def test_a_pattern_of_another_shape_is_refused(tmp_path: Path) -> None:
    layers, heads, groups = shape()
    wrong: list[Callable[[], Any]] = [
        lambda: DuoPattern(np.ones((layers + 1, groups))).scores(llama()),
        lambda: DuoPattern(np.ones((groups, layers + 3))).scores(llama()),
        lambda: DuoPattern(np.ones((layers, heads))).scores(llama()),
    ]
    (tmp_path / "table.tsv").write_text("\t".join(["1"] * heads) + "\n")
    wrong.append(lambda: read_duo_attention(tmp_path / "table.tsv", llama()))
    for ask in wrong:
        with pytest.raises(InputError, match=r"layers of .* KV groups, and zoo:tiny-llama has"):
            ask()
    with pytest.raises(InputError, match="is not of zoo:planted"):
        DuoPattern.of(scores(), hw.load("zoo:planted"))


def test_what_is_no_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="goes from 0 to 2"):
        DuoPattern(np.array([[0.0, 2.0]]))
    with pytest.raises(InputError, match=r"expected \[layer, KV group\]"):
        DuoPattern(np.ones(3))
    with pytest.raises(InputError, match="sink=-1"):
        DuoPattern(np.ones((1, 1)), sink=-1)
    write_duo_attention(DuoPattern(alpha()), tmp_path)
    with pytest.raises(InputError, match="is there already"):
        write_duo_attention(DuoPattern(alpha()), tmp_path)
    (tmp_path / "config.json").write_text('{"sink_size": 1}')
    with pytest.raises(InputError, match="lacks sink_size or recent_size"):
        read_duo_attention(tmp_path)
