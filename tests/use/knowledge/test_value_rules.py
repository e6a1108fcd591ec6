"""What interventions on values and directions share: neutral settings, padding, caches, whole texts, refusals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.use.directions.head_pursuit import HeadPursuit
from headwise.use.directions.inference_time import ITI
from headwise.use.intervention import Intervention, intervention
from headwise.use.knowledge.juice import JUICE, JustRunOnce
from headwise.use.knowledge.knowledge_pruning import PH3
from headwise.use.knowledge.temporal_edit import TemporalEdit
from headwise.use.knowledge.value_scaling import FactualScaling

MODELS = ("llama", "gpt2", "gemma2")
CLOSE, EFFECT = 5e-5, 1e-3
HEADS = HeadSet.parse("L0H1, L1H0, L2H2")
WIDTH = 12
"""Of a head, in all these builds."""

OPEN = ExitStack()


def unit(seed: int) -> Tensor:
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def iti(alpha: float) -> ITI:
    return ITI({label: unit(i) for i, label in enumerate(HEADS.labels)}, dict.fromkeys(HEADS.labels, 0.4), alpha)


ALL: dict[str, Intervention] = {
    "ph3": PH3(HEADS),
    "factual-scaling": FactualScaling("L1H0", -2.0),
    "juice": JUICE("L0H1, L1H0", "L2H2", 2.0, 1.5),
    "juice-caches": JUICE("L0H1, L1H0", "L2H2", 2.0, 1.5, mode="caches"),
    "just-run-once": JustRunOnce("L0H1, L1H0", "L2H2", 2.0, 1.5),
    "temporal-edit": TemporalEdit({"L0G1": unit(7), "L1G0": unit(8)}, 3.0, span="when"),
    "iti": iti(5.0),
    "head-pursuit": HeadPursuit(HEADS, 5.0),
}
NEUTRAL: dict[str, Intervention] = {
    "factual-scaling": FactualScaling("L1H0"),
    "juice": JUICE("L0H1", "L2H2", 0.0, 0.0),
    "juice-one-set": JUICE(enhance="L0H1", enhance_by=0.0),
    "just-run-once": JustRunOnce("L0H1", "L2H2", 0.0, 0.0),
    "temporal-edit": TemporalEdit({"L0G1": unit(7)}, 0.0, span="when"),
    "temporal-edit-nothing": TemporalEdit({"L0G1": 0 * unit(7)}, 3.0, span="when"),
    "iti": iti(0.0),
    "head-pursuit": HeadPursuit(HEADS, 1.0),
}
CASES = [(name, which) for name in MODELS for which in ALL]


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example, name=name))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()


def when(mask: Tensor) -> dict[str, list[list[int]]]:
    """The second and third attended token of each row."""
    return {"when": [[int(row.nonzero()[0]) + offset for offset in (1, 2)] for row in mask]}


def inputs_of(model: AttachedModel) -> dict[str, Tensor]:
    mask = model.example["attention_mask"]
    return {**model.example, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(model: AttachedModel, inputs: dict[str, Tensor], used: Intervention | None = None) -> Tensor:
    with torch.no_grad():
        if used is None:
            return model(**inputs).logits
        with used(model, spans=when(inputs["attention_mask"])):
            return model(**inputs).logits


@pytest.mark.parametrize("which", NEUTRAL)
def test_neutral_settings_make_no_edit(which: str) -> None:
    model, used = attached("llama"), NEUTRAL[which]
    assert used.edits(model) == ()
    assert used.beside(model) is None
    inputs = inputs_of(model)
    assert torch.equal(logits(model, inputs, used), logits(model, inputs))


@pytest.mark.parametrize(("name", "which"), CASES)
def test_a_row_beside_others_is_what_it_is_alone(name: str, which: str) -> None:
    model = attached(name)
    inputs = inputs_of(model)
    assert not bool(inputs["attention_mask"][:, 0].all())  # padded on the left
    batched = logits(model, inputs, ALL[which])
    moved = (batched - logits(model, inputs))[inputs["attention_mask"].bool()].abs().max()
    assert moved > EFFECT
    for row, mask in enumerate(inputs["attention_mask"]):
        start = int(mask.argmax())
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert (logits(model, alone, ALL[which])[0] - batched[row, start:]).abs().max() < CLOSE * (1 + float(moved))


@pytest.mark.parametrize(("name", "which"), CASES)
def test_with_a_cache_without_one_and_as_one_text_are_the_same(name: str, which: str) -> None:
    model, used = attached(name), ALL[which]
    example = {key: model.example[key] for key in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    made: dict[bool, Any] = {}
    for cached in (True, False):
        with used(model, spans=when(example["attention_mask"])):
            made[cached] = model.generate(**example, use_cache=cached, **options)
    stepwise = torch.stack(made[True].logits, dim=1)
    assert torch.equal(made[True].sequences, made[False].sequences)
    assert (stepwise - torch.stack(made[False].logits, dim=1)).abs().max() < CLOSE * 4
    assert (model.generate(**example, **options).logits[0] - made[True].logits[0]).abs().max() > EFFECT
    width = example["input_ids"].shape[1]
    mask = torch.cat([example["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    whole = {
        "input_ids": made[True].sequences[:, :-1],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad(), used(model, spans=when(mask), prompt_length=width):
        again = model(**whole).logits[:, width - 1 :]
    assert (again - stepwise).abs().max() < CLOSE * 4


@pytest.mark.parametrize("which", ALL)
def test_heads_of_another_model_are_refused_before_anything_runs(which: str) -> None:
    far = {head.label: head.label.replace("L", "L9", 1) for head in ALL[which].acts_on}
    moved = ALL[which].on([far[label] for label in far])
    with pytest.raises(InputError, match="L9"), moved(attached("llama"), spans={"when": [1]}):
        pytest.fail("opened on a model without these heads")


@pytest.mark.parametrize("which", ALL)
def test_they_are_in_the_catalogue_and_say_their_settings(which: str) -> None:
    used = ALL[which]
    assert intervention(used.id) is type(used)
    assert type(used)(**used.settings).settings.keys() == used.settings.keys()
    assert repr(used).startswith(type(used).__name__)
    assert used.acts_on


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: PH3(""), "no heads"),
        (lambda: PH3("L0H1", scope="never"), "scope"),
        (lambda: PH3(HeadSet.parse("L0G1")), "KV groups"),
        (lambda: FactualScaling("L0H1, L0H2", 2.0), "one head"),
        (lambda: FactualScaling("L0H1", float("inf")), "out of range"),
        (lambda: JUICE(), "no heads"),
        (lambda: JUICE("L0H1", enhance_by=-1.0), "from 0 on"),
        (lambda: JUICE("L0H1", suppress="L0H1, L0H2"), "both sets"),
        (lambda: JUICE("L0H1", mode="threads"), "neither 'batch' nor"),  # type: ignore[arg-type]
        (lambda: JustRunOnce("L0H1", suppress_by=float("nan")), "out of range"),
        (lambda: TemporalEdit({}), "mapping from KV group"),
        (lambda: TemporalEdit({"L0H1": unit(1)}), "KV group"),
        (lambda: TemporalEdit({"L0G1": unit(1), "L0G01": unit(1)}), "one for each group"),
        (lambda: TemporalEdit({"L0G0, L0G1": unit(1)}), "one for each group"),
        (lambda: TemporalEdit({"L0G1": unit(1) / 0}), "no finite vector"),
        (lambda: TemporalEdit({"L0G1": unit(1)}, float("nan")), "out of range"),
        (lambda: TemporalEdit({"L0G1": unit(1)}, span=""), "span"),
        (lambda: ITI({}, {}), "mapping from head"),
        (lambda: ITI({"L0H1": 2 * unit(1)}, {"L0H1": 1.0}), "length 1"),
        (lambda: ITI({"L0H1": unit(1)}, {"L0H2": 1.0}), "L0H"),
        (lambda: ITI({"L0H1": unit(1)}, {"L0H1": -1.0}), "standard deviation"),
        (lambda: ITI({"L0H1": unit(1)}, {"L0H1": 1.0}, float("inf")), "out of range"),
        (lambda: HeadPursuit("L0H1", float("nan")), "out of range"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(made: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        made()
    assert "\n" not in str(error.value)


def test_vectors_of_another_width_are_refused_before_anything_runs() -> None:
    wide = torch.ones(WIDTH + 1) / (WIDTH + 1) ** 0.5
    for used in (TemporalEdit({"L0G1": wide}), ITI({"L0H1": wide}, {"L0H1": 1.0})):
        with pytest.raises(InputError, match=f"{WIDTH} numbers"):
            used.edits(attached("llama"))
