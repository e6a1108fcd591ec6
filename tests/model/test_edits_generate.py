"""Edits in `generate()` and in hand-written decoding loops, against one plain forward of what came out.

The second way: the generated sequence is given as a whole, with no cache, to a copy of the model that headwise never
saw, and a few lines of plain code change one layer of it at the columns that the scope means. A causal model's logits
must then be those of the decoding steps, whatever cache, search or padding they came from.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel

NEW, HEADS, GROUP = 6, (0, 2), 1
LABELS, GROUP_LABEL = "L1H0, L1H2", "L1G1"
EFFECT, CLOSE = 1e-3, 5e-5
ATTENTION = {"gpt2": ("transformer.h.1.attn", "c_proj")}
SPANS = {"name": [[3, 4, 27], [14, 15, 33]]}
IN_PROMPT = {"name": [[3, 4, 27], [14, 15]]}  # a loop may end with its first forward: 33 would be an error

Columns = Callable[[Tensor, int], Tensor]  # (attended columns [batch, column], prompt length) -> [batch, column]


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


# -- the second way ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A change to one layer: of z, k, v (by position) or of the weights (by query; the columns are the keys')."""

    variable: str
    change: Callable[[Tensor], Tensor]
    columns: Columns

    @contextmanager
    def within(self, model: Any, name: str, where: Tensor) -> Iterator[None]:
        path, projection = ATTENTION.get(name, ("model.layers.1.self_attn", "o_proj"))
        target = model.get_submodule(path)
        home: Any = sys.modules[type(target).__module__]
        original = home.eager_attention_forward

        def on(x: Tensor, head_axis: int, indices: tuple[int, ...], mask: Tensor) -> Tensor:
            x = x.clone()
            for index in indices:
                part = x.select(head_axis, index)
                part.copy_(torch.where(mask, self.change(part), part))
            return x

        def changed(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any) -> Any:
            if module is not target:
                return original(module, q, k, v, mask, *args, **options)
            if self.variable == "k":
                k = on(k, 1, (GROUP,), where[:, :, None])
            if self.variable == "v":
                v = on(v, 1, (GROUP,), where[:, :, None])
            out, weights = original(module, q, k, v, mask, *args, **options)
            if self.variable in ("queries", "keys"):
                chosen = where[:, :, None] if self.variable == "queries" else where[:, None, :]
                sums = weights.sum(-1, keepdim=True)
                weights = on(weights, 1, HEADS, chosen)
                if self.variable == "keys":  # a change of columns is followed by renormalising
                    weights = weights * sums / weights.sum(-1, keepdim=True).clamp(min=1e-30)
                out = (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).transpose(1, 2).contiguous()
            return out, weights

        def pre_hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            if self.variable != "z":
                return args
            z = args[0].reshape(*args[0].shape[:2], -1, 12)
            return (on(z, 2, HEADS, where[:, :, None]).reshape(args[0].shape),)

        handle = getattr(target, projection).register_forward_pre_hook(pre_hook)
        home.eager_attention_forward = changed
        try:
            yield
        finally:
            home.eager_attention_forward = original
            handle.remove()


def plain_logits(name: str, sequences: Tensor, mask: Tensor, plain: Plain | None) -> Tensor:
    """Logits of the decoding steps, from one forward over the finished sequences."""
    model, prompt = untouched(name), mask.shape[1]
    whole = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - prompt)], dim=1)
    inputs = {"input_ids": sequences, "attention_mask": whole, "use_cache": False}
    inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        if plain is None:
            return model(**inputs).logits[:, prompt - 1 : -1]  # type: ignore[no-any-return]
        with plain.within(model, name, plain.columns(whole.bool(), prompt)):
            return model(**inputs).logits[:, prompt - 1 : -1]  # type: ignore[no-any-return]


def everywhere(mask: Tensor, prompt: int) -> Tensor:
    return torch.ones_like(mask)


def in_prompt(mask: Tensor, prompt: int) -> Tensor:
    return (torch.arange(mask.shape[1]) < prompt).expand_as(mask)


def decoded(mask: Tensor, prompt: int) -> Tensor:
    return ~in_prompt(mask, prompt)


def predicting(mask: Tensor, prompt: int) -> Tensor:
    return (torch.arange(mask.shape[1]) >= prompt - 1).expand_as(mask)


def first_token(mask: Tensor, prompt: int) -> Tensor:
    return mask & (mask.cumsum(-1) == 1)


def named(mask: Tensor, prompt: int) -> Tensor:
    chosen = torch.zeros_like(mask)
    for row, columns in enumerate(SPANS["name"]):
        if row < len(mask):
            chosen[row, [column for column in columns if column < mask.shape[1]]] = True
    return chosen


def second_row(mask: Tensor, prompt: int) -> Tensor:
    return (torch.arange(len(mask)) == 1)[:, None].expand_as(mask)


def negated(x: Tensor) -> Tensor:
    return -x


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def uniform(weights: Tensor) -> Tensor:
    seen = (weights > 0).to(weights)
    return seen / seen.sum(-1, keepdim=True).clamp(min=1)


