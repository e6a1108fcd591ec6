"""The page per method: made from its fields and its file, and the pages in the docs are those."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import markdown
import pytest

import headwise as hw
from headwise.errors import InputError
from headwise.find import METHODS, Method, method, pages
from headwise.probes import PICTURE_PROBES, probe

DOCS = Path(__file__).parents[2] / "docs"

MADE_OF = '''"""Heads that do a thing, <measured>.

A paper, 2020. With a*b and c_d in prose, and `x_h * <y>` as code:

    score_h = mean_t A_h[t, s] * 2 <z, w>

Two things:
- one
- two
"""

def score(model, items, *, lag: int = 1, how: str = "a"):
    """The score.

    Args:
        lag: in tokens.
    """
'''


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method in a file of its own."""
    module = ModuleType("made_up")
    exec(MADE_OF, module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, "made_up", module)
    return Method(
        id="made-up",
        title="a thing | that is looked for",
        page="methods/made-up.md",
        paper="A paper_with signs",
        year=2020,
        tier="B",
        status="reconstruction",
        needs=("rows", "span:value"),
        cost="1 forward",
        probe="needle",
        probes=("needle", "hash"),
        score=module.score,
    )


def test_the_pages_in_the_docs_are_the_ones_that_are_made() -> None:
    """`python -m headwise.find.pages docs/methods` writes them anew."""
    wanted = pages.pages()
    found = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "methods").glob("*.md")}
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
def test_every_method_has_its_page_at_the_place_it_names(method: Method) -> None:
    assert method.page == f"methods/{method.id}.md"
    text = pages.page(method)
    for part in (f"# {method.id}\n", str(method.year), f"| tier | {method.tier}: ", f"headwise find {method.id} MODEL"):
        assert part in text
    for name, default in method.settings.items():
        assert f"| `{name}` | `{default!r}` |" in text


def test_the_fields_are_on_the_page(made: Method) -> None:
    text = pages.page(made)
    assert text.startswith(f"{pages.MADE}\n\n# made-up\n\nA thing \\| that is looked for.\n")
    for line in (
        "| paper | A paper_with signs, 2020 |",
        "| tier | B: right on models whose heads are known (planted truth) |",
        "| needs | attention rows of every site; the span `value` |",
        "| probe | [`needle`](../probes.md#needle), unless another is given |",
        "| means something on | [`needle`](../probes.md#needle), [`hash`](../probes.md#hash) |",
        "| `lag` | `1` |",
        "| `how` | `'a'` |",
        "    lag: in tokens.",
        'scores = hw.find("made-up", model, "needle", items=64, seed=0)',
    ):
        assert line in text.splitlines()


def test_a_docstring_reads_as_it_was_written(made: Method) -> None:
    html = markdown.markdown(pages.page(made).split("## What it computes")[1])
    assert "Heads that do a thing, &lt;measured&gt;." in html.replace("measured>", "measured&gt;")
    assert "With a*b and c_d in prose, and <code>x_h * &lt;y&gt;</code> as code:" in html
    assert "<pre><code>score_h = mean_t A_h[t, s] * 2 &lt;z, w&gt;" in html
    assert re.findall(r"<li>(.*?)</li>", html) == ["one", "two"]
    assert "<em>" not in html


def test_a_method_without_settings_or_probes_of_its_own(made: Method) -> None:
    plain = replace(made, score=lambda model, items: {}, probes=("*",), needs=())
    text = pages.page(plain)
    assert "## Settings\n\nNone." in text
    assert "| means something on | every probe that has what it needs |" in text
    assert "| needs | nothing beyond a run of the model |" in text


def test_a_file_without_a_docstring_is_one_line(monkeypatch: pytest.MonkeyPatch, made: Method) -> None:
    monkeypatch.setattr(__import__("sys").modules["made_up"], "__doc__", None)
    with pytest.raises(InputError, match="made-up: the file of its `score` has no docstring"):
        pages.page(made)


def test_every_tier_need_and_status_has_words() -> None:
    from typing import get_type_hints

    from headwise.catalogue import MethodEntry
    from headwise.find.method import NEEDS

    hints: dict[str, Any] = get_type_hints(MethodEntry)
    assert set(pages.NEEDS) == set(NEEDS)
    assert set(pages.TIERS) == set(hints["tier"].__args__)
    assert set(pages.STATUS) == set(hints["status"].__args__)


def test_writing_removes_pages_of_methods_that_are_gone_and_nothing_else(tmp_path: Path, made: Method) -> None:
    folder = tmp_path / "methods"
    pages.write(folder, [made, replace(made, id="old")])
    (folder / "mine.md").write_text("by hand", encoding="utf-8")
    pages.write(folder, [made])
    assert sorted(file.name for file in folder.iterdir()) == ["index.md", "made-up.md", "mine.md"]
    assert "[made-up](made-up.md)" in (folder / "index.md").read_text(encoding="utf-8")
    assert "old" not in (folder / "index.md").read_text(encoding="utf-8").replace("hold", "")


def test_the_program_needs_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert pages.main([]) == 2
    assert pages.main([str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(pages.pages())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("named", METHODS, ids=lambda method: method.id)
def test_the_call_on_a_page_can_be_made(named: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods run in tests of their own; here what is typed must be what `find` takes."""
    called: list[tuple[Any, ...]] = []

    class Scores:
        def top_scores(self, k: int) -> None:
            called.append((k,))

    def found(name: str, model: str, probe_id: str, *, items: int, seed: int) -> Scores:
        assert method(name) is named
        assert probe(probe_id).id == named.probe
        called.append((model, items, seed))
        return Scores()

    monkeypatch.setattr(hw, "load", lambda name: name, raising=False)
    monkeypatch.setattr(hw, "find", found, raising=False)
    exec(pages.call(named), {"print": lambda *shown: None})
    shown = "zoo:visual-organism" if any(each.id == named.probe for each in PICTURE_PROBES) else "gpt2"
    assert called == [(shown, 64, 0), (5,)]
