"""What holds for every method that looks at patterns: padding, batches, chunks of rows, kinds of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.errors import Refusal
from headwise.find import Method, patterns
from headwise.find.duplicate_token import METHODS as DUPLICATE_TOKEN
from headwise.find.induction import METHODS as INDUCTION
from headwise.find.local_global import METHODS as LOCAL_GLOBAL
from headwise.find.local_global import fai, waad
from headwise.find.offset import METHODS as OFFSET
from headwise.find.patterns import Tokens
from headwise.find.previous_token import METHODS as PREVIOUS_TOKEN
from headwise.find.profile import METHODS as PROFILE
from headwise.find.sink import METHODS as SINK
from headwise.find.uniform import METHODS as UNIFORM
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet

METHODS = (
    *DUPLICATE_TOKEN,
    *INDUCTION,
    *LOCAL_GLOBAL,
    *OFFSET,
    *PREVIOUS_TOKEN,
    *PROFILE,
    *SINK,
    *UNIFORM,
)
CASES = [
    *((method, {}) for method in METHODS if method.id != "local-global"),
    *((LOCAL_GLOBAL[0], {"score": score}) for score in ("distance", "distance-without-first", "waad", "fai")),
    *((PROFILE[0], {"statistic": statistic}) for statistic in ("max", "sink_mass", "mean_distance")),
]
every_method = pytest.mark.parametrize(
    ("method", "settings"), CASES, ids=[" ".join([each.id, *settings.values()]) for each, settings in CASES]
)

PROMPTS = ([1, 20, 21, 22, 20, 21, 22], [1, *range(20, 30), *range(20, 30)], [1, 20, 20], [1, 30, 31, 30, 31, 32])
ANSWERS = ([30, 31, 32], [33, 34], list(range(40, 60)), [30, 30, 31, 33])
REPEATED = ([5, 6], None, None, [3, 4])


def singly(score: Callable[[ItemSet], Any], items: ItemSet) -> list[Any]:
    return [score(replace(items, items=(each,))) for each in items]


@pytest.mark.parametrize("name", ["zoo:tiny-llama", "zoo:tiny-gpt2", "zoo:tiny-gemma2"])
@every_method
def test_a_batch_gives_what_its_items_give_alone(
    made: Any, by_head: Any, method: Method, settings: dict[str, Any], name: str
) -> None:
    """In the batch prompts are padded on the left, alone they are not."""
    items = made(*PROMPTS, answers=ANSWERS, repeated=REPEATED)
    with hw.load(name) as model:
        together = by_head(method.score(model, items, **settings))
        alone = singly(lambda each: by_head(method.score(model, each, **settings)), items)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5, equal_nan=True)
    assert together.isfinite().any()


@every_method
def test_a_batch_gives_what_its_items_give_alone_in_an_encoder(
    minilm: AttachedModel, made: Any, by_head: Any, method: Method, settings: dict[str, Any]
) -> None:
    settings = settings | ({"rows": "prompt"} if method.id == "local-global" else {})
    prompts = [[101, *(1000 + each for each in prompt[1:])] for prompt in PROMPTS]
    items = made(*prompts, repeated=REPEATED, suffix=(102,))
    together = by_head(method.score(minilm, items, **settings))
    alone = singly(lambda each: by_head(method.score(minilm, each, **settings)), items)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5, equal_nan=True)
    assert together.shape == (4, 72)
    assert together.isfinite().any()


@every_method
def test_chunks_of_rows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny: AttachedModel, made: Any, by_head: Any, method: Method, settings: Any
) -> None:
    items = made(*PROMPTS, answers=ANSWERS, repeated=REPEATED)
    whole = by_head(method.score(tiny, items, **settings))
    for budget in (1, 6000):
        monkeypatch.setattr(patterns, "BUDGET", budget)
        found = by_head(method.score(tiny, items, **settings))
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("of_tokens", [waad, partial(fai, low=1, high=4)], ids=["waad", "fai"])
def test_numbers_by_token_hang_on_neither_batch_nor_chunk(
    monkeypatch: pytest.MonkeyPatch, tiny: AttachedModel, made: Any, of_tokens: Any
) -> None:
    items, heads = made(*PROMPTS, answers=ANSWERS), HeadSet.parse("L0H3, L2H0, L2H2")
    together = of_tokens(tiny, items, heads)
    monkeypatch.setattr(patterns, "BUDGET", 1)
    for index, (alone,) in enumerate(singly(lambda each: of_tokens(tiny, each, heads), items)):
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=0, equal_nan=True)


def test_rows_are_never_held_whole(monkeypatch: pytest.MonkeyPatch, tiny: AttachedModel, made: Any) -> None:
    monkeypatch.setattr(patterns, "BUDGET", 2 * 4 * 40 * 4 * 3)
    items = made(range(20, 60), range(20, 60))
    (batch,) = items.batches(answers=False)
    shapes = []

    def keep_shape(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        shapes.append(rows.shape)
        return rows.sum()

    patterns.reduced(tiny, Tokens.of(tiny, batch), keep_shape)
    assert set(shapes) == {(2, 4, 3, 40), (2, 4, 1, 40)}
    assert len(shapes) == 3 * 14


def test_tokens_of_left_padded_prompts(tiny: AttachedModel, made: Any) -> None:
    items = made([1, 20, 21], [1, 20, 21, 20, 20], answers=[(30, 31, 32), (33,)], repeated=[[2], None])
    (batch,) = items.batches()
    tokens = Tokens.of(tiny, batch, answers=True)
    assert tokens.prompt.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0]]
    assert tokens.answer.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
    assert tokens.words.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert tokens.first.tolist() == [2, 0]
    assert tokens.within("repeated").int().tolist() == [[0, 0, 0, 0, 1, 0, 0], [1] * 7]
    assert tokens.previous().tolist() == [[-1] * 7, [-1, -1, -1, 1, 3, -1, -1]]


def test_encoder_decoders_are_refused(made: Any) -> None:
    with hw.load("zoo:tiny-t5") as model, pytest.raises(Refusal, match="main stack is the decoder"):
        METHODS[0].score(model, made([20, 21, 20]))


def test_edits_that_are_open_count(tiny: AttachedModel, made: Any, by_head: Any) -> None:
    """A blocked key takes part in no pattern: what a method reads is what the model used."""
    items = made([1, 20, 21, 20, 21])
    with tiny.editing(hw.edit.block(tiny.heads("L1"), keys=[2])):
        found = by_head(INDUCTION[0].score(tiny, replace(items, items=items.items)))
    plain = by_head(INDUCTION[0].score(tiny, items))
    assert not torch.equal(found[0, 4:8], plain[0, 4:8])
    assert torch.equal(found[0, :4], plain[0, :4])


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.id)
def test_every_method_runs_on_its_own_probe(method: Method) -> None:
    from headwise.find import find

    with hw.load("zoo:planted") as model:
        scores = find(method, model, items=2)
    assert len(scores.heads) == 32
    assert scores.provenance.probe == method.probe
