"""JUICE: equal to its one-run form where no edited head is in front of another, and to two runs made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.use.intervention import Together
from headwise.use.knowledge.juice import JUICE, JustRunOnce
from headwise.use.scaling import HeadScaling

CLOSE, EFFECT = 2e-5, 1e-3


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def inputs_of(model: AttachedModel) -> dict[str, Tensor]:
    mask = model.example["attention_mask"]
    return {**model.example, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(model: AttachedModel, used: Any = None) -> Tensor:
    inputs = inputs_of(model)
    with torch.no_grad():
        if used is None:
            return model(**inputs).logits[inputs["attention_mask"].bool()]
        with used(model):
            return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("heads", ["L2H0", "L2H0, L2H3", "L0H1, L0H2", "L1H2"])
def test_heads_of_one_layer_are_the_same_in_one_run(model: AttachedModel, heads: str) -> None:
    twice, once = (each(heads, enhance_by=3.0) for each in (JUICE, JustRunOnce))
    assert (logits(model, twice) - logits(model, once)).abs().max() < CLOSE
    assert (logits(model, twice) - logits(model)).abs().max() > EFFECT
    one, other = HeadSet.parse(heads).labels[0], HeadSet.parse(heads).labels[1:]
    weaker = [each(one, HeadSet.parse(list(other)), 0.5, 2.0) for each in (JUICE, JustRunOnce)]
    assert (logits(model, weaker[0]) - logits(model, weaker[1])).abs().max() < CLOSE


def test_heads_of_successive_layers_are_not(model: AttachedModel) -> None:
    assert (logits(model, JUICE("L0H1, L1H0")) - logits(model, JustRunOnce("L0H1, L1H0"))).abs().max() > EFFECT


def test_the_two_differ_in_second_order_of_alpha() -> None:
    """Of the second head, one run takes alpha of what the first edit changed in it; the other takes none of that."""
    with hw.load("zoo:tiny-llama") as model:

        def apart(alpha: float) -> float:
            both = [each("L0H1, L1H0", enhance_by=alpha) for each in (JUICE, JustRunOnce)]
            return float((logits(model, both[0]) - logits(model, both[1])).norm())

        assert apart(0.2) / apart(0.1) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("mode", ["batch", "caches"])
def test_it_is_two_full_runs_token_by_token(model: AttachedModel, mode: Any) -> None:
    """By hand: the clean run is read, and its z added in the next one, over the whole text for every token."""
    enhance, suppress, up, down = HeadSet.parse("L0H1, L1H0"), HeadSet.parse("L2H2"), 2.0, 1.5
    ids, mask = model.example["input_ids"], model.example["attention_mask"]
    texts, masks = ids, mask
    for _ in range(4):
        at = {"attention_mask": masks, "position_ids": (masks.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad(), model.reading(hw.read.z(enhance | suppress)) as clean:
            model(input_ids=texts, **at)
        edits = [hw.edit.add(enhance, clean.z, strength=up), hw.edit.add(suppress, clean.z, strength=-down)]
        with torch.no_grad(), model.editing(*edits):
            last = model(input_ids=texts, **at).logits[:, -1]
        texts = torch.cat([texts, last.argmax(-1, keepdim=True)], dim=1)
        masks = torch.cat([masks, torch.ones(len(masks), 1, dtype=masks.dtype)], dim=1)
    used = JUICE(enhance, suppress, up, down, mode=mode)
    with used(model):
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
    assert torch.equal(made.sequences, texts)
    assert (made.logits[-1] - last).abs().max() < 5e-5


def test_both_modes_agree_and_beams_carry_both_runs(model: AttachedModel) -> None:
    by_mode = [JUICE("L0H1, L1H0", "L2H2", 2.0, 1.0, mode=mode) for mode in ("batch", "caches")]
    assert (logits(model, by_mode[0]) - logits(model, by_mode[1])).abs().max() < CLOSE
    written = []
    for used in by_mode:
        with used(model):
            inputs = {key: model.example[key] for key in ("input_ids", "attention_mask")}
            written.append(model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False))
    assert torch.equal(*written)


def test_with_another_intervention_both_runs_are_steered() -> None:
    """What is added is then what the head writes in the steered run, which is scaled by 1 + alpha in all."""
    with hw.load("zoo:tiny-llama") as model:
        steer = HeadScaling("L0H3", 3.0)
        together = Together((steer, JUICE("L2H1", enhance_by=2.0)))
        with torch.no_grad(), steer(model), JustRunOnce("L2H1", enhance_by=2.0)(model):
            wanted = model(**inputs_of(model)).logits[inputs_of(model)["attention_mask"].bool()]
        assert (logits(model, together) - wanted).abs().max() < CLOSE
