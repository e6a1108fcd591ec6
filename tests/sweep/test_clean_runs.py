"""Clean runs that are kept: run once, the same numbers, and never those of other items, metrics or weights."""

from __future__ import annotations

import pytest
import torch

import headwise as hw
from headwise.heads import HeadSet
from headwise.probes import ItemSet, encode, probe
from headwise.sweep import KnockOut, clean_runs, measure_sets
from headwise.sweep.clean_runs import remembered
from headwise.zoo.planted import planted

SETS = [HeadSet(), *(HeadSet.parse(f"L{layer}H{head}") for layer in range(1, 4) for head in range(4))]


@pytest.fixture
def model() -> hw.AttachedModel:
    organism = planted("llama-gqa", layers=4, heads=4, circuits=("induction",), seed=0)
    return hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)


@pytest.fixture
def items(model: hw.AttachedModel) -> ItemSet:
    return encode(probe("repeat").over(words=(6,)), model.tokenizer, n=4)


class Forwards:
    """Rows that the first block was given."""

    def __init__(self, model: hw.AttachedModel) -> None:
        self.rows: list[int] = []
        block = model.model.get_submodule("model.layers.0")
        block.mlp.register_forward_pre_hook(lambda module, args: self.rows.append(len(args[0])))


def test_the_same_items_are_run_once_as_they_are(model: hw.AttachedModel, items: ItemSet) -> None:
    alone = measure_sets(model, items, SETS, KnockOut())
    seen = Forwards(model)
    with remembered():
        first = measure_sets(model, items, SETS, KnockOut())
        with remembered():
            again = measure_sets(model, items, SETS[::-1], KnockOut())
    assert seen.rows == [len(items)]
    assert torch.equal(first, alone)
    assert torch.equal(again.flip(0), alone)


def test_what_differs_is_run_anew(model: hw.AttachedModel, items: ItemSet) -> None:
    other = encode(probe("repeat").over(words=(6,)), model.tokenizer, n=4, seed=1)
    alone = [measure_sets(model, each, SETS, KnockOut()) for each in (items, other)]
    kl = measure_sets(model, items, SETS, KnockOut(), "kl-to-clean")
    last = measure_sets(model, items, SETS, KnockOut("zero", "last"))
    with remembered():
        for given, expected in zip((items, other, items), (*alone, alone[0]), strict=True):
            assert torch.equal(measure_sets(model, given, SETS, KnockOut()), expected)
        assert torch.equal(measure_sets(model, items, SETS, KnockOut(), "kl-to-clean"), kl)
        assert torch.equal(measure_sets(model, items, SETS, KnockOut("zero", "last")), last)


def test_nothing_outlives_the_block(model: hw.AttachedModel, items: ItemSet) -> None:
    with remembered():
        before = measure_sets(model, items, SETS, KnockOut())
    with torch.no_grad():
        model.model.lm_head.weight.mul_(2.0)
    with remembered():
        assert torch.allclose(measure_sets(model, items, SETS, KnockOut()), 2 * before)


def test_the_oldest_go_first(model: hw.AttachedModel, items: ItemSet, monkeypatch: pytest.MonkeyPatch) -> None:
    other = encode(probe("repeat").over(words=(6,)), model.tokenizer, n=4, seed=1)
    measure_sets(model, items, SETS, KnockOut())  # what is measured of the model is measured
    seen = Forwards(model)
    with remembered():
        measure_sets(model, items, SETS, KnockOut())
        size = sum(clean_runs._bytes(run) for _, run in clean_runs._found.get().values())  # type: ignore[union-attr]
        monkeypatch.setattr(clean_runs, "MOST", size * 11 // 10)  # room for these, or the others
        for given in (other, other, items):
            measure_sets(model, given, SETS, KnockOut())
        monkeypatch.setattr(clean_runs, "MOST", 0)  # room for none
        measure_sets(model, other, SETS, KnockOut())
    assert sum(seen.rows) == 4 * len(items)


def test_items_are_cut_by_length_where_many_sets_fill_the_forwards(model: hw.AttachedModel) -> None:
    from headwise.sweep.measuring import chunks_of

    given = encode(probe("repeat").over(words=(4, 10)), model.tokenizer, n=12)
    widths = [len(each.prompt) + len(each.answer) for each in given]

    def padded(budget: int, sets: int) -> int:
        chunks = list(chunks_of(given, budget, sets))
        assert sorted(place for places, _ in chunks for place in places) == list(range(12))
        assert all(items == tuple(given.items[place] for place in places) for places, items in chunks)
        assert all(len(places) * max(widths[place] for place in places) <= budget for places, _ in chunks)
        return sum(len(places) * max(widths[place] for place in places) for places, _ in chunks) - sum(widths)

    assert len(list(chunks_of(given, 2000, 0))) == 1
    assert padded(2000, 200) == 0 < padded(2000, 0)
    assert padded(max(widths), 200) == 0  # one at a time
