"""The verdict: behaviours at a glance, then every verified claim with its effect, controls, q and off-target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headwise.atlas.report.charts import Axis, strip, strip_axis, strip_scale
from headwise.atlas.report.markup import Html, cell, join, tag
from headwise.atlas.report.numerals import NONE, chance_of, counted, interval, number, percent
from headwise.atlas.report.view import Behaviour, Claim, Fresh, Off, Report

MARKS = {"verified": "\u25cf", "not verified": "\u25cb", "undecidable": "\u25d0", "refused": "\u2298"}
MATCHES = {"layers": "same layers", "model": "any layer"}
HEADS_SHOWN = 12
ROWS_SHOWN = 20
KEY = (
    ("dot", "effect of taking the heads out"),
    ("bandkey", "control band: mean to 95th percentile of the controls"),
    ("tickkey", "one control set"),
    ("dotted", "smallest effect of interest"),
)


def lead(report: Report) -> Html:
    """One sentence that says what came out."""
    found = [each for each in report.behaviours if each.verified]
    refused = [each for each in report.behaviours if each.refusal]
    heads = len(report.verified_heads)
    sets = sum(len(each.heads) > 1 for behaviour in found for each in behaviour.verified)
    and_sets = f" and {counted(sets, 'set')} of heads together" if sets else ""
    text = (
        f"{heads} of {counted(report.n_heads, 'head')} {_be(heads)} verified alone{and_sets}, "
        f"for {len(found)} of {counted(len(report.behaviours), 'behaviour')}."
    )
    if refused:
        text += f" {len(refused)} {_be(len(refused))} refused."
    if not report.complete:
        text += " The atlas is not complete: this is what was there when the report was written."
    return tag("p", text, class_="lead")


def glance(report: Report) -> Html:
    """One line a behaviour: does the model solve it, which heads are verified, how many claims fell."""
    head = _head(
        ("Behaviour", "Solved", "Verified alone", "Best set together", "Claims verified"), "Solved", "Claims verified"
    )
    return tag("table", head, tag("tbody", *map(_glance_row, report.behaviours)), class_="glance stacked")


def verified(report: Report) -> Html:
    """Every verified claim, by behaviour, all on one axis."""
    found = [each for each in report.behaviours if each.verified]
    if not found:
        return tag("p", "Nothing is verified. What was tried, and why it fell, is listed below.", class_="empty")
    axis = strip_axis(found)
    key = tag("p", *(tag("span", tag("i", class_=kind), f" {text}") for kind, text in KEY), class_="key-line")
    return join(key, *(_family(each, axis) for each in found))


def not_verified(report: Report) -> Html:
    """What was tried and fell: sets first, then single heads, the largest effects of them by name."""
    parts: list[Html] = []
    refused = [each for each in report.behaviours if each.refusal]
    if refused or report.refused:
        lines = [tag("li", tag("b", each.probe), f": {each.refusal}") for each in refused]
        lines += [tag("li", tag("b", each.what), f": {each.reason}") for each in report.refused]
        parts.append(join(tag("h3", f"{MARKS['refused']} Refused"), tag("ul", *lines, class_="reasons")))
    for behaviour in report.behaviours:
        fallen = [each for each in behaviour.claims if each.ruling != "verified"]
        if fallen and not behaviour.refusal:
            parts.append(_fallen(behaviour, fallen))
    return join(*parts) if parts else tag("p", "Everything that was tried is verified.", class_="empty")


def family_line(behaviour: Behaviour) -> Html:
    """What the numbers of one behaviour are, named in full."""
    solved = behaviour.solved == behaviour.solved
    texts = (
        f"{behaviour.metric} ({behaviour.unit})",
        f"clean {number(behaviour.clean)}, chance {number(behaviour.chance)}",
        f"solves {percent(behaviour.solved)} of items" if solved else "gives no answers",
        f"n = {behaviour.n_items} held-out items",
        f"mode {behaviour.mode}, scope {behaviour.scope}",
        f"family of {counted(behaviour.family_size, 'claim')}",
        f"smallest of interest {number(behaviour.smallest)}",
    )
    return tag("p", *(tag("span", text) for text in texts), class_="facts")


def chips(heads: tuple[str, ...]) -> Html:
    shown = [tag("code", head, class_="chip") for head in heads[:HEADS_SHOWN]]
    rest = f"+{len(heads) - HEADS_SHOWN}" if len(heads) > HEADS_SHOWN else None
    return tag("span", *(join(chip, " ") for chip in shown), rest, class_="chips", title=rest and ", ".join(heads))


def _glance_row(behaviour: Behaviour) -> Html:
    solved = cell("Solved", percent(behaviour.solved), class_="n")
    if behaviour.refusal:
        why = cell("Verdict", _ruling("refused"), f" {behaviour.refusal}", colspan=3, class_="long")
        return tag("tr", tag("th", behaviour.probe, scope="row"), solved, why)
    alone = behaviour.verified_heads
    best = behaviour.best_set
    claims = Counter(each.ruling for each in behaviour.claims)
    counts = f"{claims['verified']} of {len(behaviour.claims)}"
    if claims["undecidable"]:
        counts += f", {claims['undecidable']} undecidable"
    name = tag("a", behaviour.probe, href=f"#{_anchor(behaviour)}") if behaviour.verified else behaviour.probe
    set_found = "none"
    if best is not None:
        share = percent(behaviour.share(best.effect))
        heads = counted(len(best.heads), "head") if best.method else best.heads[0]
        set_found = f"{heads} ({best.chosen_by}), {share} of reach"
    return tag(
        "tr",
        tag("th", name, scope="row"),
        solved,
        cell("Verified alone", chips(alone) if alone else "none", class_=None if alone else "quiet"),
        cell("Best set", set_found, class_=None if best else "quiet"),
        cell("Claims verified", counts, class_="n"),
    )


def _family(behaviour: Behaviour, axis: Axis) -> Html:
    numeric = ("Effect", "Excess,\n95 % interval", "Controls,\n95th percentile", "q", "Off-target")
    columns = ("Heads", "Chosen by", numeric[0], "Share of reach", *numeric[1:])
    rows = [_claim_row(each, behaviour, axis) for each in behaviour.verified]
    widths = tag("colgroup", *(tag("col", class_=f"w{i}") for i in range(len(columns))))
    head = _head(columns, *numeric, scale=strip_scale(axis))
    return tag(
        "section",
        tag("h3", behaviour.probe, tag("small", behaviour.title)),
        family_line(behaviour),
        _fresh(behaviour.fresh) if behaviour.fresh else None,
        tag("table", widths, head, tag("tbody", *rows), class_="claims stacked"),
        id=_anchor(behaviour),
        class_="family",
    )


def _fresh(fresh: Fresh) -> Html:
    """The set of heads that all this comes down to, tried where nothing was chosen."""
    n = len(fresh.heads)
    who = f"The {counted(n, 'head')} behind it, out together" if n > 1 else "The head behind it, out"
    held = "holds" if fresh.holds else "does not hold"
    lost = f"{percent(fresh.share)} of reach [{percent(fresh.low)}, {percent(fresh.high)}]"
    return tag(
        "p",
        f"On {fresh.n_items} fresh items, which neither found nor verified a head, it {held}. {who}: {lost} lost; "
        f"{fresh.n_controls} random sets: up to {percent(fresh.ceiling)} (95th percentile). ",
        chips(fresh.heads),
        class_="note fresh",
    )


def _claim_row(claim: Claim, behaviour: Behaviour, axis: Axis) -> Html:
    n = len(claim.heads)
    beside = f"{n} together, {claim.alone} verified alone" if n > 1 else ""
    if claim.named_by:
        beside = f"named by {', '.join(claim.named_by[:3])}" + (", ..." if len(claim.named_by) > 3 else "")
    controls = f"n = {claim.n_controls}, {MATCHES.get(claim.match, claim.match)}"
    return tag(
        "tr",
        tag("th", chips(claim.heads), scope="row"),
        cell("Chosen by", claim.chosen_by, tag("small", beside) if beside else None, class_="by"),
        cell("Effect", number(claim.effect), tag("small", behaviour.unit), class_="n"),
        cell("Share of reach", strip(claim, behaviour, axis), class_="drawn"),
        cell("Excess, 95 % interval", number(claim.excess), tag("small", interval(claim.low, claim.high)), class_="n"),
        cell("Controls, 95th pct.", number(claim.ceiling), tag("small", controls), class_="n"),
        cell("q", chance_of(claim.q), tag("small", f"p {chance_of(claim.p)}, {claim.p_kind}"), class_="n"),
        cell("Off-target", _off(claim.off), class_="n"),
    )


def _off(measured: tuple[Off, ...]) -> Html:
    if not measured:
        return tag("span", NONE, title="not measured for this claim")
    return join(
        *(
            tag(
                "span",
                number(each.effect),
                tag("small", each.unit),
                tag("small", interval(each.low, each.high), tag("br"), f"{each.probe}, n = {each.n_items}"),
            )
            for each in measured
        )
    )


def _fallen(behaviour: Behaviour, fallen: Sequence[Claim]) -> Html:
    sets = [each for each in fallen if each.method]
    singles = sorted((each for each in fallen if not each.method), key=lambda each: -behaviour.rank(each))
    rows = [
        tag(
            "tr",
            tag("th", chips(each.heads), scope="row"),
            cell("Verdict", _ruling(each.ruling)),
            cell("Chosen by", each.chosen_by),
            cell(f"Effect, {behaviour.unit}", number(each.effect), class_="n"),
            cell("q", chance_of(each.q), class_="n"),
            cell("Why", each.reason, class_="reason long"),
        )
        for each in (*sets, *singles[:ROWS_SHOWN])
    ]
    effect = f"Effect, {behaviour.unit}"
    left = len(singles) - ROWS_SHOWN
    rest = f"{left} more single heads with smaller effects are in the tables of the atlas." if left > 0 else None
    said = ", ".join(f"{n} {ruling}" for ruling, n in Counter(each.ruling for each in fallen).most_common())
    return tag(
        "details",
        tag("summary", tag("b", behaviour.probe), f" {said}", tag("span", f"n = {behaviour.n_items}", class_="quiet")),
        family_line(behaviour),
        tag(
            "table",
            _head(("Heads", "Verdict", "Chosen by", effect, "q", "Why"), effect, "q"),
            tag("tbody", *rows),
            class_="fallen stacked",
        ),
        tag("p", rest, class_="quiet") if rest else None,
    )


def _head(columns: Sequence[str], *numeric: str, scale: Html | None = None) -> Html:
    """The head of a table; `scale` goes under the column of drawings."""
    cells = [
        tag(
            "th",
            name,
            scale if name == "Share of reach" else None,
            scope="col",
            class_="n" if name in numeric else None,
        )
        for name in columns
    ]
    return tag("thead", tag("tr", *cells))


def _ruling(ruling: str) -> Html:
    return tag("span", f"{MARKS[ruling]} {ruling}", class_=f"ruling {ruling.replace(' ', '-')}")


def _be(n: int) -> str:
    return "is" if n == 1 else "are"


def _anchor(behaviour: Behaviour) -> str:
    key = f"{behaviour.probe}-{behaviour.metric}-{behaviour.mode}-{behaviour.scope}"
    return "family-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in key)
