"""Attention temperature against softmax(s / T), and its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel
from headwise.use.attention.temperature import AttentionTemperature


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


def read(model: AttachedModel, intervention: AttentionTemperature | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and rows of layer 0 at the attended queries, `[token, head, key]`."""
    real = model.example["attention_mask"].bool()
    reads = (hw.read.scores("L0"), hw.read.rows("L0"))
    with torch.no_grad(), model.reading(*reads) as got:
        if intervention is None:
            model(**model.example)
        else:
            with intervention(model):
                model(**model.example)
    return got.scores["L0"].transpose(1, 2)[real], got.rows["L0"].transpose(1, 2)[real]


def test_rows_are_the_softmax_of_the_divided_scores(model: AttachedModel) -> None:
    scores, rows = read(model, None)
    _, tempered = read(model, AttentionTemperature({"L0H0": 0.25, "L0H2": 4.0}))
    for head, temperature in {0: 0.25, 2: 4.0, 1: 1.0}.items():
        expected = (scores[:, head] / temperature).softmax(-1)
        assert (tempered[:, head] - expected).abs().max() < 1e-5
    assert (tempered[:, 0] - rows[:, 0]).abs().max() > 1e-2


def test_it_is_a_factor_on_queries_where_nothing_is_added_to_the_scores(model: AttachedModel) -> None:
    _, tempered = read(model, AttentionTemperature("L0H2", 0.5))
    real = model.example["attention_mask"].bool()
    doubled = hw.edit.scale("L0H2", 2.0, variable="q")
    with torch.no_grad(), model.editing(doubled), model.reading(hw.read.rows("L0")) as got:
        model(**model.example)
    assert (got.rows["L0"].transpose(1, 2)[real] - tempered).abs().max() < 1e-5


def test_a_great_temperature_is_the_mean_over_what_is_seen(model: AttachedModel) -> None:
    scores, _ = read(model, None)
    _, flat = read(model, AttentionTemperature("L0H1", 1e6))
    seen = scores[:, 1] > -torch.inf
    assert (flat[:, 1] - seen / seen.sum(-1, keepdim=True)).abs().max() < 1e-4


def test_only_the_queries_of_the_scope_are_changed(model: AttachedModel) -> None:
    _, rows = read(model, None)
    _, tempered = read(model, AttentionTemperature("L0H1", 3.0, scope="last"))
    n = model.example["attention_mask"].sum(1)
    last = [int(n[0]) - 1, int(n.sum()) - 1]
    others = [row for row in range(len(rows)) if row not in last]
    assert torch.equal(tempered[others], rows[others])
    assert (tempered[last, 1] - rows[last, 1]).abs().max() > 1e-2


def test_heads_that_look_things_up_fail_when_they_are_hot() -> None:
    """Retrieval heads of the organism at eight times their temperature find no needle; as many others do no harm."""
    model = hw.load("zoo:organism")
    items = hw.encode(hw.probe("needle"), model.tokenizer, n=8)
    hot = AttentionTemperature(hw.find("retrieval-proxy", model, items, proxy="mass").top(12), 8.0)
    others = AttentionTemperature(model.heads("L5"), 8.0)
    assert hw.measure(model, items, "exact-match").mean() == 1
    assert hw.measure(model, items, "exact-match", edits=hot.edits(model)).mean() <= 0.25
    assert hw.measure(model, items, "exact-match", edits=others.edits(model)).mean() >= 0.75
    model.detach()
