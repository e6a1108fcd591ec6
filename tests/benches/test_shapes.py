"""The shapes are what they are called, their attention is not uniform, and their items are all alike in form."""

from __future__ import annotations

import torch

from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, SHARPER, Shape, random_items

TINY = Shape("llama", 2, 4, 2, 32, 48, 97, 64)


def test_sizes_are_those_of_the_families() -> None:
    assert (GPT2_SMALL.layers, GPT2_SMALL.heads, GPT2_SMALL.width, GPT2_SMALL.vocabulary) == (12, 12, 768, 50257)
    assert (LLAMA_GQA.layers, LLAMA_GQA.heads, LLAMA_GQA.kv_heads) == (12, 12, 4)
    config = TINY.build().config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 48, 97)


def test_queries_and_keys_are_sharper_and_nothing_else() -> None:
    for family, kv_heads in (("gpt2", 4), ("llama", 2)):
        model = Shape(family, 2, 4, kv_heads, 32, 48, 997, 64).build(seed=2)  # type: ignore[arg-type]
        plain = 0.02
        for name, weights in model.named_parameters():
            weights = weights.detach()
            spread = float(weights.std())
            if "c_attn.weight" in name:
                assert abs(float(weights[:, :64].std()) / (SHARPER * plain) - 1) < 0.1
                assert abs(float(weights[:, 64:].std()) / plain - 1) < 0.1
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                assert abs(spread / (SHARPER * plain) - 1) < 0.1, name
            elif name.endswith(("v_proj.weight", "up_proj.weight", "wte.weight", "embed_tokens.weight")):
                assert abs(spread / plain - 1) < 0.1, name


def test_the_seed_decides_and_the_global_state_stays() -> None:
    before = torch.get_rng_state()
    one, again, other = (next(TINY.build(seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
    assert next(TINY.build(dtype=torch.float64).parameters()).dtype == torch.float64


def test_items_have_one_length_and_two_different_answers() -> None:
    items = random_items(TINY, n=50, tokens=9, seed=4)
    assert {len(each.prompt) for each in items} == {9}
    assert all(each.answer != each.foils[0] and len(each.answer) == len(each.foils[0]) == 1 for each in items)
    ids = {id for each in items for id in (*each.prompt, *each.answer, *each.foils[0])}
    assert min(ids) >= 1
    assert max(ids) < TINY.vocabulary
    assert len(set(items.ids)) == 50
    assert random_items(TINY, n=50, tokens=9, seed=4).items == items.items
    assert random_items(TINY, n=50, tokens=9, seed=5).items != items.items
