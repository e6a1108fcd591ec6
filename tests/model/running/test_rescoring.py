"""Logits made anew from streams of the same forward: against the model's own hidden states, also in `generate()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.model.running.rescoring import Streams


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    built = zoo.build("tiny-llama")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:
        yield model


def first_numbers(logits: Tensor, streams: Streams) -> Tensor:
    """Something of every stream that shows in the logits: its first three numbers, in front."""
    made = logits.clone()
    for place, stream in enumerate(streams.values()):
        made[..., 3 * place : 3 * place + 3] = stream[..., :3]
    return made


@torch.no_grad()
def test_streams_are_those_of_the_forward(llama: hw.AttachedModel) -> None:
    plain = llama(**llama.example, output_hidden_states=True)
    with llama.rescoring(first_numbers, ["L0", "L2"]) as rescoring:
        made = llama(**llama.example).logits
        assert torch.equal(rescoring.logits, plain.logits)
        assert torch.equal(made[..., :3], plain.hidden_states[0][..., :3])
        assert torch.equal(made[..., 3:6], plain.hidden_states[2][..., :3])
        assert torch.equal(made[..., 6:], plain.logits[..., 6:])
        chosen: list[tuple[Any, Any]] = [(2, slice(-2, None)), (torch.tensor([4, 9]), [4, 9]), (slice(2, 5),) * 2]
        backwards = torch.arange(llama.example["input_ids"].shape[1]).flip(0)
        for kept, columns in [*chosen, (backwards, backwards)]:
            few = llama(**llama.example, logits_to_keep=kept).logits
            torch.testing.assert_close(few, made[:, columns])
    assert torch.equal(llama(**llama.example).logits, plain.logits)


@torch.no_grad()
def test_edits_show_in_the_streams_wherever_their_block_is(llama: hw.AttachedModel) -> None:
    edit = hw.edit.add("L1", 3.0, variable="residual_pre")
    with llama.editing(edit):
        expected = llama(**llama.example, output_hidden_states=True)
        with llama.rescoring(first_numbers, ["L1"]):
            inside = llama(**llama.example).logits
    with llama.rescoring(first_numbers, ["L1"]), llama.editing(edit):
        outside = llama(**llama.example).logits
    clean = llama(**llama.example, output_hidden_states=True).hidden_states[1]
    assert torch.equal(inside, outside)
    torch.testing.assert_close(inside[..., :3], clean[..., :3] + 3.0)
    assert torch.equal(inside[..., 3:], expected.logits[..., 3:])


def test_what_cannot_be_is_refused_in_one_line(llama: hw.AttachedModel) -> None:
    ids = llama.example["input_ids"]

    def run(rescore: Any = first_numbers, blocks: Any = ("L1",), **options: Any) -> None:
        with llama.rescoring(rescore, blocks):
            llama(ids, **options)

    def nested() -> None:
        with llama.rescoring(first_numbers, ["L1"]), llama.rescoring(first_numbers, ["L2"]):
            pass

    def in_dual() -> None:
        with llama.dual(hw.edit.zero("L0H1")), llama.rescoring(first_numbers, ["L1"]):
            pass

    def around_dual() -> None:
        with llama.rescoring(first_numbers, ["L1"]), llama.dual(hw.edit.zero("L0H1")):
            pass

    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (run, {"rescore": 3}, InputError, "takes a function of logits and streams"),
        (run, {"rescore": lambda logits, streams: logits[:, -1]}, InputError, r"gave \[2, 264\]; expected logits"),
        (run, {"rescore": lambda logits, streams: None}, InputError, "gave NoneType"),
        (run, {"blocks": ["L9"]}, InputError, "L9"),
        (run, {"return_dict": False}, InputError, "leave return_dict at True"),
        (run, {"labels": ids}, Refusal, "leave labels= out"),
        (nested, {}, PlanConflict, "contrasted already"),
        (in_dual, {}, PlanConflict, "contrasted already"),
        (around_dual, {}, PlanConflict, "contrasted already"),
    ]
    before = llama(ids).logits
    for call, given, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            call(**given)
        assert "\n" not in str(caught.value)
        assert torch.equal(llama(ids).logits, before)


def test_an_exception_in_the_function_leaves_nothing_behind(llama: hw.AttachedModel) -> None:
    def broken(logits: Tensor, streams: Streams) -> Tensor:
        raise ZeroDivisionError("mine")

    before = llama(**llama.example).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]
    with llama.rescoring(broken, ["L1"]):
        for call in (llama, llama.generate, llama):  # caught inside: the block goes on
            with pytest.raises(ZeroDivisionError, match="mine"):
                call(**llama.example)
    assert torch.equal(llama(**llama.example).logits, before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}])
def test_generation_chooses_from_the_new_logits(llama: hw.AttachedModel, search: dict[str, Any]) -> None:
    """Against a plain hook that makes them from the hidden states of a run without a cache."""
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in search else slice(None)
    inputs = {name: value[rows] for name, value in llama.example.items()}
    network: Any = llama.model

    def contrast(logits: Tensor, stream: Tensor) -> Tensor:
        return 3 * logits - network.lm_head(stream[:, -logits.shape[1] :])

    def by_hand(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        output["logits"] = contrast(output.logits, output.hidden_states[1])
        return output

    def generated(**options: Any) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return llama.generate(
                **inputs, max_new_tokens=8, min_new_tokens=8, **{"do_sample": False} | search | options
            )

    with llama.rescoring(lambda logits, streams: contrast(logits, streams["L1"]), ["L1"]):
        found = generated()
    plain = generated()
    handle = network.register_forward_hook(by_hand, with_kwargs=True)
    network.config.output_hidden_states = True
    expected = generated(use_cache=False, prompt_lookup_num_tokens=None)
    handle.remove()
    network.config.output_hidden_states = False
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
