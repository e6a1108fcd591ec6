"""`headwise bench use-overhead` gives every figure it promises, and every way writes as many tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import headwise as hw
from headwise.benches import use_overhead
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA

SMALL = {
    "gpt2": replace(GPT2_SMALL, layers=2, heads=2, kv_heads=2, width=16, feed_forward=32, vocabulary=99),
    "llama": replace(LLAMA_GQA, layers=2, heads=4, kv_heads=2, width=32, feed_forward=64, vocabulary=99),
}
WAYS = {"z", "score_scale", "score_bias", "two_batch", "two_caches", "noise"}


def test_every_way_is_timed_on_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHAPES": SMALL, "PROMPT": 12, "NEW_TOKENS": 2, "TURNS": 1}.items():
        monkeypatch.setattr(use_overhead, name, value)
    said: list[str] = []
    figures = use_overhead.measure(said=said.append)
    assert set(figures) == {f"{model}.{way}" for model in ("gpt2", "llama", "organism") for way in WAYS}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert said == ["gpt2", "llama", "organism"]


def test_every_way_changes_what_the_model_computes() -> None:
    """An intervention that did nothing would cost nothing."""
    with hw.attach(SMALL["llama"].build()) as model:
        ids = torch.arange(1, 13)[None]
        plain = model(input_ids=ids).logits
        for name, intervention in use_overhead.interventions(model).items():
            with intervention(model):
                assert not torch.equal(model(input_ids=ids).logits, plain), name


def test_every_generation_is_as_long_as_asked() -> None:
    with hw.attach(SMALL["gpt2"].build()) as model:
        ids = torch.arange(1, 13)[None]
        for intervention in (None, *use_overhead.interventions(model).values()):
            written = use_overhead._generation(model, ids, 3, intervention)()
            assert isinstance(written, torch.Tensor)
            assert written.shape == (1, 15)
