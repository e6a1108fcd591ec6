"""The parts of the table: their quantities by hand, their controls, and that they run on a model that sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.benches.looking import PARTS, hallucinating
from headwise.benches.looking.hallucinating import EDITS, OF_ANSWERS, OF_LISTINGS
from headwise.benches.looking.items import Bench, Sizes
from headwise.benches.looking.pruned import RandomPruning
from headwise.model.attached import AttachedModel
from headwise.use.hallucination import Answers, Listings

TINY = Sizes(verdicts=4, questions=4, lists=2, clear=2, crossed=4, captions=2, pruned=2, controls=2, verdict_controls=2)


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as model:
        yield model


def test_shares_of_answers_are_those_of_hallucination() -> None:
    draw = torch.Generator().manual_seed(0)
    there, yes = (torch.rand(20, generator=draw) < 0.5 for _ in range(2))
    found = Answers(there, yes)
    of = {name: share(found).value for name, (share, _) in OF_ANSWERS.items()}
    assert of == pytest.approx({"accuracy": found.accuracy, "false yes": found.false_yes_rate})


def test_shares_of_listings_are_those_of_hallucination() -> None:
    there = tuple(map(frozenset, ({"star", "ring"}, {"cross"}, {"heart", "star", "ring"})))
    named = tuple(map(frozenset, ({"star"}, {"cross", "heart", "ring"}, set[str]())))
    found = Listings(("", "", ""), there, named)
    of = {name: share(found).value for name, (share, _) in OF_LISTINGS.items()}
    assert of == pytest.approx({"CHAIR_i": 2 / 4, "CHAIR_s": 1 / 3, "recall": 2 / 6})
    assert of == pytest.approx({"CHAIR_i": found.chair_i, "CHAIR_s": found.chair_s, "recall": found.recall})


def test_random_halves_have_half_of_every_layer(llava: AttachedModel) -> None:
    halves = [hallucinating._half(llava, str(seed)) for seed in range(6)]
    for half in halves:
        for site in llava.sites:
            if site.id.stack == llava.table.stacks[0]:
                assert sum(head.site == site.id for head in half) == site.n_heads // 2
    assert len(set(halves)) > 1


def test_dealt_weights_stay_in_their_layer() -> None:
    weights = {f"L{layer}H{head}": float(10 * layer + head) for layer in range(3) for head in range(6)}
    dealt = hallucinating._dealt(weights, Random(0))
    assert dealt != weights
    assert dealt.keys() == weights.keys()
    for layer in range(3):
        labels = [f"L{layer}H{head}" for head in range(6)]
        assert Counter(dealt[label] for label in labels) == Counter(weights[label] for label in labels)


def test_random_pruning_keeps_as_many_tokens_of_each_group(llava: AttachedModel) -> None:
    site = next(site for site in llava.sites if site.id.stack == llava.table.stacks[0])
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 1:9], image[1, 3:9] = True, True
    frame = SimpleNamespace(span=lambda name: image, mask=torch.ones_like(image))
    here: Any = SimpleNamespace(window=SimpleNamespace(key_frame=frame, keys=lambda marked: marked))
    row = torch.rand(2, site.n_heads, 12)
    dropped = RandomPruning(0.5)._dropped(site, row, here)
    assert dropped.sum(-1).tolist() == [[4] * site.n_heads, [3] * site.n_heads]
    assert not (dropped & ~image[:, None]).any()
    assert torch.equal(dropped, RandomPruning(0.5)._dropped(site, torch.rand_like(row), here))
    assert not torch.equal(dropped, RandomPruning(0.5, seed=1)._dropped(site, row, here))


@pytest.mark.parametrize("name", ["VHR", "PAINT", "PAINT by head"])
def test_controls_are_the_same_edit_on_other_heads(llava: AttachedModel, name: str) -> None:
    edit = EDITS[name](Bench(llava, sizes=TINY))
    controls = edit.controls(edit.paper)
    assert len(controls) == (0 if name == "PAINT" else TINY.controls)
    own = edit.made(edit.paper)
    for each in controls:
        assert each.edits(llava)
        if name == "VHR":
            assert each.settings["factor"] == own.settings["alpha"]
            assert each.settings["scope"] == own.settings["scope"]
        else:
            assert each.acts_on == own.acts_on
            assert each.settings["alpha"] == own.settings["alpha"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs(llava: AttachedModel, part: str) -> None:
    """The model has learnt nothing, so verdicts are refused, and nothing is made of the numbers."""
    rows = PARTS[part].rows(Bench(llava, sizes=TINY))
    assert rows
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.refused or row.items for row in rows)
    if part == "verdicts":
        assert all(row.refused for row in rows)
