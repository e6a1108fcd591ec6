"""Equalities between different edits, and what an edit must leave alone.

An equality between two edits that take different ways through the code (the kernel's own softmax, recomputed rows,
the projection) is a check on both; where the algebra ends (learned sinks, position biases) the difference is shown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel

HEADS, KEYS = (0, 2), (1, 5, 15)
EFFECT, CLOSE = 1e-3, 3e-5


@dataclass(frozen=True)
class Place:
    model: str
    label: str
    groups: tuple[int, ...] = (0, 2)
    keys: tuple[int, ...] = KEYS

    @property
    def head_labels(self) -> list[str]:
        return [f"{self.label}H{index}" for index in HEADS]

    @property
    def group_labels(self) -> list[str]:
        return [f"{self.label}G{index}" for index in self.groups]


PLACES = {
    "mha": Place("gpt2", "L1"),
    "gqa": Place("llama", "L1", groups=(1,)),
    "window": Place("mistral", "L0", groups=(1,)),
    "softcap": Place("gemma2", "L1", groups=(1,)),
    "sink": Place("gpt_oss", "L0", groups=(1,)),
    "mla": Place("deepseek_v3", "L1"),
    "gated": Place("qwen3_next", "L1", groups=(1,)),
    "encoder": Place("bert", "L1"),
    "t5": Place("t5", "L1", keys=(1, 5)),
    "cross": Place("bart", "cross.L1"),
    "vision": Place("clip", "vision.L0"),
}


OPEN = ExitStack()


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


def outcome(model: AttachedModel) -> Tensor:
    """The model's main output where tokens are attended."""
    with torch.no_grad():
        output = model(**model.example)
    if "logits" not in output:
        return output.logits_per_image  # type: ignore[no-any-return]
    return (
        output.logits if "decoder_input_ids" in model.example else output.logits[model.example["attention_mask"].bool()]
    )


def edited(place: Place, *edits: Any) -> Tensor:
    with attached(place.model).editing(*edits):
        return outcome(attached(place.model))


def clean(place: Place) -> Tensor:
    return outcome(attached(place.model))


def agree(one: Tensor, other: Tensor, before: Tensor) -> None:
    """Equal to rounding, and not because nothing happened."""
    effect = (other - before).abs().max()
    assert effect > EFFECT, f"both changed only {effect}: nothing is shown"
    assert (one - other).abs().max() < CLOSE * max(1.0, float(effect))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# -- identities (and where they end) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "softcap", "mla", "encoder", "t5", "cross"])
def test_reweighting_columns_is_adding_the_logarithm_to_their_scores(kind: str) -> None:
    place = PLACES[kind]
    reweighted = edited(place, hw.edit.reweight(place.head_labels, 3.0, keys=place.keys))
    agree(
        edited(place, hw.edit.bias(place.head_labels, math.log(3), keys=place.keys)),
        reweighted,
        clean(place),
    )


def test_with_a_learned_sink_reweighting_keeps_the_sum_and_a_bias_does_not() -> None:
    place = PLACES["sink"]
    sums = {}
    for name, edit in {
        "reweight": hw.edit.reweight(place.head_labels, 3.0, keys=KEYS),
        "bias": hw.edit.bias(place.head_labels, math.log(3), keys=KEYS),
        "none": hw.edit.scale(place.head_labels, 1.0, variable="pattern"),
    }.items():
        model = attached(place.model)
        with torch.no_grad(), model.editing(edit), model.reading(hw.read.rows(place.head_labels)) as got:
            model(**model.example)
        sums[name] = got.rows[place.label].sum(-1)[0]
    assert torch.allclose(sums["reweight"], sums["none"], atol=1e-6)
    assert (sums["bias"] - sums["none"]).max() > EFFECT


@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "mla", "encoder", "cross", "vision"])
def test_a_query_of_zeros_attends_equally_to_all_it_can_see(kind: str) -> None:
    place = PLACES[kind]
    agree(
        edited(place, hw.edit.zero(place.head_labels, variable="q")),
        edited(place, hw.edit.uniform(place.head_labels)),
        clean(place),
    )


def test_where_scores_carry_a_position_bias_a_query_of_zeros_is_not_uniform() -> None:
    place = PLACES["t5"]
    zeroed = edited(place, hw.edit.zero(place.head_labels, variable="q"))
    assert (zeroed - edited(place, hw.edit.uniform(place.head_labels))).abs().max() > EFFECT


@pytest.mark.parametrize("kind", ["mha", "gqa", "sink", "mla", "t5", "cross", "vision"])
def test_scaling_every_weight_is_scaling_z(kind: str) -> None:
    place = PLACES[kind]
    agree(
        edited(place, hw.edit.scale(place.head_labels, -1.5, variable="pattern")),
        edited(place, hw.edit.scale(place.head_labels, -1.5)),
        clean(place),
    )


