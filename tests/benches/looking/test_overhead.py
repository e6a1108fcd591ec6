"""What is counted and timed in generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.benches.looking.overhead import QUESTION, WAYS, Size, counted, random_llava, ratios
from headwise.model.attached import AttachedModel

SMALL = Size(
    layers=4, heads=4, kv_heads=2, width=32, feed_forward=48, vocabulary=97, side=16, tower_layers=2, tower_width=48
)

Built = tuple[AttachedModel, Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    network, inputs = random_llava(SMALL)
    with hw.attach(network, example=dict(inputs)) as model:
        yield model, inputs


def test_vhr_runs_the_prompt_once_more_without_its_picture(built: Built) -> None:
    model, inputs = built
    prompt = 1 + SMALL.patches + QUESTION
    assert inputs["input_ids"].shape == (1, prompt)
    assert counted(model, inputs, 5, None) == [prompt, 1, 1, 1, 1]
    assert sorted(counted(model, inputs, 5, WAYS["vhr"])) == sorted([prompt - SMALL.patches, prompt, 1, 1, 1, 1])


def test_the_same_weights_for_the_same_seed(built: Built) -> None:
    state = torch.random.get_rng_state()
    network, inputs = random_llava(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, built[1][name]) for name, value in inputs.items())
    own = dict(built[0].model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in network.named_parameters())


def test_every_way_has_its_figures(built: Built) -> None:
    figures = ratios(*built, new_tokens=3, turns=2)
    assert figures.keys() == {f"{way}.{part}" for way in (*WAYS, "noise") for part in ("first", "later")} | {
        "vhr.forwards",
        "vhr.tokens",
    }
    assert figures["vhr.forwards"] == 1
    assert figures["vhr.tokens"] == pytest.approx((1 + QUESTION) / (1 + SMALL.patches + QUESTION))
    assert all(value > 0 for value in figures.values())
