"""Self-attention whose keys are joined with others: T5Gemma 2 adds the encoder's states, DeepSeek V4 summaries.

Key columns have no names there. What names them is refused; what does not is the same with and without a cache, and
what edits do is held against plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

import headwise as hw
from headwise.benches.coverage.building import build
from headwise.benches.coverage.inputs import inputs_for
from headwise.benches.coverage.rows import Row
from headwise.model.attached import AttachedModel
from headwise.model.running.run import windowed_lengths

ROWS = {
    "t5gemma2": Row("t5gemma2", "text-to-text", "T5Gemma2ForConditionalGeneration"),
    "deepseek_v4": Row("deepseek_v4", "causal", "DeepseekV4ForCausalLM"),
}
N_DECODER, N_ENCODER = 7, 24
NO_NAMES = "key columns have no names"


@cache
def attached(name: str) -> AttachedModel:
    model = build(ROWS[name])
    inputs, _ = inputs_for(ROWS[name], model)
    return hw.attach(model, example=inputs)


@pytest.fixture(autouse=True, scope="module")
def let_go() -> Iterator[None]:
    yield
    attached.cache_clear()


def generated(model: AttachedModel, edit: hw.edit.Edit, use_cache: bool) -> Tensor:
    with model.editing(edit):
        made = model.generate(
            **model.example,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(made.logits)


SERVED = {
    "t5gemma2, last": ("t5gemma2", lambda: hw.edit.scale("L0", -2.0, scope="last")),
    "t5gemma2, all keys alike": ("t5gemma2", lambda: hw.edit.uniform("L0")),
    "t5gemma2, all values": ("t5gemma2", lambda: hw.edit.scale("L0G0", 3.0, variable="v")),
    "deepseek_v4, all values": ("deepseek_v4", lambda: hw.edit.scale("L1", 3.0, variable="v")),
    # No summary is made of so short a text, and its window is a sliding cache like any other.
    "deepseek_v4, decoded values": ("deepseek_v4", lambda: hw.edit.scale("L2", 3.0, variable="v", scope="decode")),
}


@pytest.mark.parametrize("what", SERVED)
def test_what_names_no_key_is_the_same_with_and_without_a_cache(what: str) -> None:
    name, make = SERVED[what]
    model = attached(name)
    cached, uncached = (generated(model, make(), use_cache) for use_cache in (True, False))
    plain = generated(model, hw.edit.scale("L0", 1.0, variable="v"), True)
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)
    assert (cached - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("t5gemma2", hw.edit.reweight("L0", 50.0, keys="first")),
        ("t5gemma2", hw.edit.redistribute("L0", 0.5, keys=[0], to=[1])),
        ("t5gemma2", hw.edit.scale("L0", 3.0, variable="v", scope="decode")),
        ("deepseek_v4", hw.edit.reweight("L1", 50.0, keys="first")),
        ("deepseek_v4", hw.edit.scale("L1", 3.0, variable="v", scope="decode")),
    ],
)
def test_what_names_keys_is_refused_in_one_line(name: str, edit: hw.edit.Edit) -> None:
    for use_cache in (True, False):
        with pytest.raises(hw.Refusal, match=NO_NAMES) as caught:
            generated(attached(name), edit, use_cache)
        assert "\n" not in str(caught.value)


def test_rows_and_values_of_all_keys_rebuild_z() -> None:
    model = attached("t5gemma2")
    with torch.no_grad(), model.reading(hw.read.rows("L0"), hw.read.v("L0"), hw.read.z("L0")) as got:
        model(**model.example)
    rows, values = got.rows["L0"], got.v["L0"]
    assert rows.shape[-1] == values.shape[1] == N_DECODER + N_ENCODER
    values = values.transpose(1, 2).repeat_interleave(model.site("L0").group_size, dim=1)
    torch.testing.assert_close((rows @ values).transpose(1, 2), got.z["L0"], atol=1e-5, rtol=1e-4)


def test_reads_of_keys_under_a_cache_and_statistics_by_columns_are_refused() -> None:
    model = attached("t5gemma2")
    with pytest.raises(hw.Refusal, match="which of them are new cannot be told"), model.reading(hw.read.v("L0")):
        model.generate(**model.example, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    with model.reading(hw.read.statistics("L0", wanted=["entropy", "max"])) as got:
        model(**model.example)
    assert got.statistics["L0"].entropy.shape[-1] == N_DECODER
    for wanted in ("mean_distance", "top1", "sink_mass"):
        with (
            pytest.raises(hw.Refusal, match=NO_NAMES),
            model.reading(hw.read.statistics("L0", wanted=[wanted])),
        ):
            model(**model.example)


def test_a_donors_values_are_not_put_over_other_keys_under_a_cache() -> None:
    model = attached("t5gemma2")
    with torch.no_grad(), model.reading(hw.read.v("L0"), hw.read.z("L0")) as donor:
        model(**model.example)
    with torch.no_grad(), model.editing(hw.edit.patch("L0", donor.v, variable="v")):
        torch.testing.assert_close(model(**model.example)[0], model.model(**model.example)[0])
    with pytest.raises(hw.Refusal, match="cannot be lined up"):
        generated(model, hw.edit.patch("L0", donor.v, variable="v"), True)  # its decoder begins with one token more
    with torch.no_grad():
        begun = model(**model.example, use_cache=True)
        step = {**model.example, "decoder_input_ids": torch.tensor([[5], [6]])}
        with (
            pytest.raises(hw.Refusal, match="cannot be lined up"),
            model.editing(hw.edit.patch("L0", donor.v, variable="v")),
        ):
            model(**step, past_key_values=begun.past_key_values)


def test_layers_that_are_told_the_tokens_are_no_towers() -> None:
    """A tower of its own would take the cache's length after the layers before it had filled it."""
    assert {site.tower for site in attached("deepseek_v4").sites} == {"model"}


def test_the_lengths_that_caches_hand_over() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    assert windowed_lengths(None, 3, 1) == set()
    assert windowed_lengths(DynamicCache(), 3, 1) == set()
    assert windowed_lengths(StaticCache(config=config, max_cache_len=9), 3, 1) == {9}
    sliding = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        sliding_window=4,
        layer_types=["sliding_attention"],
    )
    for past, length, n_keys in ((0, 3, 3), (3, 1, 4), (9, 1, 4), (9, 3, 6)):
        cache = DynamicCache(config=sliding)
        for step in (past, length):
            states = torch.zeros(1, 2, step, 4)
            keys = states if not step else cache.update(states, states, 0)[0]
        assert keys.shape[2] == n_keys
        assert n_keys in windowed_lengths(cache, past, length)
