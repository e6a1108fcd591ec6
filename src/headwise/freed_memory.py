"""Memory that one forward frees is there for the next.

glibc hands the free end of its heap back to the system as soon as it is twice as long as the largest block seen, and
the next forward gets it anew, page by page, each a fault and 4 kB of zeros. For a small model that is a fifth of the
time. Inside `kept` that end may grow to a gigabyte. Elsewhere (macOS, Windows, musl, another allocator in place of
malloc) nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

TRIM, MMAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""
LARGEST = 32 * 2**20
"""Blocks up to this come from the heap: as far as glibc itself raises that bound, when one of this size was freed."""
KEPT, BETWEEN = 2**30, 2 * LARGEST
"""Longest free end of the heap inside `kept` and behind it; the second is glibc's own for blocks of `LARGEST`."""

_lock = Lock()
_open = 0


@contextmanager
def kept() -> Iterator[None]:
    """Inside the block (or a function that this decorates), memory that is freed stays with the process."""
    _opened(+1)
    try:
        yield
    finally:
        _opened(-1)


def _opened(by: int) -> None:
    global _open
    with _lock:
        before, _open = _open, _open + by
        if (glibc := _glibc()) is not None and 0 in (before, _open):
            glibc.mallopt(MMAP, LARGEST)
            glibc.mallopt(TRIM, KEPT if _open else BETWEEN)
            if not _open and glibc.mallinfo2().fordblks > BETWEEN:
                glibc.malloc_trim(BETWEEN)


class _Info(ctypes.Structure):
    """glibc's mallinfo2, of which `fordblks` is wanted: bytes that are free in all heaps."""

    _fields_ = (("_before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("_behind", ctypes.c_size_t))


@cache
def _glibc() -> Any:
    """The library; None where there is none that can do this, or where the user has said how memory is to be kept."""
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"} & os.environ.keys():
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):  # before 2.33
        return None
    library.mallinfo2.restype = _Info
    return library
