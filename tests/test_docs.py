"""The documentation: it builds, it names every command, option and entry, and its Python runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from markdown.extensions.toc import slugify

from headwise.catalogue import KINDS, Entry, entries
from headwise.cli.app import DONE, app, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (ROOT / "README.md", *DOCS.rglob("*.md")) if page.is_file())
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", built)
    assert not fetched, "the site must be readable without a network"


def sections(page: Path) -> dict[str, str]:
    """Anchor of each heading -> the text up to the next heading of the same or a higher level."""
    text = re.sub(
        r"^```.*?^```", lambda block: block[0].replace("\n#", "\n "), page.read_text("utf-8"), flags=re.M | re.S
    )
    found = [(len(h[1]), h[2], h.start()) for h in re.finditer(r"^(#+) +(.+?) *$", text, flags=re.MULTILINE)]
    ends = [
        next((s for lvl, _, s in found[i + 1 :] if lvl <= level), len(text)) for i, (level, _, _) in enumerate(found)
    ]
    return {
        slugify(title.replace("`", ""), "-"): text[start:end]
        for (_, title, start), end in zip(found, ends, strict=True)
    }


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_its_heading_and_names_every_option(name: str) -> None:
    section = sections(DOCS / "cli.md").get(f"headwise-{name}")
    assert section, f"docs/cli.md has no heading `headwise {name}`"
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")}
    missing = {option for option in options if not re.search(rf"{option}\b", section)} - {"--help"}
    assert not missing


def test_the_exit_codes_on_the_page_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == DONE
    shown = set(re.findall(r"\b(\d+) ", capsys.readouterr().out.split("Exit codes:")[1]))
    table = sections(DOCS / "cli.md")["results-messages-and-exit-codes"]
    assert set(re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)) == shown == {"0", "1", "2", "3", "130"}


def undocumented(entry: Entry) -> str:
    """What the docs lack for one entry; empty if they are complete, or elsewhere."""
    if entry.page.startswith("https://"):
        return ""
    file, _, anchor = entry.page.partition("#")
    if not (DOCS / file).is_file():
        return f"docs/{file} is missing ({entry.kind}, {entry.id})"
    if anchor and anchor not in sections(DOCS / file):
        return f"docs/{file} has no heading #{anchor} ({entry.kind}, {entry.id})"
    if not anchor and entry.id not in (DOCS / file).read_text(encoding="utf-8"):
        return f"docs/{file} does not name {entry.id}"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_catalogue_entry_is_documented(kind: str) -> None:
    assert not [lack for entry in entries(kind) if (lack := undocumented(entry))]  # type: ignore[arg-type]


def test_an_entry_without_its_page_is_seen() -> None:
    def made(id: str, page: str) -> Entry:
        return Entry(id=id, kind="models", title="t", page=page)

    assert "is missing" in undocumented(made("x", "nowhere.md"))
    assert "no heading" in undocumented(made("x", "cli.md#nothing-of-the-kind"))
    assert "does not name" in undocumented(made("x-no-such-model", "cli.md"))
    assert not undocumented(made("x", "cli.md#headwise-bench"))


def python_blocks(page: Path) -> str:
    """The blocks of one page marked `python`, one after the other, each on the lines it has in the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        opens = line.strip() == "```python"
        inside = opens or (inside and line.strip() != "```")
        lines.append(line if inside and not opens else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page).strip()], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"exec(compile({python_blocks(page)!r}, {str(page)!r}, 'exec'))"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_is_among_the_pages() -> None:
    assert ROOT / "README.md" in PAGES
