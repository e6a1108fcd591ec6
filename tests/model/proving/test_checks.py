"""The doctor's checks fail when what they check is broken: one thing is sabotaged at a time, and the right ones say so.

Which checks fail is written out. A check that passes on anything would leave its row short, one that fails on anything
would lengthen the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel
from headwise.model.attention import seam
from headwise.model.positions import Frame, Window
from headwise.model.proving import checks, doctor, findings
from headwise.model.proving.doctor import examine
from headwise.model.proving.patient import Patient
from headwise.model.running import engine, rowwork, valuework
from headwise.model.running.plan import Placed

NO_OP, Z, WRITES, ROWS = "no-op", "z is", "sum of writes", "rows times values"
ZERO, OTHERS, FIRES, GROUPS, GATES = "zeroing", "pattern edits", "edits fire", "KV groups", "gate gradients"
PADDING, CACHE = "left padding", "a cache"
EVERY = (NO_OP, Z, WRITES, ROWS, ZERO, OTHERS, FIRES, GROUPS, GATES, PADDING, CACHE)

Patch = pytest.MonkeyPatch
Sabotage = Callable[[Patch, AttachedModel], None]


def _wrap(patch: Patch, owner: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def z_edited_at_the_next_head(patch: Patch, attached: AttachedModel) -> None:
    def change(edited: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest, **o: edited(x.roll(1, 2), *rest, **o).roll(-1, 2)

    _wrap(patch, valuework, "edited", change)


def z_read_at_the_next_head(patch: Patch, attached: AttachedModel) -> None:
    def change(read: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(z: Tensor, listed: Any, *rest: Any, **o: Any) -> Tensor:
            read(z.roll(1, 2), listed, *rest, **o)
            return z

        return shifted

    _wrap(patch, valuework, "read", change)


def z_scaled_by_a_thousandth(patch: Patch, attached: AttachedModel) -> None:
    def change(attend: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(*args: Any, **o: Any) -> tuple[Any, ...]:
            z, *rest = attend(*args, **o)
            return (z * (1 + 1e-3), *rest)

        return scaled

    _wrap(patch, engine.Engine, "attend", change)


def edits_applied_twice(patch: Patch, attached: AttachedModel) -> None:
    def change(blended: Callable[..., Any]) -> Callable[..., Any]:
        def twice(placed: Placed, result: Any, current: Tensor, here: Any) -> Any:
            once = blended(placed, result, current, here)
            return blended(placed, placed.edit.operation(once, here), once, here)

        return twice

    def change_map(affinely: Callable[..., Any]) -> Callable[..., Any]:
        def twice(placed: Placed, x: Tensor) -> Any:
            once = affinely(placed, x)
            return None if once is None else lambda x: once(once(x))

        return twice

    _wrap(patch, valuework, "blended", change)
    _wrap(patch, valuework, "affinely", change_map)


def edits_counted_twice(patch: Patch, attached: AttachedModel) -> None:
    def change(met: Callable[..., Any]) -> Callable[..., Any]:
        return lambda placed, positions: (met(placed, positions), met(placed, positions))

    _wrap(patch, Placed, "met", change)


def edits_counted_and_not_made(patch: Patch, attached: AttachedModel) -> None:
    def change(edited: Callable[..., Any]) -> Callable[..., Any]:
        def idle(x: Tensor, *rest: Any, **o: Any) -> Tensor:
            edited(x, *rest, **o)
            return x

        return idle

    _wrap(patch, valuework, "edited", change)


def groups_swapped_in_edits(patch: Patch, attached: AttachedModel) -> None:
    def change(across: Callable[..., Any]) -> Callable[..., Any]:
        def swapped(x: Tensor, listed: Any, *rest: Any, **o: Any) -> Tensor:
            return across(x.flip(1), listed, *rest, **o).flip(1) if o.get("keys") else across(x, listed, *rest, **o)

        return swapped

    _wrap(patch, valuework, "across", change)


def values_mixed_with_another_group(patch: Patch, attached: AttachedModel) -> None:
    def change(mix: Callable[..., Any]) -> Callable[..., Any]:
        def mixed(weights: Tensor, call: Any, heads: Tensor) -> Tensor:
            return mix(weights, call, (heads + call.n_heads // 2) % call.n_heads)

        return mixed

    _wrap(patch, rowwork, "mix_values", change)


def bias_in_every_write(patch: Patch, attached: AttachedModel) -> None:
    def change(write_of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda z, projection, **o: write_of(z, projection, **o) + projection.bias

    _wrap(patch, engine, "write_of", change)


def rows_too_large(patch: Patch, attached: AttachedModel) -> None:
    def change(read_rows: Callable[..., Any]) -> Callable[..., Any]:
        return lambda placed, stage, rows: read_rows(placed, stage, rows * (1 + 1e-3))

    _wrap(patch, rowwork, "_store_rows", change)


def rows_empty(patch: Patch, attached: AttachedModel) -> None:
    def change(store_rows: Callable[..., Any]) -> Callable[..., Any]:
        return lambda placed, stage, rows: store_rows(
            placed, stage, torch.zeros_like(rows) if placed.read.variable == "rows" else rows
        )

    _wrap(patch, rowwork, "_store_rows", change)


def neighbours_touched_by_pattern_edits(patch: Patch, attached: AttachedModel) -> None:
    def change(replaced: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: replaced(*args) * (1 + 2**-20)

    _wrap(patch, rowwork, "_replaced", change)


def gate_gradients_doubled(patch: Patch, attached: AttachedModel) -> None:
    def change(dot: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: 2 * dot(*args)

    _wrap(patch, valuework, "_dot", change)


def first_token_off_under_padding(patch: Patch, attached: AttachedModel) -> None:
    first = property(lambda frame: torch.zeros(frame.batch, dtype=torch.long))
    patch.setattr(Frame, "first", first)


def last_token_off_under_padding(patch: Patch, attached: AttachedModel) -> None:
    # Counts attended tokens where it should name a column: the same only where nothing is padded.
    patch.setattr(Frame, "prompt_end", property(lambda frame: frame.mask[:, : frame.prompt].sum(dim=1) - 1))


def keys_one_too_far_under_a_cache(patch: Patch, attached: AttachedModel) -> None:
    def shifted(window: Window, chosen: Any) -> Any:
        seen = keys(window, chosen)
        return seen if seen is None or not window.frame.past else seen.roll(1, 1)

    keys = Window.keys
    patch.setattr(Window, "keys", shifted)


def noise_when_idle(patch: Patch, attached: AttachedModel) -> None:
    def noisy(base: Callable[..., Any], *args: Any, **o: Any) -> tuple[Any, ...]:
        z, *rest = base(*args, **o)
        return (z + 1e-6, *rest)

    attached._runner.switch.handler = noisy  # until the first plan opens


BROKEN: list[tuple[str, Sabotage, set[str]]] = [
    ("tiny-llama", z_edited_at_the_next_head, {ZERO, FIRES, GROUPS, GATES}),
    ("tiny-llama", z_read_at_the_next_head, {Z, ROWS, OTHERS}),
    ("tiny-llama", z_scaled_by_a_thousandth, {NO_OP, Z, ZERO, OTHERS, FIRES, GROUPS, GATES}),
    ("tiny-llama", edits_applied_twice, {FIRES, GATES}),
    ("tiny-llama", edits_counted_twice, {FIRES, CACHE}),
    ("tiny-llama", edits_counted_and_not_made, {ZERO, FIRES, GROUPS, GATES}),
    ("tiny-llama", groups_swapped_in_edits, {GROUPS}),
    ("tiny-llama", values_mixed_with_another_group, {OTHERS}),
    ("tiny-gpt2", bias_in_every_write, {WRITES}),
    ("tiny-llama", rows_too_large, {ROWS}),
    ("tiny-llama", rows_empty, {ROWS}),
    ("tiny-bert", rows_empty, {ROWS}),
    ("tiny-llama", neighbours_touched_by_pattern_edits, {OTHERS}),
    ("tiny-llama", gate_gradients_doubled, {GATES}),
    ("tiny-llama", first_token_off_under_padding, {PADDING}),
    ("tiny-llama", last_token_off_under_padding, {PADDING}),
    ("tiny-llama", keys_one_too_far_under_a_cache, {PADDING, CACHE}),
    ("tiny-llama", noise_when_idle, {NO_OP}),
]


def failures(attached: AttachedModel) -> dict[str, str]:
    return {
        next(name for name in EVERY if check.name.startswith(name)): check.detail
        for check in examine(attached).checks
        if check.status == "fail"
    }


@pytest.mark.parametrize(("name", "sabotage", "expected"), BROKEN, ids=[f"{b[1].__name__}-{b[0]}" for b in BROKEN])
def test_exactly_the_checks_of_what_is_broken_fail(
    name: str, sabotage: Sabotage, expected: set[str], monkeypatch: Patch
) -> None:
    organism = zoo.build(name)
    with hw.attach(organism.model, example=organism.example) as attached:
        sabotage(monkeypatch, attached)
        assert set(failures(attached)) == expected


def test_a_check_that_the_model_stumbles_in_fails_and_the_others_go_on(monkeypatch: Patch) -> None:
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        monkeypatch.setattr(Patient, "counting", _stumbling(Patient.counting))
        assert failures(attached) == dict.fromkeys((FIRES, CACHE), "stopped by RuntimeError: out of order")
        assert not any(module._forward_pre_hooks for module in attached.model.modules())


def _stumbling(counting: Callable[..., Any]) -> Callable[..., Any]:
    def stumble(patient: Patient, paths: Any) -> Any:
        paths = list(paths)
        if len(paths) > 4:  # the plain run at the start counts every module
            return counting(patient, paths)
        raise RuntimeError("out of order\nand a long story about it")

    return stumble


def test_what_is_refused_in_a_check_is_no_failure_and_says_why() -> None:
    def refusing(patient: Patient) -> findings.Finding:
        raise hw.Refusal("not here")

    def mistaken(patient: Patient) -> findings.Finding:
        raise hw.InputError("not so")

    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        patient = Patient(attached, 0)
        assert findings.carried_out(refusing, patient) == findings.Finding("n/a", "refused: not here")
        assert findings.carried_out(mistaken, patient) == findings.Finding("fail", "InputError: not so")


def test_sites_that_refuse_a_read_on_the_example_are_left_out_and_the_others_examined(monkeypatch: Patch) -> None:
    def change(read_new_keys: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def refusing(x: Tensor, listed: Any, stage: Any) -> Tensor:
            if listed and stage.site.label == "L1":
                raise hw.Refusal("L1: not here")
            return read_new_keys(x, listed, stage)

        return refusing

    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        _wrap(monkeypatch, valuework, "read_new_keys", change)
        patient = Patient(attached, 0)
        labels = [site.label for site in attached.sites]
        assert [site.label for site in patient.sites("v")] == [label for label in labels if label != "L1"]
        assert patient.sites("rows") == list(attached.sites)
        assert patient.why_not("v") == "L1: not here"
        found = {check.name: check for check in examine(attached).checks}
    rebuilt = found["rows times values are the kernel's z"]
    assert rebuilt.status == "pass"
    assert rebuilt.detail.startswith(f"{len(labels) - 1} of {len(labels)} sites")


def test_attention_that_is_equal_already_is_no_edit_that_did_nothing() -> None:
    """Values all alike, as those of the first frames of a video may be: their mean is what each head has."""
    organism = zoo.build("tiny-llama")
    for layer in organism.model.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
    with hw.attach(organism.model, example=organism.example) as attached:
        found = next(check for check in examine(attached).checks if check.name.startswith(OTHERS))
    assert found.status == "n/a"
    assert "the mean of the values as it is" in found.detail


def test_an_interrupt_is_not_a_finding(monkeypatch: Patch) -> None:
    def interrupted(patient: Patient) -> Any:
        raise KeyboardInterrupt

    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        monkeypatch.setattr(Patient, "frozen", interrupted)
        with pytest.raises(KeyboardInterrupt):
            examine(attached)
        attached.model(**organism.example)
        assert seam.is_on()
        assert not any(module._forward_hooks for module in attached.model.modules())


def test_a_model_that_does_not_repeat_itself_is_not_compared_bit_for_bit() -> None:
    """And what does not need bits is still examined."""
    organism = zoo.build("tiny-llama")
    norm = organism.model.model.norm
    norm.register_forward_hook(lambda module, args, output: output + 1e-7 * torch.rand_like(output))
    with hw.attach(organism.model, example=organism.example) as attached:
        found = {check.name: check for check in examine(attached).checks}
    waiting = [check.detail for check in found.values() if check.status == "n/a"]
    assert len(waiting) == 4
    assert all("two plain runs of this model already differ" in detail for detail in waiting)
    assert found["z is the projection's input"].status == found["a cache changes nothing"].status == "pass"


def test_a_model_that_differs_under_padding_by_itself_is_told_from_a_misplaced_edit() -> None:
    """A model that numbers its positions without looking at the mask, whatever it is told."""
    organism = zoo.build("tiny-gpt2")

    def deaf(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["input_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(length)[None]}

    organism.model.register_forward_pre_hook(deaf, with_kwargs=True)
    with hw.attach(organism.model, example=organism.example) as attached:
        patient = Patient(attached, 0)
        finding = next(e for e in doctor.EXAMINATIONS if e.name.startswith(PADDING)).carry_out(patient)
    assert finding.status == "n/a"
    assert "the model itself differs under left padding" in finding.detail


def test_edits_that_move_nothing_prove_nothing() -> None:
    """Two runs agree trivially where the edits do not reach the output."""
    organism = zoo.build("tiny-llama")
    organism.model.lm_head.weight.data.zero_()
    with hw.attach(organism.model, example=organism.example) as attached:
        assert {ZERO, PADDING, CACHE} <= set(failures(attached))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_drawn_heads_hang_on_the_seed_alone(seed: int) -> None:
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, example=organism.example) as attached:
        torch.manual_seed(123 + seed)
        one = Patient(attached, seed).drawn
        assert one == Patient(attached, seed).drawn
        assert any(one != Patient(attached, other).drawn for other in range(8))


def test_the_sample_spans_every_stack_and_its_depth() -> None:
    organism = zoo.build("tiny-whisper")
    with hw.attach(organism.model, example=organism.example) as attached:
        sites = attached.sites
    main = [site for site in sites if site.id.stack == "main"]
    assert {site.id.stack for site in checks.sampled(sites)} == {"main", "cross", "encoder"}
    assert [site.label for site in checks.sampled(main)] == ["L0", "L1", "L2"]
    assert [site.label for site in checks.sampled(main, most=2)] == ["L0", "L2"]
