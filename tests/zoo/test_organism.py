"""The trained organism as it ships: it loads without a network, and it has the behaviours that its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.benches import organism as bench
from headwise.zoo.organism import CHECKPOINT

FIGURES = json.loads((CHECKPOINT / "figures.json").read_text())


@pytest.fixture(scope="module")
def model():
    with hw.load("zoo:organism") as model:
        yield model


def test_it_is_small_and_of_the_shape_it_says(model) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir() if path.is_file()) < 12e6
    assert [site.n_heads for site in model.sites] == [12] * 6
    assert {site.n_kv_heads for site in model.sites} == {6}
    assert model.model.config.max_position_embeddings == 1024
    assert model.tokenizer.model_max_length == 1024


def test_its_weights_are_bfloat16_and_it_has_no_other_seed() -> None:
    assert zoo.build("organism", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(hw.InputError, match="no seed 3"):
        zoo.build("organism", seed=3)
    with pytest.raises(hw.InputError, match="attn='nonsense'"):
        zoo.build("organism", attn="nonsense")


def test_the_doctor_passes(model) -> None:
    assert model.doctor().passed


@pytest.mark.parametrize("behaviour", sorted(bench.BEHAVIOURS))
def test_it_answers_as_its_card_says(model, behaviour: str) -> None:
    share = bench._share(model, bench.BEHAVIOURS[behaviour](), 60, seed=1)
    assert share == pytest.approx(FIGURES[f"{behaviour}.accuracy"], abs=0.12)


@pytest.mark.parametrize(("words", "depth"), [(40, 0.0), (200, 0.5), (400, 1.0)])
def test_it_finds_needles(model, words: int, depth: float) -> None:
    assert bench._share(model, hw.probe("needle").over(words=words, depth=depth), 60, seed=1) > 0.9


def test_every_behaviour_is_at_least_95_percent_right() -> None:
    assert {name: share for name, share in FIGURES.items() if name.endswith(".accuracy") and share < 0.95} == {}
    assert FIGURES["needle.worst"] >= 0.949  # of 20 items in each cell of length and depth


def test_the_card_has_the_figures() -> None:
    card = (CHECKPOINT / "README.md").read_text()
    for name, share in FIGURES.items():
        if name.endswith(".accuracy"):
            assert f"| {name.removesuffix('.accuracy')} | {share:.3f} |" in card


@pytest.mark.prove
def test_the_figures_are_those_of_the_bench() -> None:
    found = bench.measure()
    assert found.keys() == FIGURES.keys()
    for name, value in FIGURES.items():
        assert found[name] == pytest.approx(value, abs=0.02), name


def test_nothing_of_it_lies_outside_of_the_package() -> None:
    assert Path(zoo.__file__).parent in CHECKPOINT.parents
