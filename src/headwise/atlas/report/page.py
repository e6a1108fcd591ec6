"""The page as a whole: its head, its sections and their order.

Everything is inline. A content policy in the page forbids whatever else would be fetched, and every script but our own.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headwise.atlas.report import closeups, colours, comparisons, verdicts
from headwise.atlas.report.markup import Html, join, tag
from headwise.atlas.report.view import Report, Shown

_FOLDER = Path(__file__).parent

WORDS = (
    Shown(
        "effect", "the clean metric less the metric with the heads out, mean over items; positive where the heads help"
    ),
    Shown("reach", "distance of the clean metric from chance: what there is to lose"),
    Shown("excess", "effect less the mean effect of the controls"),
    Shown(
        "controls",
        "for a set: random sets of the same size in the same layers; for one head: the other heads of its layer. Where "
        "too few exist the match is widened, and the table says so",
    ),
    Shown("q", "p corrected for all claims of the family (Benjamini and Hochberg)"),
    Shown("off-target", "what the same heads cost on another probe, positive where it is for the worse"),
    Shown(
        "verified",
        "q at most 0.05 within the family, effect above the smallest of interest and above the 95th percentile of the "
        "controls, on items that chose nothing",
    ),
    Shown("descriptive", "a score without a verdict: it says where to look, not what a head does"),
)


def page(report: Report) -> str:
    """The report as one HTML document."""
    script = _plain("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sections = _sections(report)
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{report.model}: headwise atlas"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(colours.style() + _plain("report.css"))),
    )
    body = join(
        tag("a", "To the verdict", href="#verdict", class_="skip"),
        _header(report, sections),
        tag("main", *map(_drawn, sections)),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


@dataclass(frozen=True, slots=True)
class _Section:
    id: str
    title: str
    note: str
    content: Html


def _sections(report: Report) -> list[_Section]:
    """Verdict first; what an atlas does not have gets no section."""
    claims = tag("h3", "Verified claims, with their evidence", class_="over")
    verdict = join(verdicts.glance(report), claims, verdicts.verified(report))
    sections = [_Section("verdict", "Verdict", "", verdict)]
    if report.matrix is not None:
        sections.append(_Section("specialisation", "Specialisation", "", comparisons.matrix(report.matrix)))
    if report.maps:
        note = (
            "Layers downwards, heads to the right. A frame marks a head that is verified alone for the probe. "
            "A method's scores are descriptive: they say where to look, not what a head does."
        )
        sections.append(_Section("maps", "Maps", note, comparisons.maps(report.maps)))
    if report.examples:
        sections.append(_Section("examples", "Examples", "", closeups.examples(report.examples)))
    if report.doses:
        note = (
            "The same heads taken out by degrees, or one more at a time. Descriptive: the heads are ordered, and the "
            "costliest set is picked, on the same held-out items that are shown."
        )
        sections.append(_Section("dose", "Dose", note, closeups.doses(report.doses)))
    note = (
        "Not verified: the effect did not stand out. Undecidable: there are too few controls for a p that small. "
        "Refused: the question could not be asked of this model."
    )
    sections.append(_Section("rest", "Not verified, undecidable, refused", note, verdicts.not_verified(report)))
    sections.append(_Section("origin", "How to repeat this", "", _origin(report)))
    return sections


def _drawn(section: _Section) -> Html:
    heading = tag("h2", section.title, id=f"{section.id}-title")
    note = tag("p", section.note, class_="note") if section.note else None
    return tag("section", heading, note, section.content, id=section.id, aria_labelledby=f"{section.id}-title")


def _header(report: Report, sections: list[_Section]) -> Html:
    links = [tag("li", tag("a", each.title, href=f"#{each.id}")) for each in sections]
    return tag(
        "header",
        tag("p", "headwise atlas", class_="over"),
        tag("h1", report.model),
        verdicts.lead(report),
        _list(report.asked, "asked"),
        tag("nav", tag("ul", *links), aria_label="sections"),
    )


def _origin(report: Report) -> Html:
    command = tag(
        "div",
        tag("pre", tag("code", report.command, id="command"), tabindex=0, aria_label="command"),
        tag("button", "Copy", type="button", class_="copy", data_copies="command", hidden=True),
        class_="command",
    )
    files = [tag("h3", "Files of the atlas"), _list(report.files, "origin")] if report.files else []
    return join(command, _list(report.origin, "origin"), *files, tag("h3", "Words"), _list(WORDS, "words"))


def _list(lines: tuple[Shown, ...], kind: str) -> Html:
    return tag("dl", *(tag("div", tag("dt", each.name), tag("dd", each.value)) for each in lines), class_=kind)


@cache
def _plain(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