CASES: dict[str, tuple[Callable[[], Any], Plain]] = {
    "z": (lambda: hw.edit.scale(LABELS, -1.0), Plain("z", negated, everywhere)),
    "z-prompt": (lambda: hw.edit.scale(LABELS, -1.0, scope="prompt"), Plain("z", negated, in_prompt)),
    "z-decode": (lambda: hw.edit.scale(LABELS, -1.0, scope="decode"), Plain("z", negated, decoded)),
    "z-last": (lambda: hw.edit.scale(LABELS, -1.0, scope="last"), Plain("z", negated, predicting)),
    "z-span": (lambda: hw.edit.scale(LABELS, -1.0, scope="span:name"), Plain("z", negated, named)),
    "z-row": (lambda: hw.edit.scale(LABELS, -1.0, rows=[1]), Plain("z", negated, second_row)),
    "k-prompt": (lambda: hw.edit.scale(GROUP_LABEL, -1.0, "k", scope="prompt"), Plain("k", negated, in_prompt)),
    "k-span": (lambda: hw.edit.scale(GROUP_LABEL, 2.0, "k", scope="span:name"), Plain("k", doubled, named)),
    "v-decode": (lambda: hw.edit.scale(GROUP_LABEL, -1.0, "v", scope="decode"), Plain("v", negated, decoded)),
    "v-all": (lambda: hw.edit.scale(GROUP_LABEL, 2.0, "v"), Plain("v", doubled, everywhere)),
    "rows-last": (lambda: hw.edit.uniform(LABELS, scope="last"), Plain("queries", uniform, predicting)),
    "rows-prompt": (lambda: hw.edit.uniform(LABELS, scope="prompt"), Plain("queries", uniform, in_prompt)),
    "column-first": (lambda: hw.edit.reweight(LABELS, 2.0, keys="first"), Plain("keys", doubled, first_token)),
    "column-span": (lambda: hw.edit.reweight(LABELS, 2.0, keys="span:name"), Plain("keys", doubled, named)),
}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3, "length_penalty": 0.0, "output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


