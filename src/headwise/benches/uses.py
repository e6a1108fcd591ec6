"""What heads in use are worth on the trained organisms: verified heads against matched random ones, item by item.

    headwise bench uses                                                    # the organism
    python -m headwise.benches.uses docs/uses.md zoo:organism organisms/sibling-1 ...

Every use finds its heads on items of its own, sets what it has to set (strengths, numbers of heads) on others, and is
judged on items that no organism saw in training. A row is stored when it is done (`--folder`), so that the second
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import headwise
from headwise.benches.specialising import Cell, section
from headwise.benches.specialising import stored as cells
from headwise.benches.use_row import Bench, Row
from headwise.benches.use_rows import USES
from headwise.errors import HeadwiseError, InputError
from headwise.whole_file import write_whole

FOLDER = Path("benchmarks/uses")

Said = Callable[[str], None]


def measure(*, seed: int = 0, said: Said = lambda _: None) -> dict[str, float]:
    """Of the organism, `USE.clean`, `.edited`, `.change`, `.excess`, `.p` and `.holds` (1, or 0 where it does not, or
    was refused)."""
    with headwise.load("zoo:organism", dtype="float32") as model:
        rows = rows_of(Bench(model, seed), said)
    figures: dict[str, float] = {}
    for name, row in rows.items():
        values = {"clean": row.clean, "edited": row.edited, "change": row.change, "excess": row.excess, "p": row.p}
        figures |= {f"{name}.{key}": value for key, value in values.items()} | {f"{name}.holds": float(row.holds)}
    return figures


def rows_of(bench: Bench, said: Said, stored: Stored | None = None) -> dict[str, Row]:
    """The rows of all uses on one model. What is in `stored` is taken from there, and what is not is put there."""
    rows = {}
    for name, use in USES.items():
        row = None if stored is None else stored.row(name)
        if row is None:
            said(f"{bench.model.name}: {name} ...")
            row = _row(use.row, bench)
            if stored is not None:
                stored.put(name, row)
        rows[name] = row
        said(f"{bench.model.name}: {name}: {_said(row)}")
    return rows


def _row(made: Callable[[Bench], Row], bench: Bench) -> Row:
    """A use that cannot be served is a row, too."""
    try:
        return made(bench)
    except HeadwiseError as error:
        return Row(refused=str(error))


@dataclass(frozen=True, slots=True)
class Stored:
    """The rows of one model in a folder, one file each; a file appears whole or not at all."""

    folder: Path
    seed: int = 0

    def row(self, name: str) -> Row | None:
        """None where it is not there, or of other items. Raises `InputError` for a file that holds something else."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            form = json.loads(path.read_text(encoding="utf-8"))
            seed, row = form["seed"], Row(**{key: _value(value) for key, value in form["row"].items()})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no row of this table ({error}); delete it, and run again") from None
        return row if seed == self.seed else None

    def put(self, name: str, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {key: _plain(value) for key, value in asdict(row).items()}
        text = json.dumps({"seed": self.seed, "row": values}, indent=2) + "\n"
        write_whole(self._path(name), text.encode())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_value, value))
    return math.nan if value is None else value


# -- the page ---------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Mapping[str, Row]], trained: Mapping[str, Sequence[Cell]]) -> str:
    """Rows of several models in Markdown: in how many models each use holds, each use by model, and what was trained by
    `headwise.benches.specialising`."""
    parts = [_HEAD, "## In how many models\n", "| use | holds in | what |\n|---|---|---|"]
    for name, use in USES.items():
        rows = [rows[name] for rows in found.values() if name in rows]
        parts.append(f"| [{name}](#{name}) | {sum(row.holds for row in rows)} of {len(rows)} | {use.title} |")
    for name, use in USES.items():
        rows_by_model = {model: rows[name] for model, rows in found.items() if name in rows}
        parts.append(f"\n## {name}\n\n{use.title}. {use.how}\n")
        parts.append("| model | heads | items | without | with | change | beyond controls | p | holds |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        parts += [_line(model, row) for model, row in rows_by_model.items()]
        notes = [f"- {model}: {row.note}" for model, row in rows_by_model.items() if row.note]
        parts += ["", *notes] if notes else []
    return "\n".join(parts) + "\n" + section(trained)


_HEAD = """<!-- Made by `python -m headwise.benches.uses`; change that file instead. -->

# Heads in use, on the organism and its siblings

What each use does on items that the models never saw in training and that chose nothing, beside the same on controls:
as many random heads in the same layers, or what is said with the use. The metric is the share of answers that are right
to the last token: right is what the use is to bring about, and for needles and refusals that are to go what it is to
end. `change` and `beyond controls` (the change less the mean change of the controls) have 95 percent intervals; p is
two-sided, from eight controls on. A use *holds* where the change and what is beyond the controls both go the intended
way with their whole intervals, and p, where there is one, is at most 0.05. How: [Evaluating](use/evaluating.md).
"""


def _line(model: str, row: Row) -> str:
    if row.refused:
        return f"| {model} | none: {row.refused.split('. ')[0]} | | | | | | | no |"
    heads = ", ".join(row.heads[:8]) + (f" and {len(row.heads) - 8} more" if len(row.heads) > 8 else "")
    cells = (
        model,
        heads,
        str(row.items),
        f"{row.clean:.3f}",
        f"{row.edited:.3f}",
        _interval(row.change, row.interval),
        _interval(row.excess, row.excess_interval),
        f"{row.p:.2g}" if math.isfinite(row.p) else "",
        "yes" if row.holds else "no",
    )
    return f"| {' | '.join(cells)} |"


def _interval(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if math.isfinite(value) else ""


def _said(row: Row) -> str:
    if row.refused:
        return f"none: {row.refused}"
    beyond = _interval(row.excess, row.excess_interval)
    holds = "holds" if row.holds else "does not hold"
    return f"{row.clean:.3f} -> {row.edited:.3f}, beyond controls {beyond}, p {row.p:.2g}, {holds}"


def _print(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Uses of heads on several models, as a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where rows are kept")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    found = {}
    for name in asked.models:
        with headwise.load(name, dtype="float32") as model:
            stored = Stored(asked.folder / Path(name).name.replace(":", "-"), asked.seed)
            found[name] = rows_of(Bench(model, asked.seed), _print, stored)
        asked.page.write_text(page(found, cells(asked.folder / "important-heads")), encoding="utf-8")


if __name__ == "__main__":
    main()
