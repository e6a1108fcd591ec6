"""What something names, and what is remembered of the model it was made on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.heads import HeadSet
from headwise.use import DoLa, HeadScaling, TemporalEdit, Together
from headwise.use.sharing.made_on import MadeOn, made_on, named_members


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


@pytest.mark.parametrize(
    ("thing", "labels"),
    [
        (HeadSet.parse("L0H1, L1H2"), {"L0H1", "L1H2"}),
        (HeadScaling({"L0H1": 2.0, "L1H2": 0.5}), {"L0H1", "L1H2"}),
        (TemporalEdit({"L1G0": torch.ones(12)}), {"L1G0"}),
        (Together((HeadScaling("L0H1"), Together((HeadScaling("L2H3"),)))), {"L0H1", "L2H3"}),
        (DoLa(), set()),
        ({"all": ("L1", "encoder", "decode", "span:L1H2", "1.2")}, {"L1"}),
    ],
    ids=["set", "labels", "groups", "together", "none", "words"],
)
def test_every_head_group_and_site_that_is_named(thing: Any, labels: set[str]) -> None:
    assert {each.label for each in named_members(thing)} == labels


def test_the_sites_are_those_that_are_named_or_all() -> None:
    assert set(made_on(llama(), HeadScaling("L1H2", 2.0)).sites) == {"L1"}
    assert set(made_on(llama(), DoLa()).sites) == {"L0", "L1", "L2"}


def test_it_goes_through_json_and_prints_the_model() -> None:
    found = made_on(llama(), HeadScaling("L1H2", 2.0))
    assert MadeOn.from_dict(found.to_dict()) == found
    assert found.weights_hash == llama().provenance("x").weights_hash
    assert str(found) == f"zoo:tiny-llama (weights {found.weights_hash[:8]}, float32)"
