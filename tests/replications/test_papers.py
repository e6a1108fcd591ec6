"""The list of papers: complete for the methods, true to the registry."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from headwise import catalogue
from headwise.catalogue import MethodEntry
from headwise.find import METHODS
from headwise.find.towers import METHODS as TOWER_METHODS
from headwise.replications import Paper, page, papers, replications

ROOT = Path(__file__).parents[2]


def entry(id: str, tier: str = "B", paper: str = "A paper") -> MethodEntry:
    return MethodEntry(
        id=id, title="t", page="cli.md", paper=paper, year=2020, tier=tier, status="exact", needs=(), cost="1 forward"
    )  # type: ignore[arg-type]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, MethodEntry]:
    """The registered methods, to be changed."""
    catalogue.entries("methods")
    known: dict[str, MethodEntry] = {}
    monkeypatch.setitem(catalogue._registered, "methods", known)
    return known


def test_the_list_is_whole() -> None:
    listed = papers()
    assert len({paper.title.casefold() for paper in listed}) == len(listed) > 140
    assert all(paper.title == paper.title.strip() and 1990 < paper.year < 2030 and paper.about for paper in listed)


@pytest.mark.parametrize("method", [*METHODS, *TOWER_METHODS], ids=lambda method: method.id)
def test_the_paper_of_every_method_is_in_the_list(method: MethodEntry) -> None:
    own = [paper for paper in papers() if method.id in paper.methods and paper.title in method.paper]
    assert own, f"papers.csv has no row of {method.paper!r} that names {method.id}"
    assert method.year in {paper.year for paper in own}


def test_the_list_names_no_method_that_is_not_there() -> None:
    named = {id for paper in papers() for id in paper.methods}
    assert named <= {method.id for method in (*METHODS, *TOWER_METHODS)}


def test_what_the_list_says_is_made_is_made() -> None:
    named = [name for paper in papers() for name in paper.objects]
    assert named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_every_replication_is_of_a_paper_in_the_list() -> None:
    years = {paper.title: paper.year for paper in papers()}
    assert all(years[each.paper] == each.year for each in replications())


def test_command_and_tier_are_those_of_the_registry(methods: dict[str, MethodEntry]) -> None:
    paper = Paper("A paper", 2020, "heads", ("one", "two"))
    assert (paper.offers(), paper.state) == ((), "not yet")
    methods["two"] = entry("two", tier="A")
    assert [str(offer) for offer in paper.offers()] == ["headwise find two MODEL (tier A)"]
    assert paper.state == "done"


def test_a_replication_stands_under_its_paper_with_its_status(methods: dict[str, MethodEntry]) -> None:
    first = replications()[0]
    offers = [str(offer) for offer in Paper(first.paper, first.year, "heads").offers()]
    assert f"headwise replicate {first.id} MODEL (not yet run)" in offers


def test_a_paper_without_attention_heads_says_so(methods: dict[str, MethodEntry]) -> None:
    assert Paper("A paper", 2020, "experts", outside="no attention heads").state == "no attention heads"


def test_the_method_of_another_package_brings_its_paper(methods: dict[str, MethodEntry]) -> None:
    methods["own-heads"] = entry("own-heads", paper="A paper of my own")
    (found,) = [paper for paper in papers() if paper.title == "A paper of my own"]
    assert found.to_json() == {
        "title": "A paper of my own",
        "year": 2020,
        "about": "t",
        "state": "done",
        "offers": [{"command": "headwise find own-heads MODEL", "checked": "tier B"}],
    }


def test_the_page_is_the_one_that_is_made() -> None:
    """`python -m headwise.replications.page docs/papers.md` writes it anew."""
    assert (ROOT / "docs" / "papers.md").read_text(encoding="utf-8") == page.page()


def test_the_page_holds_every_rule_and_status() -> None:
    text = page.page()
    for each in replications():
        assert f"### {each.id}\n\n**{each.status.capitalize()}.**" in text
        for expected in each.expectations:
            assert f"| {expected.quantity} | {expected.published:g} | {expected.rule} |" in text


def test_the_page_needs_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert page.main([]) == 2
    assert page.main([str(tmp_path / "papers.md")]) == 0
    assert (tmp_path / "papers.md").read_text(encoding="utf-8") == page.page()
    assert capsys.readouterr().out == ""
