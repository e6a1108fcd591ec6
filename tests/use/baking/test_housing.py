"""Where an offset goes: a bias, a setting that makes one, the bias of v, a Llama; or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

import headwise as hw
from headwise import edit
from headwise.errors import Refusal
from headwise.model.attached import AttachedModel
from headwise.use.baking import BakeReport

NEAR = 2e-6
MHA = ("tiny-gpt2", "tiny-opt", "tiny-bert", "tiny-gpt_neox", "planted")
WITH_BIAS = (*(name for name in MHA if name != "planted"), "tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3_text")

Build = Callable[[str], AttachedModel]
Loaded = Callable[[Path], Any]
Compare = Callable[..., tuple[BakeReport, float, float]]
Ramp = Callable[[AttachedModel], Tensor]


@pytest.mark.parametrize("name", [*WITH_BIAS, "mistral-without-window"])
def test_offsets_go_through_the_projection_into_a_bias(
    build: Build, bake_and_compare: Compare, ramp: Ramp, name: str, tmp_path: Path
) -> None:
    model = build(name)
    delta = ramp(model)
    reference = hw.reference(model, [model.example])
    edits = [
        edit.scale("L0H1", 2.0),
        edit.add("L0H1,L0H2", {"L0H1": delta, "L0H2": delta.flip(0)}),
        edit.add("L1H0", delta),
        edit.scale("L1H0", -0.5),
        edit.set("L1H1", delta),
        edit.mix("L1H2", delta, 0.3),
        edit.mean("L2H3", reference),
    ]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert difference < NEAR < 0.05 < effect
    assert not report.impossible


@pytest.mark.parametrize("name", ["tiny-qwen2", "mistral-without-window"])
def test_where_there_is_no_bias_the_weights_become_a_llama(
    build: Build, loaded_by_transformers: Loaded, bake_and_compare: Compare, ramp: Ramp, name: str, tmp_path: Path
) -> None:
    model = build(name)
    delta = edit.add("L1H2", ramp(model))
    report, difference, _ = bake_and_compare(model, [delta], tmp_path / "baked")
    baked = loaded_by_transformers(tmp_path / "baked")
    assert type(baked) is LlamaForCausalLM
    assert report.architecture == "LlamaForCausalLM"
    assert "attention_bias=true" in report.housing
    assert difference < NEAR
    prompt = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with model.editing(delta):
        wanted = model.generate(**prompt, **options)
    assert torch.equal(baked.generate(**prompt, **options), wanted)
    assert not torch.equal(model.generate(**prompt, **options), wanted)


def test_an_offset_of_a_whole_group_goes_into_the_bias_of_v(
    build: Build, loaded_by_transformers: Loaded, bake_and_compare: Compare, ramp: Ramp, tmp_path: Path
) -> None:
    model = build("tiny-qwen2")
    delta = ramp(model)
    edits = [edit.add("L1G1", delta, "v"), edit.scale("L1H2,L1H3", {"L1H2": 2.0, "L1H3": 2.0})]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert type(loaded_by_transformers(tmp_path / "baked")) is Qwen2ForCausalLM
    assert difference < NEAR < 0.05 < effect
    assert report.lines[0].tensors == ("model.layers.1.self_attn.v_proj.bias",)
    plain = model.model.state_dict()[report.lines[0].tensors[0]]
    moved = hw.bake(model, edit.add("L1G1", delta, "v")).tensors[report.lines[0].tensors[0]]
    torch.testing.assert_close(moved[12:] - plain[12:], delta)
    assert torch.equal(moved[:12], plain[:12])


def test_an_offset_with_nowhere_to_go_is_refused_with_every_reason(build: Build, ramp: Ramp) -> None:
    with pytest.raises(Refusal) as refused:
        hw.bake(build("tiny-mistral"), edit.add("L1H2", ramp(build("tiny-mistral"))))
    for reason in ("no bias at its output projections", "not all given the same offset", "window of 8 keys"):
        assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_checkpoint_of_transformers_is_refused() -> None:
    class Mine(LlamaForCausalLM):
        pass

    plain = hw.load("zoo:tiny-llama")
    plain.detach()
    mine = Mine(plain.model.config).eval()
    with (
        hw.attach(mine, plain.tokenizer, example=plain.example) as model,
        pytest.raises(Refusal, match="code of the"),
    ):
        hw.bake(model, edit.zero("L0H0"))
