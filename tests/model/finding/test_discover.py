"""Sites found by running the model: geometry, kinds, labels, capabilities, and what a probe must not leave behind.

Truth comes from the configuration and the module tree of each type, read by hand; from plain torch hooks on the output
projection; and from transformers' own eager patterns.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel
from headwise.model.attention import seam
from headwise.model.finding.discover import discover
from headwise.model.finding.example import example_inputs
from headwise.model.finding.naming import name_sites
from headwise.zoo import Organism
from headwise.zoo.tokens import PAD


def found(name: str, **options: Any) -> AttachedModel:
    organism = zoo.build(name)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example, **options) as attached:
        return attached


def labels(attached: AttachedModel) -> list[str]:
    return [site.label for site in attached.sites]


def slice_zeroed(projection: nn.Module, columns: Any) -> Any:
    def entering(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., columns] = 0
        return (z, *args[1:])

    @contextmanager
    def zeroed() -> Any:
        hook = projection.register_forward_pre_hook(entering)
        try:
            yield
        finally:
            hook.remove()

    return zeroed()


# -- geometry, kinds, labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "geometry"),
    [  # n_heads, n_kv_heads, qk_dim, head_dim, d_model
        ("tiny-gpt2", (4, 4, 12, 12, 48)),
        ("tiny-llama", (4, 2, 12, 12, 32)),  # hidden_size // n_heads would be 8
        ("tiny-starcoder2", (4, 1, 12, 12, 48)),
        ("tiny-deepseek_v3", (4, 4, 16, 12, 32)),
        ("tiny-qwen3_next", (4, 2, 12, 12, 32)),
        ("tiny-t5", (4, 4, 12, 12, 32)),
    ],
)
def test_geometry(name: str, geometry: tuple[int, ...]) -> None:
    for site in found(name).sites:
        assert (site.n_heads, site.n_kv_heads, site.qk_dim, site.head_dim, site.d_model) == geometry
        assert len(site.heads) == site.n_heads
        assert len(site.groups) == site.n_kv_heads
        assert site.capabilities["separable"]
        assert site.capabilities["rows"]


LAYERS = ["L0", "L1", "L2"]
TOWER = ["vision.L0", "vision.L1"]
SEQ2SEQ = [*LAYERS, "cross.L0", "cross.L1", "cross.L2", "encoder.L0", "encoder.L1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny-llama", LAYERS),
        ("tiny-bert", LAYERS),
        ("tiny-albert", ["L0", "L0@1", "L0@2"]),  # one module for three layers
        ("tiny-diffllama", ["L0", "L0@1", "L1", "L1@1", "L2", "L2@1"]),  # two calls per layer
        ("tiny-jamba", ["L1"]),  # the others have no attention; the block keeps its index
        ("tiny-qwen3_next", ["L1", "L2"]),
        ("tiny-bart", SEQ2SEQ),
        ("tiny-whisper", SEQ2SEQ),
        ("tiny-t5", [*SEQ2SEQ, "encoder.L2"]),
        ("tiny-clip", LAYERS + TOWER),
        ("tiny-siglip", [*LAYERS, "cross.L0", *TOWER]),  # the pooling head has attention of torch's own
        ("tiny-qwen2_vl", LAYERS + TOWER),
        ("tiny-llava", [*LAYERS, *TOWER, "vision.L2"]),
        ("tiny-vit", LAYERS),
    ],
)
def test_labels(name: str, expected: list[str]) -> None:
    attached = found(name)
    assert labels(attached) == expected
    blocks = {label.split("@")[0] for label in expected if not label.startswith("cross")}
    assert blocks <= attached.table.sublayers.blocks.keys()
    for site in attached.sites:
        assert site.kind == ("cross" if site.label.startswith("cross") else "self")
        if site.module == "vision_model.head.attention":  # no list of layers is around it
            continue
        assert str(site.id.layer) in site.module.split(".")
        words = {"encoder": "encoder", "cross": "decoder", "vision": "vis"}
        assert words.get(site.id.stack, "") in site.module


def test_hybrid_layers_keep_their_index_and_blocks_without_attention_are_blocks() -> None:
    attached = found("tiny-jamba")
    types = attached.model.config.layers_block_type
    assert [f"L{index}" for index, kind in enumerate(types) if kind == "attention"] == labels(attached)
    assert set(attached.table.sublayers.blocks) == {f"L{index}" for index in range(len(types))}


def test_causal_sites_are_those_that_never_look_ahead() -> None:
    for name, causal in {"tiny-llama": True, "tiny-bert": False, "tiny-vit": False, "tiny-mistral": True}.items():
        organism = zoo.build(name, attn="eager")
        with torch.no_grad():
            patterns = organism.model(**organism.example, output_attentions=True).attentions
        assert [site.causal for site in found(name).sites] == [causal] * len(patterns)
        first_row = [pattern[0].triu(1).any() for pattern in patterns]  # it has no padding
        assert all(bool(ahead) is not causal for ahead in first_row)


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-t5", "tiny-t5gemma"])
def test_cross_attention_is_told_from_self_attention_when_both_sequences_are_equally_long(name: str) -> None:
    organism = zoo.build(name)
    ids = organism.example["decoder_input_ids"]
    expected = labels(found(name))
    for example in ({"input_ids": ids, "decoder_input_ids": ids}, {"input_ids": ids, "labels": ids}):
        with hw.attach(organism.model, example=example) as attached:
            assert labels(attached) == expected


def test_layers_of_stages_are_counted_through() -> None:
    class Stage(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Identity()}) for _ in range(depth))

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(2), Stage(1), Stage(2)])
    paths = [f"stages.{stage}.blocks.{block}.attn" for stage, depth in enumerate((2, 1, 2)) for block in range(depth)]
    named = name_sites(model, [(path, "self") for path in paths])
    assert [label.label for label, _ in named] == ["L0", "L1", "L2", "L3", "L4"]


# -- projections and capabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-bert", "tiny-deepseek_v3", "tiny-qwen3_next", "tiny-qwen2_vl"])
def test_every_head_is_its_slice_of_the_projection(name: str) -> None:
    organism = zoo.build(name)
    run = torch.no_grad()(lambda: organism.model(**organism.example).logits)
    with hw.attach(organism.model, example=organism.example) as attached:
        for site in attached.sites:
            projection = organism.model.get_submodule(str(site.projection))
            for head in (0, site.n_heads - 1):
                with attached.editing(hw.edit.zero(f"{site.label}H{head}")):
                    edited = run()
                with slice_zeroed(projection, slice(head * site.head_dim, (head + 1) * site.head_dim)):
                    assert torch.equal(run(), edited)


@pytest.mark.parametrize("name", ["tiny-qwen3_next", "tiny-afmoe"])
def test_gated_sites_tell_before_from_after(name: str) -> None:
    """Zeroing commutes with the gate, adding does not: `pre_gate` adds at the kernel's output, `post_gate` behind."""
    organism = zoo.build(name)
    run = torch.no_grad()(lambda: organism.model(**organism.example).logits)
    with hw.attach(organism.model) as attached:
        site = attached.sites[-1]
        assert site.gated
        results = {}  # by whether it is zeroing, and by point
        for point in ("pre_gate", "post_gate"):
            for edit in (hw.edit.zero, partial(hw.edit.add, value=0.5)):
                with attached.editing(edit(f"{site.label}H1", point=point)):
                    results[edit is hw.edit.zero, point] = run()
        assert torch.equal(results[True, "pre_gate"], results[True, "post_gate"])
        assert not torch.allclose(results[False, "pre_gate"], results[False, "post_gate"], atol=1e-4)
        with attached.reading(hw.read.z(name="z"), hw.read.z(name="bare", point="pre_gate")) as got:
            run()
        gate = (got.z[site.label] / got.bare[site.label])[organism.example["attention_mask"].bool()]
        assert bool(((gate > 0) & (gate < 1)).all())  # a sigmoid

        def shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            columns = torch.arange(args[0].shape[-1]) // site.head_dim == 1
            return (args[0] + 0.5 * columns,)

        hook = organism.model.get_submodule(str(site.projection)).register_forward_pre_hook(shifted)
        assert torch.equal(run(), results[False, "post_gate"])
        hook.remove()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny-bitnet", "a head reaches 48 columns"),  # a norm over all heads
        ("tiny-diffllama", "a head reaches 24 columns|no module"),  # heads are recombined
        ("tiny-jetmoe", "a head reaches 32 columns"),  # a routed projection
    ],
)
def test_what_has_no_slice_per_head_is_refused_with_the_reason(name: str, reason: str) -> None:
    organism = zoo.build(name)
    with hw.attach(organism.model) as attached:
        clean = organism.model(**organism.example).logits
        assert all(site.projection is None and not site.capabilities["separable"] for site in attached.sites)
        for refused in (hw.edit.zero("L1H0"), hw.edit.add("L0", 1.0)):
            with pytest.raises(hw.Refusal, match=rf"L[01]: .*({reason}).*pattern edits still work"):
                attached.editing(refused).__enter__()
        for unread in (hw.read.write("L1"), hw.read.z("L1"), hw.read.gate("L1")):
            with pytest.raises(hw.Refusal, match="L1"):
                attached.reading(unread).__enter__()
        assert torch.equal(organism.model(**organism.example).logits, clean)
        with attached.editing(hw.edit.uniform("L1H0")), attached.reading(hw.read.z(point="pre_gate")):
            assert not torch.equal(organism.model(**organism.example).logits, clean)


