"""What all interventions share: how they open, nest and combine, in one stream and in two, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.catalogue import InterventionEntry, entries
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.heads import HeadSet
from headwise.model.edit import Edit
from headwise.use import (
    JUICE,
    ContextAware,
    HeadOffset,
    HeadRemoval,
    HeadScaling,
    Intervention,
    SpanEmphasis,
    TemporalEdit,
    Together,
    intervention,
)
from headwise.use.intervention import Beside, finite, named_heads

MODELS = ("llama", "gpt2")
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}


@cache
def built(name: str) -> hw.AttachedModel:
    return hw.load(f"zoo:tiny-{name}")


def logits(model: hw.AttachedModel) -> Tensor:
    with torch.no_grad():
        return model(**model.example).logits


def under(model: hw.AttachedModel, *blocks: Intervention) -> Tensor:
    """The logits with these blocks open, the first one outermost."""
    if not blocks:
        return logits(model)
    with blocks[0](model):
        return under(model, *blocks[1:])


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(Intervention):
    """Logits of this run minus those of a run beside it that lacks heads."""

    id: ClassVar[str] = "contrast-for-tests"
    lacking: HeadSet
    mode: str = "batch"

    def beside(self, model: hw.AttachedModel) -> Beside:
        return Beside((hw.edit.zero(self.lacking),), lambda first, second: first - second, self.mode)


@dataclass(frozen=True, eq=False, repr=False)
class Borrowed(Intervention):
    """z of heads is what it is in a run beside, which lacks other heads."""

    id: ClassVar[str] = "borrowed-for-tests"
    heads: HeadSet
    lacking: HeadSet

    def edits(self, model: hw.AttachedModel) -> tuple[Edit, ...]:
        return (hw.edit.patch(self.heads, hw.edit.OTHER),)

    def beside(self, model: hw.AttachedModel) -> Beside:
        return Beside((hw.edit.zero(self.lacking),))


def offset(model: hw.AttachedModel, head: str = "L1H2") -> HeadOffset:
    return HeadOffset({head: torch.linspace(-2, 3, model.site("L1").head_dim)})


# -- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_block_acts_inside_and_leaves_nothing(name: str) -> None:
    model = built(name)
    plain = logits(model)
    assert not torch.equal(under(model, HeadRemoval("L0H1")), plain)
    assert torch.equal(logits(model), plain)
    assert not model.planned


def test_a_block_that_fails_leaves_nothing() -> None:
    model = built("llama")
    plain = logits(model)
    with pytest.raises(ZeroDivisionError), HeadRemoval("L0H1")(model):
        _ = 1 / 0
    assert not model.planned
    assert torch.equal(logits(model), plain)


def test_no_edit_at_all_is_the_plain_model() -> None:
    class Nothing(Intervention):
        id = "nothing"

    model = built("llama")
    with Nothing()(model) as opened:
        assert torch.equal(logits(model), logits(model))
        assert not model.planned
    assert not opened.fired


def test_what_opens_tells_what_was_edited() -> None:
    model = built("llama")
    with HeadRemoval("L0H1, L1H2")(model) as opened:
        logits(model)
    assert [each.site for each in opened.fired] == ["L0", "L1"]


def test_only_attached_models_are_taken() -> None:
    model = built("llama")
    with pytest.raises(InputError, match="head-removal works on an attached model"):
        HeadRemoval("L0H1")(model.model)  # type: ignore[arg-type]


def test_heads_of_another_model_are_refused_before_anything_runs() -> None:
    model = built("llama")
    for given in (HeadRemoval("L7H0"), Together((HeadRemoval("L0H0"), HeadRemoval("L0H4")))):
        with pytest.raises(InputError, match=r"L7|L0H4"), given(model):
            pytest.fail("the block was entered")
        assert not model.planned


def test_spans_and_the_end_of_the_prompt_reach_the_run() -> None:
    model = built("llama")
    plain = logits(model)
    with HeadRemoval("L0H1", scope="span:here")(model, spans={"here": [30]}):
        spanned = logits(model)
    assert torch.equal(spanned[:, :30], plain[:, :30])
    assert not torch.equal(spanned[:, 30], plain[:, 30])
    with HeadRemoval("L0H1", scope="decode")(model, prompt_length=31):
        decoded = logits(model)
    assert torch.equal(decoded[:, :31], plain[:, :31])
    assert not torch.equal(decoded[:, 31], plain[:, 31])
    with pytest.raises((InputError, Refusal), match="here"), HeadRemoval("L0H1", scope="span:here")(model):
        logits(model)


# -- together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_together_is_blocks_in_the_same_order(name: str) -> None:
    model = built(name)
    double, move = HeadScaling("L1H2", 2.0), offset(model)
    first, second = under(model, Together((double, move))), under(model, Together((move, double)))
    assert torch.equal(first, under(model, double, move))
    assert torch.equal(second, under(model, move, double))
    assert torch.allclose(second, under(model, HeadScaling("L1H2", 2.0), move.but(strength=2.0)), **CLOSE)
    assert not torch.allclose(first, second, atol=1e-3)


def test_together_nests_and_one_is_itself() -> None:
    model = built("llama")
    double, move = HeadScaling("L0H1", 2.0), offset(model)
    assert torch.equal(under(model, Together((Together((double,)), move))), under(model, double, move))
    assert torch.equal(under(model, Together((double,))), under(model, double))
    assert Together([double, move]).parts == (double, move)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["batch", "caches"])
@pytest.mark.parametrize("name", MODELS)
def test_the_others_act_in_both_streams(name: str, mode: str) -> None:
    """What is contrasted is the steered model with the steered model that lacks heads."""
    model = built(name)
    move, lacking = offset(model, "L0H0"), HeadSet.parse("L1H1")
    steered, without = under(model, move), under(model, move, HeadRemoval(lacking))
    for parts in ((move, Contrast(lacking, mode)), (Contrast(lacking, mode), move)):
        assert torch.allclose(under(model, Together(parts)), steered - without, **CLOSE)
    plain = logits(model) - under(model, HeadRemoval(lacking))
    assert torch.allclose(under(model, Contrast(lacking, mode)), plain, **CLOSE)
    assert not torch.allclose(plain, steered - without, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_borrowed_from_a_stream_comes_from_the_steered_one(name: str) -> None:
    model = built(name)
    move, heads, lacking = offset(model, "L0H0"), HeadSet.parse("L2H1"), HeadSet.parse("L1H1")
    with torch.no_grad(), move(model), HeadRemoval(lacking)(model), model.reading(hw.read.z("L2")) as donor:
        model(**model.example)
    with torch.no_grad(), move(model), model.editing(hw.edit.patch(heads, donor.z)):
        expected = model(**model.example).logits
    assert torch.allclose(under(model, Together((move, Borrowed(heads, lacking)))), expected, **CLOSE)


@pytest.mark.parametrize("mode", ["batch", "caches"])
def test_nested_blocks_edit_the_first_stream_alone_and_together_both(mode: str) -> None:
    """z of one layer does not hang on its own edits: with g from the one and alpha of z' from the other,

    nested    g z + alpha z   = (g + alpha) z       Together    g z + alpha g z = g (1 + alpha) z
    """
    model, g, alpha = built("llama"), 3.0, 2.0
    scaled, twice = HeadScaling("L1H2", g), JUICE("L1H2", enhance_by=alpha, mode=mode)  # type: ignore[arg-type]
    nested, both = (under(model, HeadScaling("L1H2", factor)) for factor in (g + alpha, g * (1 + alpha)))
    assert torch.allclose(under(model, scaled, twice), nested, **CLOSE)
    assert torch.allclose(under(model, Together((scaled, twice))), both, **CLOSE)
    assert not torch.allclose(nested, both, atol=1e-2)


def test_two_second_streams_are_refused() -> None:
    model, both = built("llama"), Together((Contrast(HeadSet.parse("L0H0")), Contrast(HeadSet.parse("L1H1"))))
    with (
        pytest.raises(Refusal, match="contrast-for-tests and contrast-for-tests each need a second stream"),
        both(model),
    ):
        pytest.fail("the block was entered")
    with pytest.raises(PlanConflict), both.parts[0](model), both.parts[1](model):
        pytest.fail("the block was entered")
    assert not model.planned


@pytest.mark.parametrize(
    "parts",
    [(), ("L0H1",), (HeadRemoval,), HeadRemoval("L0H1"), None],
    ids=["none", "a word", "a class", "one alone", "nothing"],
)
def test_together_takes_interventions(parts: Any) -> None:
    with pytest.raises(InputError, match="Together takes interventions"):
        Together(parts)


# -- settings -------------------------------------------------------------------------------------------------------


def test_other_settings_make_another_one() -> None:
    given = HeadScaling("L0H1", 2.0)
    other = given.but(factor=3.0, scope="last")
    assert (given.factor, given.scope, other.factor, other.scope) == (2.0, "all", 3.0, "last")
    assert other.settings == {"heads": HeadSet.parse("L0H1"), "factor": 3.0, "scope": "last"}
    with pytest.raises(InputError, match="head-scaling has no setting 'strength'; it has heads, factor, scope"):
        given.but(strength=1.0)
    with pytest.raises(InputError, match="out of range"):
        given.but(factor=float("nan"))
    with pytest.raises(AttributeError):
        given.factor = 1.0  # type: ignore[misc]


def test_what_is_printed_is_short() -> None:
    assert repr(HeadScaling("L0H1", 2.0)) == "HeadScaling(heads=HeadSet(L0H1), factor=2.0, scope='all')"
    many = HeadOffset({f"L0H{n}": torch.ones(12) for n in range(4)})
    assert repr(many) == "HeadOffset(offset=<4 entries>, strength=1.0, scope='all')"


def test_the_passages_that_are_named_are_known() -> None:
    dated, stressed = TemporalEdit({"L0G1": torch.ones(12)}), SpanEmphasis("L0H1", ("rule", "name"))
    assert HeadScaling("L0H1", 2.0).named_spans == ()
    assert HeadScaling("L0H1", 2.0, scope="span:rule").named_spans == ("rule",)
    assert Together((stressed, ContextAware(), dated)).named_spans == ("rule", "name", "context", "year")


def test_every_intervention_is_in_the_catalogue_by_its_own_id() -> None:
    for each in entries("interventions"):
        assert isinstance(each, InterventionEntry)
        assert intervention(each.id) is each.made
        assert each.made.id == each.id
    with pytest.raises(InputError, match="did you mean head-scaling"):
        intervention("head-scalling")


@pytest.mark.parametrize(
    ("value", "low", "high", "message"),
    [
        ("much", 0, 1, "is not a number"),
        ("0.5", 0, 1, "is not a number"),
        (True, 0, 1, "is not a number"),
        (np.True_, 0, 1, "is not a number"),
        (torch.ones(2), 0, 1, "is not a number"),
        (10**400, 0, 1, "is not a number"),
        (None, 0, 1, "is not a number"),
        (float("inf"), 0, 1, "from 0 to 1"),
        (float("nan"), -1, float("inf"), "from -1 on"),
        (2, float("-inf"), 1, "up to 1"),
        (float("nan"), float("-inf"), float("inf"), "that is finite"),
    ],
)
def test_numbers_out_of_range_are_refused(value: Any, low: float, high: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        finite(value, "it", low, high)


def test_numbers_in_range_are_taken_ends_included() -> None:
    given = (0, 1, 0.5, torch.tensor(0.25), np.int64(1), np.float32(0.5))
    assert [finite(each, "it", 0, 1) for each in given] == [0, 1, 0.5, 0.25, 1, 0.5]


def test_heads_are_read_in_every_form() -> None:
    wanted = HeadSet.parse("L0H1, L2H0")
    for form in ("L0H1 L2H0", ["L2H0", "L0H1"], {0: [1], 2: [0]}, wanted, wanted.heads):
        assert named_heads(form, "it") == wanted
