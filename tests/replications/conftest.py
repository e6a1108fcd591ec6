"""A replication of our own on a tiny model, with a method whose scores are written down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import Refusal
from headwise.find import Method
from headwise.heads import SiteId
from headwise.probes import probe
from headwise.replications import Expectation, Replication, Shape
from headwise.scores import HeadScores


def unanswered(item_id: str) -> bool:
    """Every third item or so, by its id."""
    return int(item_id[-2:], 16) % 3 == 0


def scripted(model: Any, items: Any, *, factor: float = 1.0) -> dict[SiteId, Tensor]:
    """Layer l, head h scores `factor * (10 l + h)`; as the retrieval score does, refuses items without an answer."""
    if all(unanswered(each.id) for each in items):
        raise Refusal("the scripted model answers none of them")
    return {
        site.id: factor * (10 * site.id.layer + torch.arange(site.n_heads, dtype=torch.float64)).expand(len(items), -1)
        for site in model.sites
    }


METHOD = Method(
    id="scripted",
    title="scores written down",
    page="cli.md",
    paper="A paper",
    year=2020,
    tier="C",
    status="exact",
    needs=(),
    cost="nothing",
    probe="ioi",
    score=scripted,
)


def best(scores: HeadScores) -> float:
    return scores.ranked()[0].score


@pytest.fixture
def tiny() -> Replication:
    """Holds on tiny-llama: 3 layers of 4 heads, so the best head has 2 * 23."""
    return Replication(
        id="tiny-result",
        title="the last head of a tiny model",
        paper="A paper",
        year=2020,
        source="the fixture",
        model="tiny-llama",
        shape=Shape(3, 4, 2),
        method=METHOD,
        settings={"factor": 2.0},
        probe=lambda tokenizer, items, longest: probe("ioi"),
        expectations=(
            Expectation(quantity="best score", published=46.0, low=40, high=math.inf, measure=best),
            Expectation(quantity="heads", published=12, low=12, high=12, measure=lambda found: len(found.ranked())),
        ),
        items=12,
        max_tokens=100,
        fewest=4,
    )


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    with hw.load("zoo:tiny-llama") as model:
        yield model
