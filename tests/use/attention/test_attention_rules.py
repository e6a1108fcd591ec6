"""What the interventions on attention have in common: neutral settings, padding, caches, rows that stay rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.use.attention.calibration import AttentionCalibration
from headwise.use.attention.rotary import RotaryDimensions
from headwise.use.attention.span_emphasis import SpanEmphasis
from headwise.use.attention.temperature import AttentionTemperature
from headwise.use.attention.zero_tuning import ZeroTuning
from headwise.use.intervention import Intervention

HEADS = "L0H1, L1H0, L1H2"
ALL: dict[str, Intervention] = {
    "zero-tuning": ZeroTuning(HEADS, 3.0),
    "calibration": AttentionCalibration(HEADS, above=0.05),
    "emphasis": SpanEmphasis(HEADS, "rule"),
    "temperature": AttentionTemperature(HEADS, 0.3),
    "rotary": RotaryDimensions(HEADS),
}
NEUTRAL: dict[str, Intervention] = {
    "zero-tuning": ZeroTuning(HEADS, 1.0),
    "calibration": AttentionCalibration(HEADS, beta=1.0),
    "emphasis": SpanEmphasis(HEADS, "rule", alpha=1.0),
    "temperature": AttentionTemperature({"L0H1": 1.0, "L1H0": 1.0}),
    "rotary": RotaryDimensions(HEADS, factor=1.0),
}
MODELS = ("llama", "gpt2", "qwen3", "gemma2")
EFFECT, CLOSE = 1e-3, 5e-5

OPEN = ExitStack()


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example, name=name))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


def cases() -> list[Any]:
    return [
        pytest.param(model, which, id=f"{model}-{which}")
        for model in MODELS
        for which in ALL
        if not (model == "gpt2" and which == "rotary")
    ]


def rule_of(mask: Tensor) -> list[list[int]]:
    """The third to fifth attended token of each row."""
    return [[int(row.nonzero()[0]) + offset for offset in (2, 3, 4)] for row in mask]


def inputs_of(model: AttachedModel) -> dict[str, Tensor]:
    mask = model.example["attention_mask"]
    return {**model.example, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(model: AttachedModel, inputs: dict[str, Tensor], intervention: Intervention | None = None) -> Tensor:
    with torch.no_grad():
        if intervention is None:
            return model(**inputs).logits
        with intervention(model, spans={"rule": rule_of(inputs["attention_mask"])}):
            return model(**inputs).logits


def test_the_example_is_padded_on_the_left() -> None:
    mask = attached("llama").example["attention_mask"]
    assert not bool(mask[:, 0].all())
    assert bool(mask[:, -1].all())


@pytest.mark.parametrize("which", NEUTRAL)
def test_neutral_settings_make_no_edit(which: str) -> None:
    model, intervention = attached("llama"), NEUTRAL[which]
    assert intervention.edits(model) == ()
    inputs = inputs_of(model)
    assert torch.equal(logits(model, inputs, intervention), logits(model, inputs))


@pytest.mark.parametrize(("name", "which"), cases())
def test_a_row_beside_others_is_what_it_is_alone(name: str, which: str) -> None:
    model = attached(name)
    inputs = inputs_of(model)
    batched = logits(model, inputs, ALL[which])
    moved = (batched - logits(model, inputs))[inputs["attention_mask"].bool()].abs().max()
    assert moved > EFFECT
    for row, mask in enumerate(inputs["attention_mask"]):
        start = int(mask.argmax())
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert (logits(model, alone, ALL[which])[0] - batched[row, start:]).abs().max() < CLOSE * (1 + float(moved))


@pytest.mark.parametrize(("name", "which"), cases())
def test_decoding_with_a_cache_is_decoding_without(name: str, which: str) -> None:
    model, intervention = attached(name), ALL[which]
    example = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    spans = {"rule": rule_of(example["attention_mask"])}
    made = {}
    for cached in (True, False):
        with intervention(model, spans=spans):
            made[cached] = model.generate(
                **example,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
            )
    assert torch.equal(made[True].sequences, made[False].sequences)
    for one, other in zip(made[True].logits, made[False].logits, strict=True):
        assert (one - other).abs().max() < CLOSE * 4
    plain = model.generate(
        **example,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert (plain.logits[0] - made[True].logits[0]).abs().max() > EFFECT


@pytest.mark.parametrize("which", ALL)
def test_beams_keep_what_was_found_in_their_prompt(which: str) -> None:
    model, intervention = attached("llama"), ALL[which]
    example = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    made = []
    for cached in (True, False):
        with intervention(model, spans={"rule": rule_of(example["attention_mask"])}):
            made.append(
                model.generate(
                    **example,
                    max_new_tokens=4,
                    num_beams=3,
                    do_sample=False,
                    use_cache=cached,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
            )
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert torch.allclose(made[0].sequences_scores, made[1].sequences_scores, atol=1e-4)


@pytest.mark.parametrize(("name", "which"), cases())
def test_a_text_given_whole_with_its_prompt_length_is_as_if_generated(name: str, which: str) -> None:
    model, intervention = attached(name), ALL[which]
    example = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    spans = {"rule": rule_of(example["attention_mask"])}
    with intervention(model, spans=spans):
        made = model.generate(
            **example,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    width = example["input_ids"].shape[1]
    mask = torch.cat([example["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    whole = {
        "input_ids": made.sequences[:, :-1],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad(), intervention(model, spans=spans, prompt_length=width):
        again = model(**whole).logits[:, width - 1 :]
    assert (again - torch.stack(made.logits, dim=1)).abs().max() < CLOSE * 4


@pytest.mark.parametrize(("name", "which"), [case for case in cases() if case.values[1] != "rotary"])  # type: ignore[attr-defined]
def test_rows_sum_to_one_and_other_heads_keep_theirs(name: str, which: str) -> None:
    model = attached(name)
    inputs = inputs_of(model)
    spans = {"rule": rule_of(inputs["attention_mask"])}
    with torch.no_grad(), model.reading(hw.read.rows("L0")) as clean:
        model(**inputs)
    with torch.no_grad(), ALL[which](model, spans=spans), model.reading(hw.read.rows("L0")) as got:
        model(**inputs)
    real = inputs["attention_mask"].bool()
    rows, before = got.rows["L0"].transpose(1, 2)[real], clean.rows["L0"].transpose(1, 2)[real]
    assert (rows.sum(-1) - 1).abs().max() < 1e-5
    others = [head for head in range(rows.shape[1]) if head != 1]
    assert torch.equal(rows[:, others], before[:, others])
    assert (rows[:, 1] - before[:, 1]).abs().max() > EFFECT


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: ZeroTuning("L0H0", 0.0), "above 0"),
        (lambda: ZeroTuning("L0H0", -1.0), "above 0"),
        (lambda: ZeroTuning("L0H0", float("nan")), "out of range"),
        (lambda: ZeroTuning({"L0H0": 0.0}), "of L0H0"),
        (lambda: ZeroTuning("L0H0", {"L0H1": 2.0}), "L0H"),
        (lambda: ZeroTuning("nothing", 2.0), "head label"),
        (lambda: ZeroTuning({"L0H0": 2.0}, 0.5), "leave it out"),
        (lambda: AttentionTemperature({"L0H0": 2.0}, 0.5), "leave it out"),
        (lambda: AttentionCalibration("L0H0", beta=1.5), "beta"),
        (lambda: AttentionCalibration("L0H0", above=1.0), "above"),
        (lambda: AttentionCalibration("L0H0", scope="never"), "scope"),
        (lambda: SpanEmphasis("L0H0", "rule", alpha=0.0), "above 0"),
        (lambda: SpanEmphasis("L0H0", "rule", alpha=2.0), "up to 1"),
        (lambda: SpanEmphasis("L0H0", "rule", mode="include"), "from 1 on"),
        (lambda: SpanEmphasis("L0H0", ()), "no passage"),
        (lambda: SpanEmphasis("L0H0", None), "no passage"),
        (lambda: SpanEmphasis("L0H0", 3), "no passage"),
        (lambda: SpanEmphasis("L0H0", "rule", mode="beside"), "neither"),
        (lambda: SpanEmphasis("L0H0", "rule", several="twice"), "neither"),
        (lambda: AttentionTemperature("L0H0", 0.0), "above 0"),
        (lambda: RotaryDimensions("L0H0", "middle"), "lowest"),
        (lambda: RotaryDimensions("L0H0", (0, 0)), "different"),
        (lambda: RotaryDimensions("L0H0", (0,), count=2), "count"),
        (lambda: RotaryDimensions("L0H0", count=0), "count"),
        (lambda: RotaryDimensions("L0H0", side="v"), "side"),
        (lambda: RotaryDimensions("L0H0", factor=float("inf")), "factor"),
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(made: Callable[[], Intervention], says: str) -> None:
    with pytest.raises(InputError, match=says):
        made()


@pytest.mark.parametrize("which", ALL)
def test_heads_of_another_model_are_refused_before_anything_runs(which: str) -> None:
    with pytest.raises(InputError):
        ALL[which].but(heads="L40H0").edits(attached("llama"))


def test_a_passage_without_columns_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="rule"), ALL["emphasis"](attached("llama")):
        pass


def test_calibration_behind_a_prompt_that_was_not_seen_is_refused() -> None:
    model = attached("llama")
    ids = model.example["input_ids"][1:]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(Refusal, match="begins behind it"), ALL["calibration"](model), torch.no_grad():
        model(input_ids=ids[:, -1:], past_key_values=cache)


def test_two_of_them_together_are_both_of_them() -> None:
    model = attached("llama")
    inputs = inputs_of(model)
    spans = {"rule": rule_of(inputs["attention_mask"])}
    one, other = ALL["zero-tuning"], ALL["emphasis"]
    from headwise.use.intervention import Together

    with torch.no_grad():
        with Together((one, other))(model, spans=spans):
            together = model(**inputs).logits
        with one(model), other(model, spans=spans):
            nested = model(**inputs).logits
    assert torch.equal(together, nested)
    assert (together - logits(model, inputs, one)).abs().max() > EFFECT
