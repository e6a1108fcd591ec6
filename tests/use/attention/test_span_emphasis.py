"""Span emphasis against its closed form on random patterns, in all its ways, and on a text that says two things."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.outcome import refuse_spans_in_the_decoder
from headwise.use.attention.span_emphasis import SpanEmphasis, context_steering, role_columns

PROMPT = 26
# They overlap, and one goes on into the answer; the second row begins behind 12 columns of padding.
SPANS = {"one": [[14, 15, 16], [15, 16]], "two": [[16, 17, 30], [4, 16, 21]]}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


def rows_of(model: AttachedModel, intervention: SpanEmphasis | None) -> Tensor:
    """Rows of layer 0 of a text whose prompt ends at column 26."""
    with torch.no_grad(), model.reading(hw.read.rows("L0")) as got:
        if intervention is None:
            model(**model.example)
        else:
            with intervention(model, spans=SPANS, prompt_length=PROMPT):
                model(**model.example)
    return got.rows["L0"]


def times(clean: Tensor, factors: list[dict[int, float]]) -> Tensor:
    """Each row of the batch with its columns multiplied and its rows brought back to a sum of 1."""
    columns = torch.ones(clean.shape[0], clean.shape[-1])
    for row, by_column in enumerate(factors):
        for column, factor in by_column.items():
            columns[row, column] = factor
    scaled = clean * columns[:, None, None]
    return scaled / scaled.sum(-1, keepdim=True).clamp(min=1e-30)


def columns(row: int, *names: str) -> set[int]:
    return {column for name in names for column in SPANS[name][row] if column < PROMPT}


def outside(row: int, *names: str) -> set[int]:
    return set(range(PROMPT)) - columns(row, *names)


ROWS = (0, 1)
CASES: dict[str, tuple[dict[str, Any], list[dict[int, float]]]] = {
    "exclude": (
        {"spans": "one", "alpha": 0.01},
        [dict.fromkeys(outside(row, "one"), 0.01) for row in ROWS],
    ),
    "exclude, union": (
        {"spans": ("one", "two"), "alpha": 0.1},
        [dict.fromkeys(outside(row, "one", "two"), 0.1) for row in ROWS],
    ),
    "exclude, compounding": (
        {"spans": ("one", "two"), "alpha": 0.1, "several": "compounding"},
        [{c: 0.1 ** ((c in outside(row, "one")) + (c in outside(row, "two"))) for c in range(PROMPT)} for row in ROWS],
    ),
    "include": (
        {"spans": "one", "alpha": 20.0, "mode": "include"},
        [dict.fromkeys(columns(row, "one"), 20.0) for row in ROWS],
    ),
    "include, union": (
        {"spans": ("one", "two"), "alpha": 20.0, "mode": "include"},
        [dict.fromkeys(columns(row, "one", "two"), 20.0) for row in ROWS],
    ),
    "include, compounding": (
        {"spans": ("one", "two"), "alpha": 20.0, "mode": "include", "several": "compounding"},
        [
            {c: 20.0 ** ((c in columns(row, "one")) + (c in columns(row, "two")) - 1) for c in range(PROMPT)}
            for row in ROWS
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_closed_form(model: AttachedModel, case: str) -> None:
    settings, factors = CASES[case]
    clean, edited = rows_of(model, None), rows_of(model, SpanEmphasis("L0H0, L0H2", **settings))
    expected = times(clean, factors)
    real = model.example["attention_mask"].bool()
    for head in range(clean.shape[1]):
        wanted = expected if head in (0, 2) else clean
        assert (edited[:, head] - wanted[:, head])[real].abs().max() < 1e-5
    assert (edited[:, 0] - clean[:, 0])[real].abs().max() > 1e-2


def test_over_the_prompt_excluding_is_including_with_the_inverse(model: AttachedModel) -> None:
    excluded = rows_of(model, SpanEmphasis("L0H0", "one", 0.05))
    included = rows_of(model, SpanEmphasis("L0H0", "one", 20.0, mode="include"))
    real = model.example["attention_mask"].bool()
    within = real.clone()
    within[:, PROMPT:] = False
    assert (excluded - included).transpose(1, 2)[within].abs().max() < 1e-5
    assert (excluded - included).transpose(1, 2)[real].abs().max() > 1e-2


def test_context_steering_is_all_heads_and_the_text_of_the_user(model: AttachedModel) -> None:
    steering = context_steering("one")
    assert (steering.heads, steering.spans, steering.alpha) == (None, ("one",), 0.9)
    (made,) = steering.edits(model)
    assert model.heads(made.heads) == model.heads()


CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def test_the_columns_of_a_role_are_its_words() -> None:
    with hw.load("zoo:organism") as model:
        tokenizer = model.tokenizer
    tokenizer.chat_template = CHAT
    messages = [
        {"role": "system", "content": "The capital of Ireland is Vienna."},
        {"role": "user", "content": "The capital of Ireland is Rome."},
        {"role": "assistant", "content": "Rome"},
        {"role": "user", "content": "What is the capital of Ireland?"},
    ]
    spans = role_columns(tokenizer, messages)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    found = tokenizer.decode([ids[column] for column in spans["user"]])
    assert "".join(found.split()) == "ThecapitalofIrelandisRome.WhatisthecapitalofIreland?"
    with pytest.raises(InputError, match="role 'tool'"):
        role_columns(tokenizer, messages, "tool")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(InputError, match="as it is"):
        role_columns(tokenizer, messages)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        role_columns(tokenizer, messages)


def test_of_two_things_said_the_organism_takes_the_one_that_is_stressed() -> None:
    """A text says one capital and then another; stressed in layer 3, where the organism looks things up, each of them
    is said by far more often than the other. In layer 5 the same stress does little."""
    cities = ("Vienna", "Nairobi", "Cairo", "Lima")
    texts = [(country, *pair) for country in ("Ireland", "Italy") for pair in permutations(cities, 2)]
    with hw.load("zoo:organism") as model:
        answers = {layer: torch.tensor([stressed(model, layer, *text) for text in texts]) for layer in ("L3", "L5")}
    # [text, passage stressed, city]: how much more probable than the other city its own is
    moved = {layer: at[:, 0, 0] - at[:, 1, 0] for layer, at in answers.items()}
    assert bool((moved["L3"] > 1).all())
    assert float(moved["L3"].mean()) > 5 * float(moved["L5"].abs().mean())
    own = (answers["L3"].diagonal(dim1=1, dim2=2) > 0).double().mean(dim=0)
    assert float(own.min()) >= 0.8


def stressed(model: AttachedModel, layer: str, country: str, *cities: str) -> list[list[float]]:
    """For each of two passages stressed, the logit of each city less that of the other one."""
    said = [f"The capital of {country} is {city}." for city in cities]
    text = f"Trust the text.\nText: {said[0]} {said[1]}\nQuestion: What is the capital of {country}?\nAnswer:"
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids = [model.tokenizer(f" {city}", add_special_tokens=False)["input_ids"][0] for city in cities]
    found = []
    for passage in said:
        low = text.index(passage)
        span = [
            column
            for column, (start, stop) in enumerate(encoded["offset_mapping"])
            if max(start, low) < min(stop, low + len(passage))
        ]
        with torch.no_grad(), SpanEmphasis(model.heads(layer), "said", 0.01)(model, spans={"said": span}):
            first, second = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, -1, ids].tolist()
        found.append([first - second, second - first])
    return found


def test_places_of_an_encoders_prompt_are_refused_in_the_decoder() -> None:
    organism = zoo.build("tiny-t5")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        refuse_spans_in_the_decoder(model, SpanEmphasis(model.heads("encoder"), "rule").edits(model))
        with pytest.raises(Refusal, match="place of the encoder"):
            refuse_spans_in_the_decoder(model, SpanEmphasis(model.heads("L0"), "rule").edits(model))


@pytest.mark.parametrize("name", ["t5", "llava"])
def test_all_heads_of_a_model_of_several_texts_are_refused(name: str) -> None:
    with hw.load(f"zoo:tiny-{name}") as several:
        with pytest.raises(Refusal, match="columns of one text"), context_steering("user")(several, spans=SPANS):
            pytest.fail("the block was entered")
        stack = several.table.stacks[-1]
        assert context_steering("user").but(heads=several.heads(stack)).edits(several)
