"""Knock-outs of many sets at once against one set at a time, and against `hw.measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import T5Model

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.probes import ItemSet, encode, probe
from headwise.sweep import MODES, KnockOut, measure_sets
from headwise.sweep.knockout import reference_of
from headwise.sweep.measuring import chunks_of
from headwise.zoo.planted import planted

SETS = [HeadSet.parse(each) for each in ("L0H1", "L1H2, L0H3", "", "L1H0, L1H1, L0H0", "L1H3")]
ARCHITECTURES = ("llama", "llama-gqa")  # every query head its own keys and values, and two to a pair
SCOPES = ("all", "last", "decode", "prompt", "span:first")


@cache
def small(architecture: str) -> hw.AttachedModel:
    organism = planted(architecture, layers=2, heads=4, circuits=("induction",), seed=0)  # type: ignore[arg-type]
    return hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)


@cache
def texts(architecture: str) -> ItemSet:
    """Answers of many tokens and prompts of different length, so that rows are padded and `decode` has positions."""
    items = encode(probe("text").over(sentences=3), small(architecture).tokenizer, n=5)
    assert len({len(each.prompt) for each in items}) > 1
    return items


def knock_out(architecture: str, mode: str, scope: str = "all", strength: float = 1.0) -> KnockOut:
    needs = mode in ("mean", "resample")
    reference = reference_of(small(architecture), texts(architecture)) if needs else None
    return KnockOut(mode, scope, reference, seed=3, strength=strength)  # type: ignore[arg-type]


def one_by_one(model: hw.AttachedModel, items: ItemSet, sets: Sequence[HeadSet], how: KnockOut, metric: str) -> Tensor:
    """The definition, an edit at a time."""
    rows = [hw.measure(model, items, metric, edits=[how.edit(each)] if each else ()) for each in sets]
    return torch.stack(rows).double()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "resample"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sets_together_are_what_they_are_one_by_one(architecture: str, mode: str, scope: str) -> None:
    model, items, how = small(architecture), texts(architecture), knock_out(architecture, mode, scope)
    together = measure_sets(model, items, SETS, how)
    torch.testing.assert_close(together, one_by_one(model, items, SETS, how, "cross-entropy"), rtol=0, atol=1e-9)
    alone = torch.cat([measure_sets(model, items, [each], how) for each in SETS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert (together[2] - together[1]).abs().max() > 1e-6, "a knock-out that changes nothing would pass as well"


@pytest.mark.parametrize("scope", ["all", "last"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_draws_are_those_of_the_rows(architecture: str, scope: str) -> None:
    """`resample` draws by row and column, so it is the same only where the rows are laid out alike."""
    model, how = small(architecture), knock_out(architecture, "resample", scope)
    items = texts(architecture)
    found = measure_sets(model, items, SETS, how)
    for places, part in chunks_of(items, 1024, model.device):
        together = ItemSet(items.probe, part, {}, items.metric, items.pad)
        expected = torch.stack(
            [hw.measure(model, together, edits=[how.edit(each)] if each else (), batch_size=16) for each in SETS]
        )
        torch.testing.assert_close(found[:, places], expected.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform"])
def test_a_share_of_a_knock_out_is_a_straight_line_of_z(mode: str) -> None:
    model, items = small("llama"), texts("llama")
    half = knock_out("llama", mode, strength=0.5)
    torch.testing.assert_close(
        measure_sets(model, items, SETS, half),
        one_by_one(model, items, SETS, half, "cross-entropy"),
        rtol=0,
        atol=1e-9,
    )
    nothing = measure_sets(model, items, SETS, knock_out("llama", mode, strength=0.0))
    torch.testing.assert_close(nothing, nothing[2:3].expand_as(nothing), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [None, 60, 100_000])
def test_the_layout_of_forwards_changes_nothing(tokens: int | None) -> None:
    """One item at a time, some, and all at once."""
    model, items, how = small("llama"), texts("llama"), KnockOut()
    longest = max(len(each.prompt) + len(each.answer) for each in items)
    expected = measure_sets(model, items, SETS, how, tokens=longest)
    found = measure_sets(model, items, SETS, how, tokens=None if tokens is None else max(tokens, longest))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", ["kl-to-clean", "cosine-to-clean", "exact-match-generated"])
def test_metrics_of_the_clean_run_and_of_generation(metric: str) -> None:
    model, how = small("llama"), KnockOut()
    items = encode(probe("repeat"), model.tokenizer, n=4)
    found = measure_sets(model, items, SETS, how, metric)
    torch.testing.assert_close(found, one_by_one(model, items, SETS, how, metric), rtol=0, atol=1e-6)
    if metric == "kl-to-clean":
        assert found[2].abs().max() < 1e-12
        assert found[0].max() > 1e-9


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-t5"])
@pytest.mark.parametrize("mode", MODES)
def test_encoders_are_measured_on_their_embedding(name: str, mode: str) -> None:
    model = hw.load(f"zoo:{name}")
    items = encode(probe("ioi"), model.tokenizer, n=3)
    reference = reference_of(model, items) if mode in ("mean", "resample") else None
    stack = "encoder" if "encoder" in model.table.stacks else "main"
    heads = model.heads(stack).heads
    sets = [HeadSet(heads[:1]), HeadSet(), HeadSet(heads)]
    found = measure_sets(model, items, sets, KnockOut(mode, "all", reference), "cosine-to-clean")  # type: ignore[arg-type]
    torch.testing.assert_close(found[1], torch.ones(3).double(), rtol=0, atol=1e-5)
    assert (found[2] < 1 - 1e-6).all()


def test_a_reference_set_holds_the_tokens_and_no_padding() -> None:
    model, items = small("llama"), texts("llama")
    reference = reference_of(model, items)
    assert len(reference) == sum(len(each.prompt) + len(each.answer) - 1 for each in items)
    alone = reference_of(model, ItemSet(items.probe, items.items[:1], {}, items.metric, items.pad))
    site = model.sites[1].id
    torch.testing.assert_close(reference.values[site][: len(alone)], alone.values[site], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="needs items"):
        reference_of(model, ItemSet("none", (), {}, "cross-entropy", 0))


def test_an_encoder_decoder_without_a_head_for_words_has_a_reference_set() -> None:
    """Of T5's bare model only the embedding can be told; in its decoder stands the start token alone."""
    whole = hw.load("zoo:tiny-t5")
    bare = T5Model(whole.model.config)
    bare.load_state_dict(whole.model.state_dict(), strict=False)
    items = encode(probe("ioi"), whole.tokenizer, n=3)
    with hw.attach(bare.eval(), whole.tokenizer, name="bare") as model:
        reference = reference_of(model, items)
        encoder = next(site.id for site in model.sites if site.id.stack == "encoder")
        decoder = next(site.id for site in model.sites if site.id.stack == "main")
        assert len(reference.values[decoder]) == len(items)
        expected = reference_of(whole, items).values[encoder]
        torch.testing.assert_close(reference.values[encoder], expected, rtol=0, atol=1e-5)
        sets = [HeadSet(), HeadSet(model.heads("encoder").heads)]
        clean, without = measure_sets(model, items, sets, KnockOut("mean", "all", reference), "cosine-to-clean")
    assert (clean > 1 - 1e-5).all()
    assert (without < 1 - 1e-6).all()


