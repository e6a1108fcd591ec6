"""A second stream that lacks a span, against the shorter prompt run by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal

MODES = ("batch", "caches")
CONTEXT = [[4, 5, 6, 7, 20], [14, 15, 25]]
"""Columns of `example`, whose second row begins at column 12. The first row's span is in two pieces."""


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    with attached("tiny-llama") as model:
        yield model


def shorter(inputs: dict[str, Tensor], row: int) -> Tensor:
    ids = inputs["input_ids"][row].tolist()
    seen = inputs["attention_mask"][row].tolist()
    return torch.tensor([[id for c, id in enumerate(ids) if seen[c] and c not in CONTEXT[row]]])


def placed(model: hw.AttachedModel) -> dict[str, Tensor]:
    """The example as `generate` would run it, with positions counted from each row's first token."""
    inputs = dict(model.example)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs if "bloom" in model.name.lower() else inputs | {"position_ids": positions}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-qwen3", "tiny-bloom"])
@torch.no_grad()
def test_it_is_the_shorter_prompt(name: str, mode: str) -> None:
    with attached(name) as model:
        inputs = placed(model)
        plain = model(**inputs).logits[:, -1]
        short = torch.cat([model(input_ids=shorter(inputs, row)).logits[:, -1] for row in (0, 1)])
        with model.dual(mode=mode, without="context", spans={"context": CONTEXT}) as dual:
            first = model(**inputs).logits[:, -1]
            assert dual.second is not None
            torch.testing.assert_close(dual.second[:, -1], short, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(first, plain, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(short, plain, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_that_of_two_prompts_recomputed(llama: hw.AttachedModel, mode: str, beams: int) -> None:
    """Row by row: at every step both prompts are run whole, without a cache, and their logits combined."""

    def combine(first: Tensor, second: Tensor) -> Tensor:
        return 1.5 * first.log_softmax(-1) - 0.5 * second.log_softmax(-1)

    search = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with llama.dual(combine=combine, mode=mode, without="context", spans={"context": CONTEXT}):
        found = llama.generate(**llama.example, **search)[:, -6:]
    network: Any = llama.model
    for row in (0, 1):
        short = shorter(llama.example, row)
        ids = llama.example["input_ids"][row][llama.example["attention_mask"][row].bool()][None]

        def by_hand(module: Any, args: Any, kwargs: Any, output: Any, short: Tensor = short, ids: Tensor = ids) -> Any:
            written = kwargs["input_ids"][:, ids.shape[1] :]
            other = network.forward(input_ids=torch.cat([short.expand(len(written), -1), written], 1)).logits
            output["logits"] = combine(output.logits[:, -1:], other[:, -1:])
            return output

        handle = network.register_forward_hook(by_hand, with_kwargs=True)
        expected = llama.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **search)[:, -6:]
        handle.remove()
        assert torch.equal(found[row], expected[0])
    assert not torch.equal(found, llama.generate(**llama.example, **search)[:, -6:])


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_may_come_in_pieces(llama: hw.AttachedModel, mode: str) -> None:
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    texts = []
    for size in (None, 4, 5):  # pieces of padding alone, of nothing but the span, and a last one of two tokens
        with llama.dual(combine=torch.sub, mode=mode, without="context", spans={"context": CONTEXT}) as dual:
            text = llama.generate(**llama.example, **search, prefill_chunk_size=size)
        texts.append((text, dual.second))
    for text, second in texts[1:]:
        assert torch.equal(text, texts[0][0])
        torch.testing.assert_close(second, texts[0][1], rtol=1e-4, atol=1e-4)
    spans = {"context": [31]}
    with (
        pytest.raises(InputError, match="holds a prompt's last token"),
        llama.dual(without="context", spans=spans, mode=mode),
    ):
        llama.generate(**llama.example, **search, prefill_chunk_size=5)


@torch.no_grad()
def test_positions_that_are_not_given(llama: hw.AttachedModel) -> None:
    ids = llama.example["input_ids"][:1]
    spans: dict[str, Any] = {"context": [3, 4, 5]}
    short = torch.cat([ids[:, :3], ids[:, 6:]], 1)
    for mode in MODES:
        with llama.dual(mode=mode, without="context", spans=spans) as dual:
            llama(ids)
            assert dual.second is not None
            second = dual.second[:, -1]
        torch.testing.assert_close(second, llama(short).logits[:, -1], rtol=1e-4, atol=2e-5)
    with llama.dual(mode="batch", without="context", spans={"context": CONTEXT}):
        with pytest.raises(Refusal, match="needs position_ids="):
            llama(**llama.example)
        llama(ids.expand(2, -1))


def test_what_cannot_be_is_refused(llama: hw.AttachedModel) -> None:
    inputs = placed(llama)

    def run(spans: Any, *edits: Any, without: str = "context", **more: Any) -> None:
        with llama.dual(*edits, without=without, spans=spans):
            llama(**{**inputs, **more})

    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (({"other": [3]},), {}, InputError, r"'span:context': no such span was given \(spans given: other\)"),
        (({"context": [list(range(32)), [14]]},), {}, InputError, "is all of a row's prompt"),
        (({"context": [31]},), {}, InputError, "holds a prompt's last token"),
        (({"context": [5]},), {"attention_mask": torch.zeros(2, 1, 32, 32)}, Refusal, "use a dynamic cache"),
        (({"context": [5]},), {"position_ids": torch.zeros(3, 2, 32).long()}, Refusal, "has 3 axes"),
        (
            ({"context": [[0], [14]]}, hw.edit.bias("L0H1", 1.0, keys="first")),
            {},
            Refusal,
            "holds a row's first token",
        ),
    ]
    for given, more, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            run(*given, **more)
        assert "\n" not in str(caught.value)
    run({"context": [[5], [14]]}, hw.edit.bias("L0H1", 1.0, keys="first"))


@pytest.mark.parametrize("columns", [[5, 32], [[5], [14, 32]]])
def test_what_is_written_is_not_left_out(llama: hw.AttachedModel, columns: Any) -> None:
    with (
        pytest.raises(InputError, match="reaches to column 32 and the prompt has 32"),
        llama.dual(without="context", spans={"context": columns}),
    ):
        llama.generate(**llama.example, max_new_tokens=3)


@pytest.mark.parametrize("name", ["tiny-mpt", "tiny-jamba", "tiny-t5"])
def test_models_in_which_a_gap_is_something_are_refused(name: str) -> None:
    with attached(name) as model:
        with pytest.raises(Refusal, match="no span can be left out"), model.dual(without="x", spans={"x": [4]}):
            pass
        with model.editing(hw.edit.zero(model.heads().labels[0])):  # nothing is left behind
            model(**model.example)


def test_a_window_that_the_gap_takes_room_in_is_refused() -> None:
    spans = {"x": [1]}
    with (
        attached("tiny-mistral") as model,  # of 8 columns, fewer than are tried
        pytest.raises(Refusal, match="no span can be left out"),
        model.dual(without="x", spans=spans),
    ):
        pass
    built = zoo.build("tiny-mistral")
    window = 20
    built.model.config.sliding_window = window
    kinds = [[["global", "local"], 1]]
    neo = GPTNeoConfig(num_layers=2, hidden_size=24, num_heads=2, attention_types=kinds, window_size=window)
    for network in (built.model, GPTNeoForCausalLM(neo).eval()):
        refuses_long_runs(hw.attach(network, built.tokenizer, example=built.example), window)


def refuses_long_runs(model: hw.AttachedModel, window: int) -> None:
    with model, model.dual(mode="caches", without="x", spans={"x": [1]}):
        with pytest.raises(Refusal, match=f"sees {window} columns at a time"):
            model(**model.example)
        model(input_ids=model.example["input_ids"][:1, :window])


def test_it_is_tried_inside_an_open_plan_too() -> None:
    with attached("tiny-llama") as model, model.editing(hw.edit.zero("L0H1")), torch.no_grad():
        edited = model(**model.example).logits
        with model.dual(without="x", mode="caches", spans={"x": [14]}):
            torch.testing.assert_close(model(**model.example).logits, edited)
