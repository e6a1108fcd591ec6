"""Reference sets, and the mean and resample knock-outs that draw on them, against plain hooks on the projections."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.reference import Reference

PROJECTIONS = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen3_next": "model.layers.{}.self_attn.o_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
}
HEADS, LABELS = (0, 2), "L1H0, L1H2"


OPEN = ExitStack()


@functools.cache
def attached(name: str, dtype: torch.dtype = torch.float32) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}", dtype=dtype)
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


def inputs_of(name: str) -> dict[str, Tensor]:
    return {key: attached(name).example[key] for key in ("input_ids", "attention_mask")}


def z_of(model: AttachedModel, path: str, *edits: Any, **inputs: Any) -> Tensor:
    """`[batch, position, head, dim]` as it enters a projection, by a plain hook; forwards joined along positions."""
    seen: list[Tensor] = []

    def look(_: Any, args: tuple[Tensor]) -> None:
        seen.append(args[0].clone().reshape(*args[0].shape[:2], 4, 12))

    with torch.no_grad(), model.editing(*edits) if edits else nullcontext():
        handle = model.model.get_submodule(path).register_forward_pre_hook(look)  # after headwise's own, if it has one
        try:
            model(**inputs)
        finally:
            handle.remove()
    return torch.cat(seen, dim=1)


@functools.cache
def pooled(name: str) -> Reference:
    return hw.reference(attached(name), [inputs_of(name)])


# -- the set -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_mean_is_over_attended_positions_only(name: str) -> None:
    inputs = inputs_of(name)
    z = z_of(attached(name), PROJECTIONS[name].format(1), **inputs)
    attended, everything = z[inputs["attention_mask"].bool()], z.flatten(0, 1)
    reference = pooled(name)
    assert len(reference) == int(inputs["attention_mask"].sum())
    assert torch.allclose(reference.mean(SiteId.parse("L1")), attended.mean(0), atol=1e-6)
    assert not torch.allclose(attended.mean(0), everything.mean(0), atol=1e-3)


def test_batches_are_pooled_position_by_position() -> None:
    inputs = inputs_of("llama")
    first, second = ({key: value[row : row + 1] for key, value in inputs.items()} for row in (0, 1))
    apart = hw.reference(attached("llama"), [first, second], heads="L1")
    site = SiteId.parse("L1")
    assert len(apart) == len(pooled("llama"))
    assert torch.allclose(apart.mean(site), pooled("llama").mean(site), atol=1e-5)


def test_the_decoder_of_an_encoder_decoder_has_a_mask_of_its_own() -> None:
    """Source and target are of one length here, so that taking the source's mask would go unnoticed."""
    model, generator = attached("t5"), torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (2, 2, 9), generator=generator)
    source, target = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    source[1, 3:], target[0, 6:] = 0, 0
    inputs = {"input_ids": ids[0], "attention_mask": source, "decoder_input_ids": ids[1]}
    path = "decoder.block.1.layer.{}.{}.o"
    for given, mask in ((inputs, torch.ones_like(target)), (inputs | {"decoder_attention_mask": target}, target)):
        reference = hw.reference(model, [given], heads="L1, cross.L1, encoder.L1")
        for label, z in {
            "L1": z_of(model, path.format(0, "SelfAttention"), **given)[mask.bool()],
            "cross.L1": z_of(model, path.format(1, "EncDecAttention"), **given)[mask.bool()],
            "encoder.L1": z_of(model, "encoder.block.1.layer.0.SelfAttention.o", **given)[source.bool()],
        }.items():
            assert torch.allclose(reference.mean(SiteId.parse(label)), z.mean(0), atol=1e-6), label


def test_the_mean_of_a_double_model_is_taken_in_double() -> None:
    model, inputs = attached("llama", torch.float64), inputs_of("llama")
    z = z_of(model, PROJECTIONS["llama"].format(1), **inputs)[inputs["attention_mask"].bool()]
    mean = hw.reference(model, [inputs]).mean(SiteId.parse("L1"))
    assert mean.dtype is torch.float64
    assert torch.allclose(mean, z.mean(0), atol=1e-13, rtol=0)


def test_an_empty_or_too_small_set_is_refused() -> None:
    with pytest.raises(InputError, match="reference\\(\\) was given no batch"):
        hw.reference(attached("llama"), [])
    only = hw.reference(attached("llama"), [inputs_of("llama")], heads="L0")
    with (
        pytest.raises(InputError, match="holds no z of L1; collect it with heads that include it"),
        attached("llama").editing(hw.edit.mean("L1H0", only)),
    ):
        attached("llama")(**inputs_of("llama"))


