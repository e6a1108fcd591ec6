"""The folder: whole files, locks, damage, versions."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwise.atlas import Atlas
from headwise.atlas.cell import Cell, Result
from headwise.atlas.manifest import FORMAT_VERSION
from headwise.atlas.store import Store, plain
from headwise.errors import InputError, Refusal

CELL = Cell(kind="map", probe="ioi", site="L0")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "atlas")


def files(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def test_a_cell_comes_back_as_it_was(store: Store) -> None:
    values = np.array([[1.5, np.nan], [-0.0, 1e-300]])
    store.write_cell(CELL, Result({"heads": ("L0H0",), "n": np.int64(3), "bad": float("nan")}, {"values": values}))
    found = store.read(CELL)
    assert found.arrays["values"].tobytes() == values.tobytes()
    assert found.about == {"heads": ["L0H0"], "n": 3, "bad": None}
    assert found.refused == ""
    assert files(store.folder) == ["cells/map/ioi/L0.json", "cells/map/ioi/L0.safetensors"]


def test_a_refusal_needs_no_tensors(store: Store) -> None:
    store.write_cell(CELL, Result(refused="not solved"))
    assert store.read(CELL).refused == "not solved"
    assert files(store.folder) == ["cells/map/ioi/L0.json"]


def test_tensors_without_their_json_are_no_cell(store: Store) -> None:
    store.write_cell(CELL, Result({}, {"values": np.ones(2)}))
    (store.folder / "cells/map/ioi/L0.json").unlink()
    assert not store.has(CELL)


def test_tensors_of_another_run_are_noticed(store: Store) -> None:
    store.write_cell(CELL, Result({}, {"values": np.ones(2)}))
    tensors = store.folder / "cells/map/ioi/L0.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="delete both"):
        store.read(CELL)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"about": {}, "refused": ""}'])
def test_a_damaged_cell_is_named(store: Store, content: bytes) -> None:
    store.write_cell(CELL, Result())
    (store.folder / "cells/map/ioi/L0.json").write_bytes(content)
    with pytest.raises(InputError, match=r"L0\.json is damaged"):
        store.read(CELL)


def test_a_cell_that_is_not_there(store: Store) -> None:
    with pytest.raises(InputError, match=r"map/ioi/L0 .* is not there"):
        store.read(CELL)


def test_a_full_disk_leaves_the_old_file_and_no_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("file", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refusal, match=r"No space left on device.*run the same command again"):
        store.write("file", b"new")
    assert files(store.folder) == ["file"]
    assert (store.folder / "file").read_bytes() == b"old"


HOLD = """
import sys, time
from pathlib import Path
from headwise.atlas.store import Store
with Store(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(store: Store) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(store.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Refusal, match=f"process {other.pid} is at work"), store.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with store.locked():
        pass


def test_what_a_killed_process_left_half_written_is_cleared(store: Store) -> None:
    store.write_cell(CELL, Result())
    part = store.folder / "cells/map/ioi/.L1.json.partial"
    part.write_bytes(b"{")
    with store.locked():
        assert not part.exists()
    assert store.has(CELL)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds thesis\.tex and no atlas"), Store(tmp_path).locked():
        pass
    assert files(tmp_path) == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"), Store(tmp_path / "thesis.tex").locked():
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot be made"), Store(tmp_path / "file" / "atlas").locked():
        pass


def test_no_atlas_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no atlas"):
        Atlas.open(tmp_path)


def changed(finished: Atlas, folder: Path, **fields: Any) -> Path:
    form = json.loads((finished.folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**form, **fields}), encoding="utf-8")
    return folder


def test_a_newer_format_is_refused(finished: Atlas, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"format_version {FORMAT_VERSION + 1}, this headwise reads up to"):
        Atlas.open(changed(finished, tmp_path, format_version=FORMAT_VERSION + 1))


def test_an_older_format_is_read_and_not_gone_on_with(
    finished: Atlas, tmp_path: Path, run: Callable[..., Atlas]
) -> None:
    folder = changed(finished, tmp_path, format_version=FORMAT_VERSION - 1)
    before = files(folder)
    assert Atlas.open(folder).read_only
    assert not finished.read_only
    with pytest.raises(InputError, match=r"only reads \(Atlas.open\)"):
        run(folder)
    assert [each for each in files(folder) if each != ".lock"] == before


@pytest.mark.parametrize("content", ["[]", '{"format_version": 1}', '{"format_version": 1, "format": "x"}', "{"])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest\.json"):
        Atlas.open(tmp_path)


def test_plain_values() -> None:
    assert plain({"a": (1, float("inf")), 2: np.float32(0.5)}) == {"a": [1, None], "2": 0.5}
