"""`headwise bench decode` gives every figure it promises, of generations that write the same tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headwise.benches import decoding
from headwise.benches.shapes import LLAMA_GQA
from headwise.errors import HeadwiseError

SMALL = replace(LLAMA_GQA, layers=2, heads=4, kv_heads=2, width=32, feed_forward=64, vocabulary=99)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LLAMA_GQA": SMALL, "TURNS": 1, "PROMPT": 24, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(decoding, name, value)


def test_every_way_is_timed_and_names_the_same_keys() -> None:
    figures = decoding.measure()
    assert set(figures) == {"time.retrieval", "time.output_attentions", "time.noise", "same_top"}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert figures["same_top"] == 1


def test_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = iter(range(100))

    def equal(*_: object) -> bool:
        return next(written) < 1

    monkeypatch.setattr(decoding.torch, "equal", equal)
    with pytest.raises(HeadwiseError, match="wrote other tokens than plain generation"):
        decoding.measure()