def test_a_tower_that_calls_once_per_image_is_one_site() -> None:
    organism = zoo.build("tiny-qwen2_vl")
    entered: list[Tensor] = []
    with hw.attach(organism.model, example=organism.example) as attached:
        site = attached.site("vision.L1")
        assert site.chunked
        assert not attached.site("L1").chunked
        projection = organism.model.get_submodule(str(site.projection))
        hook = projection.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        with torch.no_grad(), attached.reading(hw.read.z("vision.L1")) as got:
            organism.model(**organism.example)
        hook.remove()
        pieces = got.z.pieces("vision.L1")
        assert [piece.shape[1] for piece in pieces] == [48, 24]  # one call per image
        assert torch.equal(got.z["vision.L1"].flatten(2)[0], entered[0].reshape(72, -1))


def test_the_cache_is_found_where_there_is_one() -> None:
    caches = {site.label: bool(site.capabilities["cache"]) for site in found("tiny-bart").sites}
    assert caches == {label: not label.startswith("encoder") for label in caches}
    bert = found("tiny-bert").sites[0]
    with pytest.raises(hw.InputError, match=r"scope='decode' has no meaning at L0: the model has no key-value cache"):
        found_edit(bert.label)


def found_edit(label: str) -> None:
    organism = zoo.build("tiny-bert")
    with hw.attach(organism.model) as attached, attached.editing(hw.edit.zero(label, scope="decode")):
        pass


