"""Inputs for tiny models: made up by attach where it can, found by trying where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from headwise.benches.coverage.building import build
from headwise.benches.coverage.inputs import NoInputs, inputs_for
from headwise.benches.coverage.rows import Row, committed


def found(key: str) -> tuple[nn.Module, dict[str, Any], bool]:
    row = next(each for each in committed() if each.key == key)
    model = build(row)
    inputs, made_up = inputs_for(row, model)
    return model, inputs, made_up


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("llama causal", {"input_ids", "attention_mask"}),
        ("t5 text-to-text", {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("vit base", {"pixel_values"}),
    ],
)
def test_attach_makes_them_up_where_it_can(key: str, names: set[str]) -> None:
    _, inputs, made_up = found(key)
    assert made_up
    assert set(inputs) == names


@pytest.mark.parametrize("key", ["llava_next image-text", "qwen2_vl image-text", "gemma3 image-text"])
def test_a_model_with_pictures_gets_one_with_as_many_tokens_as_features(key: str) -> None:
    model, inputs, _ = found(key)
    marker = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    count = int((inputs["input_ids"] == marker).sum())
    assert count >= 2
    one_less = inputs | {"input_ids": inputs["input_ids"].clone()}
    one_less["input_ids"][0, (inputs["input_ids"][0] == marker).nonzero()[0]] = 9
    with pytest.raises(Exception, match="match"):
        model(**one_less)


def test_series_have_a_past_and_a_future() -> None:
    _, inputs, made_up = found("informer base")
    assert not made_up
    assert {"past_values", "future_values"} <= set(inputs)


def test_frames_of_sound_are_as_wide_as_the_model_takes_them() -> None:
    model, inputs, _ = found("audio-spectrogram-transformer base")
    assert inputs["input_values"].shape[-1] == model.config.num_mel_bins


def test_a_model_that_runs_on_nothing_says_what_was_tried() -> None:
    class Hopeless(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values: Any) -> None:
            raise RuntimeError(f"not {pixel_values.dim()} axes")

    with pytest.raises(NoInputs, match="not 4 axes"):
        inputs_for(Row("hopeless", "base", "Hopeless"), Hopeless())
