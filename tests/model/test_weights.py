"""Weights put in the place of a model's own for a while, and layers that no part of can be trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.weights import plain_layer, replaced

NAME = "model.layers.1.self_attn.q_proj"


def attached(name: str = "tiny-llama") -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def test_the_model_runs_with_the_weights_and_then_with_its_own() -> None:
    with attached() as model:
        weight = model.model.get_parameter(f"{NAME}.weight")
        order = [*model.model.state_dict()]
        plain = model(**model.example).logits.detach()
        delta = torch.full_like(weight, 0.1, requires_grad=True)
        found = []

        def run() -> None:
            with replaced(model, {f"{NAME}.weight": weight + delta}):
                found.append(model(**model.example).logits)
                found[0].sum().backward()
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            run()
        assert delta.grad is not None
        assert torch.equal(delta.grad, weight.grad)
        assert model.model.get_parameter(f"{NAME}.weight") is weight
        assert [*model.model.state_dict()] == order
        assert torch.equal(model(**model.example).logits, plain)
        with torch.no_grad():
            weight += 0.1
            assert torch.equal(model(**model.example).logits, found[0])


def test_what_is_read_of_a_projection_is_that_of_the_weights_in_place() -> None:
    with attached() as model, torch.no_grad():
        name = "model.layers.1.self_attn.o_proj.weight"
        with model.reading(hw.read.write("L1")) as before:
            model(**model.example)
        with replaced(model, {name: 2 * model.model.get_parameter(name)}), model.reading(hw.read.write("L1")) as after:
            model(**model.example)
        torch.testing.assert_close(after.write["L1"], 2 * before.write["L1"])


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ({"model.layers.1.self_attn.q_proj.wait": torch.zeros(1)}, "has no parameter"),
        ({"model.nothing.weight": torch.zeros(1)}, "has no parameter"),
        ({f"{NAME}.weight": torch.zeros(2, 2)}, r"has shape \[48, 32\], and what is to replace it \[2, 2\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, torch.Tensor], line: str) -> None:
    with attached() as model, pytest.raises(InputError, match=line), replaced(model, weights):
        pass


def test_layers_that_are_not_plain_are_refused() -> None:
    with attached() as model:
        layer = model.model.get_submodule(NAME)
        assert plain_layer(model, NAME) is layer
        other = model.model.get_submodule(NAME.replace("1", "0", 1))
        own, layer.weight = layer.weight, other.weight
        with pytest.raises(Refusal, match=r"is model\.layers\.1\.self_attn\.q_proj\.weight as well"):
            plain_layer(model, NAME)
        layer.weight = own

        class Doubling(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        layer.__class__ = Doubling
        with pytest.raises(Refusal, match="does not multiply by a plain matrix"):
            plain_layer(model, NAME)
        layer.__class__ = nn.Linear
        layer.to("meta")
        with pytest.raises(Refusal, match="not in memory"):
            plain_layer(model, NAME)
