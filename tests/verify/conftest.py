"""Evidence made by hand: effects of heads on items, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from headwise.heads import Head, HeadSet
from headwise.sweep import Controls
from headwise.verify.evidence import Evidence, Family, Joint


def made(
    effects: Mapping[str, float] | None = None,
    *,
    layers: int = 4,
    heads: int = 8,
    items: int = 32,
    joints: Mapping[str, tuple[Sequence[str], float]] | None = None,
    control_sets: int = 60,
    exhausted: bool = False,
    noise: float = 0.05,
    seed: int = 0,
    **changed: Any,
) -> Evidence:
    """A clean metric of 10 with chance 0; every head costs its effect (0 where none is named) and some noise.

    Control sets are two heads from anywhere; they cost the sum of their heads' effects.
    """
    rng = np.random.default_rng(seed)
    effects = dict(effects or {})
    every = [Head.of(layer, index) for layer in range(layers) for index in range(heads)]
    clean = 10 + 0.5 * rng.standard_normal(items)

    def out(*members: Head) -> np.ndarray:
        cost = sum(effects.get(each.label, 0.0) for each in members)
        return clean - cost - noise * rng.standard_normal() - noise * rng.standard_normal(items)

    found = []
    for name, (labels, cost) in (joints or {}).items():
        tested = HeadSet.parse(labels)
        free = [each for each in every if each not in tested]
        pairs = [(one, other) for i, one in enumerate(free) for other in free[i + 1 :]]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:control_sets]]
        sets = tuple(HeadSet(pair) for pair in chosen)
        values = clean - cost - noise * rng.standard_normal(items)
        control_values = np.array([out(*pair) for pair in chosen]).reshape(len(chosen), items)
        found.append(Joint(name, tested, values, Controls(sets, "layers", exhausted), control_values))
    fields: dict[str, Any] = {
        "family": Family("by-hand", "logit-difference"),
        "better": "higher",
        "unit": "logits",
        "item_ids": tuple(f"item-{i}" for i in range(items)),
        "clean": clean,
        "chance": 0.0,
        "solved": 1.0,
        "heads": HeadSet(tuple(every)),
        "values": np.array([out(each) for each in every]),
        "joints": tuple(found),
    }
    return Evidence(**{**fields, **changed})


@pytest.fixture
def evidence() -> Callable[..., Evidence]:
    return made
