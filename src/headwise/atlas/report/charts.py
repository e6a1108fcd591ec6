"""The drawings, as inline SVG: strips of effects, heat maps, curves. Colours and type are the style sheet's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from headwise.atlas.report.colours import Scale
from headwise.atlas.report.markup import Html, join, tag
from headwise.atlas.report.numerals import number, percent, tick
from headwise.atlas.report.view import Behaviour, Claim, Dose, HeadMap

STRIP = (220, 24)
WIDEST_MAP = 300
CURVE = (300, 168)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to places: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return round(self.start + (self.end - self.start) * (value - self.low) / span, 1)

    def ticks(self) -> list[float]:
        """Round values in the range, some four of them."""
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        rough = span / 4
        power = 10.0 ** floor(log10(rough))
        step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


def strip_axis(behaviours: Sequence[Behaviour]) -> Axis:
    """One axis for all strips of a report: shares of reach, at least 0 to 1."""
    effects = ((each, (claim.effect, *claim.controls)) for each in behaviours for claim in each.verified)
    shares = [share for each, values in effects for share in map(each.share, values) if isfinite(share)]
    return Axis(min([0.0, *shares]), max([1.0, *shares]), 8.0, STRIP[0] - 8.0)


def strip(claim: Claim, behaviour: Behaviour, axis: Axis) -> Html:
    """The effect as a point, held against the band of its controls: from their mean to their 95th percentile; single
    controls as ticks where they are known, the smallest effect of interest as a dotted line."""
    width, height = STRIP
    middle = height / 2
    share, smallest = behaviour.share(claim.effect), behaviour.share(behaviour.smallest)
    mean, ceiling = behaviour.share(claim.control_mean), behaviour.share(claim.ceiling)
    parts = [tag("line", class_="grid", x1=axis.at(at), x2=axis.at(at), y1=1, y2=height - 1) for at in (0.0, 1.0)]
    if isfinite(mean) and isfinite(ceiling):
        left, right = sorted((axis.at(mean), axis.at(ceiling)))
        wide = round(max(2.0, right - left), 1)
        parts.append(tag("rect", class_="band", x=left, width=wide, y=middle - 5, height=10, rx=1))
        parts.append(tag("line", class_="stem", x1=axis.at(mean), x2=axis.at(share), y1=middle, y2=middle))
    ticks = "".join(f"M{axis.at(behaviour.share(each))} {middle + 3}v5" for each in claim.controls if isfinite(each))
    if ticks:
        parts.append(tag("path", class_="ticks", d=ticks))
    if isfinite(smallest):
        parts.append(tag("line", class_="smallest", x1=axis.at(smallest), x2=axis.at(smallest), y1=3, y2=height - 3))
    if isfinite(share):
        parts.append(tag("circle", class_="point", cx=axis.at(share), cy=middle, r=4.5))
    label = (
        f"effect {percent(share)} of reach; controls: mean {percent(mean)}, 95th percentile {percent(ceiling)}, "
        f"n = {claim.n_controls}"
    )
    return tag("svg", tag("title", label), *parts, class_="strip", viewBox=f"0 0 {width} {height}", role="img")


def strip_scale(axis: Axis) -> Html:
    """The ticks of the strips' axis, for the head of their column."""
    texts = [
        tag("text", percent(at), x=axis.at(at), y=10, text_anchor="middle")
        for at in (0.0, 0.5, 1.0)
        if axis.low <= at <= axis.high
    ]
    return tag("svg", *texts, class_="strip scale", viewBox=f"0 0 {STRIP[0]} 13", aria_hidden="true")


