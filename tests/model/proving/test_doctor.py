"""The doctor on every type of the zoo and on models from folders: what passes, what does not apply and why.

What does not apply is listed here type by type, so that a check that silently stops applying fails a test. That the
checks can fail at all is shown in `test_checks`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import headwise as hw
from headwise import zoo
from headwise.model.proving.doctor import EXAMINATIONS, DoctorReport, examine
from headwise.model.proving.patient import SAMPLE

PADDING, CACHE = "left padding changes nothing", "a cache changes nothing"
OF_THE_PROJECTION = {
    "z is the projection's input",
    "sum of writes is the projection's output",
    "zeroing two ways agrees",
    "gate gradients match autograd",
}
NAMES = {examination.name for examination in EXAMINATIONS}

NOT_SEPARABLE = ("tiny-bitnet", "tiny-diffllama", "tiny-jetmoe")
NO_DECODER = (
    *("tiny-bert", "tiny-roberta", "tiny-albert", "tiny-distilbert", "tiny-modernbert", "tiny-wav2vec2", "tiny-hubert"),
    *("tiny-vit", "tiny-dinov2_with_registers", "tiny-clip", "tiny-siglip"),
    *("tiny-deberta", "tiny-deberta-v2", "tiny-roformer", "tiny-mpnet", "tiny-megatron-bert"),
)
ENCODER_DECODER = (
    *("tiny-t5", "tiny-t5gemma", "tiny-bart", "tiny-whisper"),
    *("tiny-led", "tiny-mvp", "tiny-bigbird_pegasus"),
)

NOT_APPLICABLE: dict[str, set[str]] = {
    **dict.fromkeys(NOT_SEPARABLE, OF_THE_PROJECTION),
    **{key: {PADDING, CACHE} for key in NO_DECODER},
    **{key: {PADDING} for key in ENCODER_DECODER},
    # On text without padding its tokens see later ones, on padded text they do not: that is its own mask.
    "tiny-paligemma": {PADDING},
    # Its own logits depend on whether it is given a cache, from the first forward on.
    "tiny-t5gemma": {PADDING, CACHE},
    # Its decoder looks ahead where it is given no cache.
    "tiny-fsmt": {PADDING, CACHE},
    "tiny-openai-gpt": {PADDING, CACHE},  # it has no cache
    "tiny-trocr": {PADDING},  # its positions count padding
    "tiny-wavlm": {*OF_THE_PROJECTION, PADDING, CACHE},  # torch's fused call projects, too
}

ROWS = (*zoo.tiny_types(), *zoo.outside_registry())
TYPES = [row.name for row in ROWS]
ROUTED = {row.name for row in ROWS if "moe" in row.tags}


def report_on(organism: zoo.Organism, **given: Any) -> DoctorReport:
    with hw.attach(organism.model, organism.tokenizer, **{"example": organism.example, **given}) as attached:
        return examine(attached)


def not_applicable(report: DoctorReport) -> set[str]:
    return {check.name for check in report.checks if check.status == "n/a"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TYPES)
def test_every_type_passes_and_what_does_not_apply_is_known(name: str, dtype: torch.dtype) -> None:
    report = report_on(zoo.build(name, dtype=dtype))
    expected = NOT_APPLICABLE.get(name, set())
    assert {check.name: check.detail for check in report.checks if check.status == "fail"} == {}
    own = {check.name for check in report.checks if "the model itself differs" in check.detail}
    if dtype == torch.bfloat16 and name in ROUTED:  # near-ties of experts fall with the last bit, on each CPU
        expected = expected | own
    assert not_applicable(report) == expected
    assert own <= {PADDING, CACHE}
    assert {check.name for check in report.checks} == NAMES
    assert all(len(check.detail) > 10 for check in report.checks)
    assert report.passed
    assert report.summary.startswith("Safe to use; ")
    refused = "edits of z and writes are refused at every site" in report.summary
    assert refused == (name in NOT_SEPARABLE)
    routes = {site.capabilities["route"] for site in report.sites}
    assert ("watched" in routes) == (name == "tiny-siglip" or name in {row.name for row in zoo.outside_registry()})


def test_the_zoo_is_covered() -> None:
    assert len(TYPES) >= 25
    assert set(NOT_APPLICABLE) <= set(TYPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bart", "tiny-vit"])
def test_other_dtypes_have_tolerances_of_their_own(name: str, dtype: torch.dtype) -> None:
    assert report_on(zoo.build(name, dtype=dtype)).passed


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-llama"])
def test_the_eager_kernel_passes(name: str) -> None:
    report = report_on(zoo.build(name, attn="eager"))
    assert report.passed
    assert not_applicable(report) == set()
    assert {site.capabilities["kernel"] for site in report.sites} == {"eager"}


# -- models from folders, with inputs made up ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("tiny-llama", {"main"}),
        ("tiny-gpt2", {"main"}),
        ("tiny-t5", {"main", "cross", "encoder"}),
        ("tiny-vit", {"main"}),
        ("tiny-whisper", {"main", "cross", "encoder"}),
        ("tiny-clip", {"main", "vision"}),
        ("tiny-llava", {"main", "vision"}),
        ("tiny-idefics3", {"main", "vision"}),
        ("tiny-qwen2_5_vl", {"main", "vision"}),
    ],
)
def test_a_model_in_a_folder_is_examined_on_made_up_inputs(
    name: str, stacks: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    organism = zoo.build(name)
    organism.model.save_pretrained(tmp_path)
    if organism.tokenizer is not None:
        organism.tokenizer.save_pretrained(tmp_path)
    with hw.load(tmp_path) as attached:
        report = examine(attached)
        assert set(attached.table.stacks) == stacks
        labels = {site.label for site in attached.sites}
    with hw.attach(organism.model, example=organism.example) as known:
        assert {site.label for site in known.sites} == labels
    assert report.passed
    assert "did not run" not in report.summary
    assert not_applicable(report) == NOT_APPLICABLE.get(name, set())


def test_a_tower_that_the_example_does_not_run_is_named() -> None:
    organism = zoo.build("tiny-llava")
    text = {"input_ids": organism.example["input_ids"][:, -8:], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    report = report_on(organism, example=text)
    assert report.passed
    assert "model.vision_tower did not run on this example and was not examined" in report.summary
    assert {site.label for site in report.sites} == {"L0", "L1", "L2"}


def test_inputs_that_cannot_be_made_up_are_asked_for() -> None:
    organism = zoo.build("tiny-vit")
    organism.model.main_input_name = "volume"
    with pytest.raises(hw.InputError, match=r"'volume'\) cannot be made up; pass example="):
        hw.attach(organism.model)


# -- what it costs and what it leaves behind -------------------------------------------------------------------


def deep(n_layers: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n_layers, vocab_size=64)).eval()


def test_the_number_of_forwards_does_not_grow_with_depth() -> None:
    forwards = {}
    for n_layers in (6, 24):
        model, calls = deep(n_layers), []
        with hw.attach(model) as attached:
            model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            report = examine(attached)
        assert report.passed
        assert not_applicable(report) == set()
        details = {check.name: check.detail for check in report.checks}
        assert details["KV groups map to their query heads"].startswith(f"{SAMPLE} of {n_layers} sites")
        assert f"all {n_layers} sites" in details["sum of writes is the projection's output"]
        forwards[n_layers] = len(calls)
    assert forwards[6] == forwards[24] < 60


def test_the_model_is_left_as_it_was() -> None:
    organism = zoo.build("tiny-llama")
    model = organism.model
    model.model.layers[0].train()  # no dropout in it: allowed, and kept
    model.model.embed_tokens.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model.lm_head.register_forward_hook(lambda *_: torch.rand(1) and None)  # a model that draws
    grads = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with hw.attach(model, example=organism.example) as attached:
        torch.manual_seed(5)
        state, own = torch.get_rng_state(), set(vars(model))
        examine(attached)
        assert torch.equal(torch.get_rng_state(), state)
        assert set(vars(model)) == own
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for parameter, (asked, grad) in zip(model.parameters(), grads, strict=True):
            assert parameter.requires_grad == asked
            assert parameter.grad is grad
            assert grad is None or bool((grad == 1).all())
        assert hooks_on(model) == 1
        with attached.reading(hw.read.z()) as got:  # and it is still attached
            model(**organism.example)
        assert got.z["L0"].shape[2] == 4


def hooks_on(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# -- when it cannot begin ----------------------------------------------------------------------------------------


def test_an_open_plan_is_a_conflict() -> None:
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        with attached.editing(hw.edit.zero("L0H0")):
            with pytest.raises(hw.PlanConflict, match="a plan is open"):
                attached.doctor()
            plain = attached(**organism.example).logits  # the plan is still in force
        assert not torch.equal(attached(**organism.example).logits, plain)
    with pytest.raises(hw.PlanConflict, match="detached"):
        attached.doctor()


def test_training_with_dropout_is_refused() -> None:
    organism = zoo.build("tiny-gpt2")
    with hw.attach(organism.model, example=organism.example) as attached:
        organism.model.train()
        with pytest.raises(hw.InputError, match="dropout"):
            attached.doctor()


def test_a_model_without_a_finite_output_is_refused() -> None:
    organism = zoo.build("tiny-llama")
    organism.model.lm_head.weight.data.fill_(float("nan"))
    with hw.attach(organism.model, example=organism.example) as attached:
        with pytest.raises(hw.InputError, match="no finite number") as refusal:
            attached.doctor()
        assert "\n" not in str(refusal.value)
        with attached.reading(hw.read.z()) as got:  # attached as before
            organism.model(**organism.example)
        assert len(got.z) == 3
