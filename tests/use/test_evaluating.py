"""What an intervention is worth: the numbers are those of runs by hand, and random heads get what is theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

import headwise as hw
from headwise.benches.shapes import Shape, random_items
from headwise.errors import InputError, Refusal
from headwise.fit.head_lora import HeadAdapter
from headwise.heads import HeadSet
from headwise.model.edit import Edit
from headwise.probes import ItemSet
from headwise.use import HeadOffset, HeadRemoval, HeadScaling, Intervention, TemporalEdit, Together
from headwise.use.evaluating import compare, cost_per_token, evaluate, random_heads
from headwise.use.evaluation import Comparison
from headwise.use.intervention import Beside
from headwise.verify.statistics import studentised_p
from headwise.verify.verifying import half_for_testing
from headwise.zoo.planted import planted


@cache
def organism() -> hw.AttachedModel:
    return hw.load("zoo:organism")


@cache
def items(probe: str, n: int = 8) -> ItemSet:
    return hw.encode(hw.probe(probe), organism().tokenizer, n=n, seed="held out")


@dataclass(frozen=True, eq=False, repr=False)
class Against(Intervention):
    """Twice the logits less those of a stream without the heads."""

    id: ClassVar[str] = "against"
    heads: HeadSet
    mode: str = "batch"

    def beside(self, model: hw.AttachedModel) -> Beside:
        return Beside((hw.edit.zero(self.heads),), lambda one, other: 2 * one - other, self.mode)


@dataclass(frozen=True, eq=False, repr=False)
class Headless(Intervention):
    """Names no heads of its own: half of what the second layer writes is taken back."""

    id: ClassVar[str] = "headless"
    factor: float = 0.5

    def edits(self, model: hw.AttachedModel) -> tuple[Edit, ...]:
        return (hw.edit.scale(model.heads("L2"), self.factor),)


# -- measuring under an intervention ----------------------------------------------------------------------------------


def test_under_an_intervention_is_with_its_edits() -> None:
    found = hw.measure(organism(), items("needle"), under=HeadRemoval("L2H1, L3H4", scope="span:needle"))
    expected = hw.measure(organism(), items("needle"), edits=[hw.edit.zero("L2H1, L3H4", scope="span:needle")])
    assert torch.equal(found, expected)
    written = hw.measure(organism(), items("needle"), under=HeadRemoval("L2H1, L3H4", scope="decode"))
    expected = hw.measure(organism(), items("needle"), edits=[hw.edit.zero("L2H1, L3H4", scope="decode")])
    assert torch.equal(written, expected)  # it is told where the prompt ends
    assert not torch.equal(written, hw.measure(organism(), items("needle")))
    both = hw.measure(organism(), items("needle"), edits=[hw.edit.zero("L3H4")], under=HeadRemoval("L2H1"))
    assert torch.equal(both, hw.measure(organism(), items("needle"), edits=[hw.edit.zero("L2H1, L3H4")]))


def test_under_neutral_settings_every_bit_stays() -> None:
    assert torch.equal(
        hw.measure(organism(), items("needle"), under=HeadScaling("L2H1", 1.0)), hw.measure(organism(), items("needle"))
    )


@pytest.mark.parametrize("mode", ["batch", "caches"])
def test_two_streams_under_an_intervention_are_two_runs_by_hand(mode: str) -> None:
    item = replace(items("ioi"), items=items("ioi").items[:4])
    one_token = [each for each in item if len(each.answer) == 1]
    assert one_token
    found = hw.measure(organism(), item, "logit-difference", under=Against(HeadSet.parse("L3H4, L2H1"), mode))
    clean = hw.measure(organism(), item, "logit-difference")
    without = hw.measure(organism(), item, "logit-difference", edits=[hw.edit.zero("L3H4, L2H1")])
    assert torch.allclose(found, 2 * clean - without, atol=1e-3)


@pytest.mark.parametrize(
    "intervention",
    [HeadScaling("L2H1, L3H4", 3.0, scope="prompt"), Against(HeadSet.parse("L2H1"))],
    ids=lambda it: it.id,
)
def test_batched_and_one_by_one(intervention: Intervention) -> None:
    batched = hw.measure(organism(), items("needle"), under=intervention)
    alone = hw.measure(organism(), items("needle"), under=intervention, batch_size=1)
    assert torch.allclose(batched, alone, atol=2e-3)


def test_the_clean_run_of_a_drift_is_outside() -> None:
    assert float(hw.measure(organism(), items("ioi"), "kl-to-clean", under=HeadRemoval("L3H4")).abs().max()) > 0
    assert float(hw.measure(organism(), items("ioi"), "kl-to-clean", under=HeadScaling("L3H4", 1.0)).abs().max()) == 0


# -- the same on other heads ------------------------------------------------------------------------------------------


def test_what_belongs_to_a_head_goes_along() -> None:
    moved = HeadScaling({"L2H1": 0.5, "L3H4": 2.0}).on("L3H0, L2H7")
    assert moved.acts_on == HeadSet.parse("L2H7, L3H0")
    assert moved.factor == {"L2H7": 0.5, "L3H0": 2.0}
    vector = torch.arange(3.0)
    offset = HeadOffset({"L2H1": vector, "L3H4": -vector}, strength=2.0).on("L2H2, L3H5")
    assert torch.equal(offset.offset["L2H2"], vector)
    assert torch.equal(offset.offset["L3H5"], -vector)
    assert offset.strength == 2.0
    assert HeadRemoval("L2H1").on("L4H4").settings == HeadRemoval("L4H4").settings


def test_several_interventions_move_together() -> None:
    both = Together((HeadRemoval("L2H1, L3H4"), HeadScaling("L3H4", 2.0)))
    assert both.acts_on == HeadSet.parse("L2H1, L3H4")
    moved = both.on("L2H0, L3H9")
    assert [each.acts_on.labels for each in moved.parts] == [("L2H0", "L3H9"), ("L3H9",)]


@pytest.mark.parametrize("heads", ["L2H1", "L2H1, L2H2, L2H3", HeadSet.parse("L2G1, L2G2")], ids=str)
def test_only_as_many_other_heads(heads: str | HeadSet) -> None:
    with pytest.raises(InputError, match="acts on 2 heads"):
        HeadRemoval("L2H1, L3H4").on(heads)
    with pytest.raises(InputError, match="acts on 0"):
        Headless().on("L2H1")


def test_random_heads_are_others_in_the_same_layers() -> None:
    drawn = random_heads(organism(), HeadRemoval("L2H1, L3H4"), 20, seed=1)
    assert len({each.acts_on for each in drawn}) == 20
    for each in drawn:
        assert [head.layer for head in each.acts_on] == [2, 3]
        assert not each.acts_on & HeadSet.parse("L2H1, L3H4")
    with pytest.raises(InputError, match="names no heads"):
        random_heads(organism(), Headless(), 3)
    with pytest.raises(Refusal, match="no others are left"):
        random_heads(organism(), HeadRemoval(organism().heads(None)), 3)


def test_groups_move_to_groups() -> None:
    vector = torch.arange(24.0)
    drawn = random_heads(organism(), TemporalEdit({"L3G1": vector}, 3.0), 4)
    assert len({each.acts_on for each in drawn}) == 4
    for each in drawn:
        ((label, values),) = each.values.items()
        assert label.startswith("L3G")
        assert label != "L3G1"
        assert torch.equal(values, vector)


def test_what_was_trained_for_its_heads_has_no_random_ones() -> None:
    adapter = HeadAdapter(HeadSet.parse("L1H2"), {"q": torch.ones(1, 4)}, {"q": torch.ones(4, 1)})
    with pytest.raises(Refusal, match="trained for its own heads"):
        random_heads(organism(), adapter, 3)


# -- what is computed of the numbers ----------------------------------------------------------------------------------


def by_hand(changes: np.ndarray, controls: np.ndarray) -> Comparison:
    """Values whose changes are these, on a clean metric that varies from item to item."""
    clean = np.linspace(-3, 4, len(changes))
    ids = tuple(f"item-{i}" for i in range(len(changes)))
    heads = (HeadSet(),) * len(controls)
    return Comparison("p", "m", "nats", "higher", ids, clean, clean + changes, clean + controls, heads, "layers")


def test_change_excess_and_p() -> None:
    draw = np.random.default_rng(0)
    changes, controls = 2 + draw.standard_normal(16), 0.5 + 0.1 * draw.standard_normal((30, 16))
    found = by_hand(changes, controls)
    assert found.change == pytest.approx(changes.mean())
    expected = stats.ttest_rel(found.edited, found.clean).confidence_interval()
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.excess == pytest.approx(changes.mean() - controls.mean())
    assert found.excess_interval[0] < found.excess < found.excess_interval[1]
    assert found.p == pytest.approx(2 * studentised_p(changes, controls))
    assert found.p < 0.01


def test_up_or_down_is_the_same_to_p() -> None:
    draw = np.random.default_rng(1)
    changes, controls = 2 + draw.standard_normal(16), 0.1 * draw.standard_normal((30, 16))
    assert by_hand(changes, controls).p == pytest.approx(by_hand(-changes, -controls).p)
    assert by_hand(controls[0], controls).p > 0.2


def test_without_enough_controls_there_is_no_p() -> None:
    few = by_hand(np.ones(8), np.zeros((7, 8)))
    assert np.isnan(few.p)
    assert few.excess == 1
    none = by_hand(np.ones(8), np.zeros((0, 8)))
    assert np.isnan([none.p, none.excess, *none.excess_interval]).all()
    assert none.interval == (1, 1)


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_heads_that_matter_stand_out_from_random_ones() -> None:
    """In the planted model only the copying heads carry the behaviour, and which they are is known."""
    built = planted(circuits=("induction",), seed=1)
    model = hw.attach(built.model, built.tokenizer, example=built.example)
    heads = built.truth.with_effect("repeat", "total")
    repeats = hw.encode(hw.probe("repeat"), built.tokenizer, n=6)
    found = compare(model, HeadRemoval(heads), repeats, controls=8)
    assert found.excess_interval[1] < 0
    assert found.p < 0.05
    assert abs(found.control_changes.mean(axis=1)).max() < abs(found.change) / 2


def test_every_part_of_an_evaluation() -> None:
    intervention = HeadRemoval("L2H1, L3H4", scope="span:needle")
    found = evaluate(organism(), intervention, items("needle"), controls=2, samples=2, off_target=["text", "ioi"])
    assert found.target.item_ids == items("needle").ids
    assert np.allclose(found.target.clean, hw.measure(organism(), items("needle")).numpy())
    for heads, values in zip(found.target.control_heads, found.target.controls, strict=True):
        by_edit = hw.measure(organism(), items("needle"), edits=[hw.edit.zero(heads, scope="span:needle")])
        assert np.allclose(values, by_edit.numpy())
    text, ioi = found.off_target
    assert (text.probe, text.metric, ioi.probe) == ("text", "cross-entropy", "ioi")
    elsewhere = hw.encode(hw.probe("text"), organism().tokenizer, n=32, seed="off target/0")
    everywhere = hw.measure(organism(), elsewhere, edits=[hw.edit.zero("L2H1, L3H4")])
    assert np.allclose(text.edited, everywhere.numpy())  # the span of a needle is at no place of it
    assert len(found.samples) == 2
    assert all(each.answer.strip() in each.without for each in found.samples)
    assert 0.3 < found.cost < 30
    assert not found.notes
    json.dumps(found.to_dict(), allow_nan=False)
    frame = found.to_pandas()
    assert list(frame.columns) == ["item", "clean", "edited", "change", "random"]
    assert np.allclose(frame["change"], frame["edited"] - frame["clean"])
    assert np.allclose(frame["random"], found.target.control_changes.mean(axis=0))
    console = Console(width=160, record=True)
    console.print(found)
    for shown in (console.export_text(), str(found)):
        assert "HeadRemoval" in shown
        assert f"{found.target.change:+.3g}" in shown
        assert "cross-entropy" in shown


def test_samples_are_what_generate_writes() -> None:
    intervention = HeadScaling("L1H1, L2H1, L3H4, L4H2, L4H7", -8.0)
    found = evaluate(organism(), intervention, items("needle"), controls=0, samples=1, off_target=None)
    (sample,) = found.samples
    prompt = torch.tensor([items("needle").items[0].prompt])
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    with intervention(organism()):
        written = organism().generate(input_ids=prompt, **asked)[0, prompt.shape[1] :]
    assert sample.steered == organism().tokenizer.decode(written, skip_special_tokens=True)
    assert sample.steered != sample.without


def test_two_streams_are_evaluated_like_one() -> None:
    found = evaluate(organism(), Against(HeadSet.parse("L2H1")), items("ioi"), controls=1, samples=1, off_target=None)
    assert found.target.controls.shape == (1, 8)
    assert found.cost > 1
    assert found.samples[0].without.startswith(found.samples[0].answer)


def test_what_cannot_be_measured_is_said() -> None:
    found = evaluate(organism(), Headless(), items("ioi"), controls=5, samples=0, off_target=None)
    assert len(found.target.controls) == 0
    assert found.notes == ("no random heads: headless names no heads of its own",)
    every = HeadScaling(organism().heads(None), 0.9)
    assert "no others are left" in evaluate(organism(), every, items("ioi"), samples=0, off_target=None).notes[0]


def test_controls_may_be_given() -> None:
    given = [HeadRemoval("L0H0"), HeadRemoval("L0H1")]
    found = evaluate(organism(), HeadRemoval("L2H1"), items("ioi"), controls=given, samples=0, off_target=None)
    assert found.target.control_heads == (HeadSet.parse("L0H0"), HeadSet.parse("L0H1"))
    assert found.target.match == "given"


def test_items_that_chose_or_tuned_are_left_out() -> None:
    used = items("ioi").ids[:5]
    found = compare_finding(used)
    assert found == items("ioi").ids[5:]
    with pytest.raises(InputError, match="were used to find"):
        compare_finding(items("ioi").ids)


def compare_finding(used: tuple[str, ...]) -> tuple[str, ...]:
    found = evaluate(
        organism(), HeadRemoval("L2H1"), items("ioi"), finding=used, controls=0, samples=0, off_target=None
    )
    return found.target.item_ids


def test_a_file_of_items(tmp_path: Path) -> None:
    file = tmp_path / "capitals.jsonl"
    cities = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}
    asked = [
        "The capital of",
        "We know the capital of",
        "So the capital of",
        "Here the capital of",
        "Then the capital of",
    ]
    rows = [(f"{way} {country} is", f" {city}") for way in asked for country, city in cities.items()]
    lines = [json.dumps({"id": f"row-{i}", "prompt": one, "answer": other}) for i, (one, other) in enumerate(rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = evaluate(organism(), HeadRemoval("L2H1"), file, controls=0, samples=0, off_target=None)
    assert found.target.item_ids == tuple(each.id for each in half_for_testing(file))
    assert found.target.probe == "capitals"


def test_what_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="attached model"):
        evaluate(organism().model, HeadRemoval("L2H1"), items("ioi"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="L9"):
        evaluate(organism(), HeadRemoval("L9H0"), items("ioi"))
    with pytest.raises(InputError, match="controls=-1"):
        evaluate(organism(), HeadRemoval("L2H1"), items("ioi"), controls=-1)
    with pytest.raises(InputError, match="no metric"):
        compare(organism(), HeadRemoval("L2H1"), items("ioi"), metric="loss")


def test_without_tokenizer_or_room_the_metric_stays() -> None:
    shape = Shape("gpt2", 2, 2, 2, 16, 32, 50, positions=20)
    model = hw.attach(shape.build(), example={"input_ids": torch.ones(1, 8, dtype=torch.long)})
    rows = random_items(shape, n=4, tokens=20, seed=0)  # as many tokens as there are positions
    with pytest.raises(Refusal, match="cannot write"):
        cost_per_token(model, HeadRemoval("L1H0"), rows)
    found = evaluate(model, HeadRemoval("L1H0"), rows, controls=1, samples=0)
    assert found.target.change != 0
    assert np.isnan(found.cost)
    assert "nothing off target on text" in found.notes[0]
    assert "nothing written" in found.notes[1]
