"""`python -m headwise.benches.looking docs/looking-results.md MODEL ...`: the table of several models, as a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import headwise
from headwise.benches.looking import parts_of
from headwise.benches.looking.items import Bench
from headwise.benches.looking.page import page
from headwise.benches.looking.stored import Stored

FOLDER = Path("benchmarks/looking")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What heads that look are worth in several models, as a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where parts are kept")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    found = {}
    for name in asked.models:
        with headwise.load(name, dtype="float32") as model:
            stored = Stored(asked.folder / Path(name).name.replace(":", "-"), asked.seed)
            found[name] = parts_of(Bench(model, asked.seed), _say, stored)
        asked.page.write_text(page(found), encoding="utf-8")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