def generated(model: AttachedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    settings |= {"output_logits": True, "return_dict_in_generate": True} | options
    with torch.no_grad():
        return model.generate(**inputs, **settings)


def check(name: str, case: str, mode: str, inputs: dict[str, Tensor]) -> None:
    make, plain = CASES[case]
    with attached(name).editing(make(), spans=SPANS if "span" in case else None):
        out = generated(attached(name), inputs, **MODES[mode])
    ours, theirs = out.logits, plain_logits(name, out.sequences, inputs["attention_mask"], plain)
    before = plain_logits(name, out.sequences, inputs["attention_mask"], None)
    assert (theirs - before).abs().max() > EFFECT, "the plain change did nothing: nothing is shown"
    if mode == "beams":  # the steps' logits belong to beams that came and went: the sum along the winner is theirs
        chosen = out.sequences[:, inputs["input_ids"].shape[1] :, None]
        summed = theirs.log_softmax(-1).gather(-1, chosen).sum(dim=(1, 2))
        assert torch.allclose(out.sequences_scores, summed, atol=1e-4)
        assert not torch.allclose(before.log_softmax(-1).gather(-1, chosen).sum(dim=(1, 2)), summed, atol=1e-3)
    else:
        assert torch.allclose(torch.stack(ours, dim=1), theirs, atol=CLOSE * float(theirs.abs().max()))


def padded(name: str) -> dict[str, Tensor]:
    return {key: attached(name).example[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("mode", ["greedy", "static", "uncached", "sampled", "beams"])
@pytest.mark.parametrize("case", CASES)
def test_each_scope_means_the_same_columns_in_every_search(case: str, mode: str) -> None:
    check("llama", case, mode, padded("llama"))


KINDS = ("gpt2", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next")
OUT_OF_SIGHT = ("mistral", "column-first")  # every layer of it has lost the first token when it starts to decode


@pytest.mark.parametrize("mode", ["greedy", "static"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in KINDS
        for case in ("z-last", "k-span", "v-decode", "rows-last", "column-first", "column-span")
        if (name, case) != OUT_OF_SIGHT
    ],
)
def test_each_kind_of_attention_in_both_caches(name: str, case: str, mode: str) -> None:
    check(name, case, mode, padded(name))


@pytest.mark.parametrize("case", ["z-decode", "z-last", "v-decode", "rows-last", "rows-prompt"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_queries_at_once_are_not_taken_for_a_prefill(name: str, case: str) -> None:
    """Prompt look-up feeds guessed tokens together with the newest one: steps of two and three queries decode."""
    ids, lengths = padded(name)["input_ids"][:1], []
    model = attached(name).model
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        check(name, case, "lookup", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        handle.remove()
    assert lengths[0] > ids.shape[1] or max(lengths[1:]) > 1, "nothing was guessed: nothing is shown"


# -- batches, caches, loops --------------------------------------------------------------------------------------------


LEFT = {
    "last": hw.edit.scale(LABELS, -1.0, scope="last"),
    "first key": hw.edit.reweight(LABELS, 4.0, keys="first"),
    "from the end": hw.edit.zero(LABELS, queries=[-1, -3]),
    "uniform": hw.edit.uniform(LABELS),
    "keys": hw.edit.add(GROUP_LABEL, 0.5, "v", scope="prompt"),
}


@pytest.mark.parametrize("edit", LEFT)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "gpt_oss"])
def test_a_padded_row_is_edited_as_it_would_be_alone(name: str, edit: str) -> None:
    model, inputs = attached(name), padded(name)
    row, pads = {key: value[1:] for key, value in inputs.items()}, int((1 - inputs["attention_mask"][1]).sum())
    assert pads > 0
    with model.editing(LEFT[edit]):
        together = generated(model, inputs)
        alone = generated(model, {key: value[:, pads:] for key, value in row.items()})
    unedited = generated(model, row)
    assert torch.equal(together.sequences[1, pads:], alone.sequences[0])
    assert torch.allclose(torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0], atol=1e-4)
    assert (together.logits[0][1] - unedited.logits[0][0]).abs().max() > EFFECT


@pytest.mark.parametrize("variable", ["k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_the_cache_stays_clean(name: str, variable: str) -> None:
    """Of the last layer, whose edits reach no other cache: a prompt filled in under an edit decodes as never edited."""
    model, inputs = attached(name), padded(name)
    caches = {}
    with torch.no_grad():
        caches["never"] = model(**inputs, use_cache=True)
        with model.editing(hw.edit.scale("L2G1", -3.0, variable)):
            caches["edited"] = model(**inputs, use_cache=True)
        assert (caches["edited"].logits - caches["never"].logits).abs().max() > EFFECT
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        after = {
            key: model(torch.tensor([[70], [71]]), attention_mask=mask, past_key_values=out.past_key_values).logits
            for key, out in caches.items()
        }
    assert torch.equal(after["never"], after["edited"])


@pytest.mark.parametrize("case", ["z-prompt", "z-decode", "z-last", "k-prompt", "v-decode", "rows-last", "column-span"])
@pytest.mark.parametrize("pieces", [(32,), (20, 12)], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_hand_written_loop_is_edited_as_generate_is(name: str, pieces: tuple[int, ...], case: str) -> None:
    model, inputs = attached(name), padded(name)
    make, plain = CASES[case]
    if "span" in case:
        plain = replace(plain, columns=lambda mask, prompt: named(mask, prompt) & in_prompt(mask, prompt))
    ids, mask, cache, steps = inputs["input_ids"], inputs["attention_mask"], None, []
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"prompt_length": 32} if len(pieces) > 1 else {}
    with torch.no_grad(), model.editing(make(), spans=IN_PROMPT, **given):
        done = 0
        for piece in pieces:
            part = slice(done, done := done + piece)
            out = model(
                ids[:, part], attention_mask=mask[:, :done], position_ids=places[:, part], past_key_values=cache
            )
            cache = out.past_key_values
        for _ in range(NEW):
            steps.append(out.logits[:, -1])
            token = steps[-1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], dim=1), torch.nn.functional.pad(mask, (0, 1), value=1)
            place = mask.sum(-1, keepdim=True) - 1
            out = model(token, attention_mask=mask, position_ids=place, past_key_values=cache)
    theirs = plain_logits(name, ids, inputs["attention_mask"], plain)
    assert torch.allclose(torch.stack(steps, dim=1), theirs, atol=CLOSE * float(theirs.abs().max()))
    assert (theirs - plain_logits(name, ids, inputs["attention_mask"], None)).abs().max() > EFFECT


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_the_first_token_is_the_first_attended_one_whatever_mask_the_model_is_given(name: str, cache: str) -> None:
    """A static cache comes with a mask of `[batch, 1, query, key]`, whose last query sees a window of the keys only."""
    chosen: list[list[int]] = []

    def look(z: Tensor, here: Any) -> Tensor:
        chosen.append(here.chosen.int().argmax(dim=1).tolist())
        return z

    with attached(name).editing(hw.edit.set("L0H0", look, queries="first")):
        generated(attached(name), padded(name), **({} if cache == "dynamic" else MODES["static"]))
    assert chosen == [[0, 12]]


@pytest.mark.parametrize("scope", ["last", "decode", "prompt", "all"])
def test_an_answer_given_whole_is_edited_as_one_that_is_generated(scope: str) -> None:
    """With `prompt_length`, one forward over prompt and answer gives the logits of the steps that generate it."""
    model = attached("llama")
    ids = model.example["input_ids"]
    edit = hw.edit.scale(LABELS, 30.0, scope=scope)
    with model.editing(edit):
        out = generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    steps = torch.stack(out.logits, dim=1)
    with torch.no_grad(), model.editing(edit, prompt_length=ids.shape[1]):
        whole = model(out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert (whole - steps).abs().max() < CLOSE * max(1.0, float(steps.abs().max()))
    with torch.no_grad():
        clean = model(out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert (whole - clean)[:, 2:].abs().max() > EFFECT
