"""The word lists and small tables of facts that probes and zoo share, plain files beside this one."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent


@cache
def word_list(name: str) -> tuple[str, ...]:
    """The words of `NAME.txt`, one a line."""
    return tuple((_FOLDER / f"{name}.txt").read_text(encoding="utf-8").split())


@cache
def refusal_markers() -> tuple[str, ...]:
    """What a refusal says, a phrase a line."""
    lines = (_FOLDER / "refusals.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def nouns() -> tuple[str, ...]:
    """Things, animals and materials."""
    return (*word_list("objects"), *word_list("animals"), *word_list("materials"))


@dataclass(frozen=True, slots=True)
class Fact:
    """`object` is the `relation` of `subject`: Paris is the capital of France."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True, slots=True)
class DatedFact:
    """`object` was the `relation` of `subject` in all of the years `first` to `last`."""

    relation: str
    subject: str
    first: int
    last: int
    object: str


@cache
def facts() -> tuple[Fact, ...]:
    """Capitals, continents and languages of countries."""
    return tuple(Fact(**row) for row in _table("facts"))


@cache
def dated_facts() -> tuple[DatedFact, ...]:
    """Heads of state and government; years in which an office changed hands are left out."""
    return tuple(
        DatedFact(row["relation"], row["subject"], int(row["first"]), int(row["last"]), row["object"])
        for row in _table("dated")
    )


@cache
def functions() -> dict[str, dict[str, str]]:
    """Functions of words, by name: input -> output."""
    found: dict[str, dict[str, str]] = {}
    for row in _table("pairs"):
        found.setdefault(row["function"], {})[row["input"]] = row["output"]
    for fact in facts():
        found.setdefault(fact.relation, {})[fact.subject] = fact.object
    return found


def _table(name: str) -> list[dict[str, str]]:
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
