"""Rotary pairs and frequencies, found by running, against what each type is known to have."""

from __future__ import annotations

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import NotFired, Refusal
from headwise.heads import SiteId
from headwise.model.finding.rotary import rotary_of

HALVES = [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


def found(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[list[list[int]], list[float]]]:
    organism = zoo.build(f"tiny-{name}", dtype=dtype)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example, name=name) as model:
        rotary = rotary_of(model)
        assert rotary_of(model) is rotary
        assert rotary.keys() == {site.id for site in model.sites}
        return {site.label: (each.pairs.tolist(), each.frequency.tolist()) for site, each in rotary.items()}


def powers(theta: float, n: int) -> list[float]:
    return [theta ** (-pair / n) for pair in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "pairs", "theta"),
    [
        ("llama", HALVES, 1e4),
        ("qwen3", HALVES, 1e4),  # normalised in front of it
        ("gpt_neox", [[0, 2], [1, 3]], None),  # the first part of a head
        ("phi", [[0, 3], [1, 4], [2, 5]], None),
        ("deepseek_v3", [[12, 14], [13, 15]], 1e4),  # the last part
    ],
)
def test_pairs_and_frequencies_are_those_of_the_type(
    name: str, pairs: list[list[int]], theta: float | None, dtype: torch.dtype
) -> None:
    for found_pairs, frequency in found(name, dtype).values():
        assert found_pairs == pairs
        assert frequency == sorted(frequency, reverse=True)
        if theta is not None:
            assert frequency == pytest.approx(powers(theta, len(pairs)), rel=1e-5)


def test_layers_may_have_tables_of_their_own() -> None:
    """Gemma 3 turns ten times as slowly, at the lowest frequency, where it sees the whole text."""
    slowest = {label: frequency[-1] for label, (_, frequency) in found("gemma3_text").items()}
    assert len(set(slowest.values())) == 2


@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj"])
def test_models_without_a_table_are_refused(name: str) -> None:
    organism = zoo.build(f"tiny-{name}")
    with (
        hw.attach(organism.model, organism.tokenizer, example=organism.example, name=name) as model,
        pytest.raises(Refusal, match="rotary"),
    ):
        rotary_of(model)


def test_a_plan_that_is_open_sees_nothing_of_it() -> None:
    organism = zoo.build("tiny-llama")
    one_row = {key: value[:1] for key, value in organism.example.items()}
    with (
        hw.attach(organism.model, organism.tokenizer, example=organism.example) as model,
        torch.no_grad(),
        model.reading(hw.read.z("L1")) as got,
        model.editing(hw.edit.zero("L1H0")),
    ):
        model(**one_row)
        before = got.z["L1"].clone()
        assert SiteId.parse("L0") in rotary_of(model)
        assert torch.equal(got.z["L1"], before)
        assert not before[:, :, 0].any()
        model(**organism.example)
        assert got.z["L1"].shape[0] == len(organism.example["input_ids"])
        assert not got.z["L1"][:, :, 0].any()


def test_nothing_ran_in_a_block_that_only_looked_for_pairs() -> None:
    organism = zoo.build("tiny-llama")
    with (
        hw.attach(organism.model, organism.tokenizer, example=organism.example) as model,
        pytest.raises(NotFired, match="nothing ran"),
        model.editing(hw.edit.zero("L0H0")),
    ):
        rotary_of(model)
