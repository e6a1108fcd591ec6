"""ACT against the formula computed from the clean rows, and the choice of its heads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.model.attached import AttachedModel
from headwise.use.attention.calibration import AttentionCalibration, choose_heads


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


def calibrated(rows: Tensor, beta: float, above: float, prompt: int | None = None) -> tuple[Tensor, int]:
    """The formula on `[query, key]`, causal rows with no padding, one query and one key at a time; how many sinks."""
    n = len(rows)
    prompt = n if prompt is None else prompt
    received = [sum(float(rows[i, j]) for i in range(j, prompt)) / (prompt - j) for j in range(prompt)]
    sinks = [j for j in range(prompt) if received[j] > above][1:]
    rows = rows.double() / rows.double().sum(-1, keepdim=True)  # of rows summing to 1 but for rounding, 1 - mass is not
    out = rows.clone()
    for i in range(n):
        mass = float(rows[i, sinks].sum())
        for j in range(i + 1):
            out[i, j] = beta * rows[i, j] if j in sinks else rows[i, j] * (1 + (1 - beta) * mass / (1 - mass))
    return out, len(sinks)


@pytest.mark.parametrize("prompt", [None, 20], ids=["the prompt alone", "an answer behind it"])
def test_rows_are_the_formula(tiny: AttachedModel, prompt: int | None) -> None:
    act = AttentionCalibration("L0H0, L0H1", beta=0.4, above=0.06)
    with torch.no_grad(), tiny.reading(hw.read.rows("L0")) as clean:
        tiny(**tiny.example)
    with torch.no_grad(), act(tiny, prompt_length=prompt), tiny.reading(hw.read.rows("L0")) as got:
        tiny(**tiny.example)
    n_sinks, moved = 0, 0.0
    for row, mask in enumerate(tiny.example["attention_mask"].bool()):
        start = int(mask.int().argmax())
        for head in (0, 1):
            before, after = (of.rows["L0"][row, head][start:, start:] for of in (clean, got))
            expected, found = calibrated(before, 0.4, 0.06, None if prompt is None else prompt - start)
            assert (after - expected).abs().max() < 1e-5
            assert (after.sum(-1) - 1).abs().max() < 1e-5
            n_sinks, moved = n_sinks + found, max(moved, float((after - before).abs().max()))
    assert n_sinks > 4
    assert moved > 1e-2


def test_sinks_are_of_each_head_and_each_item(tiny: AttachedModel) -> None:
    """Two edits that hide what another head, or another row, has for a sink would not give the same."""
    act = AttentionCalibration("L0H0, L0H1, L0H2, L0H3", above=0.06)
    alone = [AttentionCalibration(f"L0H{head}", above=0.06) for head in range(4)]
    with torch.no_grad(), act(tiny), tiny.reading(hw.read.rows("L0")) as together:
        tiny(**tiny.example)
    for head, one in enumerate(alone):
        with torch.no_grad(), one(tiny), tiny.reading(hw.read.rows("L0")) as got:
            tiny(**tiny.example)
        assert (got.rows["L0"][:, head] - together.rows["L0"][:, head]).abs().max() < 1e-6
    with torch.no_grad(), act(tiny), tiny.reading(hw.read.rows("L0H2")) as got:
        tiny(**tiny.example)
    assert (got.rows["L0"][:, 0] - together.rows["L0"][:, 2]).abs().max() < 1e-6  # read alone, edited among others


def test_a_threshold_that_no_key_reaches_changes_no_weight(tiny: AttachedModel) -> None:
    with torch.no_grad(), tiny.reading(hw.read.rows("L0")) as clean:
        tiny(**tiny.example)
    with (
        torch.no_grad(),
        AttentionCalibration("L0H0", above=0.999)(tiny),
        tiny.reading(hw.read.rows("L0")) as got,
    ):
        tiny(**tiny.example)
    assert torch.equal(got.rows["L0"], clean.rows["L0"])


def test_heads_are_chosen_on_one_half_and_judged_on_the_other() -> None:
    with hw.load("zoo:organism") as model:
        items = hw.encode(hw.probe("conflict"), model.tokenizer, n=12)
        found = choose_heads(model, items, "L3H0, L3H4, L4H2", measured="logit-difference", above=0.05)
        assert {*found.tuning.ids}.isdisjoint(found.judging.ids)
        for place, head in enumerate(found.heads.heads):
            alone = AttentionCalibration(head.label, above=0.05).edits(model)
            means = [
                float(hw.measure(model, found.tuning, "logit-difference", edits=edits).double().mean())
                for edits in (alone, ())
            ]
            assert float(found.gain[place]) == pytest.approx(means[0] - means[1], abs=1e-4)
        assert float(found.gain.abs().max()) > 1e-3
        helping = [head.label for head, gain in zip(found.heads.heads, found.gain, strict=True) if gain > 0]
        assert ([] if found.intervention is None else list(found.intervention.heads.labels)) == helping
        if found.intervention is not None:
            edits = found.intervention.edits(model)
            again = hw.measure(model, found.judging, "logit-difference", edits=edits)
            assert torch.equal(again, found.calibrated)
        with pytest.raises(InputError, match="beta=1"):
            choose_heads(model, items, "L3H0", beta=1.0)
