"""Contrastive maps: the formula, the choice of patches by hand, and what a run of two prompts gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.contrastive_maps import (
    FLOOR,
    METHODS,
    ContrastiveMap,
    band_of,
    contrastive_maps,
    crop_box,
    general_items,
    laid_over,
    top_patches,
    weighted_contrast,
)
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item, Passage
from headwise.probes.layout import picture_reader
from headwise.probes.picture import Picture, Region

QUESTIONS = ("What?", "Which color is it?", "Where is the cat?")


def asked(n: int, pictures: int = 1) -> Item:
    rng = np.random.default_rng(n)
    drawn = tuple(Picture.drawn(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(pictures))
    passage = Passage().add("<image>" * pictures + "\n").add(QUESTIONS[n], "question").add("\nAnswer:")
    return passage.item(" x", pictures=drawn, regions={"target": Region(0, (0, 0, 8, 16))}).named("made")


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3", "smolvlm"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


@pytest.fixture(scope="module")
def items(model: AttachedModel) -> ItemSet:
    return hw.encode([asked(n) for n in range(3)], model)


def grid(rows: int, columns: int, box: tuple[float, float, float, float]) -> torch.Tensor:
    left, top, right, bottom = box
    across, down = (right - left) / columns, (bottom - top) / rows
    return torch.tensor(
        [
            [left + across * c, top + down * r, left + across * (c + 1), top + down * (r + 1)]
            for r in range(rows)
            for c in range(columns)
        ],
        dtype=torch.float64,
    )


def test_what_is_seen_and_asked_is_parted() -> None:
    """A^Q = F G and A^G = F: the contrast is G, whatever F is, and steps count 1, 2, 3."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(4, 9, generator=generator, dtype=torch.float64) + 0.1
    wanted = torch.rand(9, generator=generator, dtype=torch.float64)
    found = weighted_contrast(seen[:3] * wanted, seen, floor=0.0)
    assert torch.allclose(found, 6 * wanted)
    assert torch.allclose(weighted_contrast(seen, seen, FLOOR), torch.full((9,), 10.0, dtype=torch.float64), atol=1e-4)
    stepwise = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert weighted_contrast(stepwise, torch.ones(2, 2), 0.0).tolist() == [1.0, 2.0]
    assert weighted_contrast(torch.ones(1, 2), torch.tensor([[0.0, 1.0]]), 0.5).tolist() == pytest.approx([2.0, 2 / 3])


def test_a_map_is_laid_over_as_a_picture_is_enlarged() -> None:
    values = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = laid_over(values, grid(3, 4, (0, 0, 32, 24)), (32, 24))
    small = Image.fromarray(values.reshape(3, 4).numpy().astype(np.float32), mode="F")
    assert np.allclose(found, np.asarray(small.resize((32, 24), Image.Resampling.BILINEAR)), atol=1e-5)


def test_a_map_lies_on_the_part_that_is_seen_and_tiles_on_theirs() -> None:
    cut = laid_over(torch.ones(4), grid(2, 2, (4, 2, 12, 10)), (16, 12))
    assert cut.sum() == 64
    assert cut[2:10, 4:12].min() == 1
    tiles = torch.cat(
        [grid(2, 2, (8 * c, 8 * r, 8 * c + 8, 8 * r + 8)) for r in (0, 1) for c in (0, 1)]
        + [grid(2, 2, (0, 0, 16, 16))]
    )
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]).repeat_interleave(4)
    found = laid_over(values, tiles, (16, 16))
    for (row, column), value in {(0, 0): 1.0, (0, 8): 2.0, (8, 0): 3.0, (8, 8): 4.0}.items():
        assert np.allclose(found[row : row + 8, column : column + 8], (value + 6) / 2)


def test_the_best_patches_are_kept_by_their_sums() -> None:
    values = np.zeros((10, 10))
    values[0:2, 0:2] = 5.0  # 20
    values[4, 4:9] = 3.0  # 15
    values[9, 9] = 9.0
    values[7, 0] = 4.0
    kept = top_patches(values, 0.11, 2)
    expected = np.zeros((10, 10), bool)
    expected[0:2, 0:2] = expected[4, 4:9] = True
    assert np.array_equal(kept, expected)
    assert np.array_equal(top_patches(values, 0.11, 3), expected | (values == 9))
    assert np.array_equal(top_patches(values, 0.11, 9), values > 0)
    assert top_patches(np.ones((4, 4))).all()
    # Corners do not connect, and a fifth of many patches is more than three.
    squares = np.indices((12, 12)).sum(0) % 2 * 1.0
    assert top_patches(squares, 0.5, 3).sum() == 36
    with pytest.raises(InputError, match="share"):
        top_patches(values, 1.5)


def test_the_box_around_what_is_kept() -> None:
    kept = np.zeros((6, 8), bool)
    kept[2, 3] = kept[4, 6] = True
    assert crop_box(kept) == (3, 2, 7, 5)
    assert crop_box(np.zeros((6, 8), bool)) == (0, 0, 8, 6)


