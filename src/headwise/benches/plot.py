"""Charts of benches, as one SVG file that stands by itself: panels side by side, each a line through its points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from headwise.atlas.report.charts import Axis
from headwise.atlas.report.markup import Html, join, tag
from headwise.atlas.report.numerals import number, tick

WIDTH, HEIGHT = 250, 190
LEFT, RIGHT, TOP, BOTTOM = 36, 12, 12, 40

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.grid { stroke: #ddd }
.one { stroke: #888; stroke-dasharray: 4 3 }
.curve { fill: none; stroke: #2a6fbb; stroke-width: 2 }
.point { fill: #2a6fbb }
@media (prefers-color-scheme: dark) {
  text { fill: #bbb } .grid { stroke: #444 } .curve { stroke: #7ab3ef } .point { fill: #7ab3ef }
}
"""


@dataclass(frozen=True, slots=True, order=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: ratios (upwards, from 0) over a setting that goes up in powers of two, more or less."""

    title: str
    points: tuple[Point, ...]


def drawn(panels: Sequence[Panel]) -> str:
    """The panels as SVG; all have the same scale upwards, and a dashed line where nothing is gained."""
    highest = max(point.y for panel in panels for point in panel.points)
    up = Axis(0.0, max(highest, 1.0) * 1.05, HEIGHT - BOTTOM, TOP)
    parts = [tag("g", _panel(panel, up), transform=f"translate({i * WIDTH} 0)") for i, panel in enumerate(panels)]
    box = f"0 0 {WIDTH * len(panels)} {HEIGHT}"
    return tag("svg", tag("style", Html(STYLE)), *parts, xmlns="http://www.w3.org/2000/svg", viewBox=box) + "\n"


def _panel(panel: Panel, up: Axis) -> Html:
    xs = [log2(point.x) for point in panel.points]
    across = Axis(min(xs), max(xs), LEFT + 10.0, WIDTH - RIGHT - 10.0)
    places = [(across.at(x), up.at(point.y)) for x, point in zip(xs, panel.points, strict=True)]
    right = WIDTH - RIGHT
    return join(
        (
            join(
                tag("line", class_="grid", x1=LEFT, x2=right, y1=up.at(at), y2=up.at(at)),
                tag("text", tick(at), x=LEFT - 6, y=up.at(at) + 4, text_anchor="end"),
            )
            for at in up.ticks()
        ),
        tag("line", class_="one", x1=LEFT, x2=right, y1=up.at(1.0), y2=up.at(1.0)),
        tag("path", class_="curve", d="M" + "L".join(f"{x:g} {y:g}" for x, y in places)),
        (
            join(
                tag("circle", tag("title", f"{tick(point.x)}: {number(point.y)}"), class_="point", cx=x, cy=y, r=3.5),
                tag("text", tick(point.x), x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"),
            )
            for point, (x, y) in zip(panel.points, places, strict=True)
        ),
        tag("text", panel.title, x=(LEFT + right) / 2, y=HEIGHT - 6, text_anchor="middle"),
    )
