"""The table as a page and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headwise.benches.coverage.capabilities import COLUMNS, NEW_TOKENS
from headwise.benches.coverage.examining import NO_OP, ROWS, ZERO, Z
from headwise.benches.coverage.most_used import MOST_USED
from headwise.benches.coverage.result import MEANING, Outcome, Result
from headwise.benches.coverage.rows import TASKS
from headwise.model.proving.doctor import EXAMINATIONS

COMMAND = "python -m headwise.benches.coverage docs/models.md"

_SIGNS = {"pass": "+", "fail": "**F**", "n/a": "·", "not installed": "?"}
_LETTERS = {"pass": "+", "fail": "F", "n/a": "."}


def write_json(path: Path, versions: Mapping[str, str], results: Sequence[Result]) -> None:
    """All that was found, a line for each row; times are left out, so that two runs can be compared."""
    lines = ",\n".join(json.dumps(_without_time(result), ensure_ascii=False) for result in results)
    head = f'{{"command": {json.dumps(COMMAND)},\n"versions": {json.dumps(dict(versions))},\n"rows": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


def read_json(path: Path) -> tuple[dict[str, str], dict[str, Result]]:
    """Versions, and results by key, as `write_json` wrote them."""
    read = json.loads(path.read_text(encoding="utf-8"))
    results = [Result.from_json(each) for each in read["rows"]]
    return read["versions"], {result.key: result for result in results}


def _without_time(result: Result) -> dict[str, object]:
    return {name: value for name, value in result.to_json().items() if name != "seconds"}


def page(results: Sequence[Result], versions: Mapping[str, str]) -> str:
    """The page of the docs."""
    parts = [_head(versions), _counts(results), _failures(results), _most_used(results), _legend()]
    parts += [_table(TASKS[task], [each for each in results if each.task == task]) for task in TASKS]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def _head(versions: Mapping[str, str]) -> str:
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"""# Models

Every model type that transformers ships, with each of its classes for language, text to text, images and text, and
speech; with its base model where it has none of these. Of each row a tiny random model was built (two layers, four
heads, as many kinds of layer as the type has), attached with `hw.attach`, and put to [the doctor](doctor.md). A large
model of the type runs the same code, but other settings and inputs can take other branches of it: `headwise doctor`
says the same of your own.

This page is written by a program, and nothing on it by hand: `{COMMAND}`, with {made_with}, on the CPU in fp32.
`benchmarks/models.json` has every check of every row with what was measured. The rows are fixed in
`src/headwise/benches/coverage/rows.csv`; a test says when transformers has others. Models with pictures get a picture,
those for speech get sound."""


def _counts(results: Sequence[Result]) -> str:
    def count(holds: Callable[[Result], object]) -> tuple[int, int]:
        held = [each for each in results if holds(each)]
        return len(held), len({each.model_type for each in held})

    lines = [
        ("in the table", lambda each: True),
        ("built", lambda each: each.built),
        ("run and attached", lambda each: each.sites),
        ("z shown right: equal to what enters the projection", lambda each: each.passed(Z)),
        ("a head zeroed equals its slice zeroed, bit for bit", lambda each: each.passed(ZERO)),
        ("attached and idle, the same bits", lambda each: each.passed(NO_OP)),
        ("rows readable at every site", lambda each: each.sites and each.with_rows == each.sites),
        ("rows times values are z", lambda each: each.passed(ROWS)),
        ("reached at the registry", lambda each: each.route == "registry"),
        ("reached by watching", lambda each: each.route == "watched"),
        ("reached in both ways, in one model", lambda each: each.route == "both"),
    ]
    rows = "\n".join(f"| {what} | {count(holds)[0]} | {count(holds)[1]} |" for what, holds in lines)
    statuses = Counter(each.status for each in results)
    named = "\n".join(f"| `{status}` | {statuses[status]} | {what} |" for status, what in MEANING.items())
    return f"""## Counts

| | rows | types |
|---|---|---|
{rows}

