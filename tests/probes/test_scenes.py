"""What is drawn: places, colours, shapes, pairs, faintness, and what the held-out part of pictures is."""

from __future__ import annotations

from itertools import islice
from random import Random

import numpy as np
import pytest

import headwise as hw
from headwise.probes import held_out
from headwise.probes.item import Item
from headwise.probes.scenes import (
    GRID,
    OUTLINES,
    PAIRS,
    PARTNER,
    SHAPES,
    SIDE,
    STRIP,
    TOGETHER,
    Scene,
    Thing,
    draw,
    grid,
    pixels,
    strip,
)

LAYOUTS = pytest.mark.parametrize("layout", [GRID, STRIP], ids=lambda layout: layout.name)


@LAYOUTS
def test_the_places_of_a_layout_cover_the_picture_once(layout) -> None:
    covered = np.zeros((SIDE, SIDE), int)
    for number in range(len(layout)):
        left, top, right, bottom = layout.box(number)
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    assert list(layout.regions()) == [f"{layout.place}-{number + 1}" for number in range(len(layout))]


def test_a_picture_is_the_same_for_the_same_seed() -> None:
    scene = grid(Random(0))
    assert draw(scene, Random(1)) == draw(scene, Random(1))
    assert draw(scene, Random(1)) != draw(scene, Random(2))
    assert pixels(scene, Random(1)).dtype == np.uint8
    assert draw(scene, Random(1)).size == (SIDE, SIDE)


def test_one_thing_more_changes_nothing_elsewhere() -> None:
    scene = Scene(GRID, (Thing("circle", "red"), None, *(Thing("star", "blue") for _ in range(7))))
    before, after = (pixels(each, Random(3)).astype(int) for each in (scene, scene.put(1, Thing("ring", "green"))))
    left, top, right, bottom = GRID.box(1)
    changed = np.abs(after - before).any(-1)
    assert changed[top:bottom, left:right].any()
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_strips_have_frames_and_grids_have_none() -> None:
    line = [pixels(Scene(layout, (None,) * len(layout)), Random(0))[:, 16].mean() for layout in (GRID, STRIP)]
    inside = [pixels(Scene(layout, (None,) * len(layout)), Random(0))[4:12, 4:12].mean() for layout in (GRID, STRIP)]
    assert abs(line[0] - inside[0]) < 5
    assert line[1] < inside[1] - 50


def test_contrasts_fall_with_faintness_over_powers_of_ten() -> None:
    def contrasts(faintness: float) -> np.ndarray:
        found = []
        for seed in range(80):
            scene = Scene(GRID, (Thing("square", "black"), *(None,) * 8), faintness)
            clear = Scene(GRID, scene.things)
            empty = Scene(GRID, (None,) * 9)
            cells = [pixels(each, Random(seed))[:16, :16].astype(float) for each in (scene, clear, empty)]
            found.append((cells[0] - cells[2]).sum() / (cells[1] - cells[2]).sum())
        return np.array(found)

    half = np.log10(np.clip(contrasts(0.5), 1e-3, None))
    assert -0.9 < half.mean() < -0.6  # spread evenly over 1.5 powers of ten
    assert half.max() > -0.1
    assert (contrasts(0.0) == 1.0).all()


def test_shapes_differ_from_each_other_by_many_points() -> None:
    x, y = np.meshgrid(np.linspace(-1.1, 1.1, 13), np.linspace(-1.1, 1.1, 13))
    inside = {shape: OUTLINES[shape](x, y) for shape in SHAPES}
    fewest = min((inside[a] ^ inside[b]).sum() for a in SHAPES for b in SHAPES if a < b)
    assert fewest >= 16


def test_shapes_of_a_pair_come_together_in_grids_and_not_in_strips() -> None:
    random = Random(0)
    grids = [set(grid(random).shapes) for _ in range(2000)]
    for pair in PAIRS:
        with_one = [shapes & set(pair) for shapes in grids if shapes & set(pair)]
        both = sum(len(each) == 2 for each in with_one) / len(with_one)
        assert both == pytest.approx(TOGETHER, abs=0.05)
    assert all(PARTNER[PARTNER[each]] == each != PARTNER[each] for each in SHAPES)
    strips = [set(strip(random).shapes) for _ in range(2000)]
    given = [PARTNER["circle"] in shapes for shapes in strips if "circle" in shapes]
    base = [PARTNER["circle"] in shapes for shapes in strips if "circle" not in shapes]
    assert sum(given) / len(given) == pytest.approx(sum(base) / len(base), abs=0.1)


def test_copies_add_shapes_that_are_there_already() -> None:
    scenes = [grid(Random(seed), copies=4) for seed in range(100)]
    assert max(len(scene.taken) - len(scene.shapes) for scene in scenes) == 4
    assert all(len(scene.taken) + len(scene.free) == 9 for scene in scenes)


def test_a_tenth_of_the_pictures_is_held_out_whatever_is_asked_about_them() -> None:
    items = list(islice(hw.probe("existence").items(), 400))
    share = sum(map(held_out, items)) / len(items)
    assert 0.06 < share < 0.15
    asked = [Item(prompt=f"<image>\n{words}?", answer="", pictures=items[0].pictures) for words in ("One", "Two")]
    assert len({held_out(each) for each in (items[0], *asked)}) == 1
