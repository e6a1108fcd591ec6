"""The tiny denoisers build, run without a hub, and their made-up inputs reach every attention module."""

from __future__ import annotations

import sys

import diffusers
import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.catalogue import entries
from headwise.errors import InputError, Refusal
from headwise.model.finding.denoiser_example import denoiser_inputs
from headwise.zoo.diffusion import DENOISERS

NAMES = [row.name for row in DENOISERS]


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_runs_and_reaches_all_of_its_attention(name: str) -> None:
    organism = zoo.build(name)
    attending = [module for module in organism.model.modules() if hasattr(module, "processor")]
    ran = []
    for module in attending:
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    with torch.no_grad():
        out = organism.model(**organism.example).sample
    assert len(attending) == len(ran) > 1
    assert out.isfinite().all()
    assert out.shape[0] == 2
    assert not torch.equal(out[0], out[1])
    assert not organism.model.training


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    one, again, other = (zoo.build(name, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_another_dtype_is_float32_rounded() -> None:
    wide, narrow = zoo.build("tiny-dit"), zoo.build("tiny-dit", dtype=torch.bfloat16)
    weight = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(narrow.model.state_dict()[weight], wide.model.state_dict()[weight].bfloat16())
    assert narrow.example["hidden_states"].dtype == torch.bfloat16


def test_they_are_loaded_by_name_and_listed() -> None:
    with hw.load("zoo:tiny-dit") as model:
        assert model.name == "zoo:tiny-dit"
        assert [site.label for site in model.sites] == ["L0", "L1"]
    assert set(NAMES) <= set(zoo.names())
    assert set(NAMES) <= {entry.id for entry in entries("models")}


def test_without_diffusers_a_build_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(Refusal, match=r"zoo:tiny-sd3 .* pip install 'headwise\[diffusion\]'") as error:
        zoo.build("tiny-sd3")
    assert "\n" not in str(error.value)
    assert "tiny-sd3" in zoo.names()  # the name is known all the same


def test_an_attention_implementation_by_name_is_refused() -> None:
    with pytest.raises(InputError, match="tiny-flux has attention processors"):
        zoo.build("tiny-flux", attn="eager")


def test_inputs_are_made_up_from_a_configuration() -> None:
    """Also where a model wants more than the tiny ones do: guidance (Flux), a pooled text and six numbers (SDXL)."""
    guided = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    assert denoiser_inputs(guided)["guidance"].shape == (2,)
    large = diffusers.UNet2DConditionModel(
        sample_size=128,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
        transformer_layers_per_block=2,
    ).eval()
    inputs = denoiser_inputs(large)
    assert inputs["sample"].shape == (2, 4, 16, 16)  # far fewer than the model is meant for
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 10)
    for model in (guided, large):
        with hw.attach(model) as attached:
            assert attached.sites
    with hw.attach(large) as attached:  # two transformer blocks in each part, counted through
        stacks = {stack: [s.label for s in attached.sites if s.id.stack == stack] for stack in attached.table.stacks}
    assert stacks == {
        "main": [f"L{layer}" for layer in range(8)],
        "cross": [f"cross.L{layer}" for layer in range(8)],
    }


def test_a_configuration_that_does_not_say_enough_asks_for_an_example() -> None:
    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Linear(2, 2)

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.weight(hidden_states)

    with pytest.raises(InputError, match=r"Denoiser does not say its in_channels; pass example="):
        hw.attach(Denoiser())