| status | rows | |
|---|---|---|
{named}"""


def _legend() -> str:
    names = "\n".join(f"{number}. {each.name}" for number, each in enumerate(EXAMINATIONS, start=1))
    return f"""## How to read the tables

Each row has the number of its attention sites, and of those whose z can be edited and whose rows can be read; the class
of the output projection; and the checks of the doctor in this order, `+` passed, `.` does not apply, `F` failed:

{names}"""


def _failures(results: Sequence[Result]) -> str:
    wrong = [each for each in results if each.status == "wrong"]
    if not wrong:
        return ""
    lines = "\n".join(f"- **{each.model_type}** ({each.task}): {_short(each.reason)}" for each in wrong)
    return f"## Not to be used\n\nA check failed on these:\n\n{lines}"


def _most_used(results: Sequence[Result]) -> str:
    by_key = {each.key: each for each in results}
    rows, notes = [], []
    for task, types in MOST_USED.items():
        for kind in types:
            result = by_key.get(f"{kind} {task}")
            if result is None:
                continue
            signs = [_sign(result.capabilities.get(column)) for column in COLUMNS]
            rows.append(f"| {kind} | {task} | {result.status} | {' | '.join(signs)} |")
            for column in COLUMNS:
                seen = result.capabilities.get(column)
                if seen is not None and seen.status != "pass":
                    notes.append(f"- {kind} ({task}), {column}: {seen.status}, {_short(seen.detail)}")
    if not rows:
        return ""
    count = sum(map(len, MOST_USED.values()))
    header = f"| type | task | status | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}"
    listed = "\n".join(rows)
    said = "\n".join(notes)
    return f"""## The {count} most used types

Chosen by judgement, not by a count: where this table is made there is no network to ask. They are the language,
vision-language, encoder and speech types of which model hubs serve most, by family; the list is in `most_used.py`
beside the script.
`+` shown, `·` does not apply, `**F**` failed, `?` package not installed.

- **rows**: rows times values are the kernel's z. **z**: a head zeroed by an edit, and its slice zeroed by a plain hook,
  give the same bits. **gradients**: gradients by z match autograd through a plain hook. These are checks of the doctor.
- **generate**: {NEW_TOKENS} tokens generated with heads zeroed; the logits of every step are those of plain hooks, bit
  for bit.
- **patching**: a head's z of another run put in its place; the output is that of a plain hook, bit for bit.
- **bf16**: the whole doctor on the model in bf16.
- **offload**: every weight on disk between the calls (accelerate); idle bits, and zeroing in two ways.
- **NF4**: linear layers in four bits (bitsandbytes, on the CPU); idle bits, and zeroing in two ways.

{header}
{listed}

{said}"""


def _sign(outcome: Outcome | None) -> str:
    return "" if outcome is None else _SIGNS[outcome.status]


def _table(title: str, results: Sequence[Result]) -> str:
    if not results:
        return ""
    lines = "\n".join(_line(each) for each in results)
    reasons = "\n".join(
        f"- {each.model_type}: {_short(each.reason)}" for each in results if each.reason and each.status != "wrong"
    )
    return f"""## {title}

| type | class | status | route | sites | z | rows | projection | doctor |
|---|---|---|---|---|---|---|---|---|
{lines}

{reasons}"""


def _line(result: Result) -> str:
    status = f"**{result.status}**" if result.status == "wrong" else result.status
    cells = [result.model_type, f"`{result.class_name}`", status]
    if result.sites:
        signs = "".join(
            _LETTERS[result.checks[each.name].status] for each in EXAMINATIONS if each.name in result.checks
        )
        projections = ", ".join(result.projections)
        checks = f"`{signs}`" if signs else ""
        cells += [result.route, str(result.sites), str(result.with_z), str(result.with_rows), projections, checks]
    else:
        cells += [""] * 6
    return f"| {' | '.join(cells)} |"


def _short(text: str, most: int = 300) -> str:
    """A reason on the page; the JSON has all of it."""
    return _plain(text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ...")


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in ("\\", "`", "*", "_", "<", "[", "|"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
