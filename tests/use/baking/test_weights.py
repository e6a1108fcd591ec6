"""Columns, and rows and columns that are taken out; every other bit stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import edit
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.use.baking import BakeReport

NEAR = 2e-6
MHA = ("tiny-gpt2", "tiny-opt", "tiny-bert", "tiny-gpt_neox", "planted")
GQA = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-gemma3_text", "planted-gqa")

Build = Callable[[str], AttachedModel]
Loaded = Callable[[Path], Any]
Compare = Callable[..., tuple[BakeReport, float, float]]
Ramp = Callable[[AttachedModel], Tensor]


@pytest.mark.parametrize("name", [*MHA, *GQA])
def test_scales_of_z_are_columns(
    build: Build, bake_and_compare: Compare, ramp: Ramp, name: str, tmp_path: Path
) -> None:
    model = build(name)
    first, last = model.sites[0].label, model.sites[-1].label
    edits = [
        edit.scale(f"{first}H1", 2.0),
        edit.scale(f"{first}H0", -1.0, strength=0.5),
        edit.zero(f"{last}H1"),
        edit.scale(f"{last}H0", 1 + ramp(model)),
        edit.scale(f"{last}H0", 3.0, "pattern"),
    ]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert difference < NEAR < 0.05 < effect
    assert [line.result for line in report.lines] == ["exact"] * 5
    changed = {tensor for line in report.lines for tensor in line.tensors}
    assert changed == {f"{site.projection}.weight" for site in (model.sites[0], model.sites[-1])}
    assert report.check is not None
    assert report.check.difference < NEAR


def test_factors_and_zeros_leave_the_bits_of_what_they_do_not_reach(build: Build, tmp_path: Path) -> None:
    model = build("tiny-llama")
    baked = hw.bake(model, edit.scale("L1H2", -1.0)).tensors
    name = "model.layers.1.self_attn.o_proj.weight"
    plain = model.model.state_dict()[name]
    assert torch.equal(baked[name][:, 24:36], -plain[:, 24:36])
    assert torch.equal(baked[name][:, :24], plain[:, :24])
    assert torch.equal(baked[name][:, 36:], plain[:, 36:])
    others = {other: tensor for other, tensor in model.model.state_dict().items() if other != name}
    assert all(torch.equal(baked[other], tensor) for other, tensor in others.items())


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_the_bias_is_the_projected_offset_and_not_the_offset_itself(
    build: Build, ramp: Ramp, name: str, tmp_path: Path
) -> None:
    model = build(name)
    site, delta = model.site("L1"), ramp(model)
    assert site.projection is not None
    state = model.model.state_dict()
    baked = hw.bake(model, edit.add("L1H2", delta))
    bias = f"{site.projection}.bias"
    before = state.get(bias, torch.zeros(site.d_model))
    weight = state[f"{site.projection}.weight"]
    by_head = (weight.T if name == "tiny-llama" else weight).reshape(site.n_heads, site.head_dim, site.d_model)
    torch.testing.assert_close(baked.tensors[bias], before + delta @ by_head[2], rtol=1e-5, atol=1e-6)


def test_a_tensor_of_two_modules_is_not_changed_for_one() -> None:
    plain = hw.load("zoo:tiny-llama")
    plain.detach()
    layers = plain.model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    with (
        hw.attach(plain.model, plain.tokenizer, example=plain.example) as model,
        pytest.raises(Refusal, match="is one tensor with"),
    ):
        hw.bake(model, edit.zero("L0H0"))


def test_numbers_that_the_precision_has_not_are_refused(build: Build) -> None:
    with pytest.raises(Refusal, match="numbers that float32 has not"):
        hw.bake(build("tiny-llama"), edit.scale("L0H0", math.nan))
    with hw.load("zoo:tiny-llama", dtype="float16") as model, pytest.raises(Refusal, match="float16 has not"):
        hw.bake(model, edit.scale("L0H0", 1e7))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-gemma3_text"])
def test_whole_groups_are_taken_out(
    build: Build, loaded_by_transformers: Loaded, bake_and_compare: Compare, name: str, tmp_path: Path
) -> None:
    model = build(name)
    silent = "L0H0,L0H1,L1H2,L1H3,L2H0,L2H1"
    edits = [edit.zero(silent), edit.scale("L0H3", 2.0)]
    whole = hw.bake(model, edits).save_pretrained(tmp_path / "whole")
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked", remove=True)
    assert difference < NEAR < 0.05 < effect
    assert whole.removal is None
    assert report.removal is not None
    assert report.removal.sliced
    assert report.removal.groups == ("L0G0", "L1G1", "L2G0")
    baked = loaded_by_transformers(tmp_path / "baked")
    assert (baked.config.num_attention_heads, baked.config.num_key_value_heads, baked.config.head_dim) == (2, 1, 12)
    saved = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("whole", "baked")]
    per_layer = 12 * 32 * (2 + 2 + 2) + (12 * 4 if name == "tiny-qwen2" else 0)  # q, o of two heads; k and v of one
    assert report.removal.parameters[0] - report.removal.parameters[1] == 3 * per_layer
    assert report.removal.bytes[0] - report.removal.bytes[1] == 4 * 3 * per_layer
    assert abs((saved[0] - saved[1]) - 4 * 3 * per_layer) < 200  # the headers
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    with model.editing(*edits):
        wanted = model.generate(**prompt, **options)
    assert torch.equal(baked.generate(**prompt, **options), wanted)


def test_what_stands_in_place_of_a_removed_group_stays(
    build: Build, bake_and_compare: Compare, ramp: Ramp, tmp_path: Path
) -> None:
    """A set group writes a constant, which the bias has; the biases that attention_bias makes shrink along."""
    model = build("tiny-llama")
    edits = [edit.set("L0H0,L0H1,L1H0,L1H1,L2H0,L2H1", 0.5), edit.add("L1H3", ramp(model))]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked", remove=True)
    assert report.removal is not None
    assert report.removal.sliced
    assert difference < NEAR < 0.05 < effect


@pytest.mark.parametrize(
    ("name", "heads", "why"),
    [
        ("tiny-llama", "L0H0,L0H1", "another number of groups in each layer"),
        ("tiny-llama", "L0H0,L0H1,L1H0,L1H1,L1H2,L1H3,L2H0,L2H1", "another number of groups in each layer"),
        ("tiny-llama", "L0,L1,L2", "no layer would have a head left"),
        ("tiny-gpt2", "L0H0,L1H0,L2H0", "no head_dim"),
        ("tiny-olmo2", "L0H0,L0H1,L1H0,L1H1,L2H0,L2H1", "the columns stay"),
    ],
)
def test_what_no_configuration_can_say_stays_as_zeros(
    build: Build, bake_and_compare: Compare, name: str, heads: str, why: str, tmp_path: Path
) -> None:
    model = build(name)
    report, difference, _ = bake_and_compare(model, [edit.zero(heads)], tmp_path / "baked", remove=True)
    assert report.removal is not None
    assert not report.removal.sliced
    assert why in report.removal.why
    assert "\nsilent     " in str(report)
    assert "removed" not in str(report)
    assert report.removal.bytes[0] == report.removal.bytes[1]
    assert difference < NEAR


def test_nothing_to_remove(build: Build) -> None:
    with pytest.raises(InputError, match="no KV group to remove"):
        hw.bake(build("tiny-llama"), edit.zero("L0H0"), remove=True)
    one_dimension = torch.ones(12).index_fill(0, torch.tensor(3), 0.0).expand(2, 12)
    with pytest.raises(InputError, match="no KV group to remove"):
        hw.bake(build("tiny-llama"), edit.scale(["L0H0", "L0H1"], one_dimension), remove=True)
