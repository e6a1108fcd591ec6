"""Memory that is freed stays with the process inside `kept`, and only there."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from headwise import freed_memory

FAULTS = """
import resource, torch
from headwise.freed_memory import kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    stream = torch.zeros(1024, 512)
    for _ in range(50):
        for _ in range(6):  # like the layers of a small model
            stream = stream * 2 + 1
            wide = torch.cat([stream, stream, stream])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
outside = faults()
with kept():
    faults()
    inside = faults()
print(outside, inside)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_pages_are_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside = map(int, done.stdout.split())
    assert inside < 500 < outside / 10


def test_blocks_within_and_side_by_side_end_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    set_: list[tuple[int, int]] = []
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: lambda what, to: set_.append((what, to)))
    first, second = freed_memory.kept(), freed_memory.kept()
    first.__enter__()
    with freed_memory.kept():
        second.__enter__()
    first.__exit__(None, None, None)
    assert set_ == [(freed_memory.MMAP, freed_memory.LARGEST), (freed_memory.TRIM, freed_memory.KEPT)]
    second.__exit__(None, None, None)
    assert set_[2:] == [(freed_memory.MMAP, freed_memory.LARGEST), (freed_memory.TRIM, freed_memory.BETWEEN)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert freed_memory._mallopt.__wrapped__() is None
