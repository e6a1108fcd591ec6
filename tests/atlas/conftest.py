"""A small planted model, methods with known scores, and a short atlas of it; and a model that sees, with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.atlas import Atlas, atlas
from headwise.atlas.progress import Silent
from headwise.find.method import Method, Scored, scored_sites
from headwise.model.attached import AttachedModel
from headwise.probes import probe
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item, Passage
from headwise.probes.outcome import observe
from headwise.probes.picture import Picture, Region
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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """And so one process, of which tests can say which cell it measures when."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def drawn(seed: int, side: int = 32) -> Picture:
    return Picture.drawn(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def asked(model: AttachedModel, n: int, *, pictures: int = 1) -> tuple[Item, ...]:
    """Questions that the model answers rightly, because the answer is what it says."""
    found = []
    for seed in range(n):
        passage = Passage().add("<image> " * pictures).add(f"what is {10 + seed}", "question").add(" in?")
        shown = tuple(drawn(seed + 100 * place) for place in range(pictures))
        regions = {"left": Region(0, (0, 0, 16, 32)), "right": Region(0, (16, 0, 32, 32))} if pictures else {}
        draft = passage.item("a", pictures=shown, regions=regions)
        (batch,) = encode([draft.named("draft")], model).batches(1, answers=False)
        logits = observe(model, batch, wants={"logits"}).logits
        assert logits is not None
        answer = model.tokenizer.decode([int(logits[0, 0].argmax())])
        foil = "a" if answer != "a" else "b"
        found.append(passage.item(answer, foils=(foil,), pictures=shown, regions=regions))
    return tuple(found)


def made_probe(id: str, items: Sequence[Item], *, in_prompt: bool = False) -> Probe:
    return Probe(
        id=id,
        title=f"the probe {id}",
        page="pictures.md",
        make=lambda random: random.choice(items),
        metric="logit-difference",
        chance=0.0,
        spans=("question",),
        in_prompt=in_prompt,
    )


def one_that_sees() -> AttachedModel:
    """A model of random weights that reads pictures, and writes nothing but letters."""
    attached = hw.load("zoo:tiny-llava")
    letters = [attached.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
    head = attached.model.get_output_embeddings()
    weight = torch.zeros_like(head.weight)
    weight[letters] = head.weight[letters].detach()
    head.weight = torch.nn.Parameter(weight)  # its own, where it was that of the embedding
    return attached


@pytest.fixture(scope="module")
def seeing() -> Iterator[AttachedModel]:
    with one_that_sees() as attached:
        yield attached


@pytest.fixture(scope="session")
def ask() -> Callable[..., tuple[Item, ...]]:
    return asked


@pytest.fixture(scope="session")
def probe_of() -> Callable[..., Probe]:
    return made_probe


@pytest.fixture(scope="module")
def shown(seeing: AttachedModel) -> Probe:
    """A behaviour of pictures that `seeing` solves."""
    return made_probe("shown", asked(seeing, 40))


@pytest.fixture(scope="module")
def told(seeing: AttachedModel) -> Probe:
    """A behaviour of text that `seeing` solves."""
    return made_probe("told", asked(seeing, 40, pictures=0))


@pytest.fixture(scope="module")
def seen(
    seeing: AttachedModel,
    shown: Probe,
    told: Probe,
    run: Callable[..., Atlas],
    tmp_path_factory: pytest.TempPathFactory,
) -> Atlas:
    """A finished atlas of a behaviour of pictures and one of text, not to be changed."""
    methods = [made_method("by-place", probe="shown")]
    return run(tmp_path_factory.mktemp("seen") / "atlas", seeing, probes=[shown, told], methods=methods)
