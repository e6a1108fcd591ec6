"""One row from its class to its result, on real tiny models."""

from __future__ import annotations

import dataclasses

import pytest

from headwise.benches.coverage import examining
from headwise.benches.coverage.examining import NO_OP, ZERO, Z, examine
from headwise.benches.coverage.result import Result
from headwise.benches.coverage.rows import Row, committed
from headwise.model.proving import doctor
from headwise.model.proving.findings import Finding

SAMPLE = (
    "llama causal",
    "gpt2 causal",
    "bloom causal",
    "qwen3_next causal",
    "deepseek_v3 causal",
    "mamba causal",
    "bert masked",
    "bart text-to-text",
    "qwen2_5_vl image-text",
    "whisper speech",
    "vit base",
    "wav2vec2 base",
)
"""Rows of every kind: registry and watched, gated, latent, no attention, cross, pictures, sound."""


def row(key: str) -> Row:
    return next(each for each in committed() if each.key == key)


@pytest.mark.slow
def test_the_sample_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "is_most_used", lambda kind, task: False)
    found = {key: examine(row(key)) for key in SAMPLE}
    statuses = {key: result.status for key, result in found.items()}
    assert statuses == {key: "no attention" if key == "mamba causal" else "right" for key in SAMPLE}
    assert found["bloom causal"].route == "watched"
    assert found["llama causal"].route == "registry"
    for key, result in found.items():
        if result.status == "right":
            assert result.passed(Z)
            assert result.passed(ZERO)
            assert result.passed(NO_OP)
            assert result.with_z == result.sites > 0, key
    assert found["llama causal"].heads == 8
    assert found["gpt2 causal"].projections == ("Conv1D",)
    assert found["bart text-to-text"].sites == 6
    assert "pixel_values" in found["qwen2_5_vl image-text"].seen
    assert "input_features" in found["whisper speech"].seen


@pytest.mark.slow
def test_a_most_used_type_shows_its_capabilities() -> None:
    result = examine(row("llama causal"))
    shown = {column: outcome.status for column, outcome in result.capabilities.items()}
    assert list(shown) == ["rows", "z", "generate", "gradients", "patching", "bf16", "offload", "NF4"]
    del shown["NF4"]  # needs bitsandbytes
    assert set(shown.values()) == {"pass"}
    assert "4 of 4 steps" in result.capabilities["generate"].detail


def test_a_check_that_fails_makes_the_row_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = dataclasses.replace(
        doctor.EXAMINATIONS[4], carry_out=lambda patient: Finding("fail", "the two outputs differ")
    )
    monkeypatch.setattr(doctor, "EXAMINATIONS", (*doctor.EXAMINATIONS[:4], failing, *doctor.EXAMINATIONS[5:]))
    result = examine(row("arcee causal"))
    assert (result.status, result.reason) == ("wrong", "zeroing two ways agrees: the two outputs differ")


def test_headwise_stumbling_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise KeyError("in /some/folder/file.py")

    monkeypatch.setattr(examining, "attach", stumble)
    result = examine(row("arcee causal"))
    assert result.status == "wrong"
    assert result.reason == "attach: KeyError: 'in file.py'"


def test_what_is_not_separable_is_partly_served() -> None:
    result = examine(row("bitnet causal"))
    assert result.status == "partly"
    assert (result.with_z, result.with_rows) == (0, 2)
    assert result.reason.startswith("no z edits at every site: a head reaches 64 columns")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(row: Row) -> None:
        raise ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment.")

    monkeypatch.setattr(examining, "build", lack)
    result = examine(row("gemma3n_vision base"))
    assert (result.status, result.reason) == ("not built", "the optional package timm is missing")


def test_a_model_without_attention_says_what_it_is_made_of() -> None:
    result = examine(row("resnet base"))
    assert result.status == "no attention"
    assert "ResNetConvLayer" in result.reason


def test_a_result_comes_back_from_json() -> None:
    result = examine(row("arcee causal"))
    assert result.status == "right"
    assert Result.from_json(result.to_json()) == result
