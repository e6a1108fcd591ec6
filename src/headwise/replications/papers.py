"""The papers behind the methods: what each is about, and what headwise does of it today.

`papers.csv`, beside this file, holds titles, years, a line of our own and the ids of methods. Commands and tiers are
not in it: they come from the registry, so a method is named only where it is there, with the tier it has.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from headwise import catalogue
from headwise.catalogue import MethodEntry
from headwise.find.method import LibraryMethod
from headwise.replications.published import replications

NOT_YET = "not yet"


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that headwise does of a paper: what to type, and how far that has been checked (tier or status)."""

    command: str
    checked: str

    def __str__(self) -> str:
        return f"{self.command} ({self.checked})"


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper.

    Attributes:
        about: what it says of heads, in a line of our own.
        methods: ids of methods that come from it, registered or not.
        objects: other things that headwise has of it, as dotted Python names.
        outside: why there is nothing to be done here; empty for most.
    """

    title: str
    year: int
    about: str
    methods: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    outside: str = ""

    def offers(self) -> tuple[Offer, ...]:
        """What can be run of it now: its registered methods, its replications, other objects."""
        known = {entry.id: cast(MethodEntry, entry) for entry in catalogue.entries("methods")}
        found = [Offer(_command(known[id]), f"tier {known[id].tier}") for id in self.methods if id in known]
        again = [each for each in replications() if each.paper == self.title]
        found += [Offer(f"headwise replicate {each.id} MODEL", each.status) for each in again]
        return (*found, *(Offer(name, _kind(name)) for name in self.objects))

    @property
    def state(self) -> str:
        """`done` where something of it can be run, else why not."""
        return "done" if self.offers() else self.outside or NOT_YET

    def to_json(self) -> dict[str, object]:
        """What `headwise papers --json` lists."""
        return {
            "title": self.title,
            "year": self.year,
            "about": self.about,
            "state": self.state,
            "offers": [{"command": each.command, "checked": each.checked} for each in self.offers()],
        }


def papers() -> tuple[Paper, ...]:
    """All papers by title, those of methods that another package registered as well."""
    listed = _listed()
    named = {id for paper in listed for id in paper.methods}
    others = [cast(MethodEntry, entry) for entry in catalogue.entries("methods") if entry.id not in named]
    added = [Paper(entry.paper, entry.year, entry.title, (entry.id,)) for entry in others]
    return tuple(sorted((*listed, *added), key=lambda paper: (paper.title.casefold(), paper.year)))


def _command(method: MethodEntry) -> str:
    return method.call if isinstance(method, LibraryMethod) else f"headwise find {method.id} MODEL"


def _kind(name: str) -> str:
    return "fixture from theory" if name.startswith("headwise.zoo.theory.") else "function"


@cache
def _listed() -> tuple[Paper, ...]:
    with Path(__file__).with_name("papers.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Paper(
                title=row["title"],
                year=int(row["year"]),
                about=row["about"],
                methods=tuple(row["methods"].split()),
                objects=tuple(row["objects"].split()),
                outside=row["outside"],
            )
            for row in csv.DictReader(file)
        )
