"""Edits of encoder-decoders, in `generate()` and in plain forwards, against plain hooks on the modules they concern.

What was generated is given as a whole to a copy of the model that headwise never saw, with a hook on one projection.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel

HEADS, EFFECT, NEW = (0, 2), 1e-3, 6

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3, "length_penalty": 0.0, "output_scores": True},
}


OPEN = ExitStack()


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


@functools.cache
def untouched(name: str) -> Any:
    return zoo.build(f"tiny-{name}", attn="eager").model


def padded(name: str) -> dict[str, Tensor]:
    return {key: attached(name).example[key] for key in ("input_ids", "attention_mask")}


def generated(model: AttachedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    settings |= {"output_logits": True, "return_dict_in_generate": True} | options
    with torch.no_grad():
        return model.generate(**inputs, **settings)


STACKS = {
    "main": ("L1H0, L1H2", "decoder.block.1.layer.0.SelfAttention.o", "model.decoder.layers.1.self_attn.out_proj"),
    "cross": (
        "cross.L1H0, cross.L1H2",
        "decoder.block.1.layer.1.EncDecAttention.o",
        "model.decoder.layers.1.encoder_attn.out_proj",
    ),
    "encoder": (
        "encoder.L1H0, encoder.L1H2",
        "encoder.block.1.layer.0.SelfAttention.o",
        "model.encoder.layers.1.self_attn.out_proj",
    ),
}


@pytest.mark.parametrize("mode", ["greedy", "static", "uncached", "beams"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_stack_of_an_encoder_decoder_is_edited_while_it_generates(name: str, stack: str, mode: str) -> None:
    model, inputs = attached(name), padded(name)
    labels, *projections = STACKS[stack]
    with model.editing(hw.edit.scale(labels, -1.0, rows=[1])) as opened:
        out = generated(model, inputs, **MODES[mode])
    assert all(fired.calls > 0 and fired.positions > 0 for fired in opened.fired)

    def negate(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone().reshape(*args[0].shape[:2], 4, 12)
        z[1, :, list(HEADS)] *= -1
        return (z.reshape(args[0].shape),)

    plain = untouched(name)
    given = {**inputs, "decoder_input_ids": out.sequences[:, :-1]}
    with torch.no_grad():
        before = plain(**given).logits
        handle = plain.get_submodule(projections[name == "bart"]).register_forward_pre_hook(negate)
        theirs = plain(**given).logits
        handle.remove()
    assert (theirs - before)[1].abs().max() > EFFECT
    if mode == "beams":
        summed = theirs.log_softmax(-1).gather(-1, out.sequences[:, 1:, None]).sum(dim=(1, 2))
        assert torch.allclose(out.sequences_scores, summed, atol=1e-4)
    else:
        assert torch.allclose(torch.stack(out.logits, dim=1), theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_is_not_padded_where_its_source_is(name: str) -> None:
    """A source of three tokens must not make the third target token the last one."""
    model, inputs = attached(name), dict(attached(name).example)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, 3:] = 0
    projection = model.model.get_submodule(STACKS["main"][1 + (name == "bart")])
    with torch.no_grad():
        with model.editing(hw.edit.zero("L1", scope="last")):
            ours = model(**inputs).logits
        column = torch.arange(inputs["decoder_input_ids"].shape[1]) == inputs["decoder_input_ids"].shape[1] - 1
        handle = projection.register_forward_pre_hook(lambda _, args: (args[0] * ~column[:, None],))
        theirs = model(**inputs).logits
        handle.remove()
        before = model(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - before).abs().amax(dim=(1, 2)).min() > EFFECT


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_scopes_of_cross_values_are_columns_of_the_source(mode: str) -> None:
    """`last` is the source's last attended token of each row; the plain way changes it once, where it is made."""
    model, inputs = attached("bart"), padded("bart")
    ends = inputs["attention_mask"].sum(dim=1) - 1
    with model.editing(hw.edit.scale("cross.L1G1", -4.0, "v", scope="last")):
        out = generated(model, inputs, **MODES[mode])

    def change(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, end in enumerate(ends.tolist()):
            output[row, end, 12:24] *= -4
        return output

    plain, given = untouched("bart"), {**inputs, "decoder_input_ids": out.sequences[:, :-1]}
    with torch.no_grad():
        before = plain(**given).logits
        handle = plain.get_submodule("model.decoder.layers.1.encoder_attn.v_proj").register_forward_hook(change)
        theirs = plain(**given).logits
        handle.remove()
    assert (theirs - before).abs().max() > EFFECT
    if mode == "beams":
        summed = theirs.log_softmax(-1).gather(-1, out.sequences[:, 1:, None]).sum(dim=(1, 2))
        assert torch.allclose(out.sequences_scores, summed, atol=1e-4)
    else:
        assert torch.allclose(torch.stack(out.logits, dim=1), theirs, atol=1e-4)