# -- probing leaves nothing behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3_next", "tiny-whisper", "tiny-llava"])
def test_probing_leaves_the_model_and_the_random_state_as_they_were(name: str) -> None:
    organism = zoo.build(name)
    model = organism.model
    model.train()
    for module in list(model.modules())[::2]:  # a mixture that no eval() or train() restores
        module.training = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # the first forward leaves hooks of transformers' own
        model(**organism.example)
    model.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)  # a model that draws in eval mode
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]
    configs = model.config.to_dict(), model.generation_config.to_dict()
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    discovery = discover(model, example=organism.example)
    assert discovery.table.sublayers.blocks  # found by a further forward

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not seam.is_on()


def test_a_sampling_configuration_does_not_disturb_the_probe() -> None:
    organism = zoo.build("tiny-llama")
    organism.model.generation_config.update(do_sample=True, temperature=0.3, num_return_sequences=3, num_beams=3)
    with hw.attach(organism.model) as attached:
        assert all(site.capabilities["cache"] for site in attached.sites)


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert", "tiny-t5", "tiny-whisper", "tiny-vit", "tiny-siglip"])
def test_made_up_inputs_find_what_the_zoo_s_own_find(name: str) -> None:
    organism = zoo.build(name)
    with hw.attach(organism.model) as attached:
        assert labels(attached) == labels(found(name))
    inputs = example_inputs(organism.model)
    again = example_inputs(organism.model)
    assert all(torch.equal(again[name], value) for name, value in inputs.items())
    if "input_ids" in inputs:
        assert not bool((inputs["input_ids"] == PAD).any())  # a pad token might be masked by the model itself
        assert 0 < int((inputs["attention_mask"] == 0).sum()) < inputs["attention_mask"].shape[1]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"input_ids": torch.tensor([[10**6]])}, "IndexError"),
        ({"nothing": 1}, "ValueError"),
        ({"input_ids": [[1, 2]]}, "TypeError"),
        (torch.zeros(1, 3), "is a Tensor; pass a mapping"),
        ("input_ids", "is a str; pass a mapping"),
    ],
)
def test_a_bad_example_is_one_line(example: Any, reason: str) -> None:
    with pytest.raises(hw.InputError, match=reason) as caught:
        hw.attach(zoo.build("tiny-llama").model, example=example)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_inputs_that_cannot_be_made_up_are_asked_for() -> None:
    class Unsized(nn.Module):
        main_input_name = "pixel_values"

        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    for main in ("pixel_values", "input_features", "smells"):
        model = Unsized()
        model.main_input_name = main  # type: ignore[misc]
        with pytest.raises(hw.InputError, match=r"pass example=") as caught:
            hw.attach(model)
        assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused() -> None:
    for wrong in (nn.Linear(3, 3), "gpt2", None, transformers.LlamaConfig()):
        with pytest.raises(hw.InputError):
            hw.attach(wrong)  # type: ignore[arg-type]


