"""`python -m headwise.benches.coverage docs/models.md`: examine every model type of transformers, write the table."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console

from headwise.benches.coverage import running
from headwise.benches.coverage.examining import examine
from headwise.benches.coverage.result import Result
from headwise.benches.coverage.rows import TASKS, Row, committed
from headwise.benches.coverage.table import page, read_json, write_json


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    console = Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, part = _chosen(asked.only, asked.task)
    if not rows:
        console.print("headwise: no row of the table has this type and task; see rows.csv")
        return 2
    versions = _versions()
    before: dict[str, Result] = {}
    if part:
        made_with, before = read_json(asked.json) if asked.json.exists() else (versions, {})
        if made_with != versions:
            console.print(f"headwise: {asked.json} was made with other versions; run the whole table again")
            return 2
    work = running.WorkFile(asked.json.with_suffix(".work.jsonl"), versions)
    kept = {} if part else work.read()
    left = [row for row in rows if row.key not in kept]
    if kept:
        console.print(f"headwise: {len(kept)} rows are done already; {work.path} holds them")
    try:
        with running.bar(len(left), console) as step:

            def done(result: Result) -> None:
                kept[result.key] = result
                if not part:
                    work.add(result)
                step(result)

            running.run(left, examine, workers=asked.workers, limit=asked.limit, done=done)
    except KeyboardInterrupt:
        console.print(f"headwise: interrupted; the same command goes on after {len(kept)} rows")
        return 130
    results = [(before | kept)[row.key] for row in committed() if row.key in before or row.key in kept]
    write_json(asked.json, versions, results)
    asked.page.write_text(page(results, versions), encoding="utf-8")
    work.remove()
    if part:
        for row in rows:
            result = kept[row.key]
            console.print(f"{result.status}: {result.key}: {result.reason}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m headwise.benches.coverage", description=__doc__)
    parser.add_argument("page", type=Path, help="where the table is written, docs/models.md")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/models.json"), help="where all of it is written")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types; the other rows stay as they are")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="these tasks; the other rows stay as they are")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time (1)")
    parser.add_argument("--limit", type=float, default=running.LIMIT, help="seconds for a row (%(default)s)")
    return parser


def _chosen(only: list[str] | None, task: list[str] | None) -> tuple[list[Row], bool]:
    rows = [row for row in committed() if (not only or row.model_type in only) and (not task or row.task in task)]
    return rows, bool(only or task)


def _versions() -> dict[str, str]:
    packages = ("transformers", "torch", "accelerate", "bitsandbytes")
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
