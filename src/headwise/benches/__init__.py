"""Measurements behind `headwise bench NAME`: ratios against what a user would do instead, taken in one run."""

from __future__ import annotations

import sys

from headwise.catalogue import BenchEntry, register


def _overhead(seed: int = 0) -> dict[str, float]:
    from headwise.benches.overhead import measure

    return measure(seed=seed)


def _detectors(seed: int = 0) -> dict[str, float]:
    from headwise.benches.detectors import measure

    return measure(seed=seed, said=_say)


def _calibration(seed: int = 0) -> dict[str, float]:
    from headwise.benches.calibration import measure

    return measure(seed=seed, said=_say)


def _say(what: str) -> None:
    print(f"headwise: {what}", file=sys.stderr, flush=True)


def _organism(seed: int = 0, device: str | None = None, dtype: str | None = None) -> dict[str, float]:
    from headwise.benches.organism import measure

    return measure(seed=seed, device=device, dtype=dtype)


register(
    BenchEntry(
        id="organism",
        title="what the trained organism gets right on items it never saw",
        page="benchmarks.md#organism",
        run=_organism,
    )
)
register(
    BenchEntry(
        id="overhead",
        title="what attaching, reading z and row statistics cost, in time and memory",
        page="benchmarks.md#overhead",
        run=_overhead,
    )
)
register(
    BenchEntry(
        id="detectors",
        title="recall and precision of every method on models whose heads are known",
        page="benchmarks.md#detectors",
        run=_detectors,
    )
)
register(
    BenchEntry(
        id="calibration",
        title="how often a verified claim is false, and how often a real effect is verified",
        page="benchmarks.md#calibration",
        run=_calibration,
    )
)
