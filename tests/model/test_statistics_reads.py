"""`read.statistics` in models: chosen pairs, which way calls go, and that nothing about the run changes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model import read
from headwise.model.attention import flash, statistics

LEFT_PADDING = (0, 12)  # of the zoo's decoder example
N = 32
close = torch.testing.assert_close


def attached(name: str, **options: Any) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name, **options)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), organism.example


def chosen_keys(n: int = N, rows: int = 2) -> dict[str, Tensor]:
    """The token before, and two tokens a query, the second one always ahead."""
    columns = torch.arange(n).expand(rows, n)
    two = torch.stack([(columns * 7 + 3) % (columns + 1), columns + 1], dim=-1)
    return {"before": (columns - 1).unsqueeze(-1), "two": two}


def mass_of(pattern: Tensor, keys: Tensor) -> Tensor:
    """`[batch, head, query]` from dense rows."""
    there = (keys >= 0) & (keys < pattern.shape[-1])
    index = keys.where(there, 0)[:, None].expand(-1, pattern.shape[1], -1, -1)
    return (pattern.gather(-1, index) * there[:, None]).sum(-1)


@pytest.mark.parametrize(
    ("name", "by_kernel"),
    [
        ("tiny-llama", True),
        ("tiny-gpt2", True),
        ("tiny-mistral", True),  # a sliding window
        ("tiny-gpt_oss", True),  # learned sinks, and eager
        ("tiny-gemma2", False),  # caps its scores
    ],
)
def test_pairs_are_those_of_the_rows_and_go_the_way_they_can(name: str, by_kernel: bool) -> None:
    model, example = attached(name)
    keys = chosen_keys()
    reads = [read.statistics(None, wanted=["entropy"], pairs=keys), read.rows(None)]
    kernel = mock.patch.object(flash, "_kernel", wraps=flash._kernel)
    with kernel as called, torch.no_grad(), model.reading(*reads) as got:
        model(**example)
    assert bool(called.call_count) == by_kernel
    for site in model.sites:
        label = site.label
        found, pattern = got.statistics[label], got.rows[label]
        for which, columns in keys.items():
            expected = mass_of(pattern, columns)
            for row, padding in enumerate(LEFT_PADDING):
                mass = found.pair_mass[which][row]
                close(mass[:, padding:], expected[row, :, padding:], atol=3e-6, rtol=1e-5, msg=f"{label} {which}")
                assert mass[:, :padding].isnan().all()
        close(found.entropy[0], torch.special.entr(pattern[0]).sum(-1), atol=3e-5, rtol=1e-5)


def test_reading_statistics_changes_no_bit_of_the_run() -> None:
    model, example = attached("tiny-llama")
    with torch.no_grad():
        plain = model(**example).logits
        with model.reading(read.statistics(None, pairs=chosen_keys())):
            assert torch.equal(model(**example).logits, plain)


def test_pairs_follow_the_columns_of_a_generation() -> None:
    """Prefill and single steps read the keys of their own columns, also where the prompt is padded."""
    model, example = attached("tiny-llama")
    keys = chosen_keys(N + 4)
    reads = [read.statistics("L1", wanted=[], pairs=keys), read.rows("L1")]
    with model.reading(*reads) as got:
        model.generate(**example, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    pattern, found = got.rows["L1"], got.statistics["L1"]
    n = pattern.shape[2]
    assert n == N + 3
    for name, columns in keys.items():
        alive = ~found.pair_mass[name].isnan()
        assert alive[0].all()
        close(found.pair_mass[name][alive], mass_of(pattern, columns[:, :n])[alive], atol=3e-6, rtol=1e-5)


def test_edited_scores_are_swept_and_the_pairs_are_those_of_the_edited_rows() -> None:
    model, example = attached("tiny-llama")
    keys, edit = chosen_keys(), hw.edit.bias("L1H2", 1.5, keys=[3, -2])
    reads = [read.statistics("L1", wanted=[], pairs=keys), read.rows("L1")]
    kernel = mock.patch.object(flash, "_kernel", wraps=flash._kernel)
    with kernel as called, torch.no_grad(), model.editing(edit), model.reading(*reads) as got:
        model(**example)
    assert not called.called
    for name, columns in keys.items():
        expected = mass_of(got.rows["L1"], columns)
        close(got.statistics["L1"].pair_mass[name][0], expected[0], atol=3e-6, rtol=1e-5)


def test_under_an_edited_pattern_there_are_the_pairs_of_its_rows_and_nothing_else() -> None:
    model, example = attached("tiny-llama")
    keys, edit = chosen_keys(), hw.edit.scale("L1H2", 0.5, variable="pattern")
    reads = [read.statistics("L1", wanted=[], pairs=keys), read.rows("L1")]
    with torch.no_grad(), model.editing(edit), model.reading(*reads) as got:
        model(**example)
    for name, columns in keys.items():
        mass, expected = got.statistics["L1"].pair_mass[name], mass_of(got.rows["L1"], columns)
        alive = ~mass.isnan()
        assert alive[0].all()
        assert not alive[1, :, : LEFT_PADDING[1]].any()
        close(mass[alive], expected[alive], atol=3e-6, rtol=1e-5)
    with pytest.raises(Refusal, match="but for pairs"), model.editing(edit), model.reading(read.statistics("L1")):
        model(**example)


def test_heads_beside_an_edited_one_still_go_by_the_kernel() -> None:
    model, example = attached("tiny-llama")
    edit = hw.edit.bias("L1H2", 1.5, keys=[3, -2])
    swept = mock.patch.object(statistics, "swept", wraps=statistics.swept)
    with (
        swept as called,
        torch.no_grad(),
        model.editing(edit),
        model.reading(read.statistics("L1H0", wanted=["entropy"])),
    ):
        model(**example)
    assert not called.called


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.zeros(2, N), r"torch.float32 of shape \[2, 32\], expected torch.int64 \[batch, column, slot\]"),
        (torch.zeros(2, N, dtype=torch.long), r"shape \[2, 32\]"),
    ],
)
def test_keys_that_are_none(keys: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read.statistics(pairs={"some": keys})


@pytest.mark.parametrize("shape", [(1, N, 1), (2, N - 1, 1)])
def test_keys_that_do_not_fit_the_run(shape: tuple[int, ...]) -> None:
    model, example = attached("tiny-llama")
    pairs = {"some": torch.zeros(shape, dtype=torch.long)}
    with (
        pytest.raises(
            InputError, match=r"pairs 'some' are for . rows of .. columns, and here are 2 rows up to column 31"
        ),
        model.reading(read.statistics("L0", pairs=pairs)),
    ):
        model(**example)


def test_pairs_are_refused_where_columns_have_no_names() -> None:
    model, example = attached("tiny-llava")
    pairs = {"some": torch.zeros(2, 200, 1, dtype=torch.long)}
    with (
        pytest.raises(Refusal, match="pairs cannot be placed at"),
        model.reading(read.statistics("vision.L0", wanted=["entropy"], pairs=pairs)),
    ):
        model(**example)
