"""Maps around the query, and the families that they are sorted into."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.errors import InputError
from headwise.find.towers import Grid, pattern_families
from headwise.find.towers.pattern_families import centred, sorted_into
from headwise.model.attached import AttachedModel

Pictures = Callable[[int, int], Tensor]


def test_a_map_has_every_query_in_the_middle() -> None:
    grid = Grid(2, 3)
    pattern = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(3, 5)
    for query in range(6):
        for key in range(6):
            row, column = key // 3 - query // 3, key % 3 - query % 3
            wanted[row + 1, column + 2] += pattern[query, key] / 6
    assert torch.allclose(centred(pattern, grid), wanted)


def test_heads_that_look_alike_are_of_one_family(vit: AttachedModel, pictures: Pictures, looking: Any) -> None:
    itself, right, cls = torch.eye(37), torch.zeros(37, 37), torch.zeros(37, 37)
    for cell in range(36):
        right[1 + cell, 1 + (cell if cell % 6 == 5 else cell + 1)] = 1
    cls[:, 0] = 1
    with ExitStack() as stack:
        for heads, pattern in (("L0H0 L1H3 L2H1", itself), ("L0H2 L2H2", right), ("L1H0", cls)):
            for head in heads.split():
                stack.enter_context(looking(vit, head, pattern))
        found = pattern_families(vit, pictures(2, 24), families=4)
    families = [", ".join(head.label for head in each) for each in found.families]
    # The six heads that are as they came look much the same.
    assert [len(each) for each in found.families] == [6, 3, 2, 1]
    assert families[1:] == ["L0H0, L1H3, L2H1", "L0H2, L2H2", "L1H0"]
    assert found.map_of("L1H3")[5, 5] == pytest.approx(1)
    assert found.map_of("L0H2")[5, 6] == pytest.approx(30 / 36)
    assert found.typical(2)[5, 6] == pytest.approx(30 / 36)
    assert found.map_of("L1H0").sum() == 0
    assert found.coordinates.shape == (12, 2)
    together = found.coordinates[[found.heads.heads.index(head) for head in found.families[1]]]
    assert np.ptp(together, axis=0) == pytest.approx(0, abs=1e-6)


def test_the_plane_shows_all_of_three_points() -> None:
    maps = np.zeros((3, 1, 3))
    maps[[0, 1, 2], 0, [0, 1, 2]] = 1
    family, coordinates, explained = sorted_into(maps, 3)
    assert family.tolist() == [0, 1, 2]
    assert sum(explained) == pytest.approx(1)
    apart = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    assert apart[~np.eye(3, dtype=bool)] == pytest.approx(2**0.5)


def test_maps_are_apart_by_the_square_roots_of_their_shares() -> None:
    """Hellinger: 2 - 2 sum sqrt(p q); how much of a map is on patches does not count."""
    maps = np.array([[[4.0, 0.0, 0.0]], [[0.5, 0.5, 0.0]]])
    _, coordinates, _ = sorted_into(maps, 2)
    assert np.linalg.norm(coordinates[0] - coordinates[1]) ** 2 == pytest.approx(2 - 2**0.5)


def test_the_largest_family_is_number_0() -> None:
    maps = np.zeros((4, 1, 3))
    maps[[0, 1, 2, 3], 0, [2, 0, 0, 0]] = 1
    family, _, _ = sorted_into(maps, 2)
    assert family.tolist() == [1, 0, 0, 0]
    assert sorted_into(maps[:1], 1)[0].tolist() == [0]


def test_more_families_than_heads(vit: AttachedModel, pictures: Pictures) -> None:
    with pytest.raises(InputError, match="families=13 cannot be made of 12 heads"):
        pattern_families(vit, pictures(1, 24), families=13)
    with pytest.raises(InputError, match="L9H0 has no map"):
        pattern_families(vit, pictures(1, 24)).map_of("L9H0")
