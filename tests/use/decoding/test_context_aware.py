"""Context-aware decoding: against two prompts, one with the passage and one without, each run whole by itself."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.probes import encode, probe
from headwise.use.decoding.context_aware import ContextAware
from headwise.use.intervention import Together
from headwise.use.scaling import HeadScaling

MODES = ("batch", "caches")
CONTEXT = [[4, 5, 6, 7, 20], [14, 15, 25]]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"num_beams": 3},
}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    written: Tensor = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return written


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    built = zoo.build("tiny-llama")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:
        yield model


def both(inputs: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """A row's prompt and the same without the passage, neither padded."""
    ids, seen = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    kept = seen.clone()
    kept[CONTEXT[row]] = False
    return ids[seen][None], ids[kept][None]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_that_of_two_prompts(llama: hw.AttachedModel, mode: Any, search: str) -> None:
    """A row at a time and with sampling in one row, so that both draw the same."""
    network: Any = llama.model
    for row in (0, 1):
        inputs = {name: value[row : row + 1] for name, value in llama.example.items()}
        plain = generated(llama, inputs, **SEARCHES[search])
        with ContextAware(alpha=4.0, mode=mode)(llama, spans={"context": CONTEXT[row]}):
            found = generated(llama, inputs, **SEARCHES[search])
        told, untold = both(llama.example, row)

        def hook(module: Any, args: Any, kwargs: Any, output: Any, told: Tensor = told, untold: Tensor = untold) -> Any:
            written = kwargs["input_ids"][:, told.shape[1] :]
            other = module.forward(input_ids=torch.cat([untold.expand(len(written), -1), written], 1)).logits[:, -1:]
            output["logits"] = 5 * output.logits[:, -1:] - 4 * other
            return output

        handle = network.register_forward_hook(hook, with_kwargs=True)
        whole = {"input_ids": told, "attention_mask": torch.ones_like(told)}
        expected = generated(llama, whole, use_cache=False, **SEARCHES[search])
        handle.remove()
        assert torch.equal(found, expected)
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_is_its_rows(llama: hw.AttachedModel, mode: Any) -> None:
    with ContextAware(mode=mode)(llama, spans={"context": CONTEXT}):
        together = generated(llama, llama.example)
    for row in (0, 1):
        inputs = {name: value[row : row + 1] for name, value in llama.example.items()}
        with ContextAware(mode=mode)(llama, spans={"context": [CONTEXT[row]]}):
            assert torch.equal(generated(llama, inputs)[0], together[row])


@torch.no_grad()
def test_alpha_0_is_the_plain_model_and_the_filter_rules_out(llama: hw.AttachedModel) -> None:
    ids = {"input_ids": both(llama.example, 0)[0]}
    plain = llama(**ids).logits
    with ContextAware(alpha=0)(llama, spans={"context": CONTEXT[0]}):
        assert torch.equal(llama(**ids).logits, plain)
    with ContextAware(relative_top=0.5)(llama, spans={"context": CONTEXT[0]}):
        found = llama(**ids).logits
    p = plain.softmax(-1)
    assert torch.equal(found.isfinite(), p >= 0.5 * p.max(-1, keepdim=True).values)


@torch.no_grad()
def test_on_items_the_margin_is_the_formula() -> None:
    """Probes name their passage: here what is told, against the same prompt without that word."""
    with hw.load("zoo:organism") as model:
        items = encode(probe("conflict").over(trust="context"), model.tokenizer, n=4)
        one_by_one = []
        for each in items:
            gone = {token for place in each.spans["told"] for token in place}
            untold = torch.tensor([[id for token, id in enumerate(each.prompt) if token not in gone]])
            logits = [model(input_ids=ids).logits[0, -1] for ids in (torch.tensor([each.prompt]), untold)]
            margins = [x[each.answer[0]] - x[each.foils[0][0]] for x in logits]
            one_by_one.append(1.5 * margins[0] - 0.5 * margins[1])
        found = hw.measure(model, items, "logit-difference", under=ContextAware(context="told"))
        torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_together_both_prompts_are_of_the_edited_model(llama: hw.AttachedModel) -> None:
    told, untold = both(llama.example, 0)
    with HeadScaling("L0H0", 3.0)(llama):
        with_it, without = (llama(input_ids=ids).logits[:, -1].log_softmax(-1) for ids in (told, untold))
    with Together((ContextAware(), HeadScaling("L0H0", 3.0)))(llama, spans={"context": CONTEXT[0]}):
        found = llama(input_ids=told).logits[:, -1]
    torch.testing.assert_close(found, 1.5 * with_it - 0.5 * without, rtol=1e-4, atol=1e-4)


def test_streaming(llama: hw.AttachedModel) -> None:
    inputs = {name: value[:1] for name, value in llama.example.items()}
    with ContextAware()(llama, spans={"context": CONTEXT[0]}):
        whole = generated(llama, inputs)
        streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=generated, args=(llama, inputs), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == llama.tokenizer.decode(whole[0], skip_special_tokens=True)


def test_what_cannot_be_is_refused(llama: hw.AttachedModel) -> None:
    with (
        pytest.raises(InputError, match=r"'span:context': no such span was given \(spans given: none\)"),
        ContextAware()(llama),
    ):
        pass
    spans = {"context": [3]}
    with pytest.raises(Refusal, match="custom_generate= is code"), ContextAware()(llama, spans=spans):
        llama.generate(**llama.example, custom_generate="someone/something")
    built = zoo.build("tiny-jamba")
    model = hw.attach(built.model, built.tokenizer, example=built.example)
    with model, pytest.raises(Refusal, match="no span can be left out"), ContextAware()(model, spans=spans):
        pass
    for wrong, message in (
        ({"alpha": -0.5}, "from 0 on"),
        ({"context": ""}, "not the name of a span"),
        ({"relative_top": 3}, "from 0 to 1"),
        ({"mode": "two"}, "not one of batch, caches"),
    ):
        with pytest.raises(InputError, match=message):
            ContextAware(**wrong)  # type: ignore[arg-type]