# -- wrapped models ---------------------------------------------------------------------------------------------------


def with_lora(organism: Organism) -> Any:
    """LoRA on the output projection, with both of its matrices away from zero."""
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(organism.model, settings).eval()


def test_a_lora_on_the_projection_is_part_of_the_projection() -> None:
    organism = zoo.build("tiny-llama")
    base = organism.model(**organism.example).logits
    model = with_lora(organism)
    plain = model(**organism.example).logits
    assert not torch.allclose(plain, base, atol=1e-3)
    written: list[Tensor] = []
    options = {**organism.example, "max_new_tokens": 4, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True, "eos_token_id": None}  # fmt: skip
    with torch.no_grad(), hw.attach(model) as attached:
        assert torch.equal(model(**organism.example).logits, plain)
        site = attached.site("L1")
        projection = model.get_submodule(str(site.projection))
        assert hasattr(projection, "lora_A")
        hook = projection.register_forward_hook(lambda module, args, output: written.append(output))
        with attached.reading(hw.read.write("L1")) as got:
            model(**organism.example)
        hook.remove()
        torch.testing.assert_close(got.write["L1"].sum(dim=2), written[0], atol=1e-5, rtol=1e-4)
        with attached.editing(hw.edit.zero("L1H2")):
            edited, steps = model(**organism.example).logits, attached.generate(**options).logits
        with slice_zeroed(projection, slice(24, 36)):
            assert torch.equal(model(**organism.example).logits, edited)
            assert all(torch.equal(a, b) for a, b in zip(model.generate(**options).logits, steps, strict=True))
    assert not torch.equal(edited, plain)
    assert len(steps) == 4


def test_a_trained_prefix_does_not_make_self_attention_cross_attention() -> None:
    organism = zoo.build("tiny-llama")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with hw.attach(peft.get_peft_model(organism.model, settings).eval()) as attached:
        assert [(site.label, site.kind) for site in attached.sites] == [(label, "self") for label in LAYERS]
