"""The page as text: it fetches nothing, escapes every name, and says what is descriptive."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made
import numpy as np
import pytest

from headwise.atlas.report import page, write_page
from headwise.atlas.report.view import Report

VOID = {"br", "circle", "col", "hr", "input", "line", "link", "meta", "path", "rect"}


class Elements(HTMLParser):
    """Every element with its attributes, in order; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def report() -> Report:
    return made.report()


@pytest.fixture(scope="module")
def drawn(report: Report) -> str:
    return page(report)


@pytest.fixture(scope="module")
def elements(drawn: str) -> Elements:
    return Elements(drawn)


def test_nothing_is_fetched(elements: Elements, drawn: str) -> None:
    for tag, attributes in elements.found:
        assert "src" not in attributes
        assert tag not in ("iframe", "img", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        link = attributes.get("href") or ""
        assert not link or link.startswith(("#", "data:,", "data:image/png;base64,"))
    written = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", drawn)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", written)
    policy = next(attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")


def test_a_hostile_name_stays_text(elements: Elements, drawn: str) -> None:
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert made.EVIL not in drawn
    assert sum(made.EVIL in text for text in elements.texts) >= 3


def test_every_link_in_the_page_has_its_end(elements: Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {(attributes.get("href") or "")[1:] for tag, attributes in elements.found if tag == "a"}
    assert links <= set(ids)
    assert {"verdict", "specialisation", "maps", "examples", "dose", "rest", "origin"} <= links


def test_the_verdict_comes_first_with_its_evidence(elements: Elements, report: Report) -> None:
    text = " ".join(" ".join(elements.texts).split())
    assert text.index("Verified claims") < text.index("Layers downwards")
    ioi = text[text.index("which name comes next") :]
    row = ioi[ioi.index("L6H3 alone") :]
    # effect, its excess with the interval, the controls' 95th percentile and number, q, off-target
    assert re.match(
        r"L6H3 alone 2\.90 logits .*? 2\.85 \[2\.45, 3\.25\] 0\.210 n = 63, same layers "
        r"<\s0\.001 p <\s0\.001, rank \u2013",
        row,
    )
    joint = ioi[ioi.index("top of direct-logit") :]
    assert "3 together, 2 verified alone" in joint
    assert "0.0123 nats [0.00400, 0.0210] text, n = 32" in joint


@pytest.mark.parametrize(
    "said", ["mode zero, scope all", "n = 31 held-out items", "family of 74 claims", "logit-difference"]
)
def test_family_and_number_of_items_are_named(said: str, elements: Elements) -> None:
    assert said in " ".join(elements.texts)


def test_the_heads_behind_a_behaviour_are_told_on_fresh_items(report: Report, elements: Elements) -> None:
    said = " ".join("".join(elements.texts).replace("\u202f", " ").split())
    assert (
        "On 8 fresh items, which neither found nor verified a head, it holds. The 2 heads behind it, out together: 91 "
        "% of reach [84 %, 98 %] lost; 20 random sets: up to 3 % (95th percentile)."
    ) in said
    assert said.count("fresh items, which neither found") == 1
    (fresh,) = (each.fresh for each in report.behaviours if each.fresh)
    fallen = tuple(replace(each, fresh=replace(fresh, holds=False)) for each in report.behaviours)
    assert "it does not hold" in page(replace(report, behaviours=fallen))


def test_functional_dissociation_has_a_table_of_both_scores(report: Report, drawn: str) -> None:
    for part in ("Functional dissociation", "D, scale-free", "42.5", "14 heads"):
        assert part in drawn
    assert report.matrix is not None
    without = page(replace(report, matrix=replace(report.matrix, masked=())))
    assert "Functional dissociation" not in without


def test_an_item_without_an_answer_is_encoded_as_a_whole(report: Report, drawn: str) -> None:
    asked = [each for each in report.examples if each.answer]
    whole = [each for each in report.examples if not each.answer]
    both = "from the position that predicts the answer or averaged over all positions, one item each"
    assert both in drawn
    encoder = page(replace(report, examples=tuple(whole)))
    assert "attention weight averaged over all positions, one item each" in encoder
    assert "answer: " not in encoder
    assert "attention weight from the position that predicts the answer, one" in page(
        replace(report, examples=tuple(asked))
    )


def test_what_has_no_verdict_is_called_descriptive(report: Report) -> None:
    one = replace(report, maps=report.maps[:1], examples=(), matrix=None)
    assert "descriptive: not verified" in page(one)
    assert one.maps[0].descriptive
    measured = replace(report, maps=report.maps[-1:], examples=(), matrix=None)
    assert "descriptive: not verified" not in page(measured)


def test_refusals_and_what_fell_are_there_with_reasons(elements: Elements, report: Report) -> None:
    text = " ".join(elements.texts)
    for behaviour in report.behaviours:
        assert behaviour.refusal in text
    assert "values of zoo:planted are not linear" in text
    assert "undecidable" in text
    shown = [" ".join(t.split()) for t in elements.texts if "more single heads" in t]
    # 70 or so single heads of a behaviour fell; the 20 largest are listed, the others counted
    assert shown
    assert shown[0].startswith("50 more")


def test_an_atlas_without_anything_verified_says_so(report: Report) -> None:
    facts = next(each for each in report.behaviours if each.probe == "facts")
    bare = replace(report, behaviours=(facts,), maps=(), matrix=None, examples=(), doses=(), refused=(), complete=False)
    text = " ".join(Elements(page(bare)).texts)
    assert "Nothing is verified." in text
    assert "0 of 72 heads are verified alone" in text
    assert "not complete" in text


def test_an_empty_atlas_makes_a_page(report: Report) -> None:
    empty = replace(report, behaviours=(), maps=(), matrix=None, examples=(), doses=(), refused=(), files=())
    assert "0 of 0 behaviours" in " ".join(Elements(page(empty)).texts)


def test_missing_numbers_are_dashes(report: Report) -> None:
    blank = made.claim("L0H0", effect=float("nan"), ruling="undecidable", q=float("nan"))
    odd = replace(report.behaviours[0], joints=(), singles=(blank, made.claim("L1H1", effect=float("nan"))))
    text = page(replace(report, behaviours=(odd,)))
    assert ">nan" not in text.lower()
    Elements(text)


def test_a_large_model_stays_small(report: Report) -> None:
    values = np.random.default_rng(0).normal(size=(32, 32))
    maps = [
        replace(report.maps[0], title=f"m{i // 3}", values=values, rows=tuple(f"L{r}" for r in range(32)))
        for i in range(45)
    ]
    assert len(page(replace(report, maps=tuple(maps))).encode()) < 3_000_000


def test_the_file_is_written_whole(report: Report, tmp_path: Path, drawn: str) -> None:
    path = write_page(report, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == drawn
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