# -- the knock-outs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_mean_knock_out_puts_the_mean_in_place_of_z(name: str) -> None:
    inputs, path = inputs_of(name), PROJECTIONS[name].format(1)
    before = z_of(attached(name), path, **inputs)
    after = z_of(attached(name), path, hw.edit.mean(LABELS, pooled(name)), **inputs)
    mean = before[inputs["attention_mask"].bool()].mean(0)
    assert torch.allclose(after[:, :, list(HEADS)], mean[list(HEADS)].expand(2, 32, 2, 12), atol=1e-6)
    assert torch.equal(after[:, :, [1, 3]], before[:, :, [1, 3]])


def donors(name: str, seed: int, *, layer: int = 1, site: str = "L1", **inputs: Any) -> Tensor:
    """Which sample of the set stands at each `[batch, position, head]` after resampling, found by looking it up."""
    reference = pooled(name)
    edit = hw.edit.resample(f"{site}H0, {site}H2", reference, seed)
    z = z_of(attached(name), PROJECTIONS[name].format(layer), edit, **inputs)[:, :, list(HEADS)]
    samples = reference.values[SiteId.parse(site)][:, list(HEADS)]
    same = (z[:, :, None] == samples).all(dim=-1)  # [batch, position, sample, head]
    assert same.any(dim=2).all(), "what stands there is no sample of the set"
    return same.int().argmax(dim=2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_next"])
def test_heads_of_one_position_share_a_donor_whatever_their_layer(name: str) -> None:
    inputs = inputs_of(name)
    first, second = (donors(name, 0, layer=n, site=f"L{n}", **inputs) for n in (1, 2))
    assert torch.equal(first[:, :, 0], first[:, :, 1])
    assert torch.equal(first, second)
    assert len(first.unique()) > 15, "64 draws of 52 samples hit more than these"


def test_the_draw_depends_on_the_seed_the_row_and_the_column() -> None:
    inputs = inputs_of("llama")
    drawn = donors("llama", 0, **inputs)[..., 0]
    assert torch.equal(drawn, donors("llama", 0, **inputs)[..., 0])
    assert (drawn[0] != drawn[1]).any()
    for seed in (1, -1, 2**40, 2**70):
        assert (drawn != donors("llama", seed, **inputs)[..., 0]).float().mean() > 0.8


def test_draws_are_even() -> None:
    """Chi-squared of 20 000 draws over 50 samples; its mean is 49, its standard deviation about 10."""
    site = SiteId.parse("L0")
    reference = Reference({site: torch.arange(50.0).reshape(50, 1, 1)})
    drawn = reference.draw(site, torch.arange(20), torch.arange(1000), seed=3).flatten().long()
    counts = drawn.bincount(minlength=50).double()
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * 10


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_runs_with_and_without_a_cache_draw_the_same(name: str) -> None:
    model, inputs = attached(name), inputs_of(name)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    with model.editing(hw.edit.resample(LABELS, pooled(name), seed=4)):
        cached, uncached = (
            model.generate(**inputs, use_cache=flag, do_sample=False, **settings) for flag in (True, False)
        )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4)


def test_the_beams_of_an_item_draw_what_the_item_draws_alone() -> None:
    """So that a beam keeps its past when it changes places: the winner's score is that of a plain run over it."""
    model, inputs = attached("llama"), inputs_of("llama")
    edit = hw.edit.resample(LABELS, pooled("llama"), seed=4)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "length_penalty": 0.0, "output_scores": True}
    with torch.no_grad(), model.editing(edit):
        out = model.generate(**inputs, num_beams=3, do_sample=False, return_dict_in_generate=True, **settings)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=out.sequences, attention_mask=mask, position_ids=places, use_cache=False).logits
    chosen = out.sequences[:, 32:, None]
    summed = logits[:, 31:-1].log_softmax(-1).gather(-1, chosen).sum(dim=(1, 2))
    assert torch.allclose(out.sequences_scores, summed, atol=1e-4)


@pytest.mark.parametrize("make", [hw.edit.mean, hw.edit.resample])
def test_a_reference_is_of_z_after_the_gate_and_goes_nowhere_else(make: Any) -> None:
    with pytest.raises(InputError, match="z after the gate; leave point= out"):
        make(LABELS, pooled("qwen3_next"), point="pre_gate")
