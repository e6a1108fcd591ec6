"""Example items as they are kept: their pictures, the parts that tokens stand for, and where heads look."""

from __future__ import annotations

import numpy as np
import pytest

import headwise as hw
from headwise.atlas import Atlas
from headwise.atlas.examples import LONGEST_SIDE, Example, pattern_of, pictures_of
from headwise.atlas.report.overlays import overlays
from headwise.atlas.report.reading import _example, report_of
from headwise.errors import Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Passage
from headwise.probes.layout import PictureReader
from headwise.probes.picture import Picture
from headwise.probes.stream import Probe


@pytest.fixture(scope="module")
def items(seeing: AttachedModel, shown: Probe) -> ItemSet:
    return encode(shown, seeing, n=2)


def test_a_picture_keeps_its_tokens_and_their_boxes(seeing: AttachedModel, items: ItemSet) -> None:
    first = items.items[0]
    (kept,) = pictures_of(first, items.reader)
    assert kept.size == (32, 32)
    assert np.array_equal(kept.pixels, first.item.pictures[0].array())
    assert kept.tokens.tolist() == list(first.spans["image:0"][0])
    assert kept.boxes.shape == (len(kept.tokens), 4)
    left = {place for place, box in zip(kept.tokens.tolist(), kept.boxes, strict=True) if (box[0] + box[2]) / 2 < 16}
    assert left == set(first.spans["region:left"][0])


def test_a_large_picture_is_kept_small_with_the_mean_of_its_pixels(seeing: AttachedModel) -> None:
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[:, 200:] = (200, 100, 50)
    pixels[::2, :200] = 100  # rows of 100 and 0
    item = Passage().add("<image> so?").item("a", pictures=(Picture.drawn(pixels),)).named("t")
    (kept,) = pictures_of(encode([item], seeing).items[0], encode([item], seeing).reader)
    assert kept.size == (400, 200)
    assert kept.pixels.shape == (LONGEST_SIDE // 2, LONGEST_SIDE, 3)
    assert (kept.pixels[:, LONGEST_SIDE // 2 :] == (200, 100, 50)).all()
    assert kept.pixels[:, : LONGEST_SIDE // 2].mean() == pytest.approx(50, abs=0.5)
    assert kept.boxes[:, 2].max() <= 400


def test_where_tokens_lie_may_be_unknown(items: ItemSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise Refusal("nobody knows")

    monkeypatch.setattr(PictureReader, "cells", unknown)
    (kept,) = pictures_of(items.items[0], items.reader)
    assert kept.unknown == "nobody knows"
    assert kept.boxes.shape == (0, 4)
    assert len(kept.tokens)


def test_a_head_that_sees_one_region_only_is_drawn_there(seeing: AttachedModel, items: ItemSet) -> None:
    """All else is hidden from it, so its whole attention is on the region's tokens."""
    first = items.items[0]
    elsewhere = sorted(set(range(len(first.prompt))) - set(first.spans["region:left"][0]))
    # Rows before the picture would see nothing at all, so it is hidden from the last row alone.
    hidden = hw.edit.block("L1H2", keys="span:elsewhere", queries="last")
    with seeing.editing(hidden, spans={"elsewhere": [elsewhere]}):
        tokens, weights = pattern_of(seeing, items, first, HeadSet.parse("L1H2, L1H3"), whole=False)
    assert len(tokens) == len(first.prompt)
    (kept,) = pictures_of(first, items.reader)
    on_cells = weights[0, kept.tokens]
    inside = (kept.boxes[:, 0] + kept.boxes[:, 2]) / 2 < 16
    assert on_cells[inside].sum() == pytest.approx(1, abs=1e-5)
    assert not on_cells[~inside].any()
    assert weights[1, elsewhere].sum() > 0.1


def test_the_atlas_keeps_pictures_with_examples_of_pictures(seen: Atlas, seeing: AttachedModel, shown: Probe) -> None:
    kept = seen.examples("shown")
    assert len(kept) == 3
    testing = encode(shown, seeing, n=16, max_tokens=256).items[8:]
    for each, item in zip(kept, testing, strict=False):
        assert each.item == item.id
        (picture,) = each.pictures
        assert np.array_equal(picture.pixels, item.item.pictures[0].array())
        assert picture.tokens.tolist() == list(item.spans["image:0"][0])
        assert each.weights.sum(axis=1) == pytest.approx(1, abs=1e-4)
    assert all(not each.pictures for each in seen.examples("told"))


def test_the_report_has_a_picture_as_one_token_with_the_weight_of_all(seen: Atlas) -> None:
    kept: Example = seen.examples("shown")[0]
    drawn = next(each for each in report_of(seen).examples if each.item == kept.item)
    (picture,) = kept.pictures
    assert drawn.tokens.count(" [picture]") == 1
    assert len(drawn.tokens) == len(kept.tokens) - len(picture.tokens) + 1
    at = drawn.tokens.index(" [picture]")
    for row, pattern in enumerate(drawn.patterns):
        assert pattern.weights[at] == pytest.approx(kept.weights[row, picture.tokens].sum())
        assert sum(pattern.weights) == pytest.approx(1, abs=1e-4)
        assert pattern.cells == (tuple(kept.weights[row, picture.tokens].tolist()),)
    (shot,) = drawn.pictures
    assert np.array_equal(shot.boxes, picture.boxes)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "smolvlm"])
def test_every_layout_has_a_box_for_each_token_of_each_picture(name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    shown = (Picture.drawn(pixels), Picture.drawn(pixels[:16, :16]))
    item = Passage().add("<image> and <image> so?").item("a", pictures=shown).named("t")
    with hw.load(f"zoo:tiny-{name}") as model:
        items = encode([item], model)
        tokens, weights = pattern_of(model, items, items.items[0], HeadSet.parse("L1H0, L1H1"), whole=False)
    seen = tuple(pictures_of(items.items[0], items.reader))
    assert [each.size for each in seen] == [(40, 24), (16, 16)]
    assert all(len(each.boxes) == len(each.tokens) for each in seen)
    drawn = _example("t", Example("t", tuple(tokens), "a", HeadSet.parse("L1H0, L1H1"), weights, seen), HeadSet())
    assert overlays(drawn, "p").count('class="look"') == 2
    assert sum(each in (" [picture 1]", " [picture 2]") for each in drawn.tokens) == 2
    assert sum(drawn.patterns[0].weights) == pytest.approx(1, abs=1e-4)
