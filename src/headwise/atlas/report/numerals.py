"""Numbers as the report writes them: three figures, a true minus sign, a dash where there is none."""

from __future__ import annotations

from math import floor, isfinite, log10

NONE = "\u2013"
MINUS = "\u2212"


def number(value: float, figures: int = 3) -> str:
    """`0.0123`, `4.57`, `\u22120.2`, `12,300`; a dash for NaN."""
    if not isfinite(value):
        return NONE if value != value else (MINUS if value < 0 else "") + "\u221e"
    if value == 0:
        return "0"
    size = floor(log10(abs(value)))
    if size < -4:
        text = f"{value:.{figures - 1}e}"
    else:
        text = f"{round(value, figures - 1 - size):,.{max(0, figures - 1 - size)}f}"
    return text.replace("-", MINUS)


def tick(value: float) -> str:
    """A round value beside an axis: `0.25`, `4`."""
    return f"{value:.6g}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share as `47 %`, below one percent as `0.4 %`."""
    if not isfinite(share):
        return NONE
    digits = 1 if 0 < abs(share) < 0.00995 else 0
    text = f"{100 * share:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else MINUS) + "\u202f%"


def chance_of(p: float) -> str:
    """A p or q: `0.032`, and below a thousandth `< 0.001`."""
    if not isfinite(p):
        return NONE
    return "<\u202f0.001" if p < 0.001 else f"{p:.3f}"


def interval(low: float, high: float) -> str:
    if not (isfinite(low) and isfinite(high)):
        return NONE
    return f"[{number(low)}, {number(high)}]"


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 head`, `3 heads`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
