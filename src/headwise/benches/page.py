"""`python -m headwise.benches.page`: the tables and charts of docs/benchmarks.md, from the figures in benchmarks/.

    python -m headwise.benches.page                      # write the page from the figures that are there
    python -m headwise.benches.page sweep scoped         # run these benches first and file their figures

On the page a table stands between `<!-- figures: ID -->` and `<!-- end -->`; what is around it is written by hand. A
figure with a goal has it beside it. Charts lie beside the page, as `bench-ID.svg`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from headwise import catalogue
from headwise.atlas.report.numerals import MINUS, number
from headwise.benches.plot import Panel, Point, drawn
from headwise.errors import HeadwiseError, InputError

FIGURES, PAGE = Path("benchmarks"), Path("docs/benchmarks.md")
VERSIONS = ("torch", "transformers", "transformer-lens", "nnsight", "pyvene")
PART = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Goal:
    """At least (`>=`) or at most (`<=`) a value."""

    sign: str
    value: float

    def met(self, value: float) -> bool:
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{'at least' if self.sign == '>=' else 'at most'} {self.value:g}"


def least(value: float) -> Goal:
    return Goal(">=", value)


def most(value: float) -> Goal:
    return Goal("<=", value)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the figures of a bench stand in a table.

    Attributes:
        columns: beginning of a key -> title of a column; keys that differ in nothing else share a row.
        goals: key -> what it has to be.
        panels: word -> title of the axis, for charts of the keys `WORD_NUMBER.QUANTITY`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    goals: Mapping[str, Goal] = field(default_factory=dict)
    panels: Mapping[str, str] = field(default_factory=dict)


SHAPES = {"gpt2": "GPT-2-small shape", "llama": "Llama-GQA shape"}
PEERS = ("transformer_lens", "nnsight", "pyvene")
RACES = {
    "planted_12x12.k_3": "planted 12 x 12, k = 3",
    "planted_24x16.k_3": "planted 24 x 16, k = 3",
    "planted_24x16.k_9": "planted 24 x 16, k = 9",
    "organism.k_1": "organism, k = 1",
}


def _both(goals: Mapping[str, Goal]) -> dict[str, Goal]:
    return {f"{shape}.{key}": goal for shape in SHAPES for key, goal in goals.items()}


LAYOUTS: Mapping[str, Layout] = {
    "sweep": Layout(
        SHAPES,
        {
            "gpt2.ratio_hf_last_logit": least(2.0),
            "llama.ratio_hf_last_logit": least(2.2),
            **_both({f"ratio_{peer}_all_logits": least(2.7) for peer in PEERS}),
            **_both({f"ratio_{peer}_last_logit": least(2.0) for peer in PEERS}),
            **_both({"gemm_fraction": least(0.75), "max_diff_fp64": most(1e-12)}),
        },
        {"tokens": "tokens T", "items": "items N", "layers": "layers L", "heads": "heads of a layer H"},
    ),
    "scoped": Layout(SHAPES, _both({"forwards": most(5.0)})),
    "importance": Layout(SHAPES, _both({"forwards": most(2.0)})),
    "direct": Layout(SHAPES, _both({"forwards": most(1.05)})),
    "controls": Layout(
        {"all_layers": "all layers", "upper_layers": "layers 5 to 9"},
        {"all_layers.ratio": least(1.3), "upper_layers.ratio": least(2.0)},
    ),
    "stats": Layout(
        {"time.1024": "time, 1k tokens", "time.4096": "time, 4k tokens", "memory.4096": "memory, 4k tokens"},
        {"time.4096.three": most(1.35), "time.4096.with_distance": most(1.75), "memory.32768.all": most(2.5)},
    ),
    "decode": Layout(goals={"time.retrieval": most(1.05)}),
    "use-overhead": Layout(
        {**SHAPES, "organism": "organism"},
        {
            f"{model}.{way}": most(goal)
            for model in (*SHAPES, "organism")
            for way, goal in {
                "z": 1.03,
                "score_scale": 1.15,
                "score_bias": 1.15,
                "two_batch": 2.15,
                "two_caches": 2.15,
            }.items()
        },
    ),
    "looking-overhead": Layout(
        {"llava": "LLaVA shape", "organism": "visual organism"},
        {
            f"{model}.vhr.{key}": most(goal)
            for model in ("llava", "organism")
            for key, goal in {"later": 1.03, "forwards": 1.0, "tokens": 1.0}.items()
        },
    ),
    "race": Layout(
        RACES,
        {
            f"{race}.{key}": goal
            for race in RACES
            for key, goal in {"share": most(0.1), "top_k": least(0.95), "verdicts": least(0.95)}.items()
        },
    ),
}
"""Of benches that are not named here every figure has a row of its own."""


@dataclass(frozen=True, slots=True)
class Filed:
    """What a run of a bench left in benchmarks/."""

    command: str
    versions: Mapping[str, str]
    machine: str
    figures: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> Filed:
        """Raises `InputError` for a file that holds something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            figures = {key: math.nan if value is None else float(value) for key, value in content["figures"].items()}
            return cls(content["command"], content["versions"], content["machine"], figures)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no figures of a bench ({error}); run the bench again") from None

    def write(self, path: Path) -> None:
        figures = {key: value if math.isfinite(value) else None for key, value in self.figures.items()}
        content = {
            "command": self.command,
            "versions": dict(self.versions),
            "machine": self.machine,
            "figures": figures,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measured(id: str) -> Filed:
    """Run a bench. Raises `InputError` for an unknown one."""
    entry = cast(catalogue.BenchEntry, catalogue.entry("benches", id))
    figures = dict(entry.run())
    return Filed(f"headwise bench {id} --json", _versions(), f"{os.cpu_count()} cores, CPU", figures)


def written(text: str, filed: Mapping[str, Filed]) -> str:
    """The page with the tables of these figures; a bench without figures is said to have none."""

    def part(found: re.Match[str]) -> str:
        id = found[2]
        body = table(id, filed[id]) if id in filed else "Not yet measured.\n"
        return f"{found[1]}\n{body}\n{found[3]}"

    return PART.sub(part, text)


def table(id: str, filed: Filed) -> str:
    """The figures of a bench as Markdown, with where they come from and the chart, where there is one."""
    layout = LAYOUTS.get(id, Layout())
    single = [key for key in filed.figures if _column(key, layout) is None and _point(key, layout) is None]
    parts = []
    if shared := _shared(filed, layout):
        parts.append(shared)
    if single:
        head = ["quantity", "measured", "goal"][: 3 if any(key in layout.goals for key in single) else 2]
        rows = [[f"`{key}`", _cell(filed.figures[key], layout.goals.get(key)), _goal(key, layout)] for key in single]
        parts.append(_markdown(head, [row[: len(head)] for row in rows]))
    if panels(filed, layout):
        parts.append(f"![{_alternative(filed, layout)}](bench-{id}.svg)\n")
    versions = ", ".join(f"{name} {number}" for name, number in filed.versions.items())
    return "\n".join([*parts, f"`{filed.command}`, {filed.machine}, {versions}.\n"])


def panels(filed: Filed, layout: Layout) -> list[Panel]:
    """The charts of a bench: one for each setting that was varied."""
    found: dict[str, list[Point]] = {}
    for key, value in filed.figures.items():
        point = _point(key, layout)
        if point is not None and math.isfinite(value):
            found.setdefault(point[0], []).append(Point(point[1], value))
    return [Panel(layout.panels[word], tuple(sorted(points))) for word, points in found.items()]


def main(arguments: Sequence[str] | None = None, *, root: Path = Path()) -> int:
    """Run what is named, write the page. Exit code 2 where something cannot be used, with one line that says what."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    figures, page = root / FIGURES, root / PAGE
    try:
        if not page.is_file():
            raise InputError(f"{page} is not there; run this where the repository is checked out")
        figures.mkdir(exist_ok=True)
        for id in asked:
            measured(id).write(figures / f"{id}.json")
        text = page.read_text(encoding="utf-8")
        ids = [found[2] for found in PART.finditer(text)]
        filed = {id: Filed.read(figures / f"{id}.json") for id in ids if (figures / f"{id}.json").is_file()}
        for id, each in filed.items():
            charts = panels(each, LAYOUTS.get(id, Layout()))
            if charts:
                (page.parent / f"bench-{id}.svg").write_text(drawn(charts), encoding="utf-8")
        page.write_text(written(text, filed), encoding="utf-8")
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _shared(filed: Filed, layout: Layout) -> str:
    """The table of figures that several columns share."""
    cells: dict[str, dict[str, str]] = {}
    goals: dict[str, dict[str, None]] = {}  # as an ordered set
    for key, value in filed.figures.items():
        column = _column(key, layout)
        if column is None:
            continue
        row = key.removeprefix(f"{column}.")
        cells.setdefault(row, {})[column] = _cell(value, layout.goals.get(key))
        if key in layout.goals:
            goals.setdefault(row, {})[_goal(key, layout)] = None
    if not cells:
        return ""
    columns = [column for column in layout.columns if any(column in row for row in cells.values())]
    rows = [
        [f"`{row}`", *(found.get(column, "") for column in columns), " / ".join(goals.get(row, ()))]
        for row, found in cells.items()
    ]
    return _markdown(["quantity", *(layout.columns[column] for column in columns), "goal"], rows)


def _column(key: str, layout: Layout) -> str | None:
    return next((column for column in layout.columns if key.startswith(f"{column}.")), None)


def _point(key: str, layout: Layout) -> tuple[str, float] | None:
    """The setting and its value, of a key that belongs in a chart."""
    found = re.fullmatch(r"([a-z]+)_(\d+)\.\w+", key)
    return (found[1], float(found[2])) if found and found[1] in layout.panels else None


def _cell(value: float, goal: Goal | None) -> str:
    """A figure, bold where it misses its goal."""
    text = number(value).replace(MINUS, "-")
    return f"**{text}**" if goal is not None and not goal.met(value) else text


def _goal(key: str, layout: Layout) -> str:
    return str(layout.goals[key]) if key in layout.goals else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _alternative(filed: Filed, layout: Layout) -> str:
    """The charts in words, for those who do not see them."""
    said = [
        f"by {panel.title}: " + ", ".join(f"{number(point.x)}: {number(point.y)}" for point in panel.points)
        for panel in panels(filed, layout)
    ]
    return "Ratio " + "; ".join(said)


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
