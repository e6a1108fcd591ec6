"""The direct path: what it needs of a model, and what it says of one it cannot follow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import headwise as hw
from headwise.errors import Refusal
from headwise.model.attached import AttachedModel
from headwise.model.direct import direct_paths, plain_matrix

IDS = torch.tensor([[1, 9, 10, 11], [1, 12, 13, 14]])


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **(sizes | settings))).eval()


def directions(model: AttachedModel, tokens: int = 1) -> Any:
    with torch.no_grad(), direct_paths(model).recording(tokens) as run:
        logits = model(input_ids=IDS).logits[:, -tokens:]
    return run.directions(lambda raw: raw[:, -1, 7] - raw[:, -1, 8], logits)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_unembedding_behind_gain_and_scale(tied: bool) -> None:
    """The closed form, from the weights of a Llama by name: sigma gamma (W_U[7] - W_U[8]), for every layer."""
    network = llama(tie_word_embeddings=tied)
    torch.nn.init.uniform_(network.model.norm.weight, 0.5, 1.5)
    with hw.attach(network) as model:
        found = directions(model)
        with torch.no_grad(), model.reading(hw.read.final_scale()) as got:
            model(input_ids=IDS)
        scale = got.final_scale["L0"][:, -1:, None]
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied
    unembedding = network.lm_head.weight.detach()
    expected = network.model.norm.weight.detach() * (unembedding[7] - unembedding[8])
    for label in ("L0", "L1", "mlp.L0", "mlp.L1", "stream.L0"):
        torch.testing.assert_close(found[label], expected * scale)


def test_only_the_columns_of_the_score_have_a_direction() -> None:
    with hw.attach(llama()) as model:
        found = directions(model, tokens=3)["L0"]
    assert (found[:, :2] == 0).all()
    assert (found[:, 2] != 0).any()


def test_a_factor_behind_the_unembedding_is_part_of_it_and_a_soft_cap_is_not() -> None:
    plain, scaled, capped = llama(), llama(), llama()
    with torch.no_grad():
        for network in (plain, scaled, capped):
            network.lm_head.weight *= 30

    def behind(function: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            output.logits = function(output.logits)
            return output

        return hook

    scaled.register_forward_hook(behind(lambda logits: 0.25 * logits))
    capped.register_forward_hook(behind(lambda logits: 2 * torch.tanh(logits / 2)))
    found = []
    for network in (plain, scaled, capped):
        with hw.attach(network) as model:
            found.append(directions(model)["L0"])
    torch.testing.assert_close(found[1], 0.25 * found[0])
    torch.testing.assert_close(found[2], found[0])


def test_what_stands_between_is_refused() -> None:
    """In the unembedding, before it and behind it."""
    network = llama()
    network.lm_head = nn.Sequential(nn.Tanh(), network.lm_head)
    with hw.attach(network) as model, pytest.raises(Refusal, match="not linear in what it takes"):
        directions(model)
    network = llama()
    network.lm_head.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    with hw.attach(network) as model, pytest.raises(Refusal, match="is not what the final norm returns"):
        directions(model)
    network = llama()

    def turned(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits.flip(-1)
        return output

    network.register_forward_hook(turned)
    with hw.attach(network) as model, pytest.raises(Refusal, match="nor a multiple or a soft cap"):
        directions(model)


def test_models_without_a_path_are_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    with hw.attach(llama().model) as model, pytest.raises(Refusal, match="has no unembedding"):
        direct_paths(model)
    with hw.load("zoo:tiny-jamba") as model, pytest.raises(Refusal, match=r"L0 of .*cannot be followed"):
        direct_paths(model)


def test_padding_that_is_no_number_stays_where_it_is() -> None:
    """Rows are scored apart: what stands in one does not reach the directions of another."""
    with hw.attach(llama()) as model:
        both = directions(model)["L0"]
        with torch.no_grad(), direct_paths(model).recording(1) as run:
            logits = model(input_ids=IDS[:1]).logits[:, -1:]
        alone = run.directions(lambda raw: raw[:, -1, 7] - raw[:, -1, 8], logits)["L0"]
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize("looked_at", ["two logits", "all logits"])
def test_a_matrix_and_a_forward_give_the_same_direction(looked_at: str) -> None:
    """Of a plain layer the weights are taken; one whose forward is something else's is gone through with autograd."""

    def score(raw: torch.Tensor) -> torch.Tensor:
        return raw[:, -1, 7] - (raw[:, -1, 8] if looked_at == "two logits" else raw[:, -1].mean(-1))

    def found(network: Any) -> torch.Tensor:
        with hw.attach(network) as model, torch.no_grad(), direct_paths(model).recording(2) as run:
            logits = model(input_ids=IDS).logits[:, -2:]
            return run.directions(score, logits)["L0"]

    network = llama()
    assert plain_matrix(network.lm_head) is not None
    by_matrix = found(network)
    network.lm_head.forward = partial(nn.Linear.forward, network.lm_head)
    assert plain_matrix(network.lm_head) is None
    torch.testing.assert_close(found(network), by_matrix)
    assert by_matrix.abs().max() > 0


def test_a_score_that_is_not_linear_is_refused() -> None:
    with hw.attach(llama()) as model, torch.no_grad(), direct_paths(model).recording(1) as run:
        logits = model(input_ids=IDS).logits[:, -1:]
        with pytest.raises(Refusal, match="not linear"):
            run.directions(lambda raw: 100 * raw[:, -1, 7] ** 2, logits)
