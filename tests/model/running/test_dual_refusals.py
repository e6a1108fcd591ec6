"""What a dual run refuses, in one line and without leaving anything behind, and what it takes as it comes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import headwise as hw
from headwise import zoo

MODES = ("batch", "caches")


def attached(name: str) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), dict(organism.example)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[hw.AttachedModel, dict[str, Tensor]]]:
    model, inputs = attached("tiny-llama")
    with model:
        yield model, inputs


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=2e-5, atol=2e-5))


def test_what_cannot_be_is_refused_in_one_line(llama: Any) -> None:
    model, inputs = llama
    zero = hw.edit.zero("L0H1")

    def run(*edits: Any, **options: Any) -> Callable[[dict[str, Any]], None]:
        def call(more: dict[str, Any]) -> None:
            with model.dual(*edits, **options):
                model(**{**inputs, **more})

        return call

    def nested(more: dict[str, Any]) -> None:
        with model.dual(zero), model.dual(zero):
            pass

    def other_outside(more: dict[str, Any]) -> None:
        with model.editing(hw.edit.patch("L1H0", hw.edit.OTHER)):
            pass

    def second_outside(more: dict[str, Any]) -> None:
        with model.editing(hw.edit.zero("L1H0", stream="second")):
            pass

    cases: list[tuple[Any, type[Exception], str, dict[str, Any]]] = [
        (run(zero, mode="cache"), hw.InputError, "mode='cache' is not one of batch, caches", {}),
        (run(zero, combine=3), hw.InputError, "combine= takes a function", {}),
        (run(zero, combine=lambda a, b: a[:, -1]), hw.InputError, r"combine\(\) gave \[2, 264\]; expected logits", {}),
        (run(zero, combine=lambda a, b: None), hw.InputError, r"combine\(\) gave NoneType", {}),
        (run(zero), hw.Refusal, "leave labels= out", {"labels": inputs["input_ids"]}),
        (run(zero, mode="caches"), hw.Refusal, "leave labels= out", {"labels": inputs["input_ids"]}),
        (run(zero), hw.InputError, "leave return_dict at True", {"return_dict": False}),
        (run(zero), hw.Refusal, "a transformers Cache", {"past_key_values": ((1, 2),)}),
        (run(hw.edit.patch("L1H0", hw.edit.OTHER)), hw.InputError, "not the other way round", {}),
        (nested, hw.PlanConflict, "a dual run is open already", {}),
        (other_outside, hw.InputError, "OTHER is the second stream of a dual run; open one", {}),
        (second_outside, hw.InputError, "is for the second stream; open one", {}),
    ]
    for call, kind, message, more in cases:
        with pytest.raises(kind, match=message) as caught:
            call(more)
        assert "\n" not in str(caught.value)
        with model.editing(zero):  # nothing is left half open: the next plan opens, runs and is no dual one
            assert len(model(**inputs).logits) == 2


def test_outputs_without_logits_cannot_be_combined() -> None:
    model, inputs = attached("tiny-wav2vec2")
    with model:
        clean = model(**inputs).last_hidden_state
        with model.dual(hw.edit.zero("L0H1")) as dual:
            assert close(model(**inputs).last_hidden_state, clean)
            assert dual.first is None
        with pytest.raises(hw.InputError, match="combine= needs logits"), model.dual(combine=torch.sub):
            model(**inputs)


def test_checkpointed_layers_are_refused_where_they_would_be_recomputed() -> None:
    model, inputs = attached("tiny-llama")
    model.model.gradient_checkpointing_enable()
    model.model.train()
    with model, model.dual(hw.edit.zero("L0H1")):
        with pytest.raises(hw.Refusal, match="gradient checkpointing"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_combine_leaves_nothing_behind(mode: str, llama: Any) -> None:
    model, inputs = llama
    before, own = model(**inputs).logits, set(vars(model.model))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules()]

    def broken(first: Tensor, second: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    zero = hw.edit.zero("L0H1")
    for call in (model, model.generate):
        with pytest.raises(ZeroDivisionError, match="mine"), model.dual(zero, combine=broken, mode=mode):
            call(**inputs)
        assert torch.equal(model(**inputs).logits, before)
        assert set(vars(model.model)) == own
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    with model.dual(hw.edit.zero("L0H1"), combine=broken, mode=mode):
        with pytest.raises(ZeroDivisionError):  # caught inside: the block goes on
            model(**inputs)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)


@torch.no_grad()
def test_flattened_patches_are_refused_in_one_batch() -> None:
    model, inputs = attached("tiny-qwen2_vl")
    with model, model.dual(hw.edit.zero("L0H1")):
        with pytest.raises(hw.Refusal, match=r"pixel_values has 72 rows for 2 items.*mode='caches'"):
            model(**inputs)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        text["input_ids"] = text["input_ids"].clamp(max=200)
        with model.editing(hw.edit.zero("L1H1")):  # refused on its way in, the run is over
            model(**text)


@torch.no_grad()
def test_arguments_that_are_not_by_row_are_kept_as_they_are(llama: Any) -> None:
    """As many kept positions as rows, positions given once for all rows, and positional arguments."""
    model, inputs = llama
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["attention_mask"])
    options = {"logits_to_keep": torch.tensor([3, 9]), "position_ids": torch.arange(ids.shape[1])[None]}
    clean, expected = model(ids, mask, **options).logits, model(ids, mask).logits[:, 20:]
    for mode in MODES:
        with model.dual(hw.edit.zero("L0H1"), mode=mode):
            assert close(model(ids, mask, **options).logits, clean)
            cache = DynamicCache()
            model(ids[:, :20], mask[:, :20], None, cache)
            assert close(model(ids[:, 20:], mask, None, cache).logits, expected)
            assert len(cache) == 3
            assert cache.get_seq_length() == 32


def test_attached_models_are_told_apart() -> None:
    model, inputs = attached("tiny-llama")
    bystander = copy.deepcopy(model.model)
    with model, model.dual(hw.edit.zero("L0H1")) as dual:
        model(**inputs)
        assert len(bystander(**inputs).logits) == 2
        assert dual.first is not None
