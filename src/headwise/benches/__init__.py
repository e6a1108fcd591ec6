"""Measurements behind `headwise bench NAME`: ratios against what a user would do instead, taken in one run."""

from __future__ import annotations

from headwise.catalogue import BenchEntry, register


def _overhead(seed: int = 0) -> dict[str, float]:
    from headwise.benches.overhead import measure

    return measure(seed=seed)


register(
    BenchEntry(
        id="overhead",
        title="what attaching, reading z and row statistics cost, in time and memory",
        page="benchmarks.md#overhead",
        run=_overhead,
    )
)
