"""What a picture shows, place by place: panels of a strip, cells of a grid, and how many there are of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from headwise.probes.item import Item, Passage
from headwise.probes.picture import PICTURE_MARK
from headwise.probes.scenes import (
    COLORS,
    GRID,
    SHAPES,
    STRIP,
    Scene,
    Thing,
    draw,
    grid,
    placed,
    some_color,
    some_thing,
    strip,
)
from headwise.probes.stream import Probe, require

MOST = 4
"""Largest number that the probe `count` asks for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a scene and its answer, which begins with a blank."""

    question: str
    answer: str


def about_panel(scene: Scene, number: int) -> Asked:
    """What is in a panel, counted from 0."""
    thing = scene.things[number]
    return Asked(f"What is in panel {number + 1}?", f" {thing}" if thing else " nothing")


def about_strip(scene: Scene) -> Asked:
    """All panels in order."""
    return Asked("Describe the strip.", " " + ", ".join(str(each or "nothing") for each in scene.things) + ".")


def about_place(scene: Scene, number: int, asked: str) -> Asked:
    """The `color` or `shape` in a cell, counted from 0."""
    thing = scene.things[number]
    answer = "nothing" if thing is None else thing.color if asked == "color" else thing.shape
    return Asked(f"What {asked} is in cell {number + 1}?", f" {answer}")


def about_number(scene: Scene, word: str) -> Asked:
    """How many things have a color or a shape."""
    return Asked(f"How many {word} things are there?", f" {sum(_is(each, word) for each in scene.things)}")


def asks(asked: Asked, picture: str = PICTURE_MARK) -> Passage:
    """The prompt: the picture, and the question behind it."""
    return Passage().add(f"{picture}\n").add(asked.question, "question").add("\nAnswer:")


def _is(thing: Thing | None, word: str) -> bool:
    return thing is not None and word in (thing.shape, thing.color)


def _other(random: Random, thing: Thing | None) -> Thing:
    """A thing of another shape and another color."""
    while True:
        found = some_thing(random)
        if thing is None or (found.shape != thing.shape and found.color != thing.color):
            return found


def _panel(random: Random) -> Item:
    scene = strip(random)
    number = random.choice(scene.taken or [0])
    if not scene.taken:
        scene = scene.put(0, some_thing(random))
    twin = scene.put(number, _other(random, scene.things[number]))
    return _changed(
        random, scene, twin, about_panel(scene, number), about_panel(twin, number), number, panel=number + 1
    )


def _place(random: Random, *, asked: str) -> Item:
    require("asked", asked, ("color", "shape"))
    scene = grid(random, copies=3)
    number = random.choice(scene.taken)
    twin = scene.put(number, _other(random, scene.things[number]))
    return _changed(
        random,
        scene,
        twin,
        about_place(scene, number, asked),
        about_place(twin, number, asked),
        number,
        asked=asked,
        cell=number + 1,
    )


def _changed(
    random: Random, scene: Scene, twin: Scene, right: Asked, other: Asked, number: int, **attributes: Any
) -> Item:
    """A question about one place; in the twin's picture another thing stands there, and nothing else has changed."""
    seed = random.getrandbits(32)
    return asks(right).item(
        right.answer,
        twin=asks(other),
        twin_answer=other.answer,
        foils=(other.answer,),
        pictures=(draw(scene, Random(seed)),),
        twin_pictures=(draw(twin, Random(seed)),),
        regions=scene.layout.regions() | {"target": scene.layout.region(number)},
        **attributes,
    )


def _strip(random: Random) -> Item:
    scene = strip(random)
    shifted = Scene(STRIP, (*scene.things[1:], scene.things[0]))
    seed = random.getrandbits(32)
    return asks(about_strip(scene)).item(
        about_strip(scene).answer,
        twin=asks(about_strip(shifted)),
        twin_answer=about_strip(shifted).answer,
        pictures=(draw(scene, Random(seed)),),
        twin_pictures=(draw(shifted, Random(seed)),),
        regions=STRIP.regions(),
        nothing=len(scene.free),
    )


def counted(random: Random, asked: str, number: int) -> tuple[Scene, str]:
    """A grid with `number` things of one color or shape and one to three others, and the word for it."""
    word = random.choice(SHAPES if asked == "shape" else tuple(COLORS))
    things: list[Thing] = []
    while len(things) < number:
        things.append(Thing(word, some_color(random)) if asked == "shape" else Thing(random.choice(SHAPES), word))
    others = random.randint(1, 3)
    while len(things) < number + others:
        thing = some_thing(random)
        if not _is(thing, word):
            things.append(thing)
    return placed(random, GRID, things), word


def _count(random: Random, *, asked: str, number: int) -> Item:
    require("asked", asked, ("color", "shape"))
    require("number", number, range(MOST + 1))
    scene, word = counted(random, asked, number)
    right = about_number(scene, word)
    fewer = random.random() < 0.5 if 0 < number < MOST else number == MOST
    if fewer:
        place = random.choice([each for each in scene.taken if _is(scene.things[each], word)])
        twin = scene.put(place, None)
    else:
        place = random.choice(scene.free)
        twin = scene.put(
            place, Thing(word, some_color(random)) if asked == "shape" else Thing(random.choice(SHAPES), word)
        )
    seed = random.getrandbits(32)
    return asks(right).item(
        right.answer,
        twin=asks(right),
        twin_answer=about_number(twin, word).answer,
        foils=tuple(f" {each}" for each in range(MOST + 1) if each != number),
        pictures=(draw(scene, Random(seed)),),
        twin_pictures=(draw(twin, Random(seed)),),
        regions=GRID.regions() | {"target": GRID.region(place)},
        asked=asked,
        number=number,
    )


PANEL = Probe(
    id="panel",
    title="what a panel of a strip shows; in the twin's picture it shows something else",
    page="visual-organism.md#panel",
    make=_panel,
    metric="answer-log-probability",
    chance=None,
    spans=("question",),
    in_prompt=False,
)

STRIP_IN_ORDER = Probe(
    id="strip",
    title="the six panels of a strip in order",
    page="visual-organism.md#strip",
    make=_strip,
    metric="answer-log-probability",
    chance=None,
    spans=("question",),
    in_prompt=False,
)

PLACE = Probe(
    id="place",
    title="the color or the shape in a cell of a grid",
    page="visual-organism.md#place",
    make=_place,
    metric="logit-difference",
    chance=0.0,
    spans=("question",),
    in_prompt=False,
    grid={"asked": ("color", "shape")},
)

COUNT = Probe(
    id="count",
    title="how many things of a color or a shape a grid shows",
    page="visual-organism.md#count",
    make=_count,
    metric="logit-difference",
    chance=0.0,
    spans=("question",),
    in_prompt=False,
    grid={"asked": ("color", "shape"), "number": tuple(range(MOST + 1))},
)
