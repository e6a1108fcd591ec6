"""A probe file as a behaviour of an atlas: its finding half finds heads, its testing half tests them, and what is left
of it are fresh items."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import InputError
from headwise.probes import Probe, read_items
from headwise.probes.item import Item
from headwise.verify.verifying import half_for_finding, half_for_testing

ENDINGS = (".jsonl", ".ndjson", ".csv")


def is_file(name: str) -> bool:
    """Whether this names a probe file, by its ending or its slashes, and no registered probe."""
    path = Path(name)
    return path.suffix.lower() in ENDINGS or len(path.parts) > 1


def require_files(names: Sequence[str]) -> None:
    """Raises `InputError` if one of these names a probe file that cannot be used."""
    for each in filter(is_file, names):
        ProbeFile.of(each)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFile(Probe):
    """Items of your own, in the order of the file; `file` is its path as it was given."""

    file: str

    @classmethod
    def of(cls, path: str | Path) -> ProbeFile:
        """Raises `InputError` for a file that cannot be used, or with too few items for a verdict."""
        half_for_testing(path)
        half_for_finding(path)
        id = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-")
        if not id:
            raise InputError(f"probe file {path} has no letter or figure in its name to call it by; rename it")
        return cls(
            id=id,
            title=f"the items of {Path(path).name}",
            page="pictures.md#a-probe-file-with-pictures",
            make=_nothing,
            metric="answer-log-probability",
            chance=None,
            in_prompt=False,
            file=str(path),
        )

    def items(self, seed: int | str = 0) -> Iterator[Item]:
        """All of the file, whatever the seed."""
        return iter(read_items(self.file))

    @property
    def halves(self) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        """Those that heads are found on, and those that test them: as `headwise find` and `headwise verify` take."""
        return half_for_finding(self.file), half_for_testing(self.file)


def _nothing(*_: object) -> Item:
    raise InputError("a probe file draws no items; it has those that it has")
