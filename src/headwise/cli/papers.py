"""`headwise papers`: the papers behind the methods, and what of each can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet

if TYPE_CHECKING:
    from headwise.replications import Paper


def papers(json: options.Json = False, traceback: options.Traceback = False) -> None:
    """List the papers behind the methods, each with the command that runs it and its tier, or `not yet`.

    Tiers: A matched against official code, B right on planted truth, C formula only.
    """
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.replications import papers as every_paper

        found = every_paper()
    done = [paper for paper in found if paper.state == "done"]
    if json:
        print_json({"papers": [paper.to_json() for paper in found]})
        return
    print_tables(
        _table("what can be run", done),
        _table("what cannot", [paper for paper in found if paper.state != "done"]),
        f"{len(found)} papers; of {len(done)} something can be run",
    )


def _table(title: str, found: list[Paper]) -> Table:
    table = Table("paper", "year", "what it is about", title=title, title_justify="left")
    table.add_column("headwise", overflow="fold")
    for paper in found:
        here = "\n".join(str(offer) for offer in paper.offers()) or paper.state
        table.add_row(paper.title, str(paper.year), paper.about, here)
    return table
