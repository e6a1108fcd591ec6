"""Relevance of predicates, against patterns that follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find.towers import PREDICATES, Grid, Places, predicate_relevance
from headwise.model.attached import AttachedModel

Pictures = Callable[[int, int], Tensor]


def test_a_head_that_looks_at_the_next_token(looking: Any) -> None:
    """(T - 1) / T: the last token has none; its row is equal over all keys."""
    pattern = torch.zeros(28, 28)
    pattern[torch.arange(27), torch.arange(1, 28)] = 1
    pattern[27] = 1 / 28
    with hw.load("zoo:tiny-whisper") as whisper, looking(whisper, "encoder.L1H3", pattern):
        sound = whisper.example["input_features"]
        following = predicate_relevance(whisper, sound, "next")
        before = predicate_relevance(whisper, sound, "previous")
    assert following.of("encoder.L1H3") == pytest.approx(27 / 28)
    assert before.of("encoder.L1H3") == pytest.approx(1 / 28 / 28)
    assert following.top(1).heads[0].label == "encoder.L1H3"


def test_the_predicates_of_a_picture(vit: AttachedModel, pictures: Pictures) -> None:
    with vit.editing(hw.edit.uniform(vit.heads())):
        shares = {
            name: float(predicate_relevance(vit, pictures(1, 24), name).of("L0H0")[0])
            for name in PREDICATES
            if name != "matching"
        }
    pairs = {"same-cell": 36, "same-row": 216, "same-column": 216, "previous": 35, "next": 35, "neighbour": 220}
    assert shares == pytest.approx({name: count / 36 / 37 for name, count in pairs.items()}, abs=1e-6)


def test_matching_is_the_same_word_elsewhere() -> None:
    ids = torch.tensor([[5, 6, 5, 7]])
    places = Places(Grid(1, 4), torch.ones(1, 4, dtype=torch.bool), ids)
    found = PREDICATES["matching"](places)
    assert found.nonzero().tolist() == [[0, 0, 2], [0, 2, 0]]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("predicate", ["matching", "previous"])
def test_padding_is_in_no_sum(name: str, predicate: str) -> None:
    """The shorter row by itself, and in a batch where it is padded: on the left, on the right."""
    with hw.load(f"zoo:tiny-{name}") as model:
        given = {key: model.example[key] for key in ("input_ids", "attention_mask")}
        whole = predicate_relevance(model, given, predicate)
        row = given["attention_mask"][1].bool()
        alone = predicate_relevance(model, {key: value[1:, row] for key, value in given.items()}, predicate)
        with torch.no_grad(), model.reading(hw.read.rows("L1H2")) as got:
            model(input_ids=given["input_ids"][1:, row], attention_mask=given["attention_mask"][1:, row])
        pattern, ids = got.rows["L1"][0, 0], given["input_ids"][1, row].tolist()
    assert float(whole.of("L1H2")[1]) == pytest.approx(float(alone.of("L1H2")[0]), abs=1e-5)
    wanted = 0.0
    for query in range(len(ids)):
        for key in range(len(ids)):
            same = ids[query] == ids[key] and query != key if predicate == "matching" else key == query - 1
            wanted += float(pattern[query, key]) * same / len(ids)
    assert float(alone.of("L1H2")[0]) == pytest.approx(wanted, abs=1e-6)


def test_a_predicate_of_ones_own(vit: AttachedModel, pictures: Pictures, looking: Any) -> None:
    def corner(places: Places) -> Tensor:
        return (torch.arange(len(places.grid)) == 35).expand(36, 36)

    pattern = torch.zeros(37, 37)
    pattern[:, 36] = 1
    with looking(vit, "L2H0", pattern):
        found = predicate_relevance(vit, pictures(2, 24), corner)
    assert found.of("L2H0").tolist() == [1, 1]
    assert found.provenance.settings["predicate"] == "corner"


def test_what_is_no_predicate(vit: AttachedModel, pictures: Pictures) -> None:
    with pytest.raises(InputError, match="no predicate 'left'; choose one of: matching, previous"):
        predicate_relevance(vit, pictures(1, 24), "left")
    with pytest.raises(InputError, match="compares token ids, and patches have none"):
        predicate_relevance(vit, pictures(1, 24), "matching")
