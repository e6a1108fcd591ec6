"""Attention strength by distance, against patterns whose profile is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find.towers import Grid, spatial_profile
from headwise.find.towers.pattern_families import centred
from headwise.find.towers.spatial_profile import by_hop
from headwise.model.attached import AttachedModel

Pictures = Callable[[int, int], Tensor]


def ring_sizes(side: int) -> Tensor:
    """`[cell, hop]`, counted one by one."""
    cells = [(row, column) for row in range(side) for column in range(side)]
    sizes = torch.zeros(len(cells), side)
    for query, (row, column) in enumerate(cells):
        for other_row, other_column in cells:
            sizes[query, max(abs(row - other_row), abs(column - other_column))] += 1
    return sizes


def test_a_head_that_looks_at_its_own_patch(vit: AttachedModel, pictures: Pictures, looking: Any) -> None:
    with looking(vit, "L1H2", torch.eye(37)):
        found = spatial_profile(vit, pictures(2, 24))
    assert found.grid == Grid(6, 6, 1)
    assert found.of("L1H2").tolist() == [1, 0, 0, 0, 0, 0]
    assert found.distance.of("L1H2").tolist() == [0, 0]
    assert found.within(0).of("L1H2").tolist() == [1, 1]
    assert found.within(0).of("L0H0").max() < 0.5


def test_equal_attention_is_as_much_as_there_are_cells(vit: AttachedModel, pictures: Pictures) -> None:
    with vit.editing(hw.edit.uniform(vit.heads())):
        found = spatial_profile(vit, pictures(2, 24))
    assert found.of("L2H3") == pytest.approx(ring_sizes(6).mean(0).numpy() / 37, abs=1e-6)
    assert found.per_cell == pytest.approx(1 / 37, abs=1e-6)
    assert found.special == pytest.approx(1 / 37, abs=1e-6)
    cells = np.array([(row, column) for row in range(6) for column in range(6)])
    apart = np.linalg.norm(cells[:, None] - cells[None], axis=-1)
    assert found.distance.of("L2H3") == pytest.approx(apart.mean(), abs=1e-5)


def test_the_patches_next_to_it_weigh_the_more_where_there_are_fewer(
    vit: AttachedModel, pictures: Pictures, looking: Any
) -> None:
    """One cell of every ring of hop 1: strength 1, and per cell 1 over the ring's size."""
    pattern = torch.zeros(37, 37)
    pattern[0, 0] = 1
    for cell in range(36):
        row, column = divmod(cell, 6)
        pattern[1 + cell, 1 + row * 6 + (column + 1 if column < 5 else 4)] = 1
    with looking(vit, "L0H1", pattern):
        found = spatial_profile(vit, pictures(1, 24))
    assert found.of("L0H1").tolist() == [0, 1, 0, 0, 0, 0]
    assert found.per_cell[0, 0, 1, 1] == pytest.approx((1 / ring_sizes(6)[:, 1]).mean())
    assert found.distance.of("L0H1").tolist() == [1]


def test_registers_and_cls_are_told_apart(pictures: Pictures, looking: Any) -> None:
    pattern = torch.zeros(39, 39)
    pattern[:, 2] = 1
    with hw.load("zoo:tiny-dinov2_with_registers") as dino, looking(dino, "L1H0", pattern):
        found = spatial_profile(dino, pictures(2, 24))
    assert found.grid == Grid(6, 6, 3)
    assert found.special[0, 1, 0].tolist() == [0, 0, 1]
    assert found.of("L1H0").sum() == 0
    assert "L1H0" not in found.distance.heads  # nothing on patches, no distance
    total = found.strength.sum(-1) + found.special.sum(-1)
    assert total == pytest.approx(1, abs=1e-5)


def test_siglip_has_patches_alone_and_clip_a_tower_of_fewer_heads(pictures: Pictures) -> None:
    with hw.load("zoo:tiny-siglip") as siglip:
        found = spatial_profile(siglip, pictures(2, 24))
    assert found.grid == Grid(6, 6, 0)
    assert found.strength.shape == (2, 2, 3, 6)
    assert found.strength.sum(-1) == pytest.approx(1, abs=1e-5)


def test_together_and_one_by_one(vit: AttachedModel, pictures: Pictures) -> None:
    whole = spatial_profile(vit, pictures(3, 24))
    alone = [spatial_profile(vit, pictures(3, 24)[item : item + 1]) for item in range(3)]
    assert whole.strength == pytest.approx(np.concatenate([each.strength for each in alone]), abs=1e-6)
    assert whole.distance.of("L1H1") == pytest.approx(
        np.concatenate([each.distance.of("L1H1") for each in alone]), abs=1e-6
    )
    parts = spatial_profile(vit, pictures(3, 24), batch=2)
    assert whole.per_cell == pytest.approx(parts.per_cell, abs=1e-6)


def test_sound_is_a_grid_of_one_row(looking: Any) -> None:
    pattern = torch.zeros(28, 28)
    pattern[torch.arange(28), torch.arange(28).roll(-1)] = 1  # the next frame; the last one looks at the first
    with hw.load("zoo:tiny-whisper") as whisper, looking(whisper, "encoder.L0H1", pattern):
        found = spatial_profile(whisper, whisper.example["input_features"])
        decoder = spatial_profile(whisper, whisper.example["input_features"], stack="main", grid=(1, 9))
    assert found.grid == Grid(1, 28)
    profile = found.of("encoder.L0H1")
    assert (profile[1], profile[27]) == (pytest.approx(27 / 28), pytest.approx(1 / 28))
    assert found.distance.of("encoder.L0H1") == pytest.approx((27 + 27) / 28)
    assert decoder.grid == Grid(1, 9)


def test_the_rings_of_the_centred_map_are_the_profile() -> None:
    """Two ways to the same number."""
    grid = Grid(3, 4)
    pattern = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    maps = centred(pattern, grid)
    row, column = torch.meshgrid(torch.arange(-2, 3), torch.arange(-3, 4), indexing="ij")
    hop = torch.maximum(row.abs(), column.abs())
    rings = torch.stack([maps[:, hop == step].sum(-1) for step in range(4)], dim=-1)
    assert torch.allclose(rings, by_hop(pattern, grid.hops).mean(-2))


def test_a_head_that_is_not_there(vit: AttachedModel, pictures: Pictures) -> None:
    found = spatial_profile(vit, pictures(1, 24))
    with pytest.raises(InputError, match="L7H0 has no profile"):
        found.of("L7H0")
    with pytest.raises(InputError, match="reach=-1"):
        found.within(-1)
