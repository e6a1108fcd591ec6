"""Any edit in the place of a knock-out: the same numbers as one by one, from runs that begin where it acts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

import headwise as hw
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.sweep.edited import Edited
from headwise.sweep.measuring import measure_sets

EDITS = {
    "score": lambda heads, rows: hw.edit.bias(heads, math.log(50), keys="first", rows=rows),
    "received": lambda heads, rows: hw.edit.redistribute(heads, 0.9, keys=hw.edit.received(0.05), rows=rows),
    "z": lambda heads, rows: hw.edit.scale(heads, 3.0, rows=rows),
    "k": lambda heads, rows: hw.edit.scale(heads.to_groups(dict.fromkeys(heads.sites, 2)), 0.2, "k", rows=rows),
}


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.load("zoo:organism") as attached:
        yield attached


@pytest.mark.parametrize("name", EDITS)
def test_many_sets_at_once_are_sets_one_by_one(model: AttachedModel, name: str) -> None:
    items = hw.encode(hw.probe("conflict"), model.tokenizer, n=6)
    sets = [HeadSet.parse(each) for each in ("L3H0", "L3H4, L3H5", "L5H1", "L0H2, L4H4")] + [HeadSet()]
    many = measure_sets(model, items, sets, Edited(EDITS[name]), "logit-difference")
    for values, heads in zip(many, sets, strict=True):
        edits: Sequence[Edit] = [EDITS[name](heads, None)] if heads else ()
        assert torch.allclose(values, hw.measure(model, items, edits=edits).double(), atol=1e-3)
    assert float((many - many[-1]).abs().max()) > 1e-2


def test_a_scope_is_that_of_the_edit_and_known_beforehand(model: AttachedModel) -> None:
    items = hw.encode(hw.probe("conflict"), model.tokenizer, n=3)
    heads = HeadSet.parse("L3H0, L3H3")

    def made(heads: HeadSet, rows: Sequence[int] | None) -> Edit:
        return hw.edit.bias(heads, 5.0, keys="first", rows=rows, scope="last")

    (values,) = measure_sets(model, items, [heads], Edited(made, scope="last"), "logit-difference")
    assert torch.allclose(values, hw.measure(model, items, edits=[made(heads, None)]).double(), atol=1e-3)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(InputError, match="takes a function"):
        Edited("zero")  # type: ignore[arg-type]
