"""CPU times of several ways to the same thing, taken in turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Way = Callable[[], object]


def cpu_seconds(ways: Mapping[str, Way], *, turns: int) -> dict[str, list[float]]:
    """CPU seconds of this process for every way, once per turn; a different one comes first in each turn.

    Nothing is run beforehand: a way whose first run is special has to be run once by the caller.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            ways[name]()
            taken[name].append(time.process_time() - start)
    return taken


def ratio(taken: Sequence[float], to: Sequence[float]) -> float:
    """Ratio of the medians."""
    return statistics.median(taken) / statistics.median(to)
