"""Distances, WAAD and FAI: closed forms on scripted patterns, plain sums over patterns, the split, planted heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.local_global import METHODS, fai, local_global, split, waad
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted

PROMPTS = ([1, *range(10, 30)], [1, *range(10, 25)])
ANSWERS = (tuple(range(30, 43)), tuple(range(30, 37)))


def look_back(head: int, t: int) -> dict[int, float]:
    """Head k looks k tokens back."""
    return {max(t - head, 0): 1.0}


def test_a_shift_has_its_length_as_distance_and_waad_up_to_the_window(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    items = made(*PROMPTS, answers=ANSWERS)
    with scripted(tiny, look_back):
        distance = by_head(local_global(tiny, items))
        reach = by_head(local_global(tiny, items, score="waad", window=4))
    shifts = torch.arange(12).double().expand(2, -1)
    torch.testing.assert_close(distance, shifts, atol=1e-4, rtol=0)
    torch.testing.assert_close(reach, shifts.clamp(max=4), atol=1e-4, rtol=0)


def test_the_rows_of_the_prompt_can_be_asked_for(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    with scripted(tiny, look_back):
        found = by_head(local_global(tiny, made(*PROMPTS), rows="prompt"))
    for row, ids in enumerate(PROMPTS):
        expected = [sum(min(head, t) for t in range(len(ids))) / len(ids) for head in range(12)]
        torch.testing.assert_close(found[row], torch.tensor(expected).double(), atol=1e-4, rtol=0)


def test_without_the_first_column_a_sink_has_no_distance(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    """Half on the first token, half two back."""
    items = made(*PROMPTS, answers=ANSWERS)
    with scripted(tiny, lambda head, t: {0: 0.5, t - 2: 0.5} if t > 2 else {0: 1.0}):
        whole = by_head(local_global(tiny, items))
        without = by_head(local_global(tiny, items, score="distance-without-first"))
    for row, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        rows = range(len(ids), len(ids) + len(answer) - 1)
        expected = 1 + sum(t / 2 for t in rows) / len(rows)
        torch.testing.assert_close(whole[row], torch.full((12,), expected).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(without, torch.ones_like(without), atol=1e-4, rtol=0)


def test_waad_by_token_is_the_mean_over_heads(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    """Heads 1, 6 and 11, of three layers: cut at W = 10, reaches of 1, 6 and 10."""
    near = HeadSet.parse("L0H1, L1H2, L2H3")
    with scripted(tiny, look_back):
        found = waad(tiny, made(*PROMPTS, answers=ANSWERS), near)
    assert [len(each) for each in found] == [len(answer) - 1 for answer in ANSWERS]
    for each in found:
        torch.testing.assert_close(each, torch.full_like(each, 17 / 3), atol=1e-4, rtol=0)


def test_fai_peaks_at_the_one_token_that_everything_looks_at(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    """Two of the heads look at token 7 with 0.6 and 0.2, and elsewhere at the first one."""
    mass = {0: 0.6, 5: 0.2}
    with scripted(tiny, lambda head, t: {7: mass.get(head, 0.0), 0: 1 - mass.get(head, 0.0)} if t >= 7 else {0: 1.0}):
        found = fai(tiny, made(*PROMPTS, answers=ANSWERS), HeadSet.parse("L0H0, L1H1"), low=10, high=50)
    for each, ids, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        rows = range(len(ids), len(ids) + len(answer) - 1)
        assert len(each) == len(ids) + len(answer) - 1
        expected = torch.zeros(len(each)).double()
        expected[0], expected[7] = 0.6, 0.4
        reached = torch.tensor([any(s + 10 <= t <= s + 50 for t in rows) for s in range(len(each))])
        torch.testing.assert_close(each, expected.masked_fill(~reached, torch.nan), atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("low", "high"), [(10, 50), (3, 5), (0, 0)])
def test_fai_of_a_head_and_of_its_tokens_are_sums_over_the_pattern(
    tiny: AttachedModel, made: Any, pattern: Any, by_head: Any, low: int, high: int
) -> None:
    items = made(*PROMPTS, answers=ANSWERS)
    found = by_head(local_global(tiny, items, score="fai", low=low, high=high))
    tokens = fai(tiny, items, HeadSet.parse("L0H2, L2H1"), low=low, high=high)
    for row, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        weights = pattern(tiny, [*ids, *answer[:-1]])
        n = weights.shape[-1]
        inside = [[t for t in range(len(ids), n) if s + low <= t <= s + high] for s in range(n)]
        means = [
            weights[:, rows, s].mean(-1) if rows else torch.full((12,), torch.nan) for s, rows in enumerate(inside)
        ]
        columns = torch.stack(means, dim=1)
        torch.testing.assert_close(found[row], columns.nanmean(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens[row], columns[[2, 9]].mean(0), atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("score", ["distance", "distance-without-first", "waad"])
def test_distances_are_sums_over_the_pattern(
    tiny: AttachedModel, made: Any, pattern: Any, by_head: Any, score: Any
) -> None:
    found = by_head(local_global(tiny, made(*PROMPTS, answers=ANSWERS), score=score, window=3))
    for row, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        weights = pattern(tiny, [*ids, *answer[:-1]])
        places = torch.arange(weights.shape[-1]).double()
        distance = places[:, None] - places
        if score == "waad":
            distance = distance.clamp(max=3)
        if score == "distance-without-first":
            distance[:, 0] = 0
        expected = (weights * distance).sum(-1)[:, len(ids) :].mean(-1)
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)


def test_the_split_takes_the_lowest_and_the_highest_share(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    with scripted(tiny, look_back):
        scores = find(METHODS[0], tiny, made(*PROMPTS, answers=ANSWERS))
    heads = split(scores)  # the quantiles of 0 to 11 are 3.3 and 7.7
    assert heads.near == HeadSet.parse("L0H0, L0H1, L0H2, L0H3")
    assert heads.far == HeadSet.parse("L2H0, L2H1, L2H2, L2H3")
    assert split(scores, share=0.1).far == HeadSet.parse("L2H2, L2H3")
    with pytest.raises(InputError, match=r"share=0\.6"):
        split(scores, share=0.6)


def test_planted_heads_fall_on_their_sides(organism: Planted, attached: AttachedModel) -> None:
    heads = split(find(METHODS[0], attached, items=4))
    assert set(organism.truth.heads("previous-token")) <= set(heads.near)
    assert set(organism.truth.heads("fixed-offset")) <= set(heads.near)
    assert set(organism.truth.heads("sink")) <= set(heads.far)


def test_an_answer_of_one_token_has_no_row(tiny: AttachedModel, made: Any, by_head: Any) -> None:
    found = by_head(local_global(tiny, made(*PROMPTS, answers=[(30,), (30, 31)])))
    assert found[0].isnan().all()
    assert not found[1].isnan().any()
    with pytest.raises(Refusal, match="no answer of made has rows of its own"):
        local_global(tiny, made(*PROMPTS, answers=[(30,), (30,)]))


def test_encoders_have_rows_of_the_prompt_only(minilm: AttachedModel, made: Any, pattern: Any, by_head: Any) -> None:
    ids = [101, 7592, 2088, 2003, 2204]
    items = made(ids, ids[:3], answers=[(30, 31), (30, 31)], suffix=(102,))
    with pytest.raises(Refusal, match="no rows of an answer; score the rows of the prompt"):
        local_global(minilm, items)
    found = by_head(local_global(minilm, items, rows="prompt"))
    weights = pattern(minilm, [*ids, 102])
    places = torch.arange(6).double()
    back = (places[:, None] - places).clamp(min=0)
    torch.testing.assert_close(found[0], (weights * back).sum(-1)[:, :5].mean(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "near"}, "score='near' is unknown; choose from distance"),
        ({"rows": "all"}, "rows='all' is unknown; choose from answer, prompt"),
        ({"window": 0}, "window=0 must be a whole number of tokens, at least 1"),
        ({"low": 5, "high": 4}, "high=4 must be a whole number of tokens, at least 5"),
    ],
)
def test_settings_are_checked(tiny: AttachedModel, made: Any, settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find(METHODS[0], tiny, made(*PROMPTS, answers=ANSWERS), **settings)


def test_no_heads_have_no_map(tiny: AttachedModel, made: Any) -> None:
    with pytest.raises(InputError, match="mean map of no heads"):
        waad(tiny, made(*PROMPTS, answers=ANSWERS), HeadSet())
