"""What an atlas found, for the terminal: what is verified, what is refused and why, and where the report lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from headwise.atlas.report.comparisons import text_against_pictures
from headwise.atlas.report.numerals import counted, percent
from headwise.atlas.report.reading import report_of
from headwise.atlas.report.view import Behaviour, Matrix, Report

if TYPE_CHECKING:
    from headwise.atlas.opened import Atlas

HEADS_SHOWN = 6
FAILURES_SHOWN = 8
PAIRS_SHOWN = 4
NOTHING = "\u2013"


def summary(atlas: Atlas, path: Path) -> tuple[Table | Text | str, ...]:
    """For `print_tables`; fits 80 columns. `path` is where the report was written."""
    return told(report_of(atlas), path)


def told(report: Report, path: Path) -> tuple[Table | Text | str, ...]:
    """The same of a report that is there already."""
    parts: list[Table | Text | str] = []
    solved = [each for each in report.behaviours if not each.refusal]
    if solved:
        parts.append(_verified(report, solved))
    refused = [(each.probe, each.refusal) for each in report.behaviours if each.refusal]
    refused += [(each.what, each.reason) for each in report.refused if not each.what.startswith("find/")]
    unfit = sum(each.what.startswith("find/") for each in report.refused)
    if refused:
        parts.append(_refused(refused))
    if unfit:
        parts.append(f"{counted(unfit, 'pair')} of method and probe gave no scores; the report says why.")
    if solved and report.matrix is not None and report.matrix.pairs:
        parts.append(_pairs(report.matrix))
    if solved and report.matrix is not None and report.matrix.kinds is not None:
        parts.append(text_against_pictures(report.matrix.kinds))
    heads = len(report.verified_heads)
    parts.append(f"{heads} of {counted(report.n_heads, 'head')} verified alone. Report:")
    parts.append(Text(str(path)))  # in one piece, to be copied
    if not report.complete:
        parts.append("The atlas is not complete; the same command goes on with it.")
    return tuple(parts)


def _verified(report: Report, solved: list[Behaviour]) -> Table:
    """One row a behaviour. Percentages are shares of its reach, the clean metric's distance from chance."""
    shared = {(each.mode, each.scope) for each in solved}
    how = ", ".join(f"mode {mode}, scope {scope}" for mode, scope in sorted(shared))
    table = Table(
        "behaviour",
        "verified alone",
        "best set together",
        title=Text(f"headwise atlas {report.model}: verified ({how})"),
        title_justify="left",
    )
    table.add_column("items", justify="right")
    table.add_column("claims", justify="right")
    for each in solved:
        table.add_row(
            Text(each.probe),
            Text(_alone(each)),
            Text(_together(each)),
            str(each.n_items),
            f"{len(each.verified)}/{len(each.claims)}",
        )
    return table


def _alone(behaviour: Behaviour) -> str:
    found = [each for each in behaviour.singles if each.ruling == "verified"]
    shown = [f"{each.heads[0]} {percent(behaviour.share(each.effect))}" for each in found[:HEADS_SHOWN]]
    rest = [f"+{len(found) - HEADS_SHOWN}"] if len(found) > HEADS_SHOWN else []
    return ", ".join(shown + rest).replace("\u202f", "") or NOTHING


def _together(behaviour: Behaviour) -> str:
    best = behaviour.best_set
    undecidable = sum(each.ruling == "undecidable" for each in behaviour.claims)
    if best is None:
        return f"{undecidable} undecidable" if undecidable else NOTHING
    share = percent(behaviour.share(best.effect)).replace("\u202f", "")
    heads = str(len(best.heads)) if best.method else best.heads[0]
    return f"{heads} ({best.chosen_by}): {share}"


def _pairs(matrix: Matrix) -> str:
    double, n = matrix.dissociated, len(matrix.pairs) // 2
    shown = [f"{one} and {other}" for one, other in double[:PAIRS_SHOWN]]
    rest = [f"{len(double) - PAIRS_SHOWN} more"] if len(double) > PAIRS_SHOWN else []
    named = f": {'; '.join(shown + rest)}" if double else ""
    return f"{len(double)} of {counted(n, 'pair')} of behaviours rest on different heads (double dissociation){named}."


def _refused(refused: list[tuple[str, str]]) -> Table:
    table = Table("refused", "why", title_justify="left")
    for what, reason in refused[:FAILURES_SHOWN]:
        table.add_row(Text(what), Text(reason))
    if len(refused) > FAILURES_SHOWN:
        table.add_row(Text(f"{len(refused) - FAILURES_SHOWN} more"), Text("see the report"))
    return table
