"""How knock-outs share forwards: what is run, what is said where it cannot be, and what happens out of memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.probes import ItemSet, encode, probe
from headwise.probes.outcome import observe, places
from headwise.sweep import KnockOut, Patch, measure_sets, measuring
from headwise.zoo.planted import planted


@cache
def small(architecture: str = "llama-gqa", dtype: torch.dtype = torch.float64) -> hw.AttachedModel:
    organism = planted(architecture, layers=4, heads=4, circuits=("induction",), seed=0)  # type: ignore[arg-type]
    return hw.attach(organism.model.to(dtype), organism.tokenizer, example=organism.example)


@cache
def items(answers_of_one: bool = True) -> ItemSet:
    found = encode(probe("repeat").over(words=(4, 6, 10)), small().tokenizer, n=6)
    short = tuple(replace(each, answer=each.answer[:1]) for each in found.items)
    return replace(found, items=short) if answers_of_one else found


def every_head(model: hw.AttachedModel) -> list[HeadSet]:
    return [HeadSet((head,)) for head in model.heads()]


def one_by_one(model: hw.AttachedModel, given: ItemSet, how: KnockOut, measured: str) -> Tensor:
    rows = [hw.measure(model, given, measured, edits=[how.edit(each)]) for each in every_head(model)]
    return torch.stack(rows).double()


class Width:
    """How many positions times rows the first feed-forward matrix of every block is given."""

    def __init__(self, model: nn.Module) -> None:
        self.given: list[tuple[int, int, int]] = []
        self.hooks = [
            module.register_forward_pre_hook(self._noting(number))
            for number, module in enumerate(m for name, m in model.named_modules() if name.endswith("gate_proj"))
        ]

    def _noting(self, block: int) -> Any:
        return lambda module, args: self.given.append((block, *args[0].shape[:2]))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "llama-gqa"])
@pytest.mark.parametrize("scope", ["all", "last", "decode", "span:match"])
def test_a_map_of_all_heads_is_that_of_single_runs(architecture: str, scope: str) -> None:
    model, how = small(architecture), KnockOut("zero", scope)
    named = "text" if scope == "decode" else "repeat"  # answers of many tokens; a span far behind the beginning
    given = encode(probe(named), model.tokenizer, n=4)
    for measured in ("cross-entropy", "kl-to-clean"):
        found = measure_sets(model, given, every_head(model), how, measured)
        torch.testing.assert_close(found, one_by_one(model, given, how, measured), rtol=0, atol=1e-12)


def test_a_map_at_the_last_token_runs_one_column() -> None:
    model, how = small(), KnockOut("zero", "last")
    measure_sets(model, items(), every_head(model), how)  # what is measured of the model is measured
    seen = Width(model.model)
    found = measure_sets(model, items(), every_head(model), how)
    seen.remove()
    torch.testing.assert_close(found, one_by_one(model, items(), how, items().metric), rtol=0, atol=1e-12)
    whole = [(block, n) for block, n, positions in seen.given if positions > 1]
    for block in range(4):
        assert sum(n for ran, n in whole if ran == block) == len(items()), "the clean run and nothing else"


def test_sets_run_from_their_first_block() -> None:
    model = small()
    sets = [HeadSet.parse("L2H0, L3H1"), HeadSet.parse("L3H0"), HeadSet.parse("L3H2"), HeadSet()]
    measure_sets(model, items(), sets, KnockOut())
    seen = Width(model.model)
    measure_sets(model, items(), sets, KnockOut())
    seen.remove()
    rows = len(items())
    assert [(block, n) for block, n, _ in seen.given] == [
        *((block, rows) for block in range(4)),  # the clean run
        (3, rows),  # its last block again, as it will be run
        *((2, rows), (3, rows)),  # the set that begins in block 2
        (3, 2 * rows),  # those that begin in the last
    ]


def test_one_set_costs_no_clean_run_besides() -> None:
    model = small()
    seen = Width(model.model)
    measure_sets(model, items(), [HeadSet.parse("L2H0")], KnockOut())
    seen.remove()
    assert [block for block, _, _ in seen.given] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_a_map_is_that_of_single_runs_to_its_rounding(dtype: torch.dtype) -> None:
    """The bounds are some four times what was seen; both ways round, and neither is the better one."""
    model, exact = small("llama-gqa", dtype), small()
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.25}[dtype]
    for scope in ("all", "last"):
        how = KnockOut("zero", scope)
        found = measure_sets(model, items(), every_head(model), how, "cross-entropy")
        expected = measure_sets(exact, items(), every_head(exact), how, "cross-entropy")
        single = one_by_one(model, items(), how, "cross-entropy")
        assert (found - single).abs().max() <= bound
        assert (found - expected).abs().max() <= bound


def test_a_budget_that_does_not_hold_an_item_is_an_error() -> None:
    longest = max(len(each.prompt) + len(each.answer) for each in items())
    with pytest.raises(InputError, match=rf"tokens={longest - 1} does not hold the longest item .*{longest}"):
        measure_sets(small(), items(), every_head(small()), KnockOut(), tokens=longest - 1)
    measure_sets(small(), items(), every_head(small())[:2], KnockOut(), tokens=longest)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_out_of_memory_batches_are_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    """A device that holds so many rows gives the same numbers, and it is said."""
    model, sets = small(), [*every_head(small()), HeadSet()]
    expected = measure_sets(model, items(), sets, KnockOut())
    whole = measuring.observe

    def observe(model: Any, batch: Any, **options: Any) -> Any:
        if len(batch.items) > most:
            raise torch.OutOfMemoryError("out of memory")
        return whole(model, batch, **options)

    monkeypatch.setattr(measuring, "observe", observe)
    with caplog.at_level(logging.WARNING, "headwise"):
        found = measure_sets(model, items(), sets, KnockOut())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert "go on in two halves" in caplog.text


def test_an_item_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(measuring, "observe", observe)
    with pytest.raises(Refusal, match="does not fit into memory by itself"):
        measure_sets(small(), items(), every_head(small()), KnockOut())


def test_errors_of_other_kinds_are_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(measuring, "observe", observe)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_sets(small(), items(), every_head(small()), KnockOut())


def test_a_model_that_is_run_whole_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = hw.load("zoo:tiny-albert")
    given = encode(probe("ioi"), model.tokenizer, n=3)
    sets = [HeadSet(), *(HeadSet((head,)) for head in model.heads())]
    with caplog.at_level(logging.WARNING, "headwise"):
        for _ in range(2):
            found = measure_sets(model, given, sets, KnockOut(), "cosine-to-clean")
    torch.testing.assert_close(found[0], torch.ones(3).double(), rtol=0, atol=1e-5)
    assert caplog.text.count("knock-outs take whole forwards, because its blocks do not run once each") == 1


def changed_block(model: hw.AttachedModel, layer: int) -> nn.Module:
    return model.model.model.layers[layer]  # type: ignore[union-attr, operator, index, return-value]


def with_hook_on_a_block(model: hw.AttachedModel) -> None:
    changed_block(model, 1).register_forward_hook(lambda module, args, output: output + 0.3)


def with_hook_on_a_projection(model: hw.AttachedModel) -> None:
    changed_block(model, 2).self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))  # type: ignore[union-attr]


def with_hook_behind_a_projection(model: hw.AttachedModel) -> None:
    changed_block(model, 2).self_attn.o_proj.register_forward_hook(lambda module, args, output: output * 0.5)  # type: ignore[union-attr]


def with_an_adapter_beside_attention(model: hw.AttachedModel) -> None:
    attention = changed_block(model, 1).self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))  # type: ignore[union-attr]


def with_another_forward_of_attention(model: hw.AttachedModel) -> None:
    attention = changed_block(model, 1).self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0] * 1.5, None)  # type: ignore[union-attr, method-assign]


def with_columns_mixed_in_the_last_block(model: hw.AttachedModel) -> None:
    changed_block(model, 3).mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, 1))  # type: ignore[union-attr]


def with_columns_mixed_behind_the_blocks(model: hw.AttachedModel) -> None:
    norm = model.model.model.norm  # type: ignore[union-attr]
    norm.register_forward_pre_hook(lambda module, args: (args[0] + args[0].roll(1, 1),))  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    "change",
    [
        with_hook_on_a_block,
        with_hook_on_a_projection,
        with_hook_behind_a_projection,
        with_an_adapter_beside_attention,
        with_another_forward_of_attention,
        with_columns_mixed_in_the_last_block,
        with_columns_mixed_behind_the_blocks,
    ],
)
def test_what_is_put_on_behind_the_first_map_counts_once(change: Any) -> None:
    """The course was measured without it."""
    organism = planted("llama-gqa", layers=4, heads=4, circuits=("induction",), seed=0)
    with hw.attach(organism.model.double(), organism.tokenizer, example=organism.example) as model:
        before = measure_sets(model, items(), every_head(model), KnockOut())
        change(model)
        for how in (KnockOut(), KnockOut("zero", "last")):
            found = measure_sets(model, items(), every_head(model), how)
            torch.testing.assert_close(found, one_by_one(model, items(), how, items().metric), rtol=0, atol=1e-10)
        assert (measure_sets(model, items(), every_head(model), KnockOut()) - before).abs().max() > 1e-3


def test_lowered_edits_count_once() -> None:
    model = small()
    measure_sets(model, items(), every_head(model), KnockOut())
    with model.lowered("L0,L1,L2") as lowered:
        lowered.set(hw.edit.scale("L0,L1,L2", 0.5))
        found = measure_sets(model, items(), every_head(model), KnockOut())
        expected = one_by_one(model, items(), KnockOut(), items().metric)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_a_share_is_as_exact_as_the_whole(mode: str) -> None:
    how = KnockOut(mode, strength=0.3)  # type: ignore[arg-type]
    found = measure_sets(small(), items(), every_head(small()), how)
    torch.testing.assert_close(found, one_by_one(small(), items(), how, items().metric), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [-0.1, 1.5, "half", True, float("nan")])
def test_a_strength_that_is_no_share_is_an_error(strength: Any) -> None:
    for kind in (KnockOut, Patch):
        with pytest.raises(InputError, match="is a share"):
            kind(strength=strength)


def test_what_are_no_sets_is_an_error() -> None:
    for given in ("L0H1", [None], ["L0H1"]):
        with pytest.raises(InputError, match="takes a list of head sets"):
            measure_sets(small(), items(), given, KnockOut())  # type: ignore[arg-type]


def test_a_patch_has_no_columns_in_what_is_generated() -> None:
    with pytest.raises(Refusal, match="a twin has no columns"):
        measure_sets(small(), encode(probe("repeat"), small().tokenizer, n=2), every_head(small()), Patch(), "refusal")


def test_under_a_plan_of_the_users_own_runs_are_whole() -> None:
    """Its edits may stand anywhere, and are in force."""
    model, sets = small(), every_head(small())[:4]
    with model.editing(hw.edit.zero("L0H0")):
        found = measure_sets(model, items(), sets, KnockOut())
    both = [HeadSet(tuple(dict.fromkeys((*each, *HeadSet.parse("L0H0"))))) for each in sets]
    torch.testing.assert_close(found, measure_sets(model, items(), both, KnockOut()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["all", "last", "span:match"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama-gqa"])
def test_patches_from_twins_are_those_of_single_runs(architecture: str, scope: str) -> None:
    """Against a reading of the twins and an edit that puts it in place, one head after the other."""
    model = small(architecture)
    given = encode(probe("repeat").over(words=(4, 6, 10)), model.tokenizer, n=6)
    there = replace(given, items=tuple(replace(each, prompt=each.twin.prompt) for each in given.items))  # type: ignore[union-attr]
    (own,), (twins,) = given.batches(6), there.batches(6)
    with torch.no_grad(), model.reading(hw.read.z()) as donor:
        observe(model, twins, wants={"logits"})
    chosen = hw.metric(given.metric)
    at = places(model, own)
    expected = []
    for heads in every_head(model):
        source = {site.label: donor.z[site.label][:, :, list(heads.at(site))] for site in heads.sites}
        value = next(iter(source.values()))
        edits = [hw.edit.set(heads, lambda current, here, value=value: value, scope=scope)]
        with torch.no_grad(), model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length):
            expected.append(chosen(observe(model, own, wants=chosen.wants), None))
    found = measure_sets(model, given, [HeadSet(), *every_head(model)], Patch(scope))
    torch.testing.assert_close(found[1:], torch.stack(expected).double(), rtol=0, atol=1e-10)
    if scope != "span:match":  # where nothing that the twin changes is carried on
        assert (found[1:] - found[0]).abs().max() > 1e-3
    half = measure_sets(model, given, every_head(model), Patch(scope, strength=0.0))
    torch.testing.assert_close(half, found[:1].expand_as(half), rtol=0, atol=1e-10)


def test_all_heads_of_the_last_layer_patched_are_one_patch() -> None:
    """Of a set, all heads come from the twin together."""
    model = small()
    given = encode(probe("repeat"), model.tokenizer, n=4)
    last = HeadSet(model.heads("L3").heads)
    alone = measure_sets(model, given, [last], Patch())
    beside = measure_sets(model, given, [HeadSet(), *every_head(model)[:5], last], Patch())
    torch.testing.assert_close(beside[-1], alone[0], rtol=0, atol=1e-10)


def test_a_patch_needs_twins() -> None:
    model = small()
    given = encode(probe("text"), model.tokenizer, n=2)
    with pytest.raises(InputError, match="of text has no corrupted twin"):
        measure_sets(model, given, every_head(model), Patch())


def test_hooks_that_transformers_leaves_for_hidden_states_do_not_make_runs_whole() -> None:
    organism = planted("llama-gqa", layers=4, heads=4, circuits=("induction",), seed=0)
    with hw.attach(organism.model.double(), organism.tokenizer, example=organism.example) as model:
        before = measure_sets(model, items(), every_head(model), KnockOut(), "cosine-to-clean")
        assert any(each._forward_hooks for each in organism.model.modules()), "nothing is left to be told apart"
        assert not measuring.occupied(model, measuring.course_of(model))
        again = measure_sets(model, items(), every_head(model), KnockOut(), "cosine-to-clean")
        assert torch.equal(before, again)
        torch.testing.assert_close(again, one_by_one(model, items(), KnockOut(), "cosine-to-clean"))
