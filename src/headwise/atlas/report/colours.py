"""The colours of maps: steps of one scale, from the page's ground to blue for more, to orange for less than nothing.

Blue and orange differ to every kind of colour vision, and lightness alone gives the order. A step is a class (`c5`,
`m3`), so that one report serves light and dark pages: the style sheet says what the class looks like there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

STEPS = 8

Palette = Mapping[str, str | tuple[str, ...]]

_LIGHT: Palette = {"zero": "f1efea", "more": ("cfe0f1", "5a9bd0", "0b3a78"), "less": ("f7dcc0", "e08a3c", "7a2f00")}
_DARK: Palette = {"zero": "23272e", "more": ("2b3f57", "3f7fbf", "cfe6ff"), "less": ("4d3620", "b96a24", "ffdcae")}
_INKS = ("000000", "ffffff")


@dataclass(frozen=True, slots=True)
class Scale:
    """From `low` to `high`; where values have both signs, symmetric around zero."""

    low: float
    high: float

    @classmethod
    def over(cls, values: list[float]) -> Scale:
        """For values without NaN; a scale from zero, where they are all of one sign, would hide small differences of
        large values, so it begins at the smallest."""
        low, high = min(values, default=0.0), max(values, default=0.0)
        reach = max(-low, high)
        return cls(-reach, reach) if low < 0 < high else cls(low, high)

    def step(self, value: float) -> str:
        """The class of a value; `none` for NaN."""
        if not isfinite(value):
            return "none"
        if self.low < 0 < self.high:
            place = value / self.high
        elif self.high > self.low:
            place = (value - self.low) / (self.high - self.low)
            place = place - 1 if self.high <= 0 else place
        else:
            place = 0.5 if value > 0 else 0.0
        step = round(min(1.0, abs(place)) * STEPS)
        return "c0" if step == 0 else f"{'c' if place > 0 else 'm'}{step}"

    def legend(self) -> list[tuple[str, float]]:
        """The steps from low to high with the value at the middle of each."""
        n = 2 * STEPS if self.low < 0 < self.high else STEPS
        return [(self.step(v), v) for v in (self.low + (self.high - self.low) * i / n for i in range(n + 1))]


def style() -> str:
    """The style sheet's part: grounds and inks of every step, for light pages and for dark ones."""
    light, dark = (_rules(palette) for palette in (_LIGHT, _DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n" + "".join(
        f".{step}{{--ground:var(--{step});--on:var(--{step}-ink)}}\n" for step in steps()
    )


def steps() -> list[str]:
    return [f"m{i}" for i in range(STEPS, 0, -1)] + [f"c{i}" for i in range(STEPS + 1)]


def grounds(palette: Palette) -> dict[str, str]:
    """Colour of every step, as six hexadecimal figures."""
    found = {"c0": str(palette["zero"])}
    for letter, key in (("c", "more"), ("m", "less")):
        stops = palette[key]
        assert isinstance(stops, tuple)
        found |= {f"{letter}{i}": _between(stops, (i - 1) / (STEPS - 1)) for i in range(1, STEPS + 1)}
    return found


def ink_on(ground: str) -> str:
    """Black or white, whichever is easier to read on a ground."""
    return max(_INKS, key=lambda ink: contrast(ink, ground))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _rules(palette: Palette) -> str:
    return "".join(f"--{s}:#{g};--{s}-ink:#{ink_on(g)};" for s, g in grounds(palette).items())


def _between(stops: tuple[str, ...], place: float) -> str:
    at = place * (len(stops) - 1)
    first = min(int(at), len(stops) - 2)
    pairs = zip(bytes.fromhex(stops[first]), bytes.fromhex(stops[first + 1]), strict=True)
    return bytes(round(a + (b - a) * (at - first)) for a, b in pairs).hex()


def _luminance(colour: str) -> float:
    channels = [c / 255 for c in bytes.fromhex(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
