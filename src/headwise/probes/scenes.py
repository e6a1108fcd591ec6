"""Small pictures of coloured shapes, drawn from a seed: grids of nine cells and strips of six panels.

In grids shapes come in pairs: where a circle is there is mostly a star as well. What is faint can then be guessed from
what is clear, and what is not there guessed wrongly: the cause of hallucination that these pictures are made for.
In strips every panel is drawn for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import numpy as np
from jaxtyping import Bool, Float

from headwise.probes.picture import Picture, Pixels, Region

SIDE = 48
"""Of every picture, in pixels."""

SHAPES = ("circle", "cross", "diamond", "heart", "ring", "square", "star", "triangle")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (40, 165, 65),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (150, 55, 190),
    "black": (25, 25, 25),
}

PAIRS = (("circle", "star"), ("heart", "square"), ("cross", "triangle"), ("diamond", "ring"))
"""Shapes that come together in grids, the more frequent pairs first."""
FREQUENCY = (0.4, 0.3, 0.18, 0.12)
"""How often each pair is drawn."""
TOGETHER = 0.87
"""Share of the grids with one shape of a pair in which the other is there as well."""
PARTNER: Mapping[str, str] = {each: other for pair in PAIRS for each, other in (pair, pair[::-1])}
POPULAR = tuple(shape for pair in PAIRS[:2] for shape in pair)
"""The shapes that most grids show."""

GROUND = (140, 165)
"""Gray of the ground, from and to."""
NOISE = 9.0
"""Standard deviation of every pixel's noise, in steps of 255."""
DECADES = 3.0
"""Powers of ten through which contrasts fall in a picture of faintness 1."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One colored shape."""

    shape: str
    color: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a picture is divided into equal places, counted in reading order."""

    name: str
    rows: int
    columns: int
    place: str
    """What one of them is called."""

    def __len__(self) -> int:
        return self.rows * self.columns

    def box(self, number: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of a place counted from 0."""
        width, height = SIDE // self.columns, SIDE // self.rows
        row, column = divmod(number, self.columns)
        return column * width, row * height, (column + 1) * width, (row + 1) * height

    def region(self, number: int, *, picture: int = 0) -> Region:
        return Region(picture, self.box(number))

    def regions(self, *, picture: int = 0) -> dict[str, Region]:
        """Every place by its name: `cell-1` to `cell-9`, `panel-1` to `panel-6`."""
        return {f"{self.place}-{each + 1}": self.region(each, picture=picture) for each in range(len(self))}