def test_a_refined_picture_is_what_is_kept_enlarged() -> None:
    picture = Picture.drawn(np.random.default_rng(0).integers(1, 255, (16, 16, 3), dtype=np.uint8))
    tokens = torch.zeros(16)
    tokens[[5, 6]] = torch.tensor([2.0, 2.0])
    found = ContrastiveMap("i", picture, tokens, grid(4, 4, (0, 0, 16, 16)))
    left, top, right, bottom = crop_box(found.kept())
    refined = found.refined()
    scale = max(16 / (right - left), 16 / (bottom - top))
    assert refined.size == (int((right - left) * scale), int((bottom - top) * scale))
    assert max(refined.size) >= 16
    assert found.kept()[5, 8]
    assert not found.kept()[14, 8]


def by_hand(model: AttachedModel, each: Any, steps: int) -> dict[str, torch.Tensor]:
    """The newest token's attention to the image at every step, with no cache: the whole text anew for each token."""
    ids, found = list(each.prompt), {}
    (image,) = each.spans["image"]
    rows: dict[str, list[torch.Tensor]] = {}
    ends = model.model.generation_config.eos_token_id
    for _ in range(steps):
        inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([ids]), **each.pixels}
        if types := picture_reader(model.processor).types:
            inputs[types] = torch.zeros_like(inputs["input_ids"])
            inputs[types][0, list(image)] = 1
        with torch.no_grad(), model.reading(hw.read.rows(model.heads("main"), queries=[-1])) as got:
            logits = model(**inputs).logits[0, -1]
        for label in ("L0", "L1", "L2"):
            rows.setdefault(label, []).append(got.rows[label][0, :, 0, list(image)].double())
        ids.append(int(logits.argmax()))
        if ids[-1] == ends:
            break
    found = {label: torch.stack(each_) for label, each_ in rows.items()}
    return found


def test_maps_of_a_batch_are_those_of_two_answers_step_by_step(model: AttachedModel, items: ItemSet) -> None:
    general = general_items(model, items, "Describe it.")
    assert [each.item.prompt for each in general] == ["<image>\nDescribe it.\nAnswer:"] * 3
    maps = contrastive_maps(model, items, general="Describe it.", layers="1-2", steps=4)
    assert [each.item for each in maps] == list(items.ids)
    for each, other, found in zip(items, general, maps, strict=True):
        own, rest = by_hand(model, each, 4), by_hand(model, other, 4)
        expected = sum(
            (t + 1) * own[label][t].mean(0) / (rest[label][t].mean(0) + FLOOR)
            for label in ("L1", "L2")
            for t in range(min(len(own[label]), len(rest[label])))
        )
        assert torch.allclose(found.tokens, expected, rtol=2e-3)
        assert found.pixels().shape == (16, 16)


def test_the_same_question_twice_has_no_contrast(model: AttachedModel, items: ItemSet) -> None:
    one = ItemSet(items.probe, items.items[:1], {}, items.metric, items.pad, reader=items.reader)
    (found,) = contrastive_maps(model, one, general=QUESTIONS[0], steps=3)
    assert torch.allclose(found.tokens / found.tokens[0], torch.ones_like(found.tokens), rtol=1e-3)


def test_a_heads_score_is_its_maps_share_of_the_region(model: AttachedModel, items: ItemSet) -> None:
    scores = find(METHODS[0], model, items, steps=3, general="Describe it.")
    general = general_items(model, items, "Describe it.")
    for number, (each, other) in enumerate(zip(items, general, strict=True)):
        own, rest = by_hand(model, each, 3)["L1"], by_hand(model, other, 3)["L1"]
        image, target = each.spans["image"][0], {*each.spans["region:target"][0]}
        both = min(len(own), len(rest))
        for head in range(own.shape[1]):
            summed = weighted_contrast(own[:both, head], rest[:both, head])
            inside = torch.tensor([column in target for column in image])
            assert 0 < int(inside.sum()) < len(image)
            assert float(scores.of(f"L1H{head}")[number]) == pytest.approx(
                float(summed[inside].sum() / summed.sum()), rel=5e-3
            )


def test_two_pictures_have_a_map_each(model: AttachedModel) -> None:
    both = hw.encode([asked(0, pictures=2)], model)
    maps = contrastive_maps(model, both, steps=2)
    assert [each.picture for each in maps] == list(both.items[0].item.pictures)
    assert [len(each.tokens) for each in maps] == [len(place) for place in both.items[0].spans["image"]]


def test_the_band_is_a_share_of_the_depth_or_what_is_named(model: AttachedModel) -> None:
    assert [site.layer for site in band_of(model)] == [1, 2]
    assert [site.layer for site in band_of(model, "0 - 1")] == [0, 1]
    for wrong in ("5-7", "2", "2-1", "last"):
        with pytest.raises(InputError, match="layers"):
            band_of(model, wrong)


def test_what_has_no_map_is_refused(model: AttachedModel, items: ItemSet) -> None:
    with pytest.raises(InputError, match="empty"):
        general_items(model, items, " ")
    with pytest.raises(InputError, match="no single place"):
        contrastive_maps(model, items, span="color")
    with hw.load("zoo:tiny-llama") as text, pytest.raises(Refusal, match="image"):
        find(METHODS[0], text, hw.encode([Item(prompt="a", answer=" b", id="x")], text))
