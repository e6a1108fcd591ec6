"""The folder of an atlas: what is in it, and how it stays whole whatever happens to the process.

    manifest.json                  what it is of and how it is made
    cells/find/induction/ioi.json, .safetensors    one cell: plain values, and arrays
    tables/*.parquet               all cells as tables
    log.jsonl                      what ran when, where and for how long

Every file is written beside its place, flushed and then renamed, so a kill leaves the old one or the new one. A cell's
JSON comes last and holds the hash of its tensors: a cell without it was not finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as tensor_file

from headwise.atlas.cell import Cell, Result
from headwise.atlas.manifest import FORMAT_VERSION, Manifest
from headwise.errors import InputError, Refusal

MANIFEST = "manifest.json"
LOG = "log.jsonl"
LOCK = ".lock"
PARTIAL = ".partial"


class Unreadable(InputError):
    """A cell that is not there, or damaged."""


@dataclass(frozen=True, slots=True)
class Store:
    """The files of one atlas."""

    folder: Path

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def manifest(self) -> Manifest:
        """Raises `InputError` if there is none, if it is damaged, or if a newer headwise wrote it."""
        path = self.folder / MANIFEST
        try:
            form = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"{self.folder} holds no atlas ({error.strerror}: {path})") from None
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); the atlas cannot be read") from None
        if not isinstance(form, dict):
            raise InputError(f"{path} does not describe a headwise atlas")
        version = form.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise InputError(
                f"{self.folder} has format_version {version}, this headwise reads up to {FORMAT_VERSION}; "
                "use the headwise that wrote it, or a newer one"
            )
        try:
            return Manifest.from_json(form)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def has(self, cell: Cell) -> bool:
        return self._json(cell).is_file()

    def read(self, cell: Cell) -> Result:
        """What a cell measured. Raises `Unreadable` if it is not there or damaged."""
        path = self._json(cell)
        try:
            form = json.loads(path.read_bytes())
            digest = form["tensors_sha256"]
            tensors = self._tensors(cell).read_bytes() if digest else b""
            if digest and hashlib.sha256(tensors).hexdigest() != digest:
                raise Unreadable(
                    f"{self._tensors(cell)} is not the file that {path.name} names; delete both and run the atlas again"
                )
            return Result(form["about"], tensor_file.load(tensors) if digest else {}, form["refused"])
        except OSError as error:
            raise Unreadable(
                f"cell {cell.id} of {self.folder} is not there ({error.strerror}); run the atlas again"
            ) from None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, Unreadable):  # which is a ValueError, too
                raise
            raise Unreadable(
                f"{path} is damaged ({type(error).__name__}: {error}); delete it and run the atlas again"
            ) from None

    # -- writing ----------------------------------------------------------------------------------------------------

    def write_manifest(self, manifest: Manifest) -> None:
        self.write(MANIFEST, _json(manifest.to_json()))

    def write_cell(self, cell: Cell, result: Result) -> None:
        """Raises `Refusal` if the disk does not take it; what was there before stays."""
        digest = ""
        if result.arrays:
            tensors = tensor_file.save({name: np.ascontiguousarray(each) for name, each in result.arrays.items()})
            digest = hashlib.sha256(tensors).hexdigest()
            self.write(self._tensors(cell).relative_to(self.folder), tensors)
        form = {"cell": cell.id, "refused": result.refused, "about": plain(result.about), "tensors_sha256": digest}
        self.write(self._json(cell).relative_to(self.folder), _json(form))

    def write(self, name: str | Path, content: bytes) -> None:
        """One file, whole or not at all. Raises `Refusal` if the disk does not take it."""
        path = self.folder / name
        partial = path.with_name(f".{path.name}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
                _flush_names(path.parent)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise Refusal(
                f"{path} cannot be written ({error.strerror or error}); what was finished before is kept: make room or "
                "choose another --out, and run the same command again"
            ) from error

    def log(self, event: str, **about: Any) -> None:
        """One line on what happened, with the time and the host. What the log says is not part of the atlas."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "event": event,
            **about,
        }
        # A line that the disk does not take is lost; the cells say themselves what was finished.
        with contextlib.suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block no other process writes to the folder; the system ends the lock with the process.

        Raises `Refusal` if another one holds it, if the folder cannot be made, or if it holds something else.
        """
        self._make()
        try:
            import fcntl
        except ImportError:
            raise Refusal(
                "this system has no file locks (fcntl), so two runs could mix; run the atlas elsewhere"
            ) from None
        try:
            file = (self.folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise Refusal(f"{self.folder} cannot be written to ({error.strerror}); choose another --out") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise Refusal(
                    f"process {owner} is at work on {self.folder}; wait until it has finished, or choose another --out"
                ) from None
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            for left in self.folder.rglob(f".*{PARTIAL}"):
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote
            yield

    def _make(self) -> None:
        if self.folder.exists() and not self.exists:
            ours = (LOCK, LOG, "cells", "tables")
            foreign = self.folder.is_dir() and next(
                (
                    each.name
                    for each in sorted(self.folder.iterdir())
                    if each.name not in ours and PARTIAL not in each.name
                ),
                "",
            )
            if foreign or not self.folder.is_dir():
                what = f"holds {foreign} and no atlas" if foreign else "is a file"
                raise InputError(f"{self.folder} {what}; give --out a new or empty folder, or one with an atlas")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"{self.folder} cannot be made ({error.strerror}); choose another --out") from None

    def _json(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.id}.json"

    def _tensors(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.id}.safetensors"


def plain(value: Any) -> Any:
    """As JSON holds it: numbers that are none as null, numpy's as Python's, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _json(form: Mapping[str, Any]) -> bytes:
    return (json.dumps(form, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _flush_names(folder: Path) -> None:
    """The renaming itself reaches the disk, where the system can be asked for it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
