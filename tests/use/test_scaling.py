"""Scaling, offsets and removal against hooks by hand on output projections, in models with and without KV groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.use import HeadOffset, HeadRemoval, HeadScaling, Intervention

MODELS = ("llama", "gpt2", "gemma3_text")
HEADS = HeadSet.parse("L0H1, L1H2, L1H3")
CLOSE = {"rtol": 0, "atol": 2e-5}


@cache
def built(name: str) -> hw.AttachedModel:
    return hw.load(f"zoo:tiny-{name}")


def vectors(model: hw.AttachedModel, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(len(HEADS), model.site("L0").head_dim, generator=generator) * scale
    return dict(zip(HEADS.labels, drawn, strict=True))


Change = Callable[[Tensor], Tensor]


@contextmanager
def by_hand(model: hw.AttachedModel, changes: Mapping[str, Change]) -> Iterator[None]:
    """Each head's columns of what enters its output projection, changed by a plain hook of torch."""
    handles = []
    for label, change in changes.items():
        site = model.site(Head.parse(label).site.label)
        low = Head.parse(label).index * site.head_dim

        def hook(_: Any, args: Any, low: int = low, high: int = low + site.head_dim, change: Change = change) -> Any:
            entering = args[0].clone()
            entering[..., low:high] = change(entering[..., low:high])
            return (entering, *args[1:])

        handles.append(model.model.get_submodule(str(site.projection)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: hw.AttachedModel, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or model.example)).logits


def cases(model: hw.AttachedModel) -> dict[str, tuple[Intervention, dict[str, Change]]]:
    """By name: an intervention, and what it does to z of each head."""
    moved = vectors(model)
    ramp = torch.linspace(-1, 2, model.site("L0").head_dim)
    numbers = dict(zip(HEADS.labels, (0.5, 3.0, -1.0), strict=True))
    return {
        "scaling": (HeadScaling(HEADS, -2.0), dict.fromkeys(HEADS.labels, lambda z: -2.0 * z)),
        "scaling by label": (HeadScaling(numbers), {h: (lambda z, g=g: g * z) for h, g in numbers.items()}),
        "scaling by dimension": (HeadScaling({"L1H2": ramp}), {"L1H2": lambda z: ramp * z}),
        "scaling to nothing": (HeadScaling(HEADS, 0.0), dict.fromkeys(HEADS.labels, torch.zeros_like)),
        "offset": (HeadOffset(moved, 1.5), {h: (lambda z, d=d: z + 1.5 * d) for h, d in moved.items()}),
        "removal": (HeadRemoval(HEADS), dict.fromkeys(HEADS.labels, torch.zeros_like)),
        "removal by mean": (
            HeadRemoval(HEADS, "mean", moved),
            {h: (lambda z, d=d: d.expand_as(z)) for h, d in moved.items()},
        ),
    }


CASES = (
    "scaling",
    "scaling by label",
    "scaling by dimension",
    "scaling to nothing",
    "offset",
    "removal",
    "removal by mean",
)


