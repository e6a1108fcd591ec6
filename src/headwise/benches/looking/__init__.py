"""What looking heads are worth on the visual organism and its siblings, against random heads, picture by picture.

    headwise bench looking                                                     # the organism
    python -m headwise.benches.looking docs/looking-results.md zoo:visual-organism organisms/visual-sibling-1 ...

Heads are found and strengths set on pictures of their own; what judges no organism saw in training. A part of the table
is stored when it is done (`--folder`), so that the second command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import headwise
from headwise.benches.looking import concepts, hallucinating, pruned, redirected, verdicts
from headwise.benches.looking.items import Bench
from headwise.benches.looking.row import Row
from headwise.benches.looking.stored import Stored
from headwise.errors import HeadwiseError

Said = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A part of the table: what is shown; and where heads and settings are from, and what the controls are."""

    title: str
    how: str
    rows: Callable[[Bench], Sequence[Row]]


PARTS: Mapping[str, Part] = {
    "verdicts": Part(
        "Heads that look are needed for what they look at",
        "As many heads as one in twelve, the best of each method on pictures of its own, are taken out together. The "
        "quantity is the logit of the right answer less that of the best wrong one. Controls: random heads, as many in "
        "the same layers. A row holds where the verdict is `verified`; `multimodal-retrieval on picture-needle` are "
        "heads found with evidence in pictures, `on text-needle` with evidence in a sentence.",
        verdicts.part,
    ),
    "hallucination": Part(
        "Fewer things are seen that are not there",
        "Adversarial questions of POPE and listings on faint pictures. `false yes` is the share of yes where the shape "
        "is not there, CHAIR_i of the named shapes, CHAIR_s of the listings with one. `recall` and `clear pictures` "
        "(panel, place and count, right to the last token) are to be kept: the whole interval above -0.05. Controls: "
        "for VHR random halves of the heads of every layer, reinforced alike; for VAR the same share moved in random "
        "halves of the heads of its layers; for PAINT by head the weights dealt out anew in every layer. PAINT as "
        "released takes all heads alike and has none. `tuned` is the best of a small grid on other items, for "
        "questions and for listings each by itself. An independent table has VAR worse than none in captions of a "
        "large model (CHAIR 52.5 against 48.6, LLaVA-1.5).",
        hallucinating.part,
    ),
    "gaze": Part(
        "Heads made to look at another place answer for that place",
        "Share of questions about one place that are answered with what stands in another, to the last token, one pair "
        "of places from each picture. Heads by the mass that the last token has on the place (the paper), by contrast "
        "with the other places, and by the mass that the question's tokens have there (`multimodal-retrieval`, ours). "
        "Controls: random heads, as many in the same layers.",
        redirected.part,
    ),
    "concepts": Part(
        "Color words are written less, or more",
        "Heads by Head Pursuit on strips of their own, multiplied by -1 or by 5 while others are described. Other "
        "words are to be kept. Controls: random heads, as many in the same layers.",
        concepts.part,
    ),
    "pruning": Part(
        "Image tokens can be let go of, head by head",
        "Answers that are right to the last token, when each head keeps a share of the image tokens behind the prompt. "
        "Controls: as many tokens of each head at random. A row holds where what is right is kept.",
        pruned.part,
    ),
}
"""By id, in the order of the page."""


def measure(*, seed: int = 0, said: Said = lambda _: None) -> dict[str, float]:
    """Of the organism, for every row `PART.ROW.without`, `.edited`, `.change`, `.beyond` and `.holds` (1, or 0 where it
    does not, or was refused)."""
    with headwise.load("zoo:visual-organism", dtype="float32") as model:
        found = parts_of(Bench(model, seed), said)
    return figures(found)


def figures(found: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The numbers of some parts by name."""
    numbers: dict[str, float] = {}
    for part, rows in found.items():
        for row in rows:
            name = f"{part}.{row.name}"
            values = {"without": row.without, "edited": row.edited, "change": row.change, "beyond": row.beyond}
            numbers |= {f"{name}.{key}": value for key, value in values.items()} | {f"{name}.holds": float(row.holds)}
    return numbers


def parts_of(bench: Bench, said: Said, stored: Stored | None = None) -> dict[str, list[Row]]:
    """All parts of one model. What is in `stored` is taken from there, and what is not is put there."""
    found = {}
    for name, part in PARTS.items():
        rows = None if stored is None else stored.rows(name)
        if rows is None:
            said(f"{bench.model.name}: {name} ...")
            rows = _rows(name, part, bench)
            if stored is not None:
                stored.put(name, rows)
        found[name] = rows
        said(f"{bench.model.name}: {name}: {sum(row.holds for row in rows)} of {len(rows)} rows hold")
    return found


def _rows(name: str, part: Part, bench: Bench) -> list[Row]:
    """A part that cannot be served is a row, too."""
    try:
        return list(part.rows(bench))
    except HeadwiseError as error:
        return [Row(name, refused=str(error))]
