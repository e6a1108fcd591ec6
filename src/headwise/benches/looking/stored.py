"""The parts of one model's table in a folder, a file each; a file appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from headwise.benches.looking.row import Row
from headwise.errors import InputError
from headwise.verify.verdict import plain
from headwise.whole_file import write_whole

_PAIRS = ("interval", "beyond_interval")


@dataclass(frozen=True, slots=True)
class Stored:
    """`seed` is that of the items: rows of others are not taken."""

    folder: Path
    seed: int = 0

    def rows(self, part: str) -> list[Row] | None:
        """None where they are not there, or of other items. Raises `InputError` for a file of something else."""
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            form = json.loads(path.read_text(encoding="utf-8"))
            seed, rows = form["seed"], [_row(each) for each in form["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no rows of this table ({error}); delete it, and run again") from None
        return rows if seed == self.seed else None

    def put(self, part: str, rows: Sequence[Row]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"seed": self.seed, "rows": [plain(asdict(row)) for row in rows]}, indent=1) + "\n"
        write_whole(self._path(part), text.encode())

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.json"


def _row(form: dict[str, Any]) -> Row:
    numbers = {each.name for each in fields(Row) if each.type == "float"}
    values: dict[str, Any] = {
        key: math.nan if value is None and key in numbers else value for key, value in form.items()
    }
    pairs = {key: tuple(math.nan if bound is None else bound for bound in form[key]) for key in _PAIRS}
    values |= {**pairs, "heads": tuple(form["heads"])}
    return Row(**values)
