"""What has a form in weights and what has none: every refusal, on one line with its reason."""

from __future__ import annotations

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
from headwise.model.edit import Edit
from headwise.model.proving.patient import distance
from headwise.use.baking import BakeReport

NEAR = 2e-6

Build = Callable[[str], AttachedModel]
Loaded = Callable[[Path], Any]
Output = Callable[[Any, dict[str, Tensor]], Tensor]
Compare = Callable[..., tuple[BakeReport, float, float]]
Ramp = Callable[[AttachedModel], Tensor]


@pytest.mark.parametrize(
    ("name", "made", "why"),
    [
        ("tiny-gemma2", lambda: edit.scale("L1H0", 1.2, "score"), "soft cap"),
        ("tiny-t5", lambda: edit.uniform("L1H0"), "position bias"),
        ("tiny-t5", lambda: edit.scale("L1H0", 1.2, "score"), "position bias"),
        ("tiny-gpt_oss", lambda: edit.uniform("L1H0"), "learned sink"),
        ("tiny-gpt_oss", lambda: edit.add("L1G0", torch.ones(12), "v"), "do not sum to 1"),
        ("tiny-gemma3_text", lambda: edit.scale("L1H0", 1.2, "k"), "name KV groups"),
        ("tiny-bloom", lambda: edit.uniform("L1H0"), "is not seen"),
        ("tiny-albert", lambda: edit.scale("L0H1", 2.0), "through the same weights"),
        ("tiny-albert", lambda: edit.uniform("L0H1"), "by the same weights"),
        ("tiny-bitnet", lambda: edit.scale("L0H1", 2.0), "cannot be served"),
        ("tiny-qwen3_next", lambda: edit.add("L1H1", 1.0, point="pre_gate"), "before it"),
        ("tiny-qwen3_next", lambda: edit.add("L1G0", 1.0, "v"), "gate"),
        ("tiny-llama", lambda: edit.add("L1", 1.0, "mlp"), "no bias is added"),
        ("tiny-gpt2", lambda: edit.scale("L1", 2.0, "mlp"), "only the addition of a constant"),
        ("tiny-gpt2", lambda: edit.add("L0", 1.0, "residual_pre"), "the embeddings"),
    ],
)
def test_what_a_model_cannot_hold_is_refused(build: Build, name: str, made: Callable[[], Edit], why: str) -> None:
    with pytest.raises((Refusal, InputError), match=why) as refused:
        hw.bake(build(name), made())
    assert "\n" not in str(refused.value)


def of_tiny_llama() -> hw.Reference:
    model = hw.load("zoo:tiny-llama")
    with model:
        return hw.reference(model, [model.example])


RUN_TIME = [
    (lambda: edit.scale("L1H0", 2.0, scope="decode"), "some positions only"),
    (lambda: edit.scale("L1H0", 2.0, scope="last"), "some positions only"),
    (lambda: edit.scale("L1H0", 2.0, scope="span:here"), "some positions only"),
    (lambda: edit.scale("L1H0", 2.0, scope="steps:0-3"), "steps of a loop"),
    (lambda: edit.scale("L1H0", 2.0, queries=[-1]), "queries="),
    (lambda: edit.zero("L1H0", rows=[0]), "rows of the batch"),
    (lambda: edit.bias("L1H0", 1.0, keys="first"), "key positions"),
    (lambda: edit.reweight("L1H0", 2.0, keys="first"), "key positions"),
    (lambda: edit.reweight("L1H0", 2.0), "to a pattern"),
    (lambda: edit.bias("L1H0", 1.0), "no factor on scores"),
    (lambda: edit.block("L1H0"), "no factor on scores"),
    (lambda: edit.rewrite("L1H0", lambda pattern, here: pattern), "change with the run"),
    (lambda: edit.add("L1H0", lambda current, here: current), "change with the run"),
    (lambda: edit.patch("L1H0", edit.OTHER), "two streams"),
    (lambda: edit.zero("L1H0", stream="second"), "two streams"),
    (lambda: edit.uniform("L1H0", strength=0.5), "a part of uniform"),
    (lambda: edit.scale("L1H0", torch.linspace(1, 2, 12), "q"), "another factor in each dimension"),
    (lambda: edit.add("L1H0", 1.0, "q"), "no factor on scores"),
    (lambda: edit.resample("L1H0", of_tiny_llama()), "another z"),
]


@pytest.mark.parametrize(("made", "why"), RUN_TIME)
def test_what_only_a_run_can_do_is_refused(build: Build, made: Callable[[], Edit], why: str) -> None:
    with pytest.raises(Refusal, match=why) as refused:
        hw.bake(build("tiny-llama"), [edit.scale("L0H0", 2.0), made()])
    assert "\n" not in str(refused.value)


def test_edits_compose_in_the_order_of_the_run(
    build: Build, loaded_by_transformers: Loaded, output: Output, bake_and_compare: Compare, ramp: Ramp, tmp_path: Path
) -> None:
    model = build("tiny-gpt2")
    delta = ramp(model)
    there = [edit.scale("L1H0", 3.0), edit.add("L1H0", delta)]
    outputs = []
    for at, edits in enumerate([there, there[::-1]]):
        _, difference, _ = bake_and_compare(model, edits, tmp_path / str(at))
        assert difference < NEAR
        outputs.append(output(loaded_by_transformers(tmp_path / str(at)), model.example))
    assert distance(*outputs) > 1e-2
    # v before pattern before z, whatever order they are given in
    mixed = [edit.scale("L1H0", 3.0), edit.add("L1G0", delta, "v"), edit.scale("L1H0", 0.5, "pattern")]
    assert bake_and_compare(model, mixed, tmp_path / "mixed")[1] < NEAR


def test_a_pattern_that_is_overwritten_leaves_no_trace(build: Build, bake_and_compare: Compare, tmp_path: Path) -> None:
    model = build("tiny-llama")
    with pytest.raises(Refusal, match="comes after it and puts another pattern in place"):
        hw.bake(model, [edit.scale("L1H0", 2.0, "pattern"), edit.uniform("L1H0")])
    left = hw.bake(model, [edit.scale("L1H0", 2.0, "pattern"), edit.uniform("L1H0")], leave_out=True)
    assert [line.result for line in left.report.lines] == ["impossible", "exact"]
    weights = model.model.state_dict()
    changed = {name for name, tensor in left.tensors.items() if not torch.equal(tensor, weights[name])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}
    other = [edit.scale("L1H0", 2.0, "pattern"), edit.uniform("L1H1")]
    assert bake_and_compare(model, other, tmp_path / "other")[1] < NEAR
    after = [edit.uniform("L1H0"), edit.scale("L1H0", 2.0, "pattern")]
    assert bake_and_compare(model, after, tmp_path / "after")[1] < NEAR
