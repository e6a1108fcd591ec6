"""A head's attention on the pictures of an item: the picture once, and for each head its cells over it."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, sqrt

import numpy as np
from jaxtyping import UInt8

from headwise.atlas.report.markup import Html, join, tag
from headwise.atlas.report.numerals import number, percent
from headwise.atlas.report.view import Example, Pattern

SIDE, GAP = 160, 8
"""Of a picture as it is drawn, its longer side, and between two of them."""
STEPS = 8
FAINT = 0.01
"""A cell of full colour has at least this weight: a head that looks elsewhere is not to look as if it looked here."""
COARSE = 96
"""Pictures of fewer pixels are drawn with sharp ones."""


def overlays(example: Example, name: str) -> Html:
    """The pictures of an item, and what its heads see of them; `name` is one of the page's own for this item."""
    drawing = _Drawing(example, name)
    unknown = dict.fromkeys(each.unknown for each in example.pictures if each.unknown)
    plain = tag(
        "figure",
        tag("figcaption", tag("b", _pictures(example)), tag("span", _sizes(example))),
        tag(
            "svg",
            *(drawing.image(number) for number in range(len(example.pictures))),
            viewBox=drawing.view,
            role="img",
            aria_label=f"{_pictures(example)} of item {example.item}, {_sizes(example)}",
            class_="seen",
        ),
    )
    known = drawing.boxes
    figures = [drawing.figure(pattern) for pattern in example.patterns] if known else []
    return join(
        *(tag("p", reason, class_="quiet") for reason in unknown),
        tag(
            "div",
            plain,
            *figures,
            class_="looks",
            data_boxes=json.dumps([[at, *map(_short, box)] for at, box in known], separators=(",", ":")),
            data_places=json.dumps([drawing.place(at) for at in range(len(example.pictures))], separators=(",", ":")),
        ),
    )


@dataclass(frozen=True)
class _Drawing:
    """Where the pictures of one item stand: in rows, as nearly a square as they go."""

    example: Example
    name: str

    @property
    def columns(self) -> int:
        return ceil(sqrt(len(self.example.pictures)))

    @property
    def view(self) -> str:
        n = len(self.example.pictures)
        right = [x + self.example.pictures[at].size[0] * scale for at in range(n) for x, _, scale in [self.place(at)]]
        below = [y + self.example.pictures[at].size[1] * scale for at in range(n) for _, y, scale in [self.place(at)]]
        return f"0 0 {max(right):g} {max(below):g}"

    @cached_property
    def boxes(self) -> list[tuple[int, tuple[float, ...]]]:
        """Every cell with the number of its picture, in pixels of that."""
        return [(at, tuple(box)) for at, each in enumerate(self.example.pictures) for box in each.boxes.tolist()]

    def place(self, number: int) -> tuple[float, float, float]:
        """Left and top of a picture, and by how much its pixels are larger."""
        row, column = divmod(number, self.columns)
        scale = SIDE / max(self.example.pictures[number].size)
        return float(column * (SIDE + GAP)), float(row * (SIDE + GAP)), scale

    def image(self, number: int) -> Html:
        shot, (x, y, scale) = self.example.pictures[number], self.place(number)
        return tag(
            "image",
            id=f"{self.name}-{number}",
            href=f"data:image/png;base64,{base64.b64encode(png(shot.pixels)).decode()}",
            x=x,
            y=y,
            width=shot.size[0] * scale,
            height=shot.size[1] * scale,
            preserveAspectRatio="none",
            class_="coarse" if max(shot.pixels.shape[:2]) < COARSE else None,
        )

    def figure(self, pattern: Pattern) -> Html:
        weights = [w for of_picture in self._known(pattern) for w in of_picture]
        on_pictures = sum(w for of_picture in pattern.cells for w in of_picture)
        full = max([*weights, FAINT])
        strongest = self._strongest(pattern, weights)
        share = f"{percent(on_pictures)} on {_pictures(self.example)}"
        return tag(
            "figure",
            tag(
                "figcaption",
                tag("b", pattern.head, tag("small", "verified" if pattern.verified else "descriptive")),
                tag("span", share),
            ),
            tag(
                "svg",
                tag("g", *(tag("use", href=f"#{self.name}-{at}") for at in range(len(self.example.pictures)))),
                *self._shades(weights, full),
                tag("rect", class_="cursor", visibility="hidden"),
                viewBox=self.view,
                role="application",
                tabindex=0,
                class_="look",
                aria_label=f"attention of {pattern.head}, item {self.example.item}: {share}; most: {strongest}; "
                "arrow keys move from cell to cell",
                data_head=pattern.head,
                data_weights=json.dumps(list(map(_two_figures, weights)), separators=(",", ":")),
            ),
            tag("output", f"most: {strongest}"),
        )

    def _known(self, pattern: Pattern) -> Iterator[tuple[float, ...]]:
        for of_picture, shot in zip(pattern.cells, self.example.pictures, strict=True):
            if len(shot.boxes):
                yield of_picture

    def _shades(self, weights: list[float], full: float) -> Iterator[Html]:
        paths: dict[int, list[str]] = {}
        for weight, (at, (left, top, right, bottom)) in zip(weights, self.boxes, strict=True):
            x, y, scale = self.place(at)
            if step := round(STEPS * weight / full):
                across, down = (right - left) * scale, (bottom - top) * scale
                start = f"M{_short(x + left * scale)} {_short(y + top * scale)}"
                paths.setdefault(step, []).append(f"{start}h{_short(across)}v{_short(down)}h-{_short(across)}z")
        for step, parts in sorted(paths.items()):
            yield tag("path", class_="shade", fill_opacity=step / STEPS, d="".join(parts))

    def _strongest(self, pattern: Pattern, weights: list[float]) -> str:
        at = max(range(len(weights)), key=weights.__getitem__)
        picture, box = self.boxes[at]
        return f"{where(picture, box, len(self.example.pictures))}: weight {number(weights[at])}"


def where(picture: int, box: tuple[float, ...], of: int) -> str:
    """A cell in words; report.js says the same."""
    left, top, right, bottom = (str(_short(each)) for each in box)
    said = f"{left} to {right} across, {top} to {bottom} down"
    return f"picture {picture + 1}, {said}" if of > 1 else said


def png(pixels: UInt8[np.ndarray, "row column 3"]) -> bytes:
    """The file of a picture: PNG in its plainest form, which needs no other package."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _pictures(example: Example) -> str:
    n = len(example.pictures)
    return "the picture" if n == 1 else f"the {n} pictures"


def _sizes(example: Example) -> str:
    sizes = dict.fromkeys(f"{each.size[0]} \u00d7 {each.size[1]} pixels" for each in example.pictures)
    return ", ".join(sizes)


def _two_figures(weight: float) -> float:
    return float(f"{weight:.2g}") if weight >= 1e-4 else 0.0


def _short(value: float) -> float | int:
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded


__all__ = ["FAINT", "overlays", "png", "where"]
