"""A training on disk: what it was made with, and where it stands.

    FOLDER/training.json           settings; a folder made with others is refused
    FOLDER/checkpoint.safetensors  parameters, the best ones, the optimiser's moments; losses in its metadata

The checkpoint is one file, put in place whole, so that a process killed at any moment leaves the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from headwise.errors import InputError
from headwise.whole_file import write_whole

PARTS = ("parameters", "best", "moments")


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps.

    Attributes:
        parameters: as they are now; `best`: as they were at the best validation, if there was one.
        moments: the optimiser's state, `NAME/KIND`.
        losses: of the steps so far; `validations`: by the number of steps before each.
    """

    parameters: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    losses: tuple[float, ...]
    validations: Mapping[int, float]


@dataclass(frozen=True)
class Folder:
    """Where a training keeps its checkpoint.

    Raises:
        InputError: the folder holds a training made with other settings, or what is no training.
    """

    path: Path
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            wanted = json.dumps(self.settings, indent=1, sort_keys=True)
        except TypeError as error:
            raise InputError(f"settings= of a training are written as JSON, and cannot be ({error})") from None
        written = self.path / "training.json"
        if written.exists():
            self._compare(written.read_text(encoding="utf-8"), json.loads(wanted))
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} is there and holds no training; name a new or empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(written, wanted.encode())

    def read(self) -> Checkpoint | None:
        """What was saved last, or None. Raises InputError for a file that cannot be read."""
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = json.loads((file.metadata() or {})["training"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it to begin anew") from None
        parts = {
            part: {key.removeprefix(f"{part}/"): value for key, value in tensors.items() if key.startswith(f"{part}/")}
            for part in PARTS
        }
        validations = {int(step): value for step, value in told["validations"].items()}
        return Checkpoint(**parts, losses=tuple(told["losses"]), validations=validations)

    def write(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint in the place of the one before."""
        tensors = {
            f"{part}/{name}": value.detach().cpu().contiguous()
            for part in PARTS
            for name, value in getattr(checkpoint, part).items()
        }
        # repr of a float is read back as the same bits, and json writes it so.
        told = json.dumps({"losses": checkpoint.losses, "validations": checkpoint.validations})
        write_whole(self.path / "checkpoint.safetensors", save(tensors, metadata={"training": told}))

    def _compare(self, written: str, wanted: Mapping[str, Any]) -> None:
        try:
            found = json.loads(written)
        except ValueError:
            raise InputError(f"{self.path / 'training.json'} is no JSON; name another folder") from None
        if found != wanted:
            raise InputError(
                f"{self.path} holds a training made with another {_where(found, wanted)}; "
                "give the same settings, or name another folder"
            )


def _where(found: Any, wanted: Any) -> str:
    """The first place at which two settings differ, in words."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return "setting"
    key = next(key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
    if isinstance(found.get(key), Mapping) and isinstance(wanted.get(key), Mapping):
        return _where(found[key], wanted[key])
    return f"{key} ({str(found.get(key))[:60]}, not {str(wanted.get(key))[:60]})"
