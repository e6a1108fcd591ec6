"""Memory that is freed stays with the process inside `kept`, and only there."""

from __future__ import annotations

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
    held = [torch.zeros(5_000_000) for _ in range(20)]
    last = torch.zeros(1000)  # what is freed lies below it
    del held
pages = int(open("/proc/self/statm").read().split()[1])
with kept():
    held = [torch.zeros(5_000_000) for _ in range(20)]
    more = int(open("/proc/self/statm").read().split()[1])
print(outside, inside, pages, more)
"""


@pytest.mark.skipif(freed_memory._glibc() is None, reason="nothing is done here")
def test_pages_are_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside, behind, filled = map(int, done.stdout.split())
    assert inside < min(3000, outside), "of 600,000 pages that were taken; a block now and then finds no hole"
    assert filled - behind > 60_000, "most of 400 MB had been given back"


def test_blocks_within_and_side_by_side_end_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    glibc = Glibc()
    monkeypatch.setattr(freed_memory, "_glibc", lambda: glibc)
    first, second = freed_memory.kept(), freed_memory.kept()
    first.__enter__()
    with freed_memory.kept():
        second.__enter__()
    first.__exit__(None, None, None)
    assert glibc.told == [(freed_memory.MMAP, freed_memory.LARGEST), (freed_memory.TRIM, freed_memory.KEPT)]
    second.__exit__(None, None, None)
    assert glibc.told[2:] == [(freed_memory.MMAP, freed_memory.LARGEST), (freed_memory.TRIM, freed_memory.BETWEEN)]
    assert not glibc.trimmed
    glibc.fordblks = freed_memory.BETWEEN + 1
    with freed_memory.kept():
        pass
    assert glibc.trimmed


class Glibc:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.fordblks, self.trimmed = 0, False

    def mallopt(self, what: int, to: int) -> None:
        self.told.append((what, to))

    def mallinfo2(self) -> Glibc:
        return self

    def malloc_trim(self, but_for: int) -> None:
        self.trimmed = True


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert freed_memory._glibc.__wrapped__() is None
