"""The page of `headwise bench looking`: in how many models each row holds, and the rows by model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from headwise.benches.looking import PARTS
from headwise.benches.looking.row import Pair, Row

Found = Mapping[str, Mapping[str, Sequence[Row]]]
"""By model and part."""

HEAD = """<!-- Made by `python -m headwise.benches.looking`; change that package instead. -->

# Heads that look, on the visual organism and its siblings

What heads that look at pictures are worth, and what edits of them do, on [models](visual-organism.md) trained on drawn
pictures. Heads are found and strengths set on pictures of their own; what judges no model saw in training. `change` is
with the edit less without, `beyond` with it less the mean of its controls; both with 95 percent intervals of the
bootstrap over items (and controls; in verdicts Student's). A row *holds* where both go the intended way with their
whole intervals, and for what is to be kept where the interval of the change lies above -0.05. The models are small:
what fails here may still work in models of 7B, and the other way round.
"""


def page(found: Found) -> str:
    """All models in Markdown."""
    lines = [HEAD, "## In how many models\n"]
    for id, part in PARTS.items():
        lines += [
            f"{_linked(part.title, id)}:\n",
            "| row | goes the way | holds | change, by model |",
            "|---|---|---|---|",
        ]
        lines += [_summary(name, _by_model(found, id, name)) for name in _names(found, id)]
        nowhere = [
            name for name in _names(found, id) if not any(row.holds for row in _by_model(found, id, name).values())
        ]
        lines += ["", f"In no model: {'; '.join(nowhere)}.", ""] if nowhere else [""]
    for id, part in PARTS.items():
        lines += [f"## {id}\n", f"{part.title}. {part.how}\n"]
        for name in _names(found, id):
            lines += _table(name, _by_model(found, id, name))
    return "\n".join(lines).rstrip() + "\n"


def _linked(title: str, id: str) -> str:
    return f"[{title}](#{id})"


def _names(found: Found, part: str) -> list[str]:
    return list(dict.fromkeys(row.name for parts in found.values() for row in parts.get(part, ())))


def _by_model(found: Found, part: str, name: str) -> dict[str, Row]:
    return {model: row for model, parts in found.items() for row in parts.get(part, ()) if row.name == name}


def _summary(name: str, rows: Mapping[str, Row]) -> str:
    n, served = len(rows), [row for row in rows.values() if not row.refused]
    changes = ", ".join("none" if row.refused else f"{row.change:+.3f}" for row in rows.values())
    kept = any(row.wanted == 0 for row in served)
    goes = f"{'kept in ' if kept else ''}{sum(row.changes for row in rows.values())} of {n}"
    needs_controls = any(row.wanted and not row.ruling and not row.controls for row in served)
    holds = "no controls" if needs_controls else f"{sum(row.holds for row in rows.values())} of {n}"
    return f"| {name} | {goes} | {holds} | {changes} |"


def _table(name: str, rows: Mapping[str, Row]) -> list[str]:
    lines = [
        f"**{name}**\n",
        "| model | heads | items | without | with | change | beyond | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(model, row) for model, row in rows.items()]
    notes = [f"- {model}: {row.note}" for model, row in rows.items() if row.note]
    return [*lines, "", *notes, ""] if notes else [*lines, ""]


def _line(model: str, row: Row) -> str:
    if row.refused:
        return f"| {model} | none: {row.refused.split('. ')[0]} | | | | | | no |"
    heads = ", ".join(row.heads[:8]) + (f" and {len(row.heads) - 8} more" if len(row.heads) > 8 else "")
    cells = (
        model,
        heads,
        str(row.items),
        f"{row.without:.3f}",
        f"{row.edited:.3f}",
        _with_interval(row.change, row.interval),
        _with_interval(row.beyond, row.beyond_interval),
        "yes" if row.holds else "no",
    )
    return f"| {' | '.join(cells)} |"


def _with_interval(value: float, interval: Pair) -> str:
    low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if math.isfinite(value) else ""
