"""Attention over pictures: which cells are coloured, how much, and what is said of it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace

import made
import numpy as np
import pytest
from PIL import Image

from headwise.atlas.report.closeups import examples
from headwise.atlas.report.overlays import overlays, png, where
from headwise.atlas.report.view import Example, Pattern, Shot

SIZE = (48, 48)


def grid(side: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    across, down = size[0] / side, size[1] / side
    return np.array(
        [(x * across, y * down, (x + 1) * across, (y + 1) * down) for y in range(side) for x in range(side)]
    )


def shot(side: int = 6, **changed: object) -> Shot:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    fields = {"size": SIZE, "pixels": pixels, "boxes": grid(side), "unknown": ""}
    return Shot(**{**fields, **changed})  # type: ignore[arg-type]


def example(*cells: tuple[float, ...], shots: tuple[Shot, ...] = (), verified: bool = True) -> Example:
    on_pictures = tuple(sum(each) for each in cells)
    tokens = (*(" [picture]" for _ in cells), " so", "?")
    weights = (*on_pictures, 1 - sum(on_pictures), 0.0)
    return Example("panel", "f00d", tokens, " red", (Pattern("L3H1", weights, verified, cells),), shots or (shot(),))


def paths(text: str) -> list[tuple[float, list[tuple[float, ...]]]]:
    """Opacity, and left, top, right and bottom of each box, in the drawing's units."""
    found = []
    for opacity, parts in re.findall(r'<path class="shade" fill-opacity="([^"]+)" d="([^"]+)"/>', text):
        corners = [tuple(map(float, each)) for each in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-", parts)]
        found.append((float(opacity), [(x, y, x + across, y + down) for x, y, across, down in corners]))
    return found


def test_the_cells_of_one_region_are_those_that_are_coloured() -> None:
    """A head that looks at the upper right panel, and nowhere else, of a strip of 3 x 2 in 6 x 6 cells."""
    boxes = grid(6)
    panel = [(box[0] >= 32) and (box[1] < 24) for box in boxes.tolist()]
    weights = tuple(1 / 6 if inside else 0.0 for inside in panel)
    ((opacity, coloured),) = paths(overlays(example(weights), "p"))
    assert opacity == 1
    assert len(coloured) == sum(panel) == 6
    scale = 160 / 48
    for left, top, right, bottom in coloured:
        assert left >= 32 * scale - 0.1
        assert right <= 48 * scale + 0.1
        assert bottom <= 24 * scale + 0.1
        assert top >= 0


def test_colour_goes_by_the_strongest_cell_but_not_below_a_hundredth() -> None:
    weights = [0.0] * 36
    weights[0], weights[1], weights[2] = 0.4, 0.2, 0.02
    found = {opacity: len(boxes) for opacity, boxes in paths(overlays(example(tuple(weights)), "p"))}
    assert found == {1.0: 1, 0.5: 1}
    faint = tuple(each / 100 for each in weights)  # 0.004 at most
    assert [opacity for opacity, _ in paths(overlays(example(faint), "p"))] == [0.25, 0.375]


def test_what_is_said_of_it() -> None:
    weights = [0.0] * 36
    weights[8] = 0.72
    text = overlays(example(tuple(weights)), "p")
    assert "72\u202f% on the picture" in text
    assert "most: 16 to 24 across, 8 to 16 down: weight 0.720" in text
    assert "<small>verified</small>" in text
    assert "<small>descriptive</small>" in overlays(example(tuple(weights), verified=False), "p")
    assert 'aria-label="the picture of item f00d, 48 \u00d7 48 pixels"' in text
    assert where(1, (0.0, 1.55, 8.0, 9.0), 3) == "picture 2, 0 to 8 across, 1.6 to 9 down"


def test_several_pictures_stand_side_by_side_each_at_its_size() -> None:
    wide = shot(2, size=(96, 48), pixels=np.zeros((48, 96, 3), np.uint8), boxes=grid(2, (96, 48)))
    text = overlays(example((0.0,) * 36, (0.0, 0.0, 0.0, 0.5), shots=(shot(), wide)), "p")
    ((_, ((left, top, right, bottom),)),) = paths(text)
    # The second picture begins behind the first one, which is 160 wide, and a gap of 8; it is 160 x 80.
    assert (left, top, right, bottom) == pytest.approx((168 + 80, 40, 168 + 160, 80), abs=0.2)
    assert 'viewBox="0 0 328 160"' in text
    assert "the 2 pictures" in text
    assert "most: picture 2, 48 to 96 across, 24 to 48 down: weight 0.500" in text
    boxes = json.loads(re.search(r'data-boxes="([^"]+)"', text)[1])  # type: ignore[index]
    assert len(boxes) == 40
    assert boxes[-1] == [1, 48, 24, 96, 48]


def test_a_picture_is_in_the_page_once_and_comes_back_as_it_was() -> None:
    drawn = shot()
    two = replace(example((0.01,) * 36, shots=(drawn,)), patterns=(example((0.01,) * 36).patterns[0],) * 2)
    text = overlays(two, "p7")
    (data,) = re.findall(r'href="data:image/png;base64,([^"]+)"', text)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), drawn.pixels)
    assert text.count('id="p7-0"') == 1
    assert text.count('href="#p7-0"') == 2
    assert png(drawn.pixels) == png(np.asfortranarray(drawn.pixels))


def test_where_the_cells_are_unknown_the_picture_stands_alone_with_the_reason() -> None:
    text = overlays(example((0.5,), shots=(shot(boxes=np.empty((0, 4)), unknown="no square"),)), "p")
    assert "no square" in text
    assert "<image" in text
    assert "svg" in text
    assert "shade" not in text
    assert "application" not in text


def test_pictures_of_two_items_have_names_of_their_own() -> None:
    one = example((0.01,) * 36)
    text = examples((one, one))
    assert re.findall(r'<image id="([^"]+)"', text) == ["picture-0-0", "picture-1-0"]
    assert "On pictures:" in text
    assert "On pictures:" not in examples((made.report().examples[0],))


def test_six_heads_on_a_large_picture_stay_small() -> None:
    weights = tuple(float(each) for each in np.random.default_rng(0).dirichlet(np.full(576, 0.3)))
    large = shot(24, size=(640, 480), pixels=np.random.default_rng(1).integers(0, 255, (120, 160, 3), dtype=np.uint8))
    one = example(weights, shots=(replace(large, boxes=grid(24, (640, 480))),))
    text = overlays(replace(one, patterns=one.patterns * 6), "p")
    assert len(text.encode()) < 200_000