GRID = Layout("grid", 3, 3, "cell")
STRIP = Layout("strip", 2, 3, "panel")


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a thing, or nothing, in each place of its layout.

    `faintness` 0 shows every thing clearly; of faintness f the contrasts with the ground are spread over `DECADES` * f
    powers of ten, so that some things are clear and others are lost in the noise.
    """

    layout: Layout
    things: tuple[Thing | None, ...]
    faintness: float = 0.0

    @cached_property
    def shapes(self) -> tuple[str, ...]:
        """Those that are there, each once, in the order of the alphabet."""
        return tuple(sorted({each.shape for each in self.things if each}))

    @property
    def taken(self) -> list[int]:
        return [number for number, each in enumerate(self.things) if each]

    @property
    def free(self) -> list[int]:
        return [number for number, each in enumerate(self.things) if each is None]

    def where(self, shape: str) -> int:
        """The first place of a shape that is there."""
        return next(number for number, each in enumerate(self.things) if each and each.shape == shape)

    def put(self, number: int, thing: Thing | None) -> Scene:
        """This scene with another thing, or nothing, in one place."""
        return replace(self, things=(*self.things[:number], thing, *self.things[number + 1 :]))


def some_color(random: Random) -> str:
    return random.choice(tuple(COLORS))


def some_thing(random: Random) -> Thing:
    return Thing(random.choice(SHAPES), some_color(random))


def placed(random: Random, layout: Layout, things: Sequence[Thing], *, faintness: float = 0.0) -> Scene:
    """A scene with these things in places drawn at random."""
    where = random.sample(range(len(layout)), len(things))
    by_place = dict(zip(where, things, strict=True))
    return Scene(layout, tuple(by_place.get(number) for number in range(len(layout))), faintness)


def some_shapes(random: Random, pairs: int) -> list[str]:
    """Different shapes as grids have them: one of each of `pairs` pairs, and mostly its partner."""
    found: list[str] = []
    while len(found) < pairs:
        shape = random.choice(random.choices(PAIRS, FREQUENCY)[0])
        if shape not in found and PARTNER[shape] not in found:
            found.append(shape)
    return found + [PARTNER[each] for each in found if random.random() < TOGETHER]


def grid(random: Random, *, faintness: float = 0.0, copies: int = 0) -> Scene:
    """A grid of one or two pairs of shapes; with `copies`, up to so many of them stand there again."""
    shapes = some_shapes(random, random.choice((1, 2, 2)))
    shapes += random.choices(shapes, k=random.randint(0, copies))
    return placed(random, GRID, [Thing(each, some_color(random)) for each in shapes], faintness=faintness)


def strip(random: Random, *, empty: float = 0.15, faintness: float = 0.0) -> Scene:
    """A strip whose panels are drawn each for itself; a share of `empty` of them shows nothing."""
    things = tuple(None if random.random() < empty else some_thing(random) for _ in range(len(STRIP)))
    return Scene(STRIP, things, faintness)


def draw(scene: Scene, random: Random) -> Picture:
    """The picture of a scene, with places, sizes, contrasts and noise drawn at random."""
    return Picture.drawn(pixels(scene, random))


def pixels(scene: Scene, random: Random) -> Pixels:
    """The pixels of `draw`."""
    noise = np.random.Generator(np.random.SFC64(random.getrandbits(63)))
    ground = random.uniform(*GROUND)
    canvas = noise.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * np.float32(NOISE) + np.float32(ground)
    if scene.layout is STRIP:
        canvas -= 60.0 * _frames()[:, :, None]
    for number, thing in enumerate(scene.things):
        # Drawn for empty places as well: with one thing more, the others look the same.
        size, across, down, fade = (random.random() for _ in range(4))
        if thing is None:
            continue
        left, top, right, bottom = scene.layout.box(number)
        radius = 4.6 + 1.6 * size
        spare_x, spare_y = (right - left) / 2 - radius - 1, (bottom - top) / 2 - radius - 1
        x = np.arange(right - left) - ((right - left - 1) / 2 + spare_x * (2 * across - 1))
        y = np.arange(bottom - top) - ((bottom - top - 1) / 2 + spare_y * (2 * down - 1))
        inside = OUTLINES[thing.shape](x[None, :] / radius, y[:, None] / radius)
        contrast = 10.0 ** (-DECADES * scene.faintness * fade)
        canvas[top:bottom, left:right][inside] += contrast * (np.array(COLORS[thing.color], np.float32) - ground)
    drawn: Pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return drawn


def _frames() -> Float[np.ndarray, "row column"]:
    """1 on the border lines of the panels of a strip, one pixel wide."""
    lines = np.zeros((SIDE, SIDE), np.float32)
    for number in range(len(STRIP)):
        left, top, right, bottom = STRIP.box(number)
        lines[top:bottom, left] = lines[top:bottom, right - 1] = 1.0
        lines[top, left:right] = lines[bottom - 1, left:right] = 1.0
    return lines


Row = Float[np.ndarray, "1 column"]
Column = Float[np.ndarray, "row 1"]
Outline = Callable[[Row, Column], Bool[np.ndarray, "row column"]]


def _star(x: Row, y: Column) -> Bool[np.ndarray, "row column"]:
    inside: Bool[np.ndarray, "row column"] = np.hypot(x, y) <= 0.7 + 0.42 * np.cos(5 * np.arctan2(x, -y))
    return inside


OUTLINES: Mapping[str, Outline] = {
    "circle": lambda x, y: np.hypot(x, y) <= 1.0,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 1.0),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1.1,
    "heart": lambda x, y: ((1.2 * x) ** 2 + (1.2 * y) ** 2 - 1) ** 3 + (1.2 * x) ** 2 * (1.2 * y) ** 3 <= 0,
    "ring": lambda x, y: (np.hypot(x, y) <= 1.05) & (np.hypot(x, y) >= 0.55),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.88,
    "star": _star,
    "triangle": lambda x, y: (np.abs(x) <= (y + 1.0) / 1.8) & (y <= 0.8),
}
"""Whether a point is inside a shape of radius 1, x to the right, y downward."""
