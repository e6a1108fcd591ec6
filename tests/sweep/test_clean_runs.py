"""Clean runs that are kept: run once, the same numbers, and never those of other items, metrics or weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise.heads import HeadSet
from headwise.metrics import Metric
from headwise.probes import Item, ItemSet, encode, probe
from headwise.probes.batch import pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.outcome import Outcome
from headwise.sweep import KnockOut, clean_runs, measure_sets, measuring, reference_of
from headwise.sweep.clean_runs import remembered
from headwise.sweep.measuring import FORWARD, chunks_of
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
        for asked, expected in zip((items, other, items), (*alone, alone[0]), strict=True):
            assert torch.equal(measure_sets(model, asked, SETS, KnockOut()), expected)
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
    monkeypatch.setattr(measuring, "MOST", 0)  # or larger ones are not even tried
    with remembered():
        measure_sets(model, items, SETS, KnockOut())
        assert not clean_runs._found.get()
    monkeypatch.undo()
    seen = Forwards(model)
    with remembered():
        measure_sets(model, items, SETS, KnockOut())
        size = sum(clean_runs._bytes(run) for _, run in clean_runs._found.get().values())  # type: ignore[union-attr]
        monkeypatch.setattr(clean_runs, "MOST", size * 11 // 10)  # room for these, or the others
        for asked in (other, other, items):
            measure_sets(model, asked, SETS, KnockOut())
        monkeypatch.setattr(clean_runs, "MOST", 0)  # room for none
        measure_sets(model, other, SETS, KnockOut())
    assert sum(seen.rows) == 4 * len(items)


def test_a_metric_that_writes_into_logits_spoils_nothing(model: hw.AttachedModel, items: ItemSet) -> None:
    def halved(outcome: Outcome, clean: Outcome | None) -> torch.Tensor:
        assert outcome.logits is not None
        return outcome.logits.div_(2)[:, 0].amax(-1)

    own = Metric("halved", "half of the largest logit", frozenset({"logits"}), "higher", "", halved)
    alone = measure_sets(model, items, SETS, KnockOut(), own)
    with remembered():
        for _ in range(2):
            assert torch.equal(measure_sets(model, items, SETS, KnockOut(), own), alone)


def test_sweeps_of_many_sets_share_their_clean_runs(model: hw.AttachedModel) -> None:
    mixed = encode(probe("repeat").over(words=(4, 10)), model.tokenizer, n=12)
    others = [HeadSet.parse(f"L{layer}H{head}, L3H0") for layer in (1, 2) for head in range(4)] * 5
    measure_sets(model, mixed, SETS, KnockOut())
    seen = Forwards(model)
    with remembered():
        measure_sets(model, mixed, SETS, KnockOut())
        measure_sets(model, mixed, others, KnockOut())
    assert sum(seen.rows) == len(mixed)


def test_what_resample_draws_does_not_hang_on_other_sets(model: hw.AttachedModel) -> None:
    mixed = encode(probe("repeat").over(words=(4, 10)), model.tokenizer, n=12)
    how = KnockOut("resample", reference=reference_of(model, mixed), seed=1)
    alone = measure_sets(model, mixed, SETS[5:6], how)
    assert torch.equal(measure_sets(model, mixed, SETS, how)[5:6], alone)


def of_lengths(prompt: int, answer: int) -> EncodedItem:
    return EncodedItem(Item(prompt="a", answer=" b"), (0,) * prompt, (0,) * answer, (), (), {}, None)


@given(lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=40))
def test_no_forward_takes_more_than_its_budget(lengths: list[tuple[int, int]]) -> None:
    items = ItemSet("some", tuple(of_lengths(*each) for each in lengths), {}, "", 0)
    for _, part in chunks_of(items, 60, torch.device("cpu"), sets=12):
        assert len(part) == 1 or pad(part, 0, (), answers=True).input_ids.numel() <= 60


@given(
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    budget=st.integers(1, 400),
    sets=st.sampled_from((0, 1, 12)),
)
def test_items_share_forwards_that_they_fit_into_and_cost_no_more_than_as_many_as_fit(
    widths: list[int], budget: int, sets: int
) -> None:
    items = tuple(of_lengths(width, 1) for width in widths)
    found = list(chunks_of(ItemSet("some", items, {}, "", 0), budget, torch.device("cpu"), sets=sets))
    assert sorted(place for places, _ in found for place in places) == list(range(len(widths)))
    assert all(part == tuple(items[place] for place in places) for places, part in found)
    chunks = [[widths[place] for place in places] for places, _ in found]
    assert all(len(chunk) == 1 or len(chunk) * max(chunk) <= budget for chunk in chunks)
    plain: list[list[int]] = [[]]
    for width in sorted(widths):
        if plain[-1] and (len(plain[-1]) + 1) * width > budget:
            plain.append([])
        plain[-1].append(width)
    assert _cost(chunks, budget, sets) <= _cost(plain, budget, sets)


def _cost(chunks: list[list[int]], budget: int, sets: int) -> int:
    tokens = [len(chunk) * max(chunk) for chunk in chunks]
    return sum(FORWARD["cpu"] * (1 + -(-sets // max(1, budget // each))) + each * (1 + sets) for each in tokens)


def test_items_of_one_length_go_together_where_sets_fill_the_forwards() -> None:
    items = tuple(of_lengths(20 + place % 2 * 10, 1) for place in range(20))
    given = ItemSet("some", items, {}, "", 0)
    for device, budget, sets, n in (("cpu", 1024, 0, 1), ("cpu", 1024, 12, 2), ("meta", 8192, 12, 1)):
        assert len(list(chunks_of(given, budget, torch.device(device), sets=sets))) == n
