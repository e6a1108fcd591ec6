"""Visual sinks: a planted massive activation is found exactly, shares against loops, the conditions by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find.visual_sink import (
    behind_pictures,
    checked_tau,
    image_centric,
    is_image_centric,
    normed,
    phi,
    sink_dimensions,
)
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe

DIMS = (5, 11)


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as attached:
        yield attached


@pytest.fixture(scope="module")
def items(model: AttachedModel) -> ItemSet:
    return hw.encode(hw.probe("existence"), model.processor, n=3)


@contextmanager
def massive(model: AttachedModel, items: ItemSet, *tokens: int) -> Iterator[None]:
    """The residual stream of some prompt tokens is large in two dimensions from the first layer on."""
    (batch,) = items.batches(len(items), answers=False)
    starts = [batch.prompt_length - len(each.prompt) for each in items]
    vector = torch.zeros(model.model.config.get_text_config().hidden_size)
    vector[DIMS[0]], vector[DIMS[1]] = 300.0, -200.0
    large = hw.edit.add("L0", vector, variable="residual_pre", scope="span:large")
    with model.editing(large, spans={"large": [[start + token for token in tokens] for start in starts]}):
        yield


def test_phi_is_the_largest_of_the_normed_dimensions() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    root = torch.tensor([2.5, 1.0])  # of the mean square
    assert torch.allclose(normed(x), x / root[:, None], atol=1e-6)
    assert torch.allclose(phi(x, (1, 2)), torch.tensor([1.6, 2.0]), atol=1e-5)
    assert torch.allclose(phi(x, (3,)), torch.zeros(2))


def test_the_conditions_by_hand() -> None:
    image, sinks = torch.tensor([[0, 1, 1, 0]]).bool(), torch.tensor([[1, 1, 0, 0]]).bool()
    rows = torch.tensor([[0.5, 0.1, 0.1, 0.3], [0.5, 0.2, 0.1, 0.2], [0.85, 0.05, 0.1, 0.0], [0.0, 0.2, 0.8, 0.0]])
    found = is_image_centric(rows[None, None], image, sinks, rho=0.5, least=0.2)
    assert found.tolist() == [[[True, False, False, True]]]


def test_behind_pictures_is_behind_the_last_one() -> None:
    image = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    wanted = [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert behind_pictures(image).int().tolist() == wanted


def test_tau_is_the_papers_at_the_papers_width(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.find import visual_sink

    for width, tau in ((4096, 20.0), (5120, 20.0), (1024, 10.0)):
        monkeypatch.setattr(visual_sink, "d_model", lambda _, width=width: width)
        assert checked_tau(model, None) == pytest.approx(tau)
    monkeypatch.setattr(visual_sink, "d_model", lambda _: 256)
    with pytest.raises(InputError, match=r"below 16\.0"):
        checked_tau(model, 20.0)


def test_planted_dimensions_are_found_and_no_others(model: AttachedModel, items: ItemSet) -> None:
    with massive(model, items, 0):
        assert sink_dimensions(model, items) == DIMS
        assert sink_dimensions(model, items, n=1) == DIMS[:1]


def test_a_dimension_that_is_large_in_one_prompt_stays_behind(model: AttachedModel, items: ItemSet) -> None:
    usual = sink_dimensions(model, items)
    rare = next(dim for dim in range(32) if dim not in sink_dimensions(model, items, n=8))
    (batch,) = items.batches(len(items), answers=False)
    start = batch.prompt_length - len(items.items[0].prompt)
    vector = torch.zeros(model.model.config.get_text_config().hidden_size)
    vector[rare] = 5000.0
    larger = hw.edit.add("L0", vector, variable="residual_pre", scope="span:one")
    with model.editing(larger, spans={"one": [[start], [], []]}):
        assert rare not in sink_dimensions(model, items)
    alone = replace(items, items=items.items[:1])
    with model.editing(larger, spans={"one": [[0]]}):
        assert sink_dimensions(model, alone, n=1) == (rare,)
    assert sink_dimensions(model, items) == usual


def test_scores_are_those_of_loops_over_one_item(model: AttachedModel, items: ItemSet) -> None:
    """Tokens 0 and 4 are sinks, the latter of the picture."""
    assert all(each.spans["image"][0][0] <= 4 <= each.spans["image"][0][-1] for each in items)
    settings: dict[str, Any] = {"dims": DIMS, "tau": 4.0, "least": 0.3, "rho": 0.12}
    with massive(model, items, 0, 4):
        scored = image_centric(model, items, **settings)
    seen = set()
    for row in range(len(items)):
        alone = replace(items, items=items.items[row : row + 1])
        (batch,) = alone.batches(1, answers=False)
        with massive(model, alone, 0, 4), torch.no_grad(), model.reading(hw.read.rows("L0, L1, L2")) as got:
            observe(model, replace(batch, answers=batch.answers[:, :0]), wants={"logits"})
        image = {at for place in alone.items[0].spans["image"] for at in place}
        queries = range(max(image) + 1, batch.prompt_length)
        for label in ("L0", "L1", "L2"):
            site = hw.heads.SiteId.parse(label)
            for head in range(4):
                counted = 0
                for query in queries:
                    row_ = got.rows[label][0, head, query].tolist()
                    mass = sum(row_[at] for at in image)
                    counted += mass >= 0.3 and row_[4] <= 0.12 * mass
                share = counted / len(queries)
                seen.add(round(share, 3))
                assert float(scored[site][row, head]) == pytest.approx(share), (label, row, head)
    assert len(seen) > 3


def test_it_is_found_by_its_id_and_refuses(model: AttachedModel, items: ItemSet) -> None:
    with massive(model, items, 0):
        scores = hw.find("image-centric", model, items)
    assert scores.values["main"].shape == (3, 3, 4)
    with pytest.raises(InputError, match="no dimensions"):
        image_centric(model, items, dims=(99,))
    with pytest.raises(InputError, match="no share"):
        image_centric(model, items, dims=DIMS, rho=2.0)
    with pytest.raises(InputError, match="no number of dimensions"):
        sink_dimensions(model, items, n=33)
    with hw.load("zoo:tiny-bert") as bert, pytest.raises(Refusal, match="does not read prompt"):
        image_centric(bert, hw.encode(hw.probe("facts"), bert.tokenizer, n=2), dims=(1,))
