"""`headwise bench NAME`: one measurement, as dotted keys with numbers."""

from __future__ import annotations

import math
from typing import Annotated, cast

import typer
from rich.table import Table

from headwise import catalogue
from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.errors import InputError


def bench(
    name: Annotated[str, typer.Argument(help="See `headwise list benches`.")],
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    attn: options.Attn = None,
    json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Run the measurement NAME and print its numbers. A number that could not be measured is null with --json."""
    asked = {"seed": seed, "device": device, "dtype": dtype, "revision": revision, "attn": attn}
    given = {option: value for option, value in asked.items() if value is not None}
    with quiet():
        found = cast(catalogue.BenchEntry, catalogue.entry("benches", name))
        for option in given:
            if option not in found.options:
                takes = ", ".join(f"--{known}" for known in found.options) or "no options"
                raise InputError(f"bench {name!r} does not take --{option}; it takes {takes}")
        say(f"running {name}")
        numbers = dict(found.run(**given))
    if json:
        print_json({key: value if math.isfinite(value) else None for key, value in numbers.items()})
        return
    table = Table("quantity", "value", title=f"headwise bench {name}", title_justify="left")
    for key, value in numbers.items():
        table.add_row(key, f"{value:.6g}")
    print_tables(table)