def heat_map(drawn: HeadMap, scale: Scale) -> Html:
    """Layers downwards, heads to the right, one path for all cells of a colour; verified heads are framed.

    The values go along as an attribute, for the script that names the cell under the pointer.
    """
    rows, heads = drawn.values.shape
    cell = max(3, min(20, WIDEST_MAP // max(1, heads)))
    left, top = 8 + 7 * max(map(len, drawn.rows), default=2), 16
    cells: dict[str, list[str]] = {}
    for row in range(rows):
        for head in range(heads):
            if isfinite(drawn.values[row, head]):
                step = scale.step(float(drawn.values[row, head]))
                cells.setdefault(step, []).append(f"M{head * cell} {row * cell}h{cell - 1}v{cell - 1}h-{cell - 1}z")
    every_row = -(-11 // cell)
    frames = "".join(f"M{h * cell - 0.5} {r * cell - 0.5}h{cell}v{cell}h-{cell}z" for r, h in drawn.marked)
    drawing = join(
        (
            tag("text", label, x=-6, y=i * cell + cell / 2 + 4, text_anchor="end")
            for i, label in enumerate(drawn.rows)
            if i % every_row == 0
        ),
        (
            tag("text", str(i), x=i * cell + cell / 2, y=-5, text_anchor="middle")
            for i in range(0, heads, max(1, -(-22 // cell) if heads > 12 else 1))
        ),
        (tag("path", class_=f"cell {step}", d="".join(paths)) for step, paths in sorted(cells.items())),
        tag("path", class_="frames", d=frames) if frames else None,
        tag("rect", class_="cursor", width=cell, height=cell, x=-0.5, y=-0.5, visibility="hidden"),
    )
    width, height = left + heads * cell + 2, top + rows * cell + 2
    values = [[None if not isfinite(v) else float(f"{v:.3g}") for v in row] for row in drawn.values.tolist()]
    return tag(
        "svg",
        tag("g", drawing, transform=f"translate({left} {top})"),
        class_="map",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="application",
        aria_label=f"{drawn.title}: {rows} layers by {heads} heads; arrow keys move from head to head",
        tabindex=0,
        data_cell=cell,
        data_left=left,
        data_top=top,
        data_rows=json.dumps(drawn.rows),
        data_values=json.dumps(values, separators=(",", ":")),
    )


def legend(scale: Scale) -> Html:
    steps = [tag("i", class_=f"key {step}") for step, _ in scale.legend()]
    # An end that is nothing beside the other one is written as nothing.
    low = 0.0 if abs(scale.low) < abs(scale.high) / 1000 else scale.low
    return tag("span", number(low), " ", *steps, " ", number(scale.high), class_="legend")


def curve(dose: Dose) -> Html:
    """Effect against dose: a line through points, the interval as a band, the controls' upper bound dashed."""
    width, height = CURVE
    seen = [v for v in (*dose.effect, *dose.low, *dose.high, *dose.control_high, 0.0) if isfinite(v)]
    across = Axis(min(0.0, *dose.x), max(dose.x), 50.0, width - 14.0)
    up = Axis(min(seen), max(seen), height - 32.0, 10.0)
    grid = [
        join(
            tag("line", class_="grid", x1=50, x2=width - 14, y1=up.at(t), y2=up.at(t)),
            tag("text", tick(t), x=44, y=up.at(t) + 4, text_anchor="end"),
        )
        for t in up.ticks()
    ]
    below = [tag("text", tick(t), x=across.at(t), y=height - 17, text_anchor="middle") for t in across.ticks()]
    places = [(across.at(x), up.at(y)) for x, y in zip(dose.x, dose.effect, strict=True) if isfinite(y)]
    parts: list[Html | None] = [*grid, *below]
    if dose.low and dose.high:
        upper = [(across.at(x), up.at(y)) for x, y in zip(dose.x, dose.high, strict=True) if isfinite(y)]
        lower = [(across.at(x), up.at(y)) for x, y in zip(dose.x, dose.low, strict=True) if isfinite(y)]
        if upper and lower:
            parts.append(tag("path", class_="band", d=_line([*upper, *reversed(lower)]) + "z"))
    if dose.control_high:
        bound = [(across.at(x), up.at(y)) for x, y in zip(dose.x, dose.control_high, strict=True) if isfinite(y)]
        parts.append(tag("path", class_="bound", d=_line(bound)))
    parts.append(tag("path", class_="curve", d=_line(places)))
    parts += [
        tag("circle", tag("title", f"{number(x)}: {number(y)} {dose.unit}"), class_="point", cx=place, cy=level, r=3.5)
        for x, y, (place, level) in zip(dose.x, [v for v in dose.effect if isfinite(v)], places, strict=False)
    ]
    parts.append(tag("text", dose.x_name, x=(50 + width - 14) / 2, y=height - 3, text_anchor="middle"))
    values = ", ".join(f"{number(x)}: {number(y)}" for x, y in zip(dose.x, dose.effect, strict=True))
    return tag(
        "svg",
        *parts,
        class_="dose",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"effect in {dose.unit} by {dose.x_name}: {values}",
    )


def _line(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) if places else ""
