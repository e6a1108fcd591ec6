"""Single items with a head's attention over their tokens, and effects by dose."""

from __future__ import annotations

import json
from collections.abc import Sequence

from headwise.atlas.report.charts import curve
from headwise.atlas.report.markup import Html, join, tag
from headwise.atlas.report.numerals import number
from headwise.atlas.report.overlays import FAINT, overlays
from headwise.atlas.report.view import Dose, Example, Pattern

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Attention weights at which the shade of a token changes; report.js has the same."""
VISIBLE = {"\n": "\u21b5\n", "\t": "\u21e5", "": "\u2205"}


def examples(drawn: Sequence[Example]) -> Html:
    key = tag(
        "p",
        f"Shade: attention weight {' or '.join(dict.fromkeys(_from(each) for each in drawn))}, one item each (n = 1). ",
        *(tag("span", f"\u2265\u202f{bound:g}", class_=f"t c{i + 1}") for i, bound in enumerate(BOUNDS)),
        class_="note shades",
    )
    pictured = tag(
        "p",
        "On pictures: the fuller the colour, the more of a head's attention goes there, from the same position; full "
        f"is the head's strongest cell, or \u2265\u202f{FAINT:g}.",
        class_="note",
    )
    seen = pictured if any(each.pictures for each in drawn) else None
    return join(key, seen, *(_example(each, f"picture-{number}") for number, each in enumerate(drawn)))


def _from(example: Example) -> str:
    """Which rows are drawn: an item without an answer is encoded as a whole."""
    return "from the position that predicts the answer" if example.answer else "averaged over all positions"


def doses(drawn: Sequence[Dose]) -> Html:
    key = tag(
        "p",
        tag("span", tag("i", class_="dot"), " effect"),
        tag("span", tag("i", class_="bandkey"), " 95 % interval"),
        tag("span", tag("i", class_="dashes"), " controls, 95th percentile"),
        class_="key-line",
    )
    figures = [
        tag(
            "figure",
            tag(
                "figcaption",
                tag("b", each.probe),
                tag("span", each.title),
                tag("span", f"effect in {each.unit}, n = {each.n_items}", class_="quiet"),
            ),
            curve(each),
        )
        for each in drawn
    ]
    return join(key, tag("div", *figures, class_="doses"))


def _example(example: Example, name: str) -> Html:
    first = example.patterns[0] if example.patterns else None
    tokens = [
        # The space before a word stays outside: at the end of a line it would be shaded alone.
        join(
            " " if token[:1] == " " and token.strip(" ") else None,
            tag("span", _visible(token), class_=_shade(first, i)),
        )
        for i, token in enumerate(example.tokens)
    ]
    buttons = [
        tag(
            "button",
            each.head,
            tag("small", "verified" if each.verified else "descriptive"),
            type="button",
            aria_pressed="true" if each is first else "false",
            data_head=each.head,
            data_weights=json.dumps([float(f"{w:.3g}") for w in each.weights], separators=(",", ":")),
        )
        for each in example.patterns
    ]
    return tag(
        "section",
        tag("h3", example.probe, tag("small", f"item {example.item}")),
        tag("div", *buttons, class_="choose", role="group", aria_label="head"),
        tag(
            "p",
            *tokens,
            class_="tokens",
            tabindex=0,
            role="application",
            aria_label=f"tokens of item {example.item}; arrow keys move from token to token",
        ),
        tag("p", "answer: ", tag("b", _visible(example.answer)), class_="answer") if example.answer else None,
        tag("output", _strongest(example, first) if first else "no pattern was kept"),
        overlays(example, name) if example.pictures else None,
        class_="example",
    )


def _strongest(example: Example, pattern: Pattern) -> str:
    at = max(range(len(pattern.weights)), key=pattern.weights.__getitem__)
    token = _visible(example.tokens[at])
    return f"{pattern.head} \u2192 token {at} \u201c{token}\u201d: weight {number(pattern.weights[at])}"


def _shade(pattern: Pattern | None, token: int) -> str:
    weight = pattern.weights[token] if pattern is not None else 0.0
    return f"t c{sum(weight >= bound for bound in BOUNDS)}"


def _visible(token: str) -> str:
    if token.strip(" "):
        token = token.removeprefix(" ")
    return VISIBLE.get(token, token.replace("\n", "\u21b5\n").replace("\t", "\u21e5"))
