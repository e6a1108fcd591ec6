"""Running a replication: what is measured, when it holds, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import Method
from headwise.probes import encode, probe
from headwise.replications import Expectation, Replication, Shape, replicate


def test_found_beside_expected(tiny: Replication, llama: hw.AttachedModel) -> None:
    outcome = replicate(tiny, llama)
    assert [each.value for each in outcome.found] == [46.0, 12.0]
    assert outcome.passed
    assert (outcome.model, outcome.items, outcome.max_tokens, outcome.seed) == ("zoo:tiny-llama", 12, 100, 0)


def test_the_items_are_those_of_the_probe_in_its_order(tiny: Replication, llama: hw.AttachedModel) -> None:
    seen: list[tuple[int, int]] = []
    outcome = replicate(
        replace(tiny, fewest=1), llama, items=6, seed=3, began=lambda index, of: seen.append((index, of))
    )
    assert outcome.scores.item_ids == encode(probe("ioi"), llama.tokenizer, n=6, seed=3).ids
    assert seen == [(index, 6) for index in range(6)]


def test_items_that_the_model_does_not_answer_do_not_count(tiny: Replication, llama: hw.AttachedModel) -> None:
    outcome = replicate(tiny, llama, items=24)
    # The scripted method refuses them by the last two digits of the id.
    lost = [int(id[-2:], 16) % 3 == 0 for id in outcome.scores.item_ids]
    assert 0 < sum(lost) < 24
    assert outcome.answered == 24 - sum(lost)
    assert np.isnan(outcome.scores.values["main"]).all(axis=(1, 2)).tolist() == lost
    assert outcome.found[0].value == 46.0


def test_a_number_outside_its_range_fails_the_whole(tiny: Replication, llama: hw.AttachedModel) -> None:
    outcome = replicate(replace(tiny, settings={"factor": 1.0}), llama)
    assert [(each.value, each.passed) for each in outcome.found] == [(23.0, False), (12.0, True)]
    assert not outcome.passed


def test_what_cannot_be_measured_fails_and_is_null(tiny: Replication, llama: hw.AttachedModel) -> None:
    lost = Expectation(quantity="lost", published=1, low=0, high=2, measure=lambda scores: math.nan)
    outcome = replicate(replace(tiny, expectations=(lost,)), llama)
    assert not outcome.passed
    (row,) = outcome.to_json()["expectations"]  # type: ignore[misc]
    assert (row["found"], row["passed"]) == (None, False)  # type: ignore[index]


@pytest.mark.parametrize("shape", [Shape(4, 4, 2), Shape(3, 8, 2), Shape(3, 4, 4)])
def test_a_model_of_another_shape_is_refused(tiny: Replication, llama: hw.AttachedModel, shape: Shape) -> None:
    with pytest.raises(Refusal, match=r"3 layers of 4 heads \(2 key/value heads\); name a copy of that model"):
        replicate(replace(tiny, shape=shape), llama)


def test_too_few_answers_are_refused_with_the_reason(tiny: Replication, llama: hw.AttachedModel) -> None:
    def mute(model: Any, items: Any, *, factor: float = 1.0) -> Any:
        raise Refusal("it says nothing")

    mute_method = Method(
        **{name: getattr(tiny.method, name) for name in ("title", "page", "paper", "year", "tier", "status", "cost")},
        id="mute",
        needs=(),
        probe="ioi",
        score=mute,
    )
    with pytest.raises(Refusal, match=r"a score on 0 of 12 items and 4 are needed .* it says nothing"):
        replicate(replace(tiny, method=mute_method), llama)
    with pytest.raises(Refusal, match="of 24 items and 24 are needed"):
        replicate(replace(tiny, fewest=24), llama, items=24)


def test_bad_numbers_are_one_line(tiny: Replication, llama: hw.AttachedModel) -> None:
    with pytest.raises(InputError, match="--items 3 is too few"):
        replicate(tiny, llama, items=3)
    with pytest.raises(InputError, match="is more than the 512 that zoo:tiny-llama takes"):
        replicate(tiny, llama, max_tokens=100_000)
    with pytest.raises(InputError, match="at least 1"):
        replicate(tiny, llama, max_tokens=0)
    with pytest.raises(InputError, match="no replication 'tiny'"):
        replicate("tiny", llama)