def test_every_case_is_tried() -> None:
    assert tuple(cases(built("llama"))) == CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_a_hook_by_hand_does(name: str, case: str) -> None:
    model = built(name)
    given, changes = cases(model)[case]
    with given(model):
        found = logits(model)
    with model.aside(), by_hand(model, changes):
        expected = logits(model)
    assert torch.allclose(found, expected, **CLOSE)
    assert (found - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_uniform_attention_is_the_mean_of_the_values_seen(name: str) -> None:
    """z of a removed head at a column is the mean of v over attended columns up to it; other heads keep their z."""
    model = built(name)
    with torch.no_grad(), model.reading(hw.read.v("L1"), hw.read.z("L1")) as plain:
        model(**model.example)
    heads = HeadSet.parse("L1H2, L1H3")
    with torch.no_grad(), HeadRemoval(heads, "uniform")(model), model.reading(hw.read.z("L1")) as got:
        model(**model.example)
    site = model.site("L1")
    attended = model.example["attention_mask"].bool()
    values, z, before = plain.v["L1"], got.z["L1"], plain.z["L1"]
    for row, column in ((0, 0), (0, 5), (0, 31), (1, 12), (1, 13), (1, 31)):
        seen = attended[row].nonzero()[:, 0]
        seen = seen[seen <= column]
        for head in (2, 3):
            expected = values[row, seen, head // site.group_size].mean(0)
            assert torch.allclose(z[row, column, head], expected, **CLOSE)
        assert torch.equal(z[row, column, :2], before[row, column, :2])


NEUTRAL: dict[str, Callable[[hw.AttachedModel], Intervention]] = {
    "scaling": lambda _: HeadScaling(HEADS),
    "scaling by label": lambda _: HeadScaling(dict.fromkeys(HEADS.labels, 1)),
    "scaling by dimension": lambda m: HeadScaling({"L1H2": torch.ones(m.site("L1").head_dim)}),
    "offset of nothing": lambda m: HeadOffset(vectors(m, 0.0), 3.0),
    "offset of no strength": lambda m: HeadOffset(vectors(m), 0.0),
}


@pytest.mark.parametrize("case", NEUTRAL)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neutral_settings_leave_every_bit(name: str, case: str) -> None:
    model = built(name)
    given = NEUTRAL[case](model)
    assert given.edits(model) == ()
    plain = logits(model)
    with given(model):
        assert torch.equal(logits(model), plain)


def test_a_mapping_with_a_neutral_entry_edits_the_others_only() -> None:
    model = built("llama")
    (edit,) = HeadScaling({"L0H1": 1.0, "L1H2": 0.5}).edits(model)
    assert edit.heads == HeadSet.parse("L1H2")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_row_gives_what_it_gives_alone(name: str, case: str) -> None:
    model = built(name)
    given = cases(model)[case][0]
    start = int(model.example["attention_mask"][1].argmax())
    alone = {"input_ids": model.example["input_ids"][1:, start:]}
    inputs = dict(model.example)
    if name == "gpt2":  # which numbers columns and not tokens
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with given(model):
        assert torch.allclose(logits(model, inputs)[1, start:], logits(model, alone)[0], **CLOSE)


@pytest.mark.parametrize("scope", ["all", "prompt", "decode", "last"])
@pytest.mark.parametrize("case", ["scaling", "offset", "removal by mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(name: str, case: str, scope: str) -> None:
    model = built(name)
    given = cases(model)[case][0].but(scope=scope)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with ExitStack() as blocks:
        blocks.enter_context(given(model))
        with_cache, without = (model.generate(**model.example, **options, use_cache=each) for each in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no heads": (lambda: HeadScaling("", 2.0), "was given no heads"),
    "KV groups": (lambda: HeadScaling(HeadSet.parse("L0G1", "group"), 2.0), "acts on heads, and"),
    "unreadable": (lambda: HeadScaling("first", 2.0), "'first' is not a head label"),
    "a word as a factor": (lambda: HeadScaling("L0H1", "twice"), "factor='twice' is not a number"),  # type: ignore
    "not finite": (lambda: HeadScaling("L0H1", float("inf")), "factor=inf is out of range"),
    "a head without a factor": (lambda: HeadScaling("L0H1, L0H2", {"L0H1": 2.0}), "L0H2"),
    "a factor without a head": (lambda: HeadScaling("L0H1", {"L0H1": 2.0, "L0H2": 2.0}), "L0H2"),
    "factors given twice": (lambda: HeadScaling({"L0H1": 2.0}, 3.0), "leave it out, or name the heads alone"),
    "two labels of one head": (lambda: HeadScaling({"L0H1": 2.0, "L0H01": 3.0}), "not one for each head"),
    "a label of two heads": (lambda: HeadScaling({"L0H1, L0H2": 2.0}), "not one for each head"),
    "a truth as a factor": (lambda: HeadScaling({"L0H1": True}), "is not a number"),
    "a number as an offset": (lambda: HeadOffset({"L0H1": 0.5}), "is no tensor"),  # type: ignore[dict-item]
    "a matrix": (lambda: HeadScaling({"L0H1": torch.ones(2, 2)}), r"has shape \[2, 2\]"),
    "a vector that is not finite": (lambda: HeadOffset({"L0H1": torch.tensor([1.0, float("nan")])}), "finite"),
    "no offset": (lambda: HeadOffset({}), "takes a mapping"),
    "no vector": (lambda: HeadOffset("L0H1"), "takes a mapping"),  # type: ignore[arg-type]
    "no strength": (lambda: HeadOffset({"L0H1": torch.ones(12)}, float("nan")), "strength=nan is out of range"),
    "another mode": (lambda: HeadRemoval("L0H1", "mask"), "mode='mask' is not one of"),  # type: ignore[arg-type]
    "mean without means": (lambda: HeadRemoval("L0H1", "mean"), "mean= goes with mode='mean'"),
    "means without mean": (lambda: HeadRemoval("L0H1", "zero", {"L0H1": torch.ones(12)}), "mean= goes with"),
    "another scope": (lambda: HeadScaling("L0H1", 2.0, "everywhere"), "everywhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_when_it_is_made(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        HeadScaling("L9H0", 2.0),
        HeadScaling("L0H4", 1.0),
        HeadOffset({"L0H4": torch.ones(12)}, 0.0),
        HeadRemoval("L0H1, L3H0"),
        HeadOffset({"L0H1": torch.ones(5)}),
        HeadScaling({"L0H1": torch.full((5,), 2.0)}),
        HeadRemoval("L0H1", "mean", {"L0H1": torch.ones(5)}),
    ],
    ids=str,
)
def test_heads_and_shapes_of_another_model_are_refused_before_anything_runs(given: Intervention) -> None:
    model = built("llama")
    with pytest.raises(InputError, match=r"L9|L0H4|L3|shape|12"), given(model):
        pytest.fail("the block was entered")
