"""`headwise list [KIND]`: what this installation offers."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, cast

import typer
from rich.table import Table

from headwise import catalogue
from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say


def list_entries(
    kind: Annotated[
        str | None, typer.Argument(metavar=f"[{'|'.join(catalogue.KINDS)}]", help="Leave out to list every kind.")
    ] = None,
    json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """List the methods, probes, models, edits, interventions and benches on offer, those of other packages included."""
    wanted = catalogue.KINDS if kind is None else (cast(catalogue.Kind, kind),)
    with quiet():
        found = [entry for one in wanted for entry in catalogue.entries(one)]
    if json:
        print_json({"items": [entry.to_json() for entry in found]})
    elif found:
        print_tables(*(_table(of_kind, list(group)) for of_kind, group in groupby(found, key=lambda entry: entry.kind)))
    else:
        say(f"no {kind or 'entries'} in this version yet")


def _table(kind: str, entries: list[catalogue.Entry]) -> Table:
    table = Table("id", "title", title=kind, title_justify="left")
    for entry in entries:
        table.add_row(entry.id, entry.title)
    return table
