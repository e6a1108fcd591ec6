"""Inputs of towers and their grids: what fits, what is filled in, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.catalogue import entries
from headwise.errors import InputError, Refusal
from headwise.find import method
from headwise.find.towers import METHODS, Grid, pattern_families, spatial_profile
from headwise.find.towers.tower import Inputs, grid_of, sites_of, stacked
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel


def test_hops_and_distances_of_a_grid() -> None:
    grid = Grid(2, 3, before=1)
    assert (len(grid), grid.steps) == (6, 3)
    assert grid.cells[4].tolist() == [1, 1]
    assert grid.hops[0].tolist() == [0, 1, 2, 1, 1, 2]
    assert grid.distances[0, 5] == pytest.approx(5**0.5)
    assert grid.offsets[4, 0].tolist() == [-1, -1]
    assert grid.within(torch.arange(49.0).reshape(1, 1, 7, 7))[0, 0, 0, 0] == 8


def test_tokens_that_stand_nowhere_come_first() -> None:
    assert grid_of((6, 6), 39) == Grid(6, 6, 3)
    with pytest.raises(InputError, match="6 x 6 cells does not fit 35 tokens"):
        grid_of((6, 6), 35)


def test_text_is_added_for_towers_that_stand_beside_one(pictures: Callable[[int, int], Tensor]) -> None:
    with hw.load("zoo:tiny-clip") as clip:
        inputs = Inputs.of(clip, pictures(5, 24))
        assert list(inputs.of_items) == ["pixel_values"]
        assert len(inputs.shared["input_ids"]) == 2
        assert sites_of(clip)[0].label == "vision.L0"
        assert len(spatial_profile(clip, pictures(5, 24), batch=2).distance.item_ids) == 5


def test_every_picture_of_a_language_model_gets_a_prompt(pictures: Callable[[int, int], Tensor]) -> None:
    with hw.load("zoo:tiny-llava") as llava:
        inputs = Inputs.of(llava, pictures(3, 16))
        assert inputs.of_items["input_ids"].shape == (3, 50)
        assert not inputs.shared
        found = spatial_profile(llava, pictures(3, 16))
        assert found.grid == Grid(4, 4, 1)
        assert found.sites[0] == SiteId.parse("vision.L0")


def test_a_tower_that_packs_its_pictures_is_refused() -> None:
    with hw.load("zoo:tiny-qwen2_vl") as qwen:
        given = {name: value for name, value in qwen.example.items() if len(value) == 2}
        beside = {name: value for name, value in qwen.example.items() if len(value) != 2}
        with pytest.raises(Refusal, match="windows or packs them"):
            spatial_profile(qwen, given, beside=beside)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"stack": "sound"}, "no stack 'sound'; it has main"),
        ({"grid": (9, 9)}, "9 x 9 cells does not fit 37 tokens"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_what_cannot_be_is_one_line(
    vit: AttachedModel, pictures: Callable[[int, int], Tensor], keywords: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        pattern_families(vit, pictures(2, 24), **keywords)  # type: ignore[arg-type]


def test_inputs_without_items_or_of_different_length(
    vit: AttachedModel, pictures: Callable[[int, int], Tensor]
) -> None:
    for given in ({}, {"pixel_values": pictures(0, 24)}, {"pixel_values": pictures(2, 24), "labels": torch.zeros(3)}):
        with pytest.raises(InputError, match="one row per item"):
            spatial_profile(vit, given)
    with pytest.raises(InputError, match="takes an attached model"):
        spatial_profile(vit.model, pictures(1, 24))  # type: ignore[arg-type]


def test_a_model_of_text_has_no_pictures(pictures: Callable[[int, int], Tensor]) -> None:
    with hw.load("zoo:tiny-llama") as llama, pytest.raises(InputError, match="give its inputs as a mapping"):
        spatial_profile(llama, pictures(1, 24))


def test_sites_with_fewer_heads_are_filled_up() -> None:
    values = {SiteId.parse("L1"): torch.ones(2, 1), SiteId.parse("L0"): torch.zeros(2, 3)}
    found = stacked(values)
    assert found.shape == (2, 2, 3)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1, 0] == 1
    assert bool(found[0, 1, 1:].isnan().all())


@pytest.mark.parametrize("listed", METHODS, ids=lambda each: each.id)
def test_they_are_listed_and_find_names_their_call(listed: object) -> None:
    assert listed in entries("methods")
    id: str = listed.id
    call: str = listed.call  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match=rf"{id}' takes no items of a probe.*in Python call headwise\.find\.towers"):
        method(id)
    path, _, name = call.partition("(")[0].rpartition(".")
    assert callable(getattr(__import__(path, fromlist=[name]), name))
