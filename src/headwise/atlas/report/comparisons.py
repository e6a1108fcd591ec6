"""Maps of every method, and the specialisation matrix with its dissociations."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from headwise.atlas.report.charts import heat_map, legend
from headwise.atlas.report.colours import Scale
from headwise.atlas.report.markup import Html, cell, join, tag
from headwise.atlas.report.numerals import NONE, chance_of, counted, interval, number, percent
from headwise.atlas.report.view import HeadMap, Kinds, Matrix

TOP = 5
PAIRS_SHOWN = 30


def maps(drawn: Sequence[HeadMap]) -> Html:
    """What was measured first, then one map of every method, then each method's maps on its other probes."""
    measured = [each for each in drawn if not each.descriptive]
    by_method: dict[str, list[HeadMap]] = {}
    for each in drawn:
        if each.descriptive:
            by_method.setdefault(each.title, []).append(each)
    parts: list[Html] = []
    if measured:
        parts += [tag("h3", "Effect of each head alone", class_="over"), _grid(measured)]
    if by_method:
        firsts = [of_method[0] for of_method in by_method.values()]
        parts += [tag("h3", "Scores by method", tag("small", "descriptive"), class_="over"), _grid(firsts)]
    for title, of_method in by_method.items():
        if len(of_method) > 1:
            said = f" descriptive, on {counted(len(of_method) - 1, 'other probe')}"
            parts.append(tag("details", tag("summary", tag("b", title), said), _grid(of_method[1:])))
    return join(*parts)


def _grid(drawn: Sequence[HeadMap]) -> Html:
    return tag("div", *map(_figure, drawn), class_="maps")


def matrix(found: Matrix) -> Html:
    """Heads verified for something, by behaviours; verified cells in bold with a frame, the others muted."""
    scale = Scale(min(0.0, -_largest(found)) if (found.shares < -0.005).any() else 0.0, max(_largest(found), 1e-9))
    head = tag(
        "tr",
        tag("th", "Head", scope="col"),
        *(
            tag("th", tag("span", name), scope="col", class_="up first" if place == _first_picture(found) else "up")
            for place, name in enumerate(found.behaviours)
        ),
        tag("th", tag("span", "selectivity"), scope="col", class_="up n"),
    )
    rows = [
        tag(
            "tr",
            tag("th", tag("code", label), scope="row"),
            *(_cell(found, scale, row, column) for column in range(len(found.behaviours))),
            tag("td", _index(float(found.selectivity[row])), class_="n"),
        )
        for row, label in enumerate(found.heads)
    ]
    table = tag("table", tag("thead", _kinds_above(found), head), tag("tbody", *rows), class_="matrix")
    return join(
        tag(
            "p",
            "Effect of each head alone, in percent of what the behaviour has to lose. ",
            tag("b", "Bold and framed"),
            ": verified. The others are descriptive. ",
            f"Selectivity is {found.index}.",
            class_="note",
        ),
        tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="specialisation matrix"),
        tag("p", text_against_pictures(found.kinds)) if found.kinds else None,
        _pairs(found),
        _alike(found),
        _masked(found),
    )


def text_against_pictures(found: Kinds) -> str:
    """How far heads divide by what is asked about, in words."""
    heads = (
        f"{counted(found.text, 'head')} verified for a behaviour of text, {found.pictures} for one of pictures, "
        f"{found.both} for both ({number(found.by_chance, 2)} by chance, p {chance_of(found.p)})."
    )
    if not found.pairs:
        return heads
    return (
        f"{heads} {found.double} of {counted(found.pairs, 'pair')} of a text and a picture behaviour rest on different "
        "heads (double dissociation)."
    )


def _first_picture(found: Matrix) -> int:
    """The column with which behaviours of pictures begin; -1 where there is one kind."""
    return len(found.behaviours) - found.n_pictures if found.kinds else -1


def _kinds_above(found: Matrix) -> Html | None:
    if not found.kinds:
        return None
    return tag(
        "tr",
        tag("td"),
        tag("th", "Text", scope="colgroup", colspan=_first_picture(found), class_="kind"),
        tag("th", "Pictures", scope="colgroup", colspan=found.n_pictures, class_="kind first"),
        tag("td"),
    )


def _figure(drawn: HeadMap) -> Html:
    values = drawn.values[np.isfinite(drawn.values)]
    scale = Scale.over(values.tolist())
    best = _largest_heads(drawn)
    label = "descriptive: not verified" if drawn.descriptive else "measured by knock-out"
    stack = None if drawn.stack == "main" else f", {drawn.stack} stack"
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("b", drawn.title),
            tag("span", f"on {drawn.probe}, n = {drawn.n_items}", stack),
            tag("span", label, class_="label"),
        ),
        heat_map(drawn, scale) if values.size else tag("p", "no values", class_="empty"),
        legend(scale) if values.size else None,
        tag("output", f"highest: {best}" if best else NONE),
        tag("p", drawn.note, class_="quiet") if drawn.note else None,
        data_n=drawn.n_items,
    )


def _largest_heads(drawn: HeadMap) -> str:
    places = [(row, head) for row, head in np.argwhere(np.isfinite(drawn.values))]
    places.sort(key=lambda at: -drawn.values[at])
    return ", ".join(f"{drawn.rows[row]}H{head} {number(float(drawn.values[row, head]))}" for row, head in places[:TOP])


