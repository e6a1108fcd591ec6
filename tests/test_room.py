"""Rooms that are functions, too: `hw.find`, `hw.verify`, `hw.atlas`, whatever was imported before."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import headwise as hw


@pytest.mark.parametrize("first", ["", "import headwise.{0}; ", "from headwise.{0} import __name__ as _; "])
@pytest.mark.parametrize(("room", "home"), [("find", "search"), ("verify", "verifying"), ("atlas", "running")])
def test_a_room_can_be_called_whatever_was_imported_first(first: str, room: str, home: str) -> None:
    code = f"""{first.format(room)}import headwise as hw, inspect, importlib
function = getattr(importlib.import_module("headwise.{room}.{home}"), "{room}")
assert callable(hw.{room}), hw.{room}
assert inspect.signature(hw.{room}) == inspect.signature(function)
assert hw.{room}.{home}.{room} is function
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_call_is_the_function_s() -> None:
    with pytest.raises(hw.InputError, match="did you mean retrieval"):
        hw.find("retreival", None)  # type: ignore[arg-type]
    assert "model" in inspect.signature(hw.find).parameters
