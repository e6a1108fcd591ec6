"""What makes a head's queries and values, and what writes to the stream: found, changed, and the same as in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

import headwise as hw
from headwise import edit
from headwise.errors import Refusal
from headwise.model.attached import AttachedModel
from headwise.use.baking import BakeReport
from headwise.use.baking.origins import Origins, Variable
from headwise.zoo.decoders import WIDE_HEADS

NEAR = 2e-6

Build = Callable[[str], AttachedModel]
Compare = Callable[..., tuple[BakeReport, float, float]]
Ramp = Callable[[AttachedModel], Tensor]


@pytest.mark.parametrize(
    "name", ["tiny-llama", "tiny-gpt2", "tiny-gpt_neox", "tiny-bert", "tiny-qwen3", "tiny-gemma3_text"]
)
def test_values_of_a_group_and_uniform_attention(
    build: Build, bake_and_compare: Compare, ramp: Ramp, name: str, tmp_path: Path
) -> None:
    model = build(name)
    edits = [
        edit.scale("L0G1", 1 + ramp(model), "v"),
        edit.add("L1G0", ramp(model), "v"),
        edit.uniform("L1H0"),
        edit.zero("L2H1", "q"),
    ]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert difference < NEAR < 0.05 < effect
    assert not report.impossible


@pytest.mark.parametrize(
    "name", ["tiny-llama", "tiny-gpt2", "tiny-qwen2", "tiny-opt", "tiny-bert", "tiny-gpt_oss", "tiny-olmo2"]
)
def test_temperature_is_rows_of_q(build: Build, bake_and_compare: Compare, name: str, tmp_path: Path) -> None:
    model = build(name)
    edits = [
        edit.scale("L0H1,L0H2", torch.tensor([2.0, 0.5]), "score"),
        edit.scale("L1H0", 1.5, "q"),
        edit.scale("L1H0", 2.0, "score"),
        edit.scale("L2G1", 0.7, "k"),
    ]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert difference < NEAR < 0.02 < effect
    assert not report.impossible


def test_behind_a_norm_of_queries_only_all_heads_alike_have_a_temperature(
    build: Build, bake_and_compare: Compare, tmp_path: Path
) -> None:
    model = build("tiny-qwen3")
    with pytest.raises(Refusal, match="a norm or a bias stands between the weights and the queries"):
        hw.bake(model, edit.scale("L1H0", 1.5, "score"))
    report, difference, effect = bake_and_compare(model, [edit.scale("L1", 1.5, "score")], tmp_path / "baked")
    assert report.lines[0].tensors == ("model.layers.1.self_attn.q_norm.weight",)
    assert difference < NEAR < 0.02 < effect


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-opt", "tiny-bert"])
def test_constants_go_into_what_writes_to_the_stream(
    build: Build, bake_and_compare: Compare, name: str, tmp_path: Path
) -> None:
    model = build(name)
    constant = torch.linspace(-1, 1, model.sites[0].d_model)
    edits = [
        edit.add("L1", constant, "mlp"),
        edit.add("L0", constant.flip(0), "residual_post"),
        edit.add("L2", 0.5 * constant, "residual_pre"),
    ]
    report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
    assert difference < NEAR < 0.02 < effect
    assert all(line.tensors[0].endswith(".bias") for line in report.lines)


def test_what_is_multiplied_on_its_way_to_the_stream_is_divided_by_that(
    bake_and_compare: Compare, tmp_path: Path
) -> None:
    """Granite multiplies what a feed-forward part writes."""
    config = GraniteConfig(**WIDE_HEADS, mlp_bias=True, residual_multiplier=0.25)
    with hw.attach(GraniteForCausalLM(config).eval(), example=hw.load("zoo:tiny-llama").example) as model:
        constant = torch.linspace(-1, 1, model.sites[0].d_model)
        edits = [edit.add("L1", constant, "residual_post"), edit.add("L0", constant.flip(0), "mlp")]
        report, difference, effect = bake_and_compare(model, edits, tmp_path / "baked")
        assert difference < NEAR < 0.02 < effect
        assert report.lines[0].tensors == ("model.layers.1.mlp.down_proj.bias",)


@pytest.mark.parametrize(
    ("name", "variable", "index", "wanted"),
    [
        ("tiny-llama", "q", 2, {"self_attn.q_proj.weight": (0, range(24, 36))}),
        ("tiny-llama", "v", 1, {"self_attn.v_proj.weight": (0, range(12, 24))}),
        (
            "tiny-qwen2",
            "k",
            1,
            {"self_attn.k_proj.weight": (0, range(12, 24)), "self_attn.k_proj.bias": (0, range(12, 24))},
        ),
        # One matrix for all three, turned around: q of all heads, then k, then v.
        ("tiny-gpt2", "k", 2, {"attn.c_attn.weight": (1, range(72, 84)), "attn.c_attn.bias": (0, range(72, 84))}),
        # One matrix, head by head: q, k and v of a head stand together.
        (
            "tiny-gpt_neox",
            "v",
            1,
            {
                "attention.query_key_value.weight": (0, range(60, 72)),
                "attention.query_key_value.bias": (0, range(60, 72)),
            },
        ),
    ],
)
def test_the_rows_of_a_head_are_found(
    build: Build, name: str, variable: Variable, index: int, wanted: dict[str, tuple[int, range]]
) -> None:
    model = build(name)
    made = Origins(model).made(model.site("L1"), variable, index)
    prefix = model.site("L1").module.rpartition(".")[0] + "."
    found = {each.name.removeprefix(prefix): (each.dim, each.indices.tolist()) for each in made.own}
    assert found == {name: (dim, list(indices)) for name, (dim, indices) in wanted.items()}


def test_a_norm_over_all_heads_leaves_no_row_to_one_of_them(build: Build) -> None:
    model = build("tiny-olmo2")
    made = Origins(model).made(model.site("L1"), "q", 1)
    assert [each.name.rpartition("self_attn.")[2] for each in made.own] == ["q_norm.weight"]
    assert [each.name.rpartition("self_attn.")[2] for each in made.shared] == ["q_proj.weight"]


def test_frozen_weights_are_measured_and_stay_frozen(build: Build) -> None:
    model = build("tiny-llama")
    for weight in model.model.parameters():
        weight.requires_grad_(False)
    try:
        assert Origins(model).made(model.site("L1"), "q", 0).own
        assert not any(weight.requires_grad for weight in model.model.parameters())
    finally:
        model.model.requires_grad_(True)
