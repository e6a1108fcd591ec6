"""Tiny configurations: small, consistent, with every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig

from headwise.benches.coverage.building import LARGEST, TooLarge, build
from headwise.benches.coverage.particulars import PARTICULARS
from headwise.benches.coverage.rows import Row, committed
from headwise.benches.coverage.shrinking import DROPPED, FIRST_SPECIAL, VOCABULARY, shrunk


def tiny(name: str, **special: Any) -> Any:
    return shrunk(getattr(transformers, name), special)


def test_llama_is_two_layers_of_four_heads() -> None:
    config = tiny("LlamaConfig")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (16, 64, VOCABULARY)


def test_fewer_key_value_heads_stay_fewer() -> None:
    assert tiny("LlamaConfig").num_key_value_heads == 4  # as many as there are heads, by default
    assert tiny("Qwen3NextConfig").num_key_value_heads == 2


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Gemma3TextConfig", {"sliding_attention", "full_attention"}),
        ("Qwen3NextConfig", {"linear_attention", "full_attention"}),
    ],
)
def test_every_kind_of_layer_is_there_once(name: str, kinds: set[str]) -> None:
    config = tiny(name)
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers == 2


def test_settings_by_layer_follow_their_layers() -> None:
    """Gemma 4 has its wider heads in the layers of full attention, here the second one."""
    config = tiny("Gemma4TextConfig")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.to_dict()["per_layer_config"] == {"1": {"head_dim": 32}}


def test_special_tokens_move_into_the_vocabulary_together() -> None:
    config = tiny("LlavaConfig", image_token_index=32000)
    assert config.image_token_index == 32000  # what is given stays as it is
    config = tiny("Gemma3Config")
    moved = {config.image_token_index, config.boi_token_index, config.eoi_token_index}
    assert len(moved) == 3
    assert all(FIRST_SPECIAL <= token < VOCABULARY for token in moved)


def test_a_backbone_gives_out_the_stages_it_has() -> None:
    config = tiny("Dinov2Config")
    assert config.num_hidden_layers == 2
    assert config.out_features == ["stage2"]


def test_parts_are_made_where_a_class_leaves_them_out() -> None:
    assert tiny("Gemma4Config").vision_config.hidden_size == 64


def test_what_is_special_goes_into_parts_and_can_be_dropped() -> None:
    config = tiny("LlavaConfig", **{"text_config.num_hidden_layers": 3, "projector_hidden_act": DROPPED})
    assert config.text_config.num_hidden_layers == 3
    assert config.projector_hidden_act == "gelu"


def test_a_model_that_stayed_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.benches.coverage.building.LARGEST", 1000)
    with pytest.raises(TooLarge, match=r"parameters: model\.embed_tokens\.weight"):
        build(Row("llama", "causal", "LlamaForCausalLM"))
    assert LARGEST == 40_000_000


def test_the_same_model_twice_and_the_random_state_left_alone() -> None:
    import torch

    before = torch.get_rng_state()
    one, other = (build(Row("llama", "causal", "LlamaForCausalLM")) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not one.training


def test_what_is_particular_belongs_to_a_row() -> None:
    known = {row.model_type for row in committed()} | {row.key for row in committed()}
    assert set(PARTICULARS) <= known


def test_every_given_input_belongs_to_a_row() -> None:
    from headwise.benches.coverage.given import GIVEN

    known = {row.model_type for row in committed()} | {row.key for row in committed()}
    assert set(GIVEN) <= known


def test_the_default_of_the_class_is_left_alone() -> None:
    before: PreTrainedConfig = transformers.LlamaConfig()
    tiny("LlamaConfig")
    assert transformers.LlamaConfig().to_dict() == before.to_dict()
