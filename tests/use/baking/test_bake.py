"""The whole of it: interventions, what is left out, adapters, and a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import headwise as hw
from headwise import edit, use
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.identity import weights_hash
from headwise.model.proving.patient import distance
from headwise.use import HeadOffset, HeadRemoval, HeadScaling, Together
from headwise.use.baking import BakeReport
from headwise.use.intervention import Beside, Intervention

NEAR = 2e-6

Build = Callable[[str], AttachedModel]
Loaded = Callable[[Path], Any]
Output = Callable[[Any, dict[str, Tensor]], Tensor]
Compare = Callable[..., tuple[BakeReport, float, float]]
Ramp = Callable[[AttachedModel], Tensor]


def test_what_cannot_be_baked_can_be_left_out(
    build: Build, loaded_by_transformers: Loaded, output: Output, tmp_path: Path
) -> None:
    model = build("tiny-llama")
    there = edit.scale("L0H0", 2.0)
    report = hw.bake(model, [edit.zero("L1H1", scope="last"), there], leave_out=True).save_pretrained(tmp_path / "b")
    assert [line.result for line in report.lines] == ["impossible", "exact"]
    assert "some positions only" in report.impossible[0].why
    baked = output(loaded_by_transformers(tmp_path / "b"), model.example)
    with model.editing(there):
        assert distance(baked, output(model.model, model.example)) < NEAR


class Doubled(Intervention):
    id = "doubled"

    def beside(self, model: AttachedModel) -> Beside:
        return Beside()


class Own(Intervention):
    id = "own"

    def _opened(self, model: AttachedModel, given: Any) -> Any:
        raise AssertionError("nothing runs here")


def test_interventions_are_baked(
    build: Build, loaded_by_transformers: Loaded, output: Output, ramp: Ramp, tmp_path: Path
) -> None:
    model = build("tiny-llama")
    steered = Together(
        (
            HeadScaling({"L0H0": 2.0, "L1H1": -1.0}),
            HeadOffset({"L1H0": ramp(model)}, strength=2.0),
            HeadRemoval("L2H0", "uniform"),
            HeadRemoval("L2H1", "mean", {"L2H1": ramp(model)}),
            HeadScaling("L0H1", 1.0),
        )
    )
    report = hw.bake(model, steered).save_pretrained(tmp_path / "baked")
    assert [line.why for line in report.lines][-1] == "changes nothing"
    assert not report.impossible
    baked = output(loaded_by_transformers(tmp_path / "baked"), model.example)
    with steered(model):
        assert distance(baked, output(model.model, model.example)) < NEAR


@pytest.mark.parametrize(
    "made",
    [
        lambda vector: use.AttentionTemperature({"L0H1": 0.5, "L1H2": 2.0}),
        lambda vector: use.JustRunOnce("L0H1", "L1H2", 3.0, 0.5),
        lambda vector: use.FactualScaling("L1H2", 3.0, "all"),
        lambda vector: use.ITI({"L1H2": vector / vector.norm()}, {"L1H2": 2.0}, 5.0, "all"),
    ],
    ids=["temperature", "just-run-once", "factual-scaling", "iti"],
)
def test_published_interventions_that_act_everywhere(
    build: Build, bake_and_compare: Compare, ramp: Ramp, made: Callable[[Tensor], Intervention], tmp_path: Path
) -> None:
    model = build("tiny-llama")
    report, difference, effect = bake_and_compare(model, made(ramp(model)).edits(model), tmp_path / "baked")
    assert difference < NEAR < 0.02 < effect
    assert not report.impossible


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: use.DeCoRe("L1H2"), "second stream"),
        (lambda: use.ContextAware(1.0, "passage"), "second stream"),
        (lambda: use.ZeroTuning({"L1H2": 2.0}), "key positions|some positions"),
        (lambda: use.SpanEmphasis("L1H2", "rule"), "key positions|some positions"),
    ],
)
def test_published_interventions_of_a_run_are_refused(build: Build, made: Callable[[], Intervention], why: str) -> None:
    with pytest.raises(Refusal, match=why):
        hw.bake(build("tiny-llama"), made())


@pytest.mark.parametrize(("made", "why"), [(Doubled(), "second stream"), (Own(), "does more in a run")])
def test_interventions_that_are_more_than_edits_are_refused(build: Build, made: Intervention, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        hw.bake(build("tiny-llama"), [HeadScaling("L0H0", 2.0), made])


def test_the_model_stays_as_it_is(build: Build, output: Output, ramp: Ramp, tmp_path: Path) -> None:
    model = build("tiny-llama")
    before, plain = weights_hash(model.model), output(model.model, model.example)
    asking = {name: weight.requires_grad for name, weight in model.model.named_parameters()}
    config = model.model.config.to_dict()
    edits = [edit.add("L1H0", ramp(model)), edit.uniform("L0H0"), edit.zero("L2")]
    hw.bake(model, edits).save_pretrained(tmp_path / "baked")
    assert weights_hash(model.model) == before
    assert torch.equal(output(model.model, model.example), plain)
    assert {name: weight.requires_grad for name, weight in model.model.named_parameters()} == asking
    assert all(weight.grad is None for weight in model.model.parameters())
    assert model.model.config.to_dict() == config


def test_adapters_are_merged_into_a_copy(
    loaded_by_transformers: Loaded, output: Output, bake_and_compare: Compare, tmp_path: Path
) -> None:
    plain = hw.load("zoo:tiny-llama")
    plain.detach()
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(plain.model, settings).eval()
    with hw.attach(wrapped, plain.tokenizer, example=plain.example, name="tuned") as model:
        before = weights_hash(wrapped)
        report, difference, _ = bake_and_compare(model, [edit.scale("L0H1", 2.0), edit.uniform("L1H0")], tmp_path / "a")
        assert difference < 1e-5
        assert report.lines[0].edit == "the adapters of PEFT"
        assert "model.layers.0.self_attn.q_proj.weight" in report.lines[0].tensors
        hw.bake(model).save_pretrained(tmp_path / "b")
        alone = output(loaded_by_transformers(tmp_path / "b"), model.example)
        assert distance(alone, output(wrapped, model.example)) < 1e-5
        with wrapped.disable_adapter():
            assert distance(alone, output(wrapped, model.example)) > 1e-2
        assert weights_hash(wrapped) == before
        with wrapped.disable_adapter(), pytest.raises(Refusal, match="switched off"):
            hw.bake(model, edit.scale("L0H1", 2.0))


def int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def declared(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "why"), [(int8, "is quantised"), (declared, "is quantised"), (cpu_offload, "offloaded")]
)
def test_weights_that_cannot_be_changed_are_refused(change: Callable[[Any], Any], why: str) -> None:
    plain = hw.load("zoo:tiny-llama")
    plain.detach()
    with (
        hw.attach(change(plain.model), plain.tokenizer, example=plain.example) as model,
        pytest.raises(Refusal, match=why),
    ):
        hw.bake(model, edit.zero("L0H0"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((), "no edits"),
        ("L0H0", "edits and interventions"),
        ([edit.zero("L9H0")], "no attention at L9"),
        ([edit.zero("L0H9")], "no L0H9"),
        ([edit.add("L0H0", torch.ones(5))], "shape"),
    ],
)
def test_bad_input(build: Build, given: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        hw.bake(build("tiny-llama"), given)


def test_an_open_plan_and_a_bare_model(build: Build) -> None:
    model = build("tiny-llama")
    with model.editing(edit.zero("L0H0")):
        model(**model.example)
        with pytest.raises(PlanConflict, match="leave its block"):
            hw.bake(model, edit.zero("L0H0"))
    with pytest.raises(InputError, match="attached model"):
        hw.bake(model.model, edit.zero("L0H0"))
