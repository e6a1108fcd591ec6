"""Circuits of two planted tasks that share edges: found, set against each other, and run on each other's items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import comb

import pytest

import headwise as hw
from headwise.circuits.across_tasks import AcrossTasks, across_tasks
from headwise.circuits.circuit import Circuit
from headwise.circuits.tracing import graph_of
from headwise.errors import InputError
from headwise.probes.encoded import EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.zoo.planted import Planted, planted

Exchange = Callable[..., ItemSet]
ARCHITECTURES = ("llama", "llama-gqa")


@cache
def induction(architecture: str) -> tuple[Planted, hw.AttachedModel]:
    organism = planted(architecture, layers=2, heads=4, circuits=("induction",), seed=0)  # type: ignore[arg-type]
    return organism, hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)


FOUND: dict[str, AcrossTasks] = {}


def found_in(architecture: str, exchange: Exchange) -> AcrossTasks:
    """Values exchanged and keys exchanged, tested on items that circuits were not made of."""
    if architecture not in FOUND:
        organism, model = induction(architecture)
        tasks, test = ({f"{way}": exchange(organism, way, seed) for way in (0, 1)} for seed in (0, 1))
        FOUND[architecture] = across_tasks(model, tasks, test)
    return FOUND[architecture]


def planted_edges(architecture: str) -> dict[str, set[str]]:
    organism, model = induction(architecture)
    copying = [organism.truth.named(f"induction-{each}").label for each in "ab"]
    first = organism.truth.named("previous-token").label
    group = {head: hw.HeadSet.parse(head).to_groups(model.table.group_sizes).labels[0] for head in (first, *copying)}
    last = {f"{head} -> logits" for head in copying}
    return {
        "0": last | {f"input -> {group[head]}.v" for head in copying},
        "1": last | {f"input -> {group[first]}.v"} | {f"{first} -> {group[head]}.k" for head in copying},
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_circuits_are_the_planted_ones(architecture: str, exchange: Exchange) -> None:
    found = found_in(architecture, exchange)
    for task, edges in planted_edges(architecture).items():
        assert {edge.label for edge in found.smallest[task].circuit} == edges
        assert found.smallest[task].faithfulness.value > 0.95


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_they_share_is_counted_and_its_p_is_the_closed_form(architecture: str, exchange: Exchange) -> None:
    found = found_in(architecture, exchange)
    total = graph_of(induction(architecture)[1]).n_edges
    edges = planted_edges(architecture)
    a, b, both = len(edges["0"]), len(edges["1"]), len(edges["0"] & edges["1"])
    assert both == 2
    table = found.to_pandas().set_index(["task", "circuit"])
    row = table.loc["0", "1"]
    assert row.edge_iou == pytest.approx(both / (a + b - both))
    assert row.edge_recall == pytest.approx(both / a)
    assert table.loc["1", "0"].edge_recall == pytest.approx(both / b)
    ways = sum(comb(a, x) * comb(total - a, b - x) for x in range(both, min(a, b) + 1)) / comb(total, b)
    assert row.edge_p == pytest.approx(ways)
    # The nodes of the one are those of the other but for the previous-token head.
    assert (row.node_iou, row.node_recall, table.loc["1", "0"].node_recall) == (3 / 4, 1, 3 / 4)
    assert (row.n_edges, row.n_nodes) == (b, 4)
    assert table.loc["0", "0"].edge_iou == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_circuit_does_its_own_task_and_nothing_of_the_other(architecture: str, exchange: Exchange) -> None:
    found = found_in(architecture, exchange)
    table = found.matrix("faithfulness")
    assert list(table.index) == list(table.columns) == ["0", "1"]
    for task in found.tasks:
        for circuit in found.tasks:
            assert table.loc[task, circuit] == pytest.approx(float(task == circuit), abs=0.05)
    relative = found.matrix("relative_faithfulness")
    assert [relative.loc[task, task] for task in found.tasks] == [1, 1]
    assert relative.loc["0", "1"] == pytest.approx(table.loc["0", "1"] / table.loc["0", "0"])
    # Measured on the items that test them, and not on those they were made of.
    ids = found.faithfulness["0", "1"].item_ids
    assert ids == ("0-1-0", "0-1-1", "0-1-2")
    organism, model = induction(architecture)
    clean, corrupted = (float(hw.measure(model, each).mean()) for each in both_runs(exchange(organism, 0, 1)))
    assert found.to_pandas().set_index(["task", "circuit"]).loc["0", "1"].margin == pytest.approx(clean - corrupted)


def both_runs(items: ItemSet) -> tuple[ItemSet, ItemSet]:
    return items, replace(items, items=tuple(replace(each, prompt=each.twin.prompt) for each in items))  # type: ignore[union-attr]


def test_the_full_graph_does_all_of_every_task_and_the_empty_one_nothing(exchange: Exchange) -> None:
    from headwise.circuits.criteria import cross_task

    organism, model = induction("llama")
    graph = graph_of(model)
    runs = cross_task(model, {"full": Circuit.full(graph), "empty": Circuit.empty(graph)}, {"0": exchange(organism, 0)})
    assert runs["0", "full"].value == pytest.approx(1, abs=1e-9)
    assert runs["0", "empty"].value == 0


def test_items_with_a_small_margin_do_not_count(exchange: Exchange) -> None:
    organism, model = induction("llama")
    tasks = {f"{way}": exchange(organism, way) for way in (0, 1)}
    # A twin that differs in a word that no circuit reads: clean and corrupted run are nearly the same.
    odd = tasks["0"].items[0]
    other = next(word for word in organism.lexicon.content if word not in odd.prompt)
    near = replace(odd, twin=EncodedTwin((odd.prompt[0], other, *odd.prompt[2:]), (), {}))
    tasks["0"] = replace(tasks["0"], items=(near, *tasks["0"].items[1:]))
    found = across_tasks(model, tasks, margin=3.0, steps=2)
    assert {pair: len(run.item_ids) for pair, run in found.faithfulness.items()} == {
        ("0", "0"): 2,
        ("0", "1"): 2,
        ("1", "0"): 3,
        ("1", "1"): 3,
    }
    assert len(found.smallest["0"].faithfulness.item_ids) == 2
    assert "2 tasks" in repr(found)


def test_what_cannot_be_set_against_each_other_is_said(exchange: Exchange) -> None:
    organism, model = induction("llama")
    items = exchange(organism, 0)
    with pytest.raises(InputError, match="two or more"):
        across_tasks(model, {"one": items})
    with pytest.raises(InputError, match="the same tasks"):
        across_tasks(model, {"one": items, "two": items}, {"one": items})
    with pytest.raises(InputError, match="no quantity"):
        found_in("llama", exchange).matrix("edges")  # type: ignore[arg-type]
