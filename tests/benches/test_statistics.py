"""`headwise bench stats` gives every figure it promises; what the figures are is no test."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from headwise.benches import statistics
from headwise.benches.shapes import LLAMA_GQA

SMALL = replace(LLAMA_GQA, heads=4, kv_heads=2, width=32, feed_forward=64, vocabulary=99)


def test_every_way_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LLAMA_GQA", SMALL)
    monkeypatch.setattr(statistics, "TURNS", 1)
    figures = statistics.measure_times(40)
    assert set(figures) == {f"time.40.{name}" for name in (*statistics.WAYS, "noise")}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())


def test_what_a_user_would_do_gives_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LLAMA_GQA", SMALL)
    ids = statistics._ids(40, seed=1)
    with statistics._attached(statistics._model(40, 2, seed=0)) as attached:
        theirs = statistics._way("output_attentions", attached, ids)()
        asked = statistics._read(statistics.WITH_DISTANCE, ids)
        with torch.no_grad(), attached.reading(asked) as got:
            attached(input_ids=ids)
        ours = [got.statistics[site.label] for site in attached.sites]
        assert attached.model.config._attn_implementation == "sdpa"
    assert isinstance(theirs, list)
    for mine, layer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.entropy, layer["entropy"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.sink_mass, layer["sink_mass"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine.pair_mass["previous"][..., 1:], layer["previous"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine.mean_distance.float(), layer["mean_distance"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_is_that_of_fresh_processes() -> None:
    figures = statistics.measure_memory(512, ways=("three",))
    assert set(figures) == {"memory.512.plain_mb", "memory.512.three"}
    assert all(value > 0 for value in figures.values())
