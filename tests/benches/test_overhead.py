"""`headwise bench overhead` gives every figure it promises; what the figures are is no test."""

from __future__ import annotations

import math

import pytest

from headwise import catalogue
from headwise.benches import overhead


@pytest.mark.slow
def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "TURNS", 1)
    entry = catalogue.entry("benches", "overhead")
    assert isinstance(entry, catalogue.BenchEntry)
    figures = entry.run()
    assert set(figures) == {
        *(f"time.{name}" for name in ("idle", "read_z", "hooks", "noise", "idle_seam_share")),
        "memory.statistics_above_plain_mb",
        "memory.plain_mb",
    }
    assert all(math.isfinite(value) and value > 0 for name, value in figures.items() if name.startswith("time"))
