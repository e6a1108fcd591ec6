"""Gaze scores: scripted heads whose numbers are known, one item alone, the matrix against its items, pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.gaze import METHODS, SCORES, GazeMatrix, gaze, gaze_matrix
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Passage
from headwise.probes.outcome import observe
from headwise.probes.picture import Picture, Region

(GAZE,) = METHODS
REGIONS = {"panel-1": (2, 3), "panel-2": (4, 5), "panel-3": (6, 7)}
FIRST = 12
"""Length of the prompt that asks for the first panel; the others are one and two tokens longer, which is how a script
tells them apart."""


def strip(made: Any, asked: tuple[int, ...] = (0, 1, 2), *, regions: dict[str, tuple[int, ...]] = REGIONS) -> ItemSet:
    """Questions about three panels, each of two tokens."""
    items: ItemSet = made(*([1, *range(10, 9 + FIRST + number)] for number in asked))
    names = list(REGIONS)
    return replace(
        items,
        items=tuple(
            replace(
                each,
                spans={f"region:{name}": (place,) for name, place in regions.items()}
                | {"region:target": (REGIONS[names[number]],)},
            )
            for each, number in zip(items, asked, strict=True)
        ),
    )


def looks(head: int, t: int) -> dict[int, float]:
    """Heads by number: 0 at what is asked, 1 always at the second panel, 2 at all panels alike, 3 at what is asked with
    a fifth of its mass, 4 at the other panels, 5 and all others at the first token."""
    number = t - FIRST + 1
    if number not in (0, 1, 2):
        return {0: 1.0}
    asked = 2 + 2 * number
    match head:
        case 0:
            return {asked: 0.5, asked + 1: 0.5}
        case 1:
            return {4: 0.75, 5: 0.25}
        case 2:
            return dict.fromkeys(range(2, 8), 1 / 6)
        case 3:
            return {0: 0.8, asked: 0.2}
        case 4:
            return {each: 0.25 for each in range(2, 8) if each not in (asked, asked + 1)}
        case _:
            return {0: 1.0}


KNOWN = {
    # G[k, r] for k asked: on the target, on the others
    "mass": [[1, 1, 1], [0, 1, 0], [1 / 3] * 3, [0.2] * 3, [0] * 3, [0] * 3],
    "contrast": [[1, 1, 1], [-0.5, 1, -0.5], [0] * 3, [0.2] * 3, [-0.5] * 3, [0] * 3],
    "correlation": [[1, 1, 1], [-0.5, 1, -0.5], [0] * 3, [1] * 3, [-1] * 3, [0] * 3],
}


@pytest.mark.parametrize("score", SCORES)
def test_heads_of_known_gaze(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any, score: Any) -> None:
    with scripted(tiny, looks):
        found = by_head(gaze(tiny, strip(made), score=score))
    expected = torch.tensor(KNOWN[score], dtype=torch.float64).T
    torch.testing.assert_close(found[:, :6], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 6:], torch.zeros(3, 6).double(), atol=1e-5, rtol=0)


def test_the_released_score_is_the_default_and_its_head_the_first(
    tiny: AttachedModel, made: Any, scripted: Any
) -> None:
    with scripted(tiny, looks):
        scores = find(GAZE, tiny, strip(made))
    assert scores.top(1).labels == ("L0H0",)
    assert scores.of("L0H0") == pytest.approx([1, 1, 1], abs=1e-5)
    assert scores.of("L0H1") == pytest.approx([0, 1, 0], abs=1e-5)


def test_the_matrix(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    with scripted(tiny, looks):
        found = gaze_matrix(tiny, strip(made))
    assert found.regions == tuple(REGIONS)
    assert found.n_items == (1, 1, 1)
    third = torch.full((3, 3), 1 / 3).double()
    torch.testing.assert_close(found.of("L0H0"), torch.eye(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.of("L0H2"), third, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.of("L1H0"), (1 - torch.eye(3)).double() / 2, atol=1e-5, rtol=0)
    site = next(iter(found.masses))
    mass, contrast, correlation = (found.score(each)[site] for each in SCORES)
    assert mass.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0.2], abs=1e-5)
    assert contrast.tolist() == pytest.approx([1, 0, 0, 0.2], abs=1e-5)
    assert correlation.tolist() == pytest.approx([1, 0, 0, 1], abs=1e-5)


def test_the_matrix_is_the_mean_of_the_items_that_ask(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    """The first panel is asked for twice and the last one never; then the diagonal is not the mean over items."""
    items = strip(made, (0, 0, 1))
    with scripted(tiny, looks):
        found = gaze_matrix(tiny, items)
        scores = find(GAZE, tiny, items)
    assert found.n_items == (2, 1, 0)
    assert found.of("L0H1")[2].isnan().all()
    site = next(iter(found.masses))
    assert found.score("mass")[site].tolist() == pytest.approx([1, 0.5, 1 / 3, 0.2], abs=1e-5)
    assert scores.mean()["main"][0][1] == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize("build", ["tiny-llama", "tiny-gpt2"])
def test_padded_in_a_batch_is_one_item_alone(build: str, made: Any, pattern: Callable[..., Any], by_head: Any) -> None:
    with hw.load(f"zoo:{build}") as model:
        items = strip(made)
        rows = [pattern(model, each.prompt)[:, -1] for each in items]
        found = {score: by_head(gaze(model, items, score=score)) for score in SCORES}
    for number, row in enumerate(rows):
        masses = torch.stack([row[:, list(place)].sum(1) for place in REGIONS.values()], dim=1)
        others = [each for each in range(3) if each != number]
        torch.testing.assert_close(found["mass"][number], masses[:, number], atol=1e-5, rtol=0)
        contrast = masses[:, number] - masses[:, others].mean(1)
        torch.testing.assert_close(found["contrast"][number], contrast, atol=1e-5, rtol=0)
        asked = torch.eye(3).double()[number]
        pearson = torch.stack([torch.corrcoef(torch.stack([each, asked]))[0, 1] for each in masses])
        torch.testing.assert_close(found["correlation"][number], pearson, atol=1e-3, rtol=0)


def test_what_differs_by_rounding_is_the_same() -> None:
    rounded = 1 / 3 + 1e-9 * torch.eye(3).double()
    found = GazeMatrix(tuple(REGIONS), {SiteId(layer=0): torch.stack([rounded, 1e-3 * torch.eye(3)])}, (1, 1, 1))
    assert found.score("correlation")[SiteId(layer=0)].tolist() == pytest.approx([0, 1])


def noise(height: int, width: int, seed: int) -> Picture:
    return Picture.drawn(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def seen(model: AttachedModel) -> ItemSet:
    """An item with a picture, and one with two of other sizes, whose prompt is longer."""
    one = Passage().add("It is ").add("so", "needle").add(" <image>").add(" Which?", "question").add("\n")
    two = Passage().add("See <image> and <image> ").add("here", "needle").add(" Where is it?", "question").add(":")
    left, right = Region(0, (0, 0, 16, 32)), Region(0, (16, 0, 32, 32))
    wide = {"left": Region(1, (0, 0, 20, 24)), "right": Region(1, (20, 0, 40, 24))}
    passages = (
        (one, (noise(32, 32, 0),), {"left": left, "right": right, "target": left}),
        (two, (noise(16, 16, 1), noise(24, 40, 2)), wide | {"target": wide["right"]}),
    )
    made = [p.item(" a", foils=(" b",), pictures=pictures, regions=r).named("seen") for p, pictures, r in passages]
    return encode(made, model)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "smolvlm"])
def test_pictures_of_different_size(family: str) -> None:
    """Items with one and two pictures, in a batch and alone: the last row on the tokens of the region asked for."""
    with hw.load(f"zoo:tiny-{family}") as model:
        items = seen(model)
        found = {score: find(GAZE, model, items, score=score).values["main"] for score in SCORES}
        matrix = gaze_matrix(model, items)
        for row, item in enumerate(items):
            (batch,) = items.only([each == row for each in range(len(items))], "one").batches(1)
            last = batch.prompt_length - 1
            with model.reading(hw.read.rows(model.heads("main"), queries=[last])) as got:
                observe(model, batch, wants={"logits"})
            rows = torch.stack([got.rows[f"L{layer}"][0, :, 0] for layer in range(len(found["mass"][row]))]).double()
            shift = batch.prompt_length - len(item.prompt)
            on = {
                name: rows[..., [shift + at for at in item.spans[f"region:{name}"][0]]].sum(-1).numpy()
                for name in ("left", "right", "target")
            }
            assert found["mass"][row] == pytest.approx(on["target"], abs=1e-5)
            other = on["right"] if (on["left"] == on["target"]).all() else on["left"]
            assert found["contrast"][row] == pytest.approx(on["target"] - other, abs=1e-5)
            asked = matrix.regions.index("left" if other is on["right"] else "right")
            for layer, heads in enumerate(matrix.masses.values()):
                assert heads[:, asked, matrix.regions.index("left")] == pytest.approx(on["left"][layer], abs=1e-5)
        assert matrix.n_items == (1, 1)


def test_a_region_that_overlaps_the_target_is_no_other(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    """The whole strip, and for the item that asks for the last panel one that shares a token with it."""
    items = strip(made, (0, 2), regions=REGIONS | {"all": tuple(range(2, 8)), "seam": (5, 6)})
    with scripted(tiny, looks):
        found = by_head(gaze(tiny, items, score="contrast"))
    assert found[0, 1] == pytest.approx(-(1.0 + 0 + 0.25) / 3, abs=1e-5)  # panels 2 and 3, and the seam
    assert found[1, 1] == pytest.approx(-(0 + 1.0) / 2, abs=1e-5)


def test_the_rows_of_the_question(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any, pattern: Any) -> None:
    """The last row, and one before it in which every head rests on the first token."""
    items = strip(made)
    items = replace(
        items,
        items=tuple(
            replace(each, spans=each.spans | {"question": ((len(each.prompt) - 7, len(each.prompt) - 1),)})
            for each in items
        ),
    )
    with scripted(tiny, looks):
        found = {score: by_head(gaze(tiny, items, score=score, rows="question")) for score in SCORES}
        matrix = gaze_matrix(tiny, items, rows="question")
    for score in ("mass", "contrast"):
        halved = torch.tensor(KNOWN[score], dtype=torch.float64).T / 2
        torch.testing.assert_close(found[score][:, :6], halved, atol=1e-5, rtol=0)
    known = torch.tensor(KNOWN["correlation"], dtype=torch.float64).T
    torch.testing.assert_close(found["correlation"][:, :6], known, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.of("L0H0"), torch.eye(3).double() / 2, atol=1e-5, rtol=0)
    dense = pattern(tiny, items.items[1].prompt)[:, [-7, -1]].mean(1)
    mass = by_head(gaze(tiny, items, rows="question"))[1]
    torch.testing.assert_close(mass, dense[:, [4, 5]].sum(1), atol=1e-5, rtol=0)
    with pytest.raises(Refusal, match="asked"):
        gaze(tiny, items, rows="asked")


def test_what_cannot_be_scored(tiny: AttachedModel, made: Any) -> None:
    items = strip(made)
    with pytest.raises(InputError, match="correlation"):
        gaze(tiny, items, score="diagonal")  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="region:place"):
        find(GAZE, tiny, items, target="place")
    lone = strip(made, regions={})
    assert find(GAZE, tiny, lone).values["main"].shape == (3, 3, 4)
    with pytest.raises(Refusal, match="one region"):
        find(GAZE, tiny, lone, score="contrast")
    with pytest.raises(InputError, match="none of its others"):
        gaze_matrix(tiny, lone)
    mixed = replace(items, items=(items.items[0], *strip(made, (1, 2), regions=REGIONS | {"x": (8,)}).items[:1]))
    with pytest.raises(InputError, match="other regions"):
        gaze_matrix(tiny, mixed)
    with pytest.raises(InputError, match="L9H0"):
        gaze_matrix(tiny, items).of("L9H0")
