"""The retrieval heads of three models: the items, the measures, the figures, and one run on planted heads."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import headwise as hw
from headwise.errors import Refusal
from headwise.find import find
from headwise.find.retrieval import METHODS
from headwise.heads import SiteId
from headwise.probes import encode, probe
from headwise.replications import REPLICATIONS, Expectation, Shape, replicate, retrieval
from headwise.scores import HeadScores, Provenance

SCORES = HeadScores(
    {"main": np.array([[[0.9, 0.1], [0.05, 0.5]], [[0.7, 0.1], [0.05, 0.3]]])},
    {"main": (SiteId(stack="main", layer=0), SiteId(stack="main", layer=1))},
    ("a", "b"),
    Provenance("retrieval"),
)
"""Means: L0H0 0.8, L1H1 0.4, L0H1 0.1, L1H0 0.05."""


def test_the_measures() -> None:
    assert retrieval.share_above(0.1)(SCORES) == 0.75
    assert retrieval.share_above(0.41)(SCORES) == 0.25
    assert retrieval.score_of("L1H1")(SCORES) == pytest.approx(0.4)
    assert math.isnan(retrieval.score_of("L7H0")(SCORES))
    assert retrieval.among_the_first(("L0H0", "L1H0"), 1)(SCORES) == 1
    assert retrieval.among_the_first(("L0H0", "L1H0"), 3)(SCORES) == 1
    assert retrieval.among_the_first(("L0H0", "L1H0"), 4)(SCORES) == 2


@pytest.mark.parametrize(
    ("id", "above", "heads", "first", "score"),
    [
        ("retrieval-llama-2-7b-80k", 33, 1024, "L16H19", 0.94),
        ("retrieval-mistral-7b-v0.2", 43, 1024, "L18H0", 0.94),
        ("retrieval-qwen1.5-14b", 61, 1600, "L12H2", 1.0),
    ],
)
def test_the_figures_are_the_published_ones(id: str, above: int, heads: int, first: str, score: float) -> None:
    (found,) = [each for each in REPLICATIONS if each.id == id]
    share, strongest, *_ = found.expectations
    assert share.published == pytest.approx(above / heads, abs=1e-4)
    assert found.shape.layers * found.shape.heads == heads
    assert (strongest.quantity, strongest.published) == (f"score of {first}", score)
    assert found.status == "not yet run"
    assert found.settings == {"counting": "steps"}


def test_the_grid_of_the_paper_and_thinned() -> None:
    tokenizer = hw.load("zoo:tiny-llama").tokenizer
    whole = retrieval.needle_sentences(tokenizer, 600, 50_000).grid
    assert [len(whole[name]) for name in ("needle", "words", "depth")] == [3, 20, 10]
    assert (whole["depth"][0], whole["depth"][-1]) == (0.0, 1.0)
    thin = retrieval.needle_sentences(tokenizer, 60, 5_000).grid
    cells = [len(thin[name]) for name in ("needle", "words", "depth")]
    assert cells[0] == 3
    assert 30 < math.prod(cells) <= 60


def test_the_longest_prompt_is_about_as_long_as_asked_for() -> None:
    tokenizer = hw.load("zoo:tiny-llama").tokenizer
    asked = retrieval.needle_sentences(tokenizer, 60, 2_000)
    longest = max(asked.grid["words"])
    (item,) = islice(asked.over(words=[longest], depth=[0.5], needle=[0]).items(), 1)
    tokens = len(tokenizer(item.prompt)["input_ids"])
    assert 0.85 * 2_000 < tokens < 1.2 * 2_000


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_an_item_holds_its_needle_once_at_its_depth_and_asks_for_it(depth: float) -> None:
    tokenizer = hw.load("zoo:tiny-llama").tokenizer
    asked = retrieval.needle_sentences(tokenizer, 60, 1_000).over(depth=[depth])
    for item in islice(asked.items(), 9):
        text = item.prompt
        (place,) = item.spans["needle"]
        begins, phrase, question = retrieval.NEEDLES[int(item.attributes["needle"])]
        assert text[place.start : place.stop] == phrase  # type: ignore[union-attr]
        assert text.count(phrase) == 1
        assert f"{begins} {phrase}." in text
        assert text.endswith(f"Question: {question}\nAnswer:")
        assert item.answer == f" {phrase}"
        body = text.index("\nThe text above") - len(phrase) - len(begins)
        assert (place.start - len(begins)) / body == pytest.approx(depth, abs=0.15)  # type: ignore[union-attr]


@pytest.mark.slow
def test_planted_copying_heads_are_found_again_and_a_wrong_figure_is_not() -> None:
    """The whole way with the real method, on a model whose copying heads are known."""
    organism = hw.load("zoo:planted")
    scores = find(METHODS[0], organism, "hash", items=12, span="value", new_tokens=4)
    first = scores.ranked()[0]
    tiny = replace(
        REPLICATIONS[0],
        id="planted",
        shape=Shape(4, 8, 8),
        method=METHODS[0],
        settings={"counting": "steps", "span": "value", "new_tokens": 4},
        probe=lambda tokenizer, items, longest: probe("hash"),
        expectations=(
            Expectation(quantity="best", published=1.0, low=0.9, high=1.0, measure=retrieval.score_of(str(first.head))),
        ),
    )
    outcome = replicate(tiny, organism, items=12, max_tokens=200)
    assert outcome.passed
    assert outcome.found[0].value == pytest.approx(first.score)
    assert outcome.answered == int(np.isfinite(scores.values["main"]).any(axis=(1, 2)).sum())
    (rule,) = tiny.expectations
    shifted = replace(rule, low=0.0, high=0.1, published=0.0)
    assert not replicate(replace(tiny, expectations=(shifted,)), organism, items=12, max_tokens=200).passed


def test_a_model_that_answers_nothing_is_refused(llama: hw.AttachedModel) -> None:
    settings = {"counting": "steps", "new_tokens": 3}
    tiny = replace(REPLICATIONS[0], shape=Shape(3, 4, 2), method=METHODS[0], settings=settings)
    with pytest.raises(Refusal, match="a score on 0 of 12 items"):
        replicate(tiny, llama, items=12, max_tokens=60)


def test_every_needle_can_be_encoded() -> None:
    tokenizer = hw.load("zoo:tiny-llama").tokenizer
    items = encode(retrieval.needle_sentences(tokenizer, 12, 100), tokenizer, n=12)
    assert items.n_dropped == 0
