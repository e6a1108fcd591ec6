"""The summary in the terminal: what is in it, and that it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made
from rich.console import Console

from headwise.atlas.report import page
from headwise.atlas.report.view import Claim, Failure, Report
from headwise.atlas.summary import told

PATH = Path("atlas-planted/report.html")


def printed(report: Report) -> str:
    console = Console(width=80, markup=False, highlight=False, emoji=False, color_system=None)
    with console.capture() as text:
        for part in told(report, PATH):
            console.print(part)
    return text.get()


def test_it_says_what_is_verified_refused_and_where_the_report_is() -> None:
    text = printed(made.report())
    flat = " ".join(text.replace("\u2502", " ").split())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "L6H3 69%" in flat
    assert "mode zero, scope all" in flat
    assert "arithmetic" in flat
    assert "3 of 64 items" in flat
    assert "3 of 72 heads verified alone. Report: atlas-planted/report.html" in flat
    assert "1 undecidable" in flat


def test_methods_that_do_not_fit_a_probe_are_counted_and_probes_are_named() -> None:
    failures = (Failure("find/direct-logit-source/ioi", "no span"), Failure("find/copying/ioi", "none"))
    text = " ".join(
        printed(replace(made.report(), refused=(*failures, Failure("echo", "half of them are needed")))).split()
    )
    assert "2 pairs of method and probe gave no scores" in text
    assert "no span" not in text
    assert "echo" in text


def test_square_brackets_in_a_name_are_no_markup() -> None:
    assert "[red]x[/red]" in printed(replace(made.report(), model="[red]x[/red]"))


def test_nothing_solved_and_not_complete() -> None:
    report = made.report()
    refused = tuple(each for each in report.behaviours if each.refusal)
    text = printed(replace(report, behaviours=refused, complete=False))
    assert "behaviour" not in text
    assert "not complete" in text


def test_the_best_set_is_the_smallest_that_does_as_much() -> None:
    controls = (0.0, 0.1, 0.0, 0.1)

    def best(*claims: Claim) -> tuple[str, ...]:
        joints = tuple(each for each in claims if each.method)
        singles = tuple(each for each in claims if not each.method)
        found = made.behaviour("ioi", "names", joints, singles).best_set
        return () if found is None else found.heads

    whole = made.claim("L1H0", "L1H1", "L2H0", effect=4.0, method="wide", controls=controls)  # interval 3.6 to 4.4
    within = made.claim("L1H0", "L1H1", effect=3.7, method="narrow", controls=controls)
    below = made.claim("L1H0", "L1H1", effect=3.5, method="narrow", controls=controls)
    beside = made.claim("L1H0", "L3H0", effect=3.7, method="other", controls=controls)
    fallen = made.claim("L1H0", "L1H1", effect=3.7, method="fallen", ruling="not verified", controls=controls)
    assert best(whole, within) == within.heads
    for other in (below, beside, fallen):
        assert best(whole, other) == whole.heads
    assert best(whole, within, made.claim("L1H1", effect=3.61)) == ("L1H1",)
    assert best(whole, within, made.claim("L1H1", effect=3.59)) == within.heads
    assert best(whole, within, made.claim("L4H4", effect=3.9)) == within.heads
    assert best(fallen, made.claim("L1H1", effect=3.9)) == ()


def test_the_best_set_and_who_named_it_are_in_the_summary_and_on_the_page() -> None:
    controls = (0.0, 0.1)
    whole = made.claim("L1H0", "L1H1", effect=4.0, method="direct-logit, gate-gradient", controls=controls)
    report = replace(made.report(), behaviours=(made.behaviour("ioi", "names", (whole,), ()),))
    flat = " ".join(printed(report).replace("\u2502", " ").split())
    assert "named by" in flat
    assert "direct-logit and" in flat
    assert "2 heads (named by direct-logit and gate-gradient), 95" in page(report)
    one = made.claim("L1H1", effect=3.9)
    report = replace(made.report(), behaviours=(made.behaviour("ioi", "names", (whole,), (one,)),))
    assert "L1H1 (alone): 93%" in " ".join(printed(report).replace("\u2502", " ").split())
    assert "L1H1 (alone), 93" in page(report)


def test_doses_are_said_to_be_ordered_on_the_items_shown() -> None:
    assert "the heads are ordered, and the costliest set is picked, on the same held-out items" in page(made.report())