def test_an_unknown_mode_and_a_mode_without_its_reference_are_errors() -> None:
    with pytest.raises(InputError, match="no knock-out mode 'gone'"):
        KnockOut("gone")  # type: ignore[arg-type]
    for mode in ("mean", "resample"):
        with pytest.raises(InputError, match="reference set"):
            KnockOut(mode)  # type: ignore[arg-type]


def test_a_scope_without_a_position_is_refused_and_not_an_effect_of_0() -> None:
    model = small("llama")
    items = encode(probe("repeat"), model.tokenizer, n=4)
    short = replace(items, items=tuple(replace(each, answer=each.answer[:1]) for each in items))
    for how in (KnockOut("zero", "decode"), knock_out("llama", "resample", "decode"), KnockOut("uniform", "decode")):
        with pytest.raises(Refusal, match=r"scope 'decode' has no position in any of the 4 items of repeat.*one token"):
            measure_sets(model, short, SETS, how)
    assert torch.isfinite(measure_sets(model, short, [HeadSet()], KnockOut("zero", "decode"))).all()
    assert torch.isfinite(measure_sets(model, short, SETS, KnockOut("zero", "prompt"))).all()


@pytest.mark.parametrize("together", [False, True])
def test_some_items_without_a_position_in_the_scope_cost_nothing_there(together: bool) -> None:
    """By the call, not by the forward."""
    model, items = small("llama"), texts("llama")
    tokens = 100_000 if together else max(len(each.prompt) + len(each.answer) for each in items)
    first, *others = items.items
    mixed = replace(items, items=(*(replace(each, answer=each.answer[:1]) for each in others), first))
    clean, out = measure_sets(model, mixed, [HeadSet(), SETS[3]], KnockOut("zero", "decode"), tokens=tokens)
    torch.testing.assert_close(out[:-1], clean[:-1], rtol=0, atol=1e-9)
    assert abs(out[-1] - clean[-1]) > 1e-6


def test_nothing_to_measure_and_heads_that_are_not_there_are_errors() -> None:
    model, items = small("llama"), texts("llama")
    with pytest.raises(InputError, match="needs items and sets"):
        measure_sets(model, items, [], KnockOut())
    with pytest.raises(InputError, match="needs items and sets"):
        measure_sets(model, items.only([False] * len(items), "none"), SETS, KnockOut())
    with pytest.raises(InputError, match="L9"):
        measure_sets(model, items, [HeadSet.parse("L9H0")], KnockOut())
    with pytest.raises((InputError, Refusal), match="nowhere"):
        measure_sets(model, items, SETS, KnockOut("zero", "span:nowhere"))
