"""Layer x head maps as self-contained HTML: inline SVG, no script, readable on light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headwise.heads import Head, SiteId

_SEQUENTIAL = ("440154", "3b528b", "21918c", "5ec962", "fde725")
_DIVERGING = ("2166ac", "92c5de", "e8e8e8", "f4a582", "b2182b")
_CELL = 16


def heat_maps(
    caption: str,
    sites: Mapping[str, Sequence[SiteId]],
    means: Mapping[str, Float[np.ndarray, "site head"]],
    errors: Mapping[str, Float[np.ndarray, "site head"]],
    counts: Mapping[str, Int[np.ndarray, "site head"]],
) -> str:
    """One map per stack on one colour scale; a cell's title gives head, mean, error and count. NaN is blank."""
    parts = [f"<div>{html.escape(caption)}</div>"]
    scored = np.concatenate([mean[np.isfinite(mean)] for mean in means.values()])
    scale = _ColourScale.over(scored) if scored.size else None
    for stack, mean in means.items():
        cells = [
            f'<rect x="{_CELL * head.index}" y="{_CELL * row}" width="{_CELL}" height="{_CELL}" '
            f'fill="{scale.colour(mean[row, head.index])}" stroke="currentColor" stroke-opacity="0.2">'
            f"<title>{head}: {mean[row, head.index]:.4g} \u00b1 {errors[stack][row, head.index]:.2g} "
            f"(n={counts[stack][row, head.index]})</title></rect>"
            for row, site in enumerate(sites[stack])
            for head in (Head(site, int(index)) for index in np.flatnonzero(np.isfinite(mean[row])))
            if scale is not None
        ]
        parts.append(_framed(stack, [site.label for site in sites[stack]], mean.shape[1], "".join(cells)))
    return f'<div style="font: 11px sans-serif">{"".join(parts)}{scale.legend() if scale else "no scores"}</div>'


@dataclass(frozen=True)
class _ColourScale:
    """From low to high; around zero and symmetric, blue to red, where the scores have both signs."""

    low: float
    high: float

    @classmethod
    def over(cls, means: Float[np.ndarray, " head"]) -> _ColourScale:
        low, high = float(means.min()), float(means.max())
        reach = max(-low, high)
        return cls(-reach, reach) if low < 0 < high else cls(low, high)

    def colour(self, score: float) -> str:
        colours = _DIVERGING if self.low < 0 < self.high else _SEQUENTIAL
        stops = np.array([list(bytes.fromhex(each)) for each in colours])
        place = (score - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        rgb = [round(np.interp(place * 4, range(5), channel)) for channel in stops.T]
        return "#" + bytes(rgb).hex()

    def legend(self) -> str:
        strip = "".join(
            f'<rect x="{3 * i}" width="3" height="10" fill="{self.colour(score)}"/>'
            for i, score in enumerate(np.linspace(self.low, self.high, 40))
        )
        strip = f'<svg width="120" height="10" role="presentation">{strip}</svg>'
        return f"<div>{self.low:.3g} {strip} {self.high:.3g}</div>"


def _framed(stack: str, rows: list[str], n_heads: int, cells: str) -> str:
    """Row labels at the left, head numbers on top. Text takes the page's own colour, dark or light."""
    left, top = 7 * max(map(len, rows)) + 6, 16
    width, height = left + n_heads * _CELL + 1, top + len(rows) * _CELL + 1
    labels = "".join(f'<text x="-4" y="{_CELL * i + 12}" text-anchor="end">{row}</text>' for i, row in enumerate(rows))
    numbers = "".join(
        f'<text x="{_CELL * (i + 0.5):g}" y="-4" text-anchor="middle">{i}</text>'
        for i in range(0, n_heads, -(-n_heads // 32))
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="display:block;max-width:100%;margin:6px 0" '
        f'role="img" aria-label="mean score by site and head, stack {stack}" font-size="10" fill="currentColor">'
        f'<g transform="translate({left} {top})">{labels}{numbers}{cells}</g></svg>'
    )
