"""A small planted model, methods with known scores, and a short atlas of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.atlas import Atlas, atlas
from headwise.atlas.progress import Silent
from headwise.find.method import Method, Scored, scored_sites
from headwise.model.attached import AttachedModel
from headwise.probes import probe
from headwise.probes.encoding import ItemSet
from headwise.probes.stream import Probe
from headwise.zoo.planted import planted

SHORT = probe("repeat").over(words=(8,))
TEXT = "text"


def by_place(model: AttachedModel, items: ItemSet, *, best: int = 2) -> Scored:
    """The first `best` heads of the first layer score 5, all others a little and less by their place."""
    scored = {}
    for layer, site in enumerate(scored_sites(model)):
        n = model.table.site(site).n_heads
        means = torch.tensor([5.0 if layer == 0 and i < best else 0.1 / (1 + layer * n + i) for i in range(n)])
        scored[site] = means.expand(len(items), n)
    return scored


def nothing(model: AttachedModel, items: ItemSet) -> Scored:
    return {site: torch.full((len(items), model.table.site(site).n_heads), torch.nan) for site in scored_sites(model)}


def made_method(id: str, score: Callable[..., Scored] = by_place, **changed: Any) -> Method:
    fields: dict[str, Any] = {
        "id": id,
        "title": f"the method {id}",
        "page": "methods/none.md",
        "paper": "none",
        "year": 2024,
        "tier": "C",
        "status": "exact",
        "needs": ("answer",),
        "cost": "nothing",
        "probe": "repeat",
        "score": score,
    }
    return Method(**{**fields, **changed})


@pytest.fixture(scope="session")
def method() -> Callable[..., Method]:
    return made_method


@pytest.fixture(scope="session")
def short() -> Probe:
    return SHORT


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    """Two layers of four heads: a previous-token head and two induction heads among random ones."""
    organism = planted("llama", layers=2, heads=4, circuits=("induction",), seed=0)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example, name="small") as attached:
        yield attached


@pytest.fixture(scope="module")
def run(model: AttachedModel) -> Callable[..., Atlas]:
    """`run(folder, **arguments)`: an atlas of `SHORT` with two methods, 16 items and 4 control sets."""

    def start(folder: Path, given: AttachedModel = model, **arguments: Any) -> Atlas:
        known: dict[str, Any] = {
            "probes": [SHORT],
            "methods": [made_method("by-place"), made_method("silent", nothing)],
            "items": 16,
            "controls": 4,
            "watching": Silent(),
        }
        return atlas(given, folder, **{**known, **arguments})

    return start


@pytest.fixture(scope="module")
def finished(run: Callable[..., Atlas], tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """A finished atlas, not to be changed."""
    return run(tmp_path_factory.mktemp("finished") / "atlas")
