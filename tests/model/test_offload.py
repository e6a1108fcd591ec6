"""Weights that are elsewhere between calls (accelerate's device_map, CPU and disk offload): as the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import headwise as hw
from headwise import zoo
from headwise.errors import Refusal
from headwise.model.attached import AttachedModel
from headwise.model.identity import weights_hash
from headwise.zoo import Organism

CPU = torch.device("cpu")
EDITS = (hw.edit.zero("L0H1"), hw.edit.scale("L1H0", 2.0), hw.edit.uniform("L2H0"), hw.edit.zero("L1", variable="v"))


def mapped(model: Any, folder: Path) -> nn.Module:
    """Blocks 0 and 2 on disk, the rest in memory."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    blocks = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    dispatched: nn.Module = dispatch_model(
        model, {**places, **blocks}, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    return dispatched


def on_cpu(model: Any, folder: Path) -> nn.Module:
    offloaded: nn.Module = cpu_offload(model, execution_device=CPU)
    return offloaded


def on_disk(model: Any, folder: Path) -> nn.Module:
    disk_offload(model, folder, execution_device=CPU, offload_buffers=True)
    return model  # type: ignore[no-any-return]


Form = Callable[[Any, Path], nn.Module]


@pytest.fixture
def whole() -> Iterator[AttachedModel]:
    made = zoo.build("tiny-llama")
    with hw.attach(made.model.eval(), made.tokenizer) as attached:
        yield attached


@pytest.fixture(params=[mapped, on_cpu, on_disk])
def apart(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AttachedModel]:
    made: Organism = zoo.build("tiny-llama")
    model = request.param(made.model.eval(), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    with hw.attach(model, made.tokenizer) as attached:
        yield attached


@torch.no_grad()
def run(attached: AttachedModel) -> Tensor:
    return attached.model(**attached.example).logits


def test_runs_edits_and_reads_are_those_in_memory(whole: AttachedModel, apart: AttachedModel) -> None:
    assert apart.device == CPU
    assert torch.equal(run(apart), run(whole))
    got, outputs = [], []
    for attached in (whole, apart):
        with attached.editing(*EDITS), attached.reading(hw.read.z(), hw.read.write(), hw.read.rows("main")) as one:
            outputs.append(run(attached))
        got.append(one)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], run(whole))
    for site in whole.sites:
        for name in ("z", "write", "rows"):
            assert torch.equal(getattr(got[0], name)[site.label], getattr(got[1], name)[site.label]), (name, site)


def test_lowered_edits_are_those_in_memory(whole: AttachedModel, apart: AttachedModel) -> None:
    with whole.editing(*EDITS[:2]):
        expected = run(whole)
    with apart.lowered() as lowered:
        assert torch.equal(run(apart), run(whole))
        lowered.set(*EDITS[:2])
        assert torch.equal(run(apart), expected)


def test_generation(whole: AttachedModel, apart: AttachedModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    made = []
    for attached in (whole, apart):
        with attached.editing(*EDITS):
            made.append(attached.generate(**attached.example, **options))
    assert torch.equal(*made)


def test_the_doctor_passes(apart: AttachedModel) -> None:
    report = apart.doctor()
    assert report.passed, report
    left_out = [check for check in report.checks if check.status == "n/a"]
    assert all("no backward here" in check.detail for check in left_out), left_out


def test_a_model_has_one_hash_wherever_it_lies(whole: AttachedModel, apart: AttachedModel) -> None:
    assert weights_hash(apart.model) == weights_hash(whole.model)


def test_the_hash_is_of_what_is_on_disk(whole: AttachedModel, tmp_path: Path) -> None:
    model: Any = zoo.build("tiny-llama").model
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1.0
    assert weights_hash(on_disk(model, tmp_path)) != weights_hash(whole.model)


def test_tied_weights(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        config = zoo.build("tiny-llama").model.config
        config.tie_word_embeddings = True
        return LlamaForCausalLM(config).eval()

    assert weights_hash(on_disk(build(), tmp_path)) == weights_hash(build())


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        model = zoo.build("tiny-llama").model.to("meta")
    with pytest.raises(Refusal, match=r"is on the meta device and accelerate has not offloaded it.*load its weights"):
        weights_hash(model)


def test_an_offloaded_final_norm_is_refused_with_the_reason(tmp_path: Path) -> None:
    made = zoo.build("tiny-llama")
    asked = hw.read.final_scale()
    refused = pytest.raises(Refusal, match="one that is offloaded is not measured: keep it in memory")
    attached = hw.attach(on_disk(made.model.eval(), tmp_path), made.tokenizer)
    with refused, attached.reading(asked):
        run(attached)
    attached.detach()
