"""Value scaling in a model without feed-forward parts, norms at its end and further layers: the logits are a sum.

There the logit difference is affine in alpha, and its slope is what `direct-logit` says of the head.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn

import headwise as hw
from headwise.find import find
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.use.intervention import Intervention
from headwise.use.knowledge.knowledge_pruning import PH3
from headwise.use.knowledge.value_scaling import FactualScaling
from headwise.use.scaling import HeadScaling


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=request.param, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config).eval()
    nn.init.zeros_(network.model.layers[0].mlp.down_proj.weight)
    network.model.norm = nn.Identity()
    with hw.attach(network, name="attention-only") as attached:
        yield attached


def items() -> ItemSet:
    rows = [
        EncodedItem(Item(prompt="", answer="", id=f"i{n}"), tuple(prompt), (20 + n,), (), ((30 + n,),), {}, None)
        for n, prompt in enumerate(([1, 9, 10, 11], [1, 12, 13, 14, 15, 16], [1, 40, 9]))
    ]
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0)


def measured(model: AttachedModel, used: Intervention) -> torch.Tensor:
    with used(model):
        return hw.measure(model, items(), batch_size=3)


@pytest.mark.parametrize("head", ["L0H0", "L0H3"])
def test_the_logit_difference_is_affine_in_alpha_with_the_attribution_as_slope(model: AttachedModel, head: str) -> None:
    slope = torch.tensor(find("direct-logit", model, items()).of(head), dtype=torch.float32)
    plain = hw.measure(model, items())
    assert slope.abs().min() > 1e-3
    for alpha in (-5.0, 0.0, 0.5, 2.0, 10.0):
        found = measured(model, FactualScaling(head, alpha))
        assert torch.allclose(found, plain + (alpha - 1) * slope, atol=2e-4)


def test_it_is_the_scaling_of_one_head_and_at_0_its_removal(model: AttachedModel) -> None:
    assert torch.equal(measured(model, FactualScaling("L0H2", 3.0)), measured(model, HeadScaling("L0H2", 3.0)))
    assert torch.allclose(measured(model, FactualScaling("L0H2", 0.0)), measured(model, PH3("L0H2")), atol=1e-6)


def test_values_of_one_head_alone_are_scaled(model: AttachedModel) -> None:
    """Under grouped queries the other head of its KV group keeps its own."""
    inputs = {"input_ids": torch.tensor([[1, 9, 10, 11]])}
    with torch.no_grad(), model.reading(hw.read.z()) as clean:
        model(**inputs)
    with torch.no_grad(), FactualScaling("L0H2", 3.0)(model), model.reading(hw.read.z()) as got:
        model(**inputs)
    ratio = got.z["L0"] / clean.z["L0"]
    assert torch.allclose(ratio[:, :, 2], torch.tensor(3.0))
    assert torch.equal(got.z["L0"][:, :, [0, 1, 3]], clean.z["L0"][:, :, [0, 1, 3]])