PROJECTIONS = {
    "mha": "transformer.h.1.attn.c_proj",
    "encoder": "bert.encoder.layer.1.attention.output.dense",
    "cross": "model.decoder.layers.1.encoder_attn.out_proj",
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_constant_added_to_z_is_a_bias_of_the_projection(kind: str) -> None:
    place, vectors = PLACES[kind], numbers(2, 12)
    projection: Any = attached(place.model).model.get_submodule(PROJECTIONS[kind])
    matrix = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
    blocks = matrix.detach().reshape(-1, 12, matrix.shape[-1])
    ours, before, kept = edited(place, hw.edit.add(place.head_labels, vectors)), clean(place), projection.bias.data
    projection.bias.data = kept + torch.einsum("hd,hdo->o", vectors, blocks[list(HEADS)])
    try:
        agree(ours, clean(place), before)
    finally:
        projection.bias.data = kept


def test_a_whole_groups_constant_may_be_added_to_v_or_to_z() -> None:
    place, vector = PLACES["gqa"], numbers(12)
    through_v = edited(place, hw.edit.add("L1G1", vector, variable="v"))
    agree(through_v, edited(place, hw.edit.add("L1H2, L1H3", vector.expand(2, 12))), clean(place))


# -- what must stay ----------------------------------------------------------------------------------------------------


NEUTRAL: dict[str, tuple[bool, Callable[[Place], Any]]] = {
    "scale z": (True, lambda p: hw.edit.scale(p.head_labels, 1.0)),
    "add z": (True, lambda p: hw.edit.add(p.head_labels, 0.0)),
    "strength z": (True, lambda p: hw.edit.zero(p.head_labels, strength=0.0)),
    "mix z": (True, lambda p: hw.edit.mix(p.head_labels, 5.0, 0.0)),
    "scale q": (True, lambda p: hw.edit.scale(p.head_labels, 1.0, variable="q")),
    "scale k": (True, lambda p: hw.edit.scale(p.group_labels, 1.0, variable="k")),
    "add v": (True, lambda p: hw.edit.add(p.group_labels, 0.0, variable="v")),
    "scope without positions": (True, lambda p: hw.edit.zero(p.head_labels, scope="decode")),
    "reweight": (False, lambda p: hw.edit.reweight(p.head_labels, 1.0, keys=KEYS)),
    "bias": (False, lambda p: hw.edit.bias(p.head_labels, 0.0)),
    "strength rows": (False, lambda p: hw.edit.uniform(p.head_labels, strength=0.0)),
    "redistribute": (False, lambda p: hw.edit.redistribute(p.head_labels, 0.0, keys=KEYS)),
}


@pytest.mark.parametrize("setting", NEUTRAL)
@pytest.mark.parametrize("kind", ["mha", "gqa", "softcap", "sink", "mla", "gated"])
def test_a_neutral_setting_changes_nothing(kind: str, setting: str) -> None:
    place, (exactly, make) = PLACES[kind], NEUTRAL[setting]
    ours, before = edited(place, make(place)), clean(place)
    assert torch.equal(ours, before) if exactly else torch.allclose(ours, before, atol=1e-5)


@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "sink", "cross"])
def test_other_heads_queries_and_rows_keep_the_kernels_bits(kind: str) -> None:
    place = PLACES[kind]
    model = attached(place.model)

    def z_after(*edits: Any) -> Tensor:
        seen: list[Tensor] = []
        projection = model.model.get_submodule(str(model.site(place.label).projection))
        handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        try:
            with torch.no_grad(), model.editing(*edits):
                model(**model.example)
        finally:
            handle.remove()
        return seen[0].reshape(*seen[0].shape[:2], model.site(place.label).n_heads, -1)

    before = z_after(hw.edit.scale(place.head_labels, 1.0))
    after = z_after(hw.edit.rewrite(place.head_labels, lambda w, here: w.flip(1), queries=[4, 8], rows=[0]))
    same = (before == after).all(dim=-1)
    expected = torch.ones_like(same)
    for query in (4, 8):
        expected[0, query, list(HEADS)] = False
    assert torch.equal(same, expected)


@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "softcap", "sink", "mla", "gated"])
def test_hidden_keys_stay_hidden_whatever_an_edit_returns(kind: str) -> None:
    """Tokens of the future and of the padding are changed: a query whose pattern was edited must not notice."""
    place, query = PLACES[kind], 25
    model = attached(place.model)
    inputs = dict(model.example)
    edits = [
        hw.edit.set(place.head_labels, lambda scores, here: torch.full_like(scores, 3.0), variable="score"),
        hw.edit.rewrite(place.head_labels, lambda pattern, here: torch.ones_like(pattern)),
    ]
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][:, query + 1 :] = 77
    other["input_ids"][1, :12] = 78
    for edit in edits:
        with torch.no_grad(), model.editing(edit), model.reading(hw.read.rows(place.head_labels)) as got:
            one, two = model(**inputs).logits, model(**other).logits
        rows = got.rows[place.label]
        assert torch.allclose(one[:, query], two[:, query], atol=1e-6)
        assert (one[:, query + 1] - two[:, query + 1]).abs().max() > EFFECT
        assert (rows[1, :, 12:, :12] == 0).all()
        assert (rows.triu(1) == 0).all()
        if kind == "window":
            assert (rows[0, :, 20, :13] == 0).all()
