"""Reads at chosen positions against the same positions of a full read, and what cannot be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model import read

close = torch.testing.assert_close


def attached(name: str) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), organism.example


READS: dict[str, Callable[..., read.Read]] = {
    "q": read.q,
    "k": read.k,
    "v": read.v,
    "z": read.z,
    "write": read.write,
    "rows": read.rows,
    "scores": read.scores,
    "statistics": read.statistics,
    "mlp": read.mlp,
    "residual_post": read.residual,
}
HALF = torch.zeros(2, 32).bool()
HALF[0, [1, 9]] = HALF[1, [14, 15]] = True


@pytest.mark.parametrize(
    ("name", "queries", "columns"),
    [
        ("tiny-llama", [-1], [[31], [31]]),
        ("tiny-bert", [-1], [[31], [19]]),  # padded on the right: each row's own last token
        ("tiny-bert", [-2, 3], [[30, 3], [18, 3]]),
        ("tiny-llama", 5, [[5], [5]]),
        ("tiny-llama", slice(20, 29, 4), [[20, 24, 28], [20, 24, 28]]),
        ("tiny-llama", "last", [[31], [31]]),
        ("tiny-llama", "first", [[0], [12]]),
        ("tiny-llama", "span:verb", [[4, 6], [30, 31]]),
        ("tiny-llama", HALF, [[1, 9], [14, 15]]),
    ],
)
@pytest.mark.parametrize("variable", READS)
def test_queries_choose_positions_of_each_row(name: str, queries: Any, columns: list[list[int]], variable: str) -> None:
    model, example = attached(name)
    make = READS[variable]
    spans = {"verb": [[4, 6], [30, 31]]}
    with torch.no_grad(), model.reading(make("L1"), make("L1", queries=queries, name="some"), spans=spans) as got:
        model(**example)
    everything, some = getattr(got, variable)["L1"], got.some["L1"]
    if variable == "statistics":
        everything, some = everything.entropy, some.entropy
    axis = 1 if variable in ("rows", "scores", "statistics") else 0
    wanted = torch.stack([everything[row].index_select(axis, torch.tensor(at)) for row, at in enumerate(columns)])
    close(some, wanted, atol=2e-6, rtol=1e-5, equal_nan=True)


def test_rows_that_want_different_numbers_of_positions_are_refused() -> None:
    model, example = attached("tiny-llama")
    with pytest.raises(Refusal, match=r"selects \[2, 1\] positions"):  # noqa: SIM117
        with model.reading(read.z("L0", queries="span:verb"), spans={"verb": [[4, 6], [30]]}):
            model(**example)


# -- what cannot be asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: read.z(point="middle"), "point='middle' is neither 'post_gate' nor 'pre_gate'"),
        (lambda: read.q(point="pre_gate"), "read.q has no option 'point'"),
        (lambda: read.rows("L0", wanted=["max"]), "read.rows has no option 'wanted'"),
        (lambda: read.statistics(grad=True), "read.statistics has no option 'grad'"),
        (lambda: read.statistics(wanted=["entrpy"]), "no statistic named 'entrpy'"),
        (lambda: read.final_scale(grad=True), "read.final_scale has no option 'grad'"),
        (lambda: read.gate(reduce=len), "read.gate has no option 'reduce'"),
        (lambda: read.z(name="fired"), "name='fired' cannot be an attribute"),
        (lambda: read.z(name="my z"), "name='my z' cannot be an attribute"),
        (lambda: read.residual(where="mid"), "where='mid' is neither 'pre' nor 'post'"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Callable[[], read.Read], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


def test_what_a_site_cannot_give_is_refused_with_the_reason() -> None:
    model, _ = attached("tiny-jetmoe")
    with pytest.raises(Refusal, match=r"read\.write cannot be served at L0: .*read\.z\(point='pre_gate'\) still works"):  # noqa: SIM117
        with model.reading(read.write("L0")):
            pass
    with pytest.raises(InputError, match=r"wants span 'verb', and spans= does not give it"):  # noqa: SIM117
        with model.reading(read.statistics("L0", spans=["verb"])):
            pass