def _cell(found: Matrix, scale: Scale, row: int, column: int) -> Html:
    share = float(found.shares[row, column])
    first = " first" if column == _first_picture(found) else ""
    if not isfinite(share):
        return tag("td", NONE, class_=f"none{first}", title="not measured")
    sure = bool(found.verified[row, column])
    text = f"{100 * share:.0f}".replace("-0", "0").replace("-", "\u2212")
    said = f"{found.heads[row]} on {found.behaviours[column]}: {percent(share)} of reach, " + (
        "verified" if sure else "descriptive: not verified"
    )
    return tag(
        "td",
        tag("b", text) if sure else text,
        class_=f"{scale.step(share)} {'sure' if sure else 'unsure'}{first}",
        title=said,
    )


def _index(selectivity: float) -> str:
    return f"{selectivity:.2f}" if isfinite(selectivity) else NONE


def _largest(found: Matrix) -> float:
    values = np.abs(found.shares[np.isfinite(found.shares)])
    return float(values.max()) if values.size else 0.0


def _pairs(found: Matrix) -> Html | None:
    if not found.pairs:
        return None
    double = len(found.dissociated)
    head = tag(
        "tr",
        tag("th", "Heads of", scope="col"),
        tag("th", "against", scope="col"),
        tag("th", "Own lost", scope="col", class_="n"),
        tag("th", "Other lost", scope="col", class_="n"),
        tag("th", "More than random heads, 95 % interval", scope="col", class_="n"),
        tag("th", "Double dissociation", scope="col"),
    )
    rows = [
        tag(
            "tr",
            tag("th", each.heads_of, scope="row"),
            cell("against", each.other),
            cell("Own lost", percent(each.own), class_="n"),
            cell("Other lost", percent(each.cross), class_="n"),
            cell("More than random heads, 95 % interval", _percents(each.low, each.high), class_="n"),
            cell("Double dissociation", "yes" if each.double else "no"),
        )
        for each in found.pairs[:PAIRS_SHOWN]
    ]
    left = len(found.pairs) - PAIRS_SHOWN
    return tag(
        "details",
        tag("summary", tag("b", "Double dissociation"), f" {counted(double, 'pair')} of {len(found.pairs) // 2}"),
        tag(
            "p",
            "The heads of one behaviour out, on its own items and on another's: shares of reach lost, on fresh items "
            "that neither found nor verified a head. Double: both sets cost their own behaviour more than the other, "
            "and more so than random heads of the same layers.",
            class_="note",
        ),
        tag("table", tag("thead", head), tag("tbody", *rows), class_="pairs stacked"),
        tag("p", f"{left} more rows are in the tables of the atlas.", class_="quiet") if left > 0 else None,
    )


def _alike(found: Matrix) -> Html | None:
    if not found.alike:
        return None
    head = tag(
        "tr",
        tag("th", "Behaviours", scope="col"),
        tag("th", "Rank correlation of effects", scope="col", class_="n"),
        tag("th", "Verified heads shared", scope="col", class_="n"),
        tag("th", "by chance", scope="col", class_="n"),
        tag("th", "p", scope="col", class_="n"),
    )
    rows = [
        tag(
            "tr",
            tag("th", f"{each.first}, {each.second}", scope="row"),
            cell("Rank correlation of effects", number(each.spearman, 2), class_="n"),
            cell("Verified heads shared", str(each.shared), class_="n"),
            cell("by chance", number(each.by_chance, 2), class_="n"),
            cell("p", chance_of(each.p), class_="n"),
        )
        for each in found.alike[:PAIRS_SHOWN]
    ]
    return tag(
        "details",
        tag("summary", tag("b", "Similarity of behaviours"), f" {counted(len(found.alike), 'pair')}"),
        tag("table", tag("thead", head), tag("tbody", *rows), class_="pairs stacked"),
    )


def _masked(found: Matrix) -> Html | None:
    if not found.masked:
        return None
    columns = ("Heads out", "D, original", "D, scale-free", "random heads, original", "random heads, scale-free")
    head = tag(
        "tr", *(tag("th", name, scope="col", class_="n" if place else None) for place, name in enumerate(columns))
    )
    rows = [
        tag(
            "tr",
            tag("th", f"{percent(each.share)}, {counted(each.n_heads, 'head')}", scope="row"),
            cell(columns[1], number(each.original), class_="n"),
            cell(columns[2], number(each.scale_free), class_="n"),
            cell(columns[3], number(each.random_original), class_="n"),
            cell(columns[4], number(each.random_scale_free), class_="n"),
        )
        for each in found.masked
    ]
    return tag(
        "details",
        tag("summary", tag("b", "Functional dissociation"), " descriptive"),
        tag(
            "p",
            "D of Li et al. 2023, in percent, mean over behaviours: how much better the others are solved than the "
            "behaviour whose most important heads (by gate gradient) are out. Scale-free: each behaviour over its own "
            "accuracy.",
            class_="note",
        ),
        tag("table", tag("thead", head), tag("tbody", *rows), class_="pairs stacked"),
    )


def _percents(low: float, high: float) -> str:
    return f"[{percent(low)}, {percent(high)}]" if isfinite(low) and isfinite(high) else interval(low, high)
