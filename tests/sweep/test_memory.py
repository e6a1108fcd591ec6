"""When memory runs out: the same numbers, in smaller forwards; and an end where one item does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.circuits.attribution import attribute_edges
from headwise.circuits.circuit import Circuit
from headwise.circuits.faithfulness import run_circuits
from headwise.circuits.patching import patch_map
from headwise.circuits.paths import path_patch
from headwise.circuits.tracing import graph_of
from headwise.errors import Refusal
from headwise.probes.encoding import ItemSet
from headwise.sweep.memory import halving

ROOM = 140  # tokens; an item of these has some 17


@pytest.fixture(scope="module")
def model() -> hw.AttachedModel:
    return hw.load("zoo:planted")


@pytest.fixture(scope="module")
def items(model: hw.AttachedModel) -> ItemSet:
    return hw.encode(hw.probe("ioi"), model.tokenizer, n=12)


class Memory:
    """Lets the model fail as torch does where a forward has more tokens than `room`; `tried` are those it was given."""

    def __init__(self) -> None:
        self.room = 10**9
        self.tried: list[int] = []

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tried.append(ids.numel())
        if ids.numel() > self.room:
            raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def memory(model: hw.AttachedModel) -> Iterator[Memory]:
    # On from the beginning: what is found out about a model is found out anew when a hook comes.
    found = Memory()
    taken = model.model.register_forward_pre_hook(found, with_kwargs=True)
    yield found
    taken.remove()


def _paths(model: hw.AttachedModel, items: ItemSet) -> torch.Tensor:
    return path_patch(model, items, ["logits"], ["L1H0", "L0H1"]).values


def _edges(model: hw.AttachedModel, items: ItemSet) -> torch.Tensor:
    return attribute_edges(model, items, "eap").values.nan_to_num()


def _queries(model: hw.AttachedModel, items: ItemSet) -> torch.Tensor:
    return patch_map(model, items, "q", ["L1H0", "L0H1"]).values


def _circuit(model: hw.AttachedModel, items: ItemSet) -> torch.Tensor:
    return run_circuits(model, [Circuit.empty(graph_of(model))], items)[0].values


@pytest.mark.parametrize("measured", [_paths, _edges, _queries, _circuit])
def test_the_numbers_are_the_same_with_less_memory(
    model: hw.AttachedModel,
    items: ItemSet,
    memory: Memory,
    measured: Callable[[hw.AttachedModel, ItemSet], torch.Tensor],
) -> None:
    plain = measured(model, items)
    memory.room, memory.tried = ROOM, []
    found = measured(model, items)
    assert max(memory.tried) > ROOM
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-4)


def test_one_item_that_does_not_fit_is_refused(model: hw.AttachedModel, items: ItemSet, memory: Memory) -> None:
    _paths(model, items)
    memory.room = 3
    with pytest.raises(Refusal, match="does not fit into memory by itself"):
        _paths(model, items)


def test_other_errors_pass() -> None:
    @halving
    def fails(*, tokens: int | None = None) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fails()
