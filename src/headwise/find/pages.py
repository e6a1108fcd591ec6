"""A page of documentation per method, made from its fields and the docstring of its file.

    python -m headwise.find.pages docs/methods

writes one page per registered method of this package, and `index.md` with a table of them. Pages in that folder that
this module once wrote, of methods that are gone, are removed; other files are left alone.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import dedent

from headwise.catalogue import entry
from headwise.errors import HeadwiseError, InputError
from headwise.find import METHODS, Method
from headwise.probes import PICTURE_PROBES, probe

MADE = "<!-- Made by `python -m headwise.find.pages`; change the method's file instead. -->"

TIERS = {
    "A": "matched against official code",
    "B": "right on models whose heads are known (planted truth)",
    "C": "formula only",
}
STATUS = {
    "exact": "exact: the published formula as it stands",
    "reconstruction": "reconstruction: where the paper leaves something open, the text below says what was chosen",
}
NEEDS = {
    "rows": "attention rows of every site",
    "z": "z of every site",
    "projection": "the output projection, head by head",
    "gradients": "gradients",
    "logits": "logits",
    "generation": "greedy generation",
    "weights": "weights alone, no run over items",
    "answer": "an answer to every item",
    "foils": "wrong answers (foils)",
    "twin": "corrupted twins",
}


def pages(methods: Iterable[Method] = METHODS) -> dict[str, str]:
    """Name of file -> its text, for the methods and their index. Raises `InputError` for a file without a docstring."""
    ordered = sorted(methods, key=lambda each: each.id)
    return {f"{each.id}.md": page(each) for each in ordered} | {"index.md": index(ordered)}


def write(folder: Path, methods: Iterable[Method] = METHODS) -> list[Path]:
    """Write the pages and remove those of methods that are gone. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages(methods)
    for old in folder.glob("*.md"):
        if old.name not in wanted and old.read_text(encoding="utf-8").startswith(MADE):
            old.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in wanted]


def page(method: Method) -> str:
    """The page of one method, as Markdown."""
    facts = {
        "paper": f"{_plain(method.paper)}, {method.year}",
        "tier": f"{method.tier}: {TIERS[method.tier]}",
        "status": STATUS[method.status],
        "needs": "; ".join(_need(each) for each in method.needs) or "nothing beyond a run of the model",
        "cost": _plain(method.cost),
        "probe": f"{_probe(method.probe)}{_over(method)}, unless another is given",
        "means something on": _probes(method),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return "\n".join(
        (
            MADE,
            "",
            f"# {method.id}",
            "",
            f"{_sentence(_plain(method.title))}",
            "",
            "| | |",
            "|---|---|",
            table,
            "",
            "Scores of heads are descriptive: a [verdict](../verdict.md) comes from taking heads out.",
            "",
            "```sh",
            f"headwise find {method.id} MODEL",
            "```",
            "",
            "```py",
            call(method),
            "```",
            "",
            "## Settings",
            "",
            _settings(method),
            "",
            "## What it computes",
            "",
            _markdown(_docstring(method)),
            "",
        )
    )


def index(methods: Sequence[Method]) -> str:
    """The page that lists the methods."""
    rows = "\n".join(
        f"| [{each.id}]({each.id}.md) | {_plain(each.title)} | {_plain(each.paper)}, {each.year} | {each.tier} | "
        f"{each.status} | {_plain(each.cost)} |"
        for each in methods
    )
    tiers = "\n".join(f"- **{tier}**: {words}." for tier, words in TIERS.items())
    return "\n".join(
        (
            MADE,
            "",
            "# Methods",
            "",
            "Published scores of heads. Each has a page, made from its fields and the docstring of its file.",
            "",
            "| method | what it looks for | paper | tier | status | cost |",
            "|---|---|---|---|---|---|",
            rows,
            "",
            "Tiers say how far a method has been checked:",
            "",
            tiers,
            "",
            "`headwise papers` lists the papers behind the methods, those that are not done yet as well.",
            "",
        )
    )


def sees(method: Method) -> bool:
    """Whether a method is at home on questions about pictures."""
    return probe(method.probe) in PICTURE_PROBES


def call(method: Method) -> str:
    """The Python that runs it on its own probe; settings are keyword arguments of `find`."""
    return "\n".join(
        (
            "import headwise as hw",
            "",
            f'model = hw.load("{"zoo:visual-organism" if sees(method) else "gpt2"}")  # or a folder, or zoo:NAME',
            f'scores = hw.find("{method.id}", model, "{method.probe}", items=64, seed=0)',
            "print(scores.top_scores(5))",
        )
    )


def _settings(method: Method) -> str:
    if not method.settings:
        return "None."
    rows = "\n".join(f"| `{name}` | `{default!r}` |" for name, default in method.settings.items())
    said = inspect.getdoc(_scored_by(method)) or ""
    return f"| setting | default |\n|---|---|\n{rows}\n\n```text\n{said}\n```"


def _scored_by(method: Method) -> object:
    # A `functools.partial` has the docstring and the module of partial.
    return getattr(method.score, "func", method.score)


def _docstring(method: Method) -> str:
    module = inspect.getmodule(_scored_by(method))
    said = inspect.getdoc(module) if module is not None else None
    if not said:
        raise InputError(f"method {method.id}: the file of its `score` has no docstring to make a page of; write one")
    return said


def _markdown(said: str) -> str:
    """A docstring as Markdown: code stays as it is, in prose signs that Markdown would act upon are made plain."""
    blocks = re.split(r"\n\s*\n", dedent(said).strip())
    return "\n\n".join(block if _is_code(block) else _prose(block) for block in blocks)


def _is_code(block: str) -> bool:
    return all(line.startswith("    ") for line in block.splitlines())


def _prose(block: str) -> str:
    # Between backticks nothing is acted upon.
    parts = re.split(r"(`[^`]*`)", _with_room_for_lists(block))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _with_room_for_lists(block: str) -> str:
    """A list becomes one only behind an empty line."""
    lines: list[str] = []
    for line in block.splitlines():
        if line.startswith("- ") and lines and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _escaped(text: str) -> str:
    # Inside a word an underscore is acted upon by no Markdown here.
    underscored = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)
    return underscored.replace("*", r"\*").replace("<", "&lt;")


def _plain(text: str) -> str:
    """Text for a table's cell or a line."""
    return _escaped(text).replace("|", r"\|")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def _need(name: str) -> str:
    if not name.startswith("span:"):
        return NEEDS[name]
    span = name.removeprefix("span:")
    return f"the span that the setting `{span.strip('{}')}` names" if span.startswith("{") else f"the span `{span}`"


def _probe(id: str) -> str:
    where = entry("probes", id).page
    return f"[`{id}`]({where if where.startswith('https://') else f'../{where}'})"


def _over(method: Method) -> str:
    return "".join(f", `{name}={value!r}`" for name, value in method.over.items())


def _probes(method: Method) -> str:
    if method.probes == ("*",):
        return "every probe that has what it needs"
    return ", ".join(_probe(each) for each in method.probes)


def main(arguments: Sequence[str]) -> int:
    """The program: one argument, the folder. Returns its exit code."""
    if len(arguments) != 1:
        print("headwise: name the folder of the pages: python -m headwise.find.pages docs/methods", file=sys.stderr)
        return InputError.exit_code
    try:
        written = write(Path(arguments[0]))
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        return error.exit_code
    print(f"headwise: wrote {len(written)} pages to {arguments[0]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
