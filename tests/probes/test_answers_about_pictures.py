"""The right answer of every probe with pictures, found again from pixels and text by a reader of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import islice, product
from random import Random

import numpy as np
import pytest

from headwise.probes import PICTURE_PROBES, Item, encode, probe
from headwise.probes.picture import Picture
from headwise.probes.scenes import COLORS, GRID, OUTLINES, PAIRS, SHAPES, STRIP, Layout, Scene, Thing, draw

ITEMS = 48


def drawn(id: str) -> list[Item]:
    of = probe(id)
    clear = of.over(faintness=0.0) if "faintness" in of.grid else of
    return list(islice(clear.items("right"), ITEMS))


def read(picture: Picture, box: tuple[int, int, int, int]) -> str:
    """What a clear picture shows in a box: the color by the mean, the shape by the outline that fits best."""
    left, top, right, bottom = box
    # Two pixels of the border may be the frame of a panel.
    cell = picture.array()[top + 1 : bottom - 1, left + 1 : right - 1].astype(float)
    ground = np.median(picture.array(), axis=(0, 1))
    inside = np.abs(cell - ground).max(-1) > 45
    if inside.sum() < 12:
        return "nothing"
    mean = cell[inside].mean(0)
    color = min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum())
    return f"{color} {max(outlines(), key=lambda each: _overlap(_cropped(inside), each[1]))[0]}"


@cache
def outlines() -> list[tuple[str, np.ndarray]]:
    """Every shape in every size, between pixels too, as it looks in the box around it."""
    found = []
    for shape, radius, right, down in product(SHAPES, np.arange(4.6, 6.3, 0.2), (0.0, 0.5), (0.0, 0.5)):
        y, x = np.indices((16, 16)) - 8.0
        found.append((shape, _cropped(OUTLINES[shape]((x - right) / radius, (y - down) / radius))))
    return found


def _cropped(inside: np.ndarray) -> np.ndarray:
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    return inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    rows, columns = np.minimum(one.shape, other.shape)
    both = (one[:rows, :columns] & other[:rows, :columns]).sum()
    return both / (one.sum() + other.sum() - both)


def shown(picture: Picture, layout: Layout = GRID) -> list[str]:
    return [read(picture, layout.box(number)) for number in range(len(layout))]


def shapes(picture: Picture) -> set[str]:
    return {each.split()[-1] for each in shown(picture)} - {"nothing"}


def asked(prompt: str, pattern: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, prompt, flags=re.DOTALL)
    assert found, f"{prompt!r} does not read as {pattern!r}"
    return found.groups()


Pictures = tuple[Picture, ...]


def solve_panel(prompt: str, pictures: Pictures) -> str:
    (number,) = asked(prompt, r"<image>\nWhat is in panel (\d)\?\nAnswer:")
    return f" {read(pictures[0], STRIP.box(int(number) - 1))}"


def solve_strip(prompt: str, pictures: Pictures) -> str:
    asked(prompt, r"<image>\nDescribe the strip\.\nAnswer:")
    return f" {', '.join(shown(pictures[0], STRIP))}."


def solve_place(prompt: str, pictures: Pictures) -> str:
    what, number = asked(prompt, r"<image>\nWhat (color|shape) is in cell (\d)\?\nAnswer:")
    color, shape = read(pictures[0], GRID.box(int(number) - 1)).split()
    return f" {color if what == 'color' else shape}"


def solve_count(prompt: str, pictures: Pictures) -> str:
    (word,) = asked(prompt, r"<image>\nHow many (\w+) things are there\?\nAnswer:")
    return f" {sum(word in each.split() for each in shown(pictures[0]))}"


def solve_existence(prompt: str, pictures: Pictures) -> str:
    (shape,) = asked(prompt, r"<image>\nIs there a (\w+)\?\nAnswer:")
    return " yes" if shape in shapes(pictures[0]) else " no"


def solve_listing(prompt: str, pictures: Pictures) -> str:
    asked(prompt, r"<image>\nName the shapes\.\nAnswer:")
    return f" {', '.join(sorted(shapes(pictures[0])))}."


def solve_picture_needle(prompt: str, pictures: Pictures) -> str:
    album, question = asked(prompt, r"((?:Picture \d: <image>\n)+)(.*)\nAnswer:")
    assert [int(each) for each in re.findall(r"\d", album)] == list(range(1, len(pictures) + 1))
    (shape,) = re.findall(r"(\w+)\?", question)
    ((number, place),) = [
        (number, each)
        for number, picture in enumerate(pictures)
        for each in shown(picture)
        if each.split()[-1] == shape
    ]
    return f" {place.split()[0]}" if question.startswith("What color") else f" {number + 1}"


def solve_text_needle(prompt: str, pictures: Pictures) -> str:
    (what,) = re.findall(r"What is the (\w+)\?\nAnswer:$", prompt)
    (word,) = re.findall(rf"The {what} is (\w+)\.", prompt)
    return f" {word}"


SOLVERS: dict[str, Callable[[str, Pictures], str]] = {
    "count": solve_count,
    "existence": solve_existence,
    "listing": solve_listing,
    "panel": solve_panel,
    "picture-needle": solve_picture_needle,
    "place": solve_place,
    "strip": solve_strip,
    "text-needle": solve_text_needle,
}


def test_every_probe_with_pictures_has_a_solver() -> None:
    assert set(SOLVERS) == {each.id for each in PICTURE_PROBES}


@pytest.mark.parametrize("layout", [GRID, STRIP], ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_stands_in_its_place_in_its_color_and_shape(layout: Layout, shape: str) -> None:
    for number, color in zip(range(len(layout)), COLORS, strict=False):
        things = tuple(Thing(shape, color) if each == number else None for each in range(len(layout)))
        picture = draw(Scene(layout, things), Random(f"{shape}/{number}"))
        assert shown(picture, layout) == [str(each or "nothing") for each in things]


@pytest.mark.parametrize("id", sorted(SOLVERS))
def test_the_answer_is_what_the_picture_shows(id: str) -> None:
    for item in drawn(id):
        assert SOLVERS[id](str(item.prompt), item.pictures) == item.answer
        assert item.answer not in item.foils


@pytest.mark.parametrize("id", sorted(SOLVERS))
def test_the_twin_has_the_same_text_another_picture_and_another_answer(id: str) -> None:
    for item in drawn(id)[:12]:
        twin = item.twin
        assert twin is not None
        assert SOLVERS[id](str(twin.prompt), twin.pictures or item.pictures) == twin.answer != item.answer
        if id != "text-needle":
            assert twin.prompt == item.prompt
            assert twin.pictures != item.pictures
        if item.foils and id != "text-needle":
            assert twin.answer in item.foils


@pytest.mark.parametrize("id", ["panel", "place", "count", "existence", "listing"])
def test_only_the_target_differs_in_the_twins_picture(id: str) -> None:
    for item in drawn(id)[:12]:
        assert item.twin is not None
        left, top, right, bottom = item.regions["target"].box
        differs = (item.pictures[0].array() != item.twin.pictures[0].array()).any(-1)
        assert differs[top:bottom, left:right].any()
        differs[top:bottom, left:right] = False
        assert not differs.any()


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_questions_of_a_kind_ask_for_what_the_kind_says(kind: str) -> None:
    partner = {each: other for pair in PAIRS for each, other in (pair, pair[::-1])}
    for item in islice(probe("existence").over(kind=kind, faintness=0.0).items(), 24):
        there, shape = shapes(item.pictures[0]), item.attributes["shape"]
        assert (shape in there) == (item.answer == " yes")
        assert (item.attributes["partner"] == "there") == (partner[shape] in there) == ("partner" in item.regions)
        if kind == "adversarial":
            assert partner[shape] in there
        if kind == "popular":
            assert shape in PAIRS[0] + PAIRS[1]


def test_the_target_of_a_needle_is_the_shape_in_its_picture() -> None:
    for item in drawn("picture-needle")[:12]:
        target = item.regions["target"]
        shape = re.findall(r"(\w+)\?", str(item.prompt))[0]
        assert read(item.pictures[target.picture], target.box).split()[-1] == shape
        assert item.attributes["depth"] == target.picture / (len(item.pictures) - 1)


@pytest.mark.parametrize("pictures", [0, 1, 4])
def test_a_text_needle_stands_at_its_depth_among_any_number_of_pictures(pictures: int) -> None:
    for item in islice(probe("text-needle").over(pictures=pictures).items(), 12):
        assert len(item.pictures) == pictures
        (place,) = item.spans["needle"]
        before = str(item.prompt)[: place.start].count("<image>")
        assert item.attributes["depth"] == (before / pictures if pictures else 0)


def test_a_second_sentence_tells_another_word() -> None:
    for item in islice(probe("text-needle").over(sentences=2).items(), 12):
        (place,) = item.spans["distractor"]
        (foil,) = item.foils
        assert str(item.prompt)[place.start : place.stop].endswith(f"{foil}.")
    one = next(probe("text-needle").items())
    assert "distractor" not in one.spans
    assert one.foils[0] not in str(one.prompt)


SETTINGS = [
    ("count", "asked", "size"),
    ("count", "number", 5),
    ("existence", "answer", "maybe"),
    ("existence", "faintness", 1.2),
    ("existence", "kind", "usual"),
    ("listing", "faintness", "much"),
    ("picture-needle", "asked", "shape"),
    ("picture-needle", "pictures", 1),
    ("place", "asked", "size"),
    ("text-needle", "pictures", 5),
    ("text-needle", "sentences", 3),
]


@pytest.mark.parametrize(("id", "setting", "bad"), SETTINGS)
def test_a_setting_out_of_range_is_refused(id: str, setting: str, bad: object) -> None:
    from headwise import InputError

    with pytest.raises(InputError, match=f"setting '{setting}' must be"):
        next(probe(id).over(**{setting: [bad]}).items())


def test_every_setting_is_tried() -> None:
    assert {(id, name) for id, name, _ in SETTINGS} == {
        (each.id, name) for each in PICTURE_PROBES for name in each.grid
    }


def test_items_can_be_written_for_a_model_that_sees() -> None:
    import headwise as hw

    with hw.load("zoo:tiny-llava") as model:
        for each in PICTURE_PROBES:
            items = encode(each, model, n=6)
            # A password in bytes is mostly longer or shorter than its twin.
            assert items.n_dropped == 0 or each.id == "text-needle"
            assert set(each.spans) <= set(items.items[0].spans)
