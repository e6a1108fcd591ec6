"""Denoising loops written out with schedulers of diffusers: edits limited to steps and to a branch of guidance.

The oracle is the same loop with a plain hook that is put on for the calls, and cuts the rows, that the scope names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, NotFired, PlanConflict, Refusal
from headwise.model.scopes import Scope, parse_scope

SCALE = 3.0
STEPS = 5
IMAGE, TEXT = 16, 7


@cache
def attached(name: str) -> hw.AttachedModel:
    return hw.load(f"zoo:tiny-{name}")


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def timesteps(n: int = STEPS) -> Tensor:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def conditions(model: Any, rows: slice) -> dict[str, Tensor]:
    """Row 0 of the example's text is the unconditional one, row 1 the conditional one."""
    names = ("encoder_hidden_states", "pooled_projections")
    return {name: model.example[name][rows] for name in names if name in model.example}


@torch.no_grad()
def batch_loop(
    model: Any,
    scheduler: Any = None,
    *,
    n_steps: int = STEPS,
    flow: bool = False,
    before: Callable[[int], None] = lambda call: None,
) -> Tensor:
    """A pipeline with both branches in one call; `before(call)` is told that a call is about to be made."""
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(n_steps)
    x = noise()
    for call, t in enumerate(scheduler.timesteps):
        before(call)
        twice = torch.cat([x] * 2)
        twice = twice if flow else scheduler.scale_model_input(twice, t)
        guess = model(twice, timestep=t.expand(2) if flow else t, **conditions(model, slice(0, 2))).sample
        unconditional, conditional = guess.chunk(2)
        x = scheduler.step(unconditional + SCALE * (conditional - unconditional), t, x).prev_sample
    return x


@torch.no_grad()
def calls_loop(model: Any, *, before: Callable[[int], None] = lambda call: None) -> Tensor:
    """A pipeline with a call for each branch, the unconditional one first."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    x = noise()
    for step, t in enumerate(scheduler.timesteps):
        guesses = []
        for row in range(2):
            before(2 * step + row)
            guesses.append(model(x, timestep=t, **conditions(model, slice(row, row + 1))).sample)
        unconditional, conditional = guesses
        x = scheduler.step(unconditional + SCALE * (conditional - unconditional), t, x).prev_sample
    return x


class Cutting:
    """Zeroes columns of what enters modules, in some rows, while a call among `calls` goes on."""

    def __init__(self, model: Any, paths: Iterable[str], head: int, width: int, rows: slice, calls: set[int]) -> None:
        self.now = -1
        self._undo = ExitStack()
        for path in paths:

            def hook(module: Any, args: Any) -> Any:
                if self.now not in calls:
                    return None
                x = args[0].clone()
                x[rows, :, head * width : (head + 1) * width] = 0
                return (x, *args[1:])

            self._undo.callback(model.model.get_submodule(path).register_forward_pre_hook(hook).remove)

    def before(self, call: int) -> None:
        self.now = call

    def __enter__(self) -> Cutting:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._undo.close()


CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"

BATCH = {
    "steps:1-2": (slice(0, 2), {1, 2}),
    "steps:0,3-": (slice(0, 2), {0, 3, 4}),
    "branch:conditional": (slice(1, 2), set(range(STEPS))),
    "branch:unconditional steps:4": (slice(0, 1), {4}),
    "span:image steps:0-1 branch:conditional": (slice(1, 2), {0, 1}),
}


@pytest.mark.parametrize("scope", BATCH)
def test_steps_and_branch_of_a_batch_are_a_hook_on_those_calls_and_rows(scope: str) -> None:
    model = attached("unet")
    rows, calls = BATCH[scope]
    with Cutting(model, [CROSS], 1, 4, rows, calls) as cutting:
        expected = batch_loop(model, before=cutting.before)
    with model.denoising(guidance="batch"), model.editing(hw.edit.zero("cross.L0H1", scope=scope)) as opened:
        edited = batch_loop(model)
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, batch_loop(model))
    n_rows = rows.stop - rows.start
    assert [(met.calls, met.positions) for met in opened.fired] == [(STEPS, len(calls) * n_rows * 64)]


CALLS = {
    "steps:1-2": {2, 3, 4, 5},
    "branch:conditional": {1, 3, 5, 7, 9},
    "branch:unconditional steps:3-4": {6, 8},
}


@pytest.mark.parametrize("scope", CALLS)
def test_where_every_branch_has_a_call_of_its_own_the_turn_within_the_step_tells(scope: str) -> None:
    model = attached("unet")
    with Cutting(model, [CROSS], 1, 4, slice(None), CALLS[scope]) as cutting:
        expected = calls_loop(model, before=cutting.before)
    with model.denoising(guidance="calls") as loop, model.editing(hw.edit.zero("cross.L0H1", scope=scope)):
        edited = calls_loop(model)
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, calls_loop(model))
    assert (loop.step, loop.calls) == (STEPS - 1, 2 * STEPS)


def test_steps_branch_and_span_together_in_joint_attention() -> None:
    """Flow matching, whose timesteps are no whole numbers, with SD3: the projection of the text alone is cut."""
    model = attached("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler()
    path = "transformer_blocks.1.attn.to_add_out"
    with Cutting(model, [path], 2, 8, slice(1, 2), {1, 2, 3}) as cutting:
        expected = batch_loop(model, scheduler, flow=True, before=cutting.before)
    scope = "span:text steps:1-3 branch:conditional"
    edits = hw.edit.zero("L1H2", scope=scope)
    with model.denoising(guidance="batch", steps=STEPS) as loop, model.editing(edits) as opened:
        edited = batch_loop(model, FlowMatchEulerDiscreteScheduler(), flow=True)
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, batch_loop(model, FlowMatchEulerDiscreteScheduler(), flow=True))
    assert opened.fired[0].positions == 3 * TEXT
    assert loop.timesteps == scheduler.timesteps.tolist()


def test_a_pattern_edit_in_some_steps_leaves_the_other_steps_their_bits() -> None:
    model = attached("unet")
    uniform = hw.edit.uniform("cross.L0H1", scope="steps:2-3 branch:conditional")
    with model.denoising(guidance="batch"), model.reading(hw.read.z("cross.L0")) as plain:
        batch_loop(model)
    with model.denoising(guidance="batch"), model.editing(uniform), model.reading(hw.read.z("cross.L0")) as got:
        batch_loop(model)
    before, after = plain.z["cross.L0"], got.z["cross.L0"]
    assert before.shape == (STEPS, 2, 64, 4, 4)
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[2, 0], after[2, 0])
    assert torch.equal(before[2, 1, :, [0, 2, 3]], after[2, 1, :, [0, 2, 3]])
    spread = after[2:4, 1, :, 1]
    torch.testing.assert_close(spread, spread[:, :1].expand_as(spread))  # every query sees the same mean
    assert not torch.allclose(before[2, 1, :, 1], after[2, 1, :, 1], atol=1e-3)


# -- how steps are counted -----------------------------------------------------------------------------------


def test_calls_in_a_row_with_one_timestep_are_one_step() -> None:
    """PNDM calls twice at its second timestep, Heun twice at all but its first."""
    model = attached("unet")
    pndm = PNDMScheduler(skip_prk_steps=True)
    with model.denoising(guidance="batch", steps=STEPS) as loop, model.reading(hw.read.z("L0")) as got:
        batch_loop(model, pndm)
    assert len(pndm.timesteps) == STEPS + 1 == loop.calls == len(got.z["L0"])
    assert len(loop.timesteps) == STEPS
    heun = HeunDiscreteScheduler()
    scheduler_calls = 2 * STEPS - 1
    once = hw.edit.zero("L0H0", scope="steps:1")
    with model.denoising(guidance="batch", steps=STEPS) as loop, model.editing(once) as opened:
        batch_loop_of_higher_order(model, heun)
    assert loop.calls == scheduler_calls
    assert len(loop.timesteps) == STEPS
    assert opened.fired[0].positions == 2 * 2 * 64  # two calls of two rows


@torch.no_grad()
def batch_loop_of_higher_order(model: Any, scheduler: Any) -> None:
    scheduler.set_timesteps(STEPS)
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        twice = scheduler.scale_model_input(torch.cat([x] * 2), t)
        guess = model(twice, timestep=t, **conditions(model, slice(0, 2))).sample
        x = scheduler.step(guess.mean(0, keepdim=True), t, x).prev_sample


def test_a_new_loop_in_the_block_counts_from_0_again() -> None:
    model = attached("unet")
    once = hw.edit.zero("L0H0", scope="steps:0")
    with model.denoising(guidance="batch", steps=STEPS) as loop, model.editing(once) as opened:
        first = batch_loop(model)
        assert torch.equal(batch_loop(model), first)
    assert (loop.calls, opened.fired[0].calls, opened.fired[0].positions) == (STEPS, STEPS, 128)


def test_a_loop_that_goes_up_is_a_loop_too() -> None:
    """Inversion: timesteps rise. The order is whatever came."""
    model = attached("dit")
    with model.denoising() as loop, model.reading(hw.read.z("L0", scope="steps:1-2")) as got:
        for t in timesteps().flip(0):
            model(noise(), timestep=t[None], class_labels=torch.tensor([1]))
    assert loop.timesteps == [0, 200, 400, 600, 800]
    assert got.z["L0"].shape == (2, 1, IMAGE, 4, 8)


def of_steps(*given: float) -> list[float]:
    model = attached("dit")
    with model.denoising() as loop, model.editing(hw.edit.zero("L0H0", scope="steps:0-1")) as opened:
        for t in given:
            model(noise(), timestep=torch.tensor([t]), class_labels=torch.tensor([1]))
    assert opened.fired[0].calls == loop.calls
    return loop.timesteps


TURNED = {
    "a second loop that begins later": ((9, 6, 3, 6, 3), "timestep 6 comes after 3"),
    "a second loop that begins earlier": ((6, 3, 9, 6), "timestep 9 comes after 3"),
    "upwards": ((3, 6, 9, 6), "timestep 6 comes after 9"),
    "upwards and back": ((3, 6, 9, 9, 6), "timestep 6 comes after 9"),
}


@pytest.mark.parametrize("what", TURNED)
def test_a_timestep_that_turns_back_is_an_error(what: str) -> None:
    given, line = TURNED[what]
    with pytest.raises(InputError, match=line + ".*; steps cannot be counted so: .* block of its own") as error:
        of_steps(*given)
    assert "\n" not in str(error.value)


def test_one_step_run_twice_is_one_step() -> None:
    """As the docs say: nothing tells it from a scheduler that repeats its timestep."""
    assert of_steps(9, 9) == [9]
    assert of_steps(9, 6, 9, 6, 9) == [9]
    assert of_steps(9, 9, 6, 6, 3) == [9, 6, 3]


# -- branches ------------------------------------------------------------------------------------------------


def test_branches_are_named_in_their_own_order() -> None:
    """Pipelines of DiT put the conditional rows first; three branches are three thirds."""
    model = attached("dit")
    labels = torch.tensor([1, 2, 10])

    def call(rows: int) -> None:
        model(noise().expand(rows, -1, -1, -1), timestep=torch.tensor([500]), class_labels=labels[:rows])

    for branches, rows in (
        (("conditional", "unconditional"), [False, True]),
        (("unconditional", "perturbed", "conditional"), [False, False, True]),
    ):
        name = branches[-1]
        with (
            model.denoising(guidance="batch", branches=branches),
            model.editing(hw.edit.zero("L0H3", scope=f"branch:{name}")),
            model.reading(hw.read.z("L0H3")) as got,
        ):
            call(len(rows))
        assert got.z["L0H3"][0].eq(0).all(-1).all(-1).tolist() == rows


def test_rows_and_branch_go_together() -> None:
    model = attached("dit")
    edit = hw.edit.zero("L0H0", scope="branch:conditional", rows=[0, 3])
    with model.denoising(guidance="batch"), model.editing(edit), model.reading(hw.read.z("L0H0")) as got:
        model(noise().expand(4, -1, -1, -1), timestep=torch.tensor([500]), class_labels=torch.tensor([1, 2, 3, 4]))
    assert got.z["L0H0"][0].eq(0).all(-1).all(-1).tolist() == [False, False, False, True]


# -- calls that do not come one for each branch ----------------------------------------------------------------


def in_turn(*given: float | str, guidance: Any = "calls", steps: int | None = None) -> list[int]:
    """Which calls, counted over those that ended, an edit of the conditional branch came to.

    `9`: a call at timestep 9; `"9!"`: one that ends in an exception, which is caught.
    """
    model, seen = attached("dit"), []
    scope = "branch:conditional" if guidance else "all"
    with (
        model.denoising(guidance=guidance, steps=steps) as loop,
        model.editing(hw.edit.zero("L0H0", scope=scope)),
        model.reading(hw.read.z("L0H0")) as got,
    ):
        for each in given:
            t = torch.tensor([float(str(each).removesuffix("!"))])
            if str(each).endswith("!"):
                handle = model.model.transformer_blocks[1].register_forward_hook(stumble)
                with pytest.raises(ValueError, match="the user's own"):
                    model(noise(), timestep=t, class_labels=torch.tensor([1]))
                handle.remove()
            else:
                model(noise(), timestep=t, class_labels=torch.tensor([1]))
                seen.append(bool(got.z.pieces("L0")[-1][:, :, 0].eq(0).all()))
                assert len(got.z["L0"]) == loop.calls
    return [number for number, edited in enumerate(seen) if edited]


SINGLE = r"had {} for 2 branches \(unconditional, conditional\); guidance='calls' takes one call of each in every step"

UNEVEN = {
    "guidance cut off": ((9, 9, 6, 3), r"step 1 \(timestep 6\) " + SINGLE.format("1 call")),
    "guidance cut off in the last step": ((9, 9, 6), r"step 1 \(timestep 6\) " + SINGLE.format("1 call")),
    "guidance from a later step on": ((9, 6, 6), r"step 0 \(timestep 9\) " + SINGLE.format("1 call")),
    "one call in every step": ((9, 6, 3), r"step 0 \(timestep 9\) " + SINGLE.format("1 call")),
    "three calls": ((9, 9, 9, 6), r"step 0 \(timestep 9\) " + SINGLE.format("3 calls")),
    "stopped after a call and begun again": ((9, 9, 9, 6, 6), r"step 0 \(timestep 9\) " + SINGLE.format("3 calls")),
    "stopped in a later step and begun again": ((9, 9, 6, 9, 9), r"step 1 \(timestep 6\) " + SINGLE.format("1 call")),
    "given up after an exception": ((9, "9!", 6, 6), r"step 0 \(timestep 9\) " + SINGLE.format("1 call")),
    "the step anew after an exception": ((9, "9!", 9, 9, 6), r"step 0 \(timestep 9\) " + SINGLE.format("3 calls")),
}


@pytest.mark.parametrize("what", UNEVEN)
def test_calls_that_cannot_be_told_by_their_turn_are_an_error(what: str) -> None:
    given, line = UNEVEN[what]
    with pytest.raises(InputError, match=line + ".* open model.editing") as error:
        in_turn(*given)
    assert "\n" not in str(error.value)
    assert not attached("dit").planned
    in_turn(*given, guidance=None)  # without branches there is no turn to lose


def test_a_call_that_ended_in_an_exception_does_not_take_its_branch_away() -> None:
    assert in_turn(9, 9, 6, 6) == [1, 3]
    assert in_turn(9, "9!", 9, 6, 6) == [1, 3]
    assert in_turn(9, "9!", "9!", 9, 6, "6!", 6) == [1, 3]
    assert in_turn("9!", 9, 9, "6!", 6, 6) == [1, 3]
    assert in_turn("9!", 7, 7, 6, 6, steps=2) == [1, 3]  # nothing had begun


def test_a_loop_that_an_exception_broke_off_begins_anew_or_ends() -> None:
    assert in_turn(9, 9, 6, "6!", 9, 9, 6, 6, steps=2) == [1, 4, 6]
    assert in_turn(9, 9, 6, "6!") == [1]


def test_second_order_with_calls_takes_every_branch_twice() -> None:
    assert in_turn(9, 9, 6, 6, 6, 6, 3, 3, 3, 3, steps=3) == [1, 3, 5, 7, 9]


def test_half_a_step_alone_never_had_the_other_branch() -> None:
    with pytest.raises(NotFired, match="no call of its steps was of branch conditional"):
        in_turn(9)


def test_a_block_around_single_calls_serves_what_turns_cannot_tell() -> None:
    """What the error says to do where guidance is cut off."""
    model, zeroed = attached("dit"), []
    with model.denoising() as loop, model.reading(hw.read.z("L1")):
        for t, conditional in ((9, False), (9, True), (6, True), (3, True)):
            with ExitStack() as stack:
                if conditional:
                    stack.enter_context(model.editing(hw.edit.zero("L0H0", scope="steps:0-1")))
                got = stack.enter_context(model.reading(hw.read.z("L0H0")))
                model(noise(), timestep=torch.tensor([t]), class_labels=torch.tensor([1]))
                if not conditional or loop.step < 2:
                    zeroed.append(bool(got.z["L0H0"].eq(0).all()))
                else:
                    stack.pop_all()
    assert zeroed == [False, True, True]


# -- reads ---------------------------------------------------------------------------------------------------


def test_reads_keep_every_call_of_the_loop_along_a_first_axis() -> None:
    model = attached("unet")
    single: list[Tensor] = []
    with model.reading(hw.read.rows("cross.L1", reduce=lambda rows: single.append(rows.clone()))):
        batch_loop(model)
    with (
        model.denoising(guidance="batch"),
        model.reading(
            hw.read.rows("cross.L1"),
            hw.read.statistics("cross.L1", wanted=["entropy"], spans=["text"]),
            hw.read.z("L0", scope="steps:3-"),
            hw.read.v("cross.L1", name="last", scope="steps:4"),
        ) as got,
    ):
        batch_loop(model)
    assert got.rows["cross.L1"].shape == (STEPS, 2, 4, 16, TEXT)
    assert torch.equal(got.rows["cross.L1"], torch.stack(single))
    assert torch.equal(got.rows["cross.L1H2"], torch.stack(single)[:, :, 2])
    entropy = -torch.stack(single).xlogy(torch.stack(single)).sum(-1)
    torch.testing.assert_close(got.statistics["cross.L1"].entropy, entropy, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.statistics["cross.L1H2"].entropy, entropy[:, :, 2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.statistics["cross.L1"].span_mass["text"], torch.ones_like(entropy))
    assert got.z["L0"].shape == (2, 2, 64, 4, 4)
    assert got.last["cross.L1G0"].shape == (1, 2, TEXT, 8)
    assert {met.what: met.positions for met in got.fired}["read.z"] == 2 * 2 * 64


def test_reads_of_one_branch_where_it_has_its_own_calls() -> None:
    model = attached("unet")
    with model.denoising(guidance="calls"), model.reading(hw.read.z("L0", scope="branch:conditional")) as got:
        calls_loop(model)
    with model.denoising(guidance="calls"), model.reading(hw.read.z("L0")) as both:
        calls_loop(model)
    assert torch.equal(got.z["L0"], both.z["L0"][1::2])


def test_what_a_loop_was_read_for_is_put_in_call_by_call() -> None:
    """The patterns of one prompt's loop in another one's: each call gets those of the same call."""
    model = attached("unet")
    with model.denoising(guidance="batch"), model.reading(hw.read.rows("cross.L0")) as donor:
        batch_loop(model)
    other = hw.edit.zero("L1")  # makes another loop of it
    patched = hw.edit.patch("cross.L0", donor.rows, variable="pattern", scope="steps:1-")
    with (
        model.denoising(guidance="batch"),
        model.editing(other, patched),
        model.reading(hw.read.rows("cross.L0")) as got,
    ):
        batch_loop(model)
    torch.testing.assert_close(got.rows["cross.L0"][1:], donor.rows["cross.L0"][1:])
    with model.denoising(guidance="batch"), model.editing(other), model.reading(hw.read.rows("cross.L0")) as plain:
        batch_loop(model)
    assert torch.equal(got.rows["cross.L0"][0], plain.rows["cross.L0"][0])
    assert not torch.allclose(plain.rows["cross.L0"][1], donor.rows["cross.L0"][1], atol=1e-3)
    with (
        pytest.raises(InputError, match="the donor was read in a denoising loop"),
        model.editing(hw.edit.patch("cross.L0", donor.rows, variable="pattern")),
    ):
        model(**model.example)


def test_a_function_is_told_the_step() -> None:
    model = attached("dit")

    def ramp(current: Tensor, here: Any) -> Tensor:
        return current * here.step / 4

    with model.denoising(), model.reading(hw.read.z("L0")) as plain:
        for t in timesteps():
            model(noise(), timestep=t[None], class_labels=torch.tensor([1]))
    with model.denoising(), model.editing(hw.edit.set("L0H1", ramp)), model.reading(hw.read.z("L0")) as got:
        for t in timesteps():
            model(noise(), timestep=t[None], class_labels=torch.tensor([1]))
    share = torch.arange(5)[:, None, None, None] / 4
    torch.testing.assert_close(got.z["L0H1"], plain.z["L0H1"] * share)


def test_blocks_opened_within_the_loop_leave_its_counts_alone() -> None:
    model = attached("dit")
    edit = hw.edit.zero("L0H0", scope="steps:0-1")
    with model.denoising() as loop, model.editing(edit) as opened, model.reading(hw.read.z("L1")) as got:
        for step, t in enumerate(timesteps()):
            with model.reading(hw.read.z("L0H0", name="now")) as now:
                model(noise(), timestep=t[None], class_labels=torch.tensor([1]))
            assert loop.step == step
            assert now.now["L0H0"].eq(0).all().item() is (step < 2)
    assert (opened.fired[0].calls, opened.fired[0].positions) == (5, 2 * IMAGE)
    assert len(got.z["L1"]) == 5


def test_a_backward_in_every_step_counts_nothing_twice() -> None:
    """With gradient checkpointing the layers run again in backward; the loop's counts are those of its forwards."""
    with hw.load("zoo:tiny-unet") as model:
        model.model.enable_gradient_checkpointing()
        edit = hw.edit.zero("L0H0", scope="steps:1-")
        with model.denoising(), model.editing(edit) as opened, model.reading(hw.read.gate("cross.L0")) as got:
            for t in (30, 20, 10):
                model(**{**model.example, "timestep": t}).sample.square().sum().backward()
        assert got.gate.grad["cross.L0"].shape == (3, 2, 64, 4)
        assert (opened.fired[0].calls, opened.fired[0].positions) == (3, 2 * 2 * 64)


# -- what never came, and what cannot be meant ---------------------------------------------------------------


def test_a_step_that_never_came_is_an_error_when_the_block_is_left() -> None:
    model = attached("unet")

    def edited() -> None:
        with model.denoising(guidance="batch"), model.editing(hw.edit.zero("L0H0", scope="steps:40-45")):
            batch_loop(model)

    def read() -> None:
        with model.denoising(guidance="batch"), model.reading(hw.read.z("L0", scope="steps:5-")):
            batch_loop(model)

    with pytest.raises(NotFired, match=r"scope=steps:40-45.* did not fire: the loop had 5 steps"):
        edited()
    with pytest.raises(NotFired, match=r"read\.z did not fire: the loop had 5 steps"):
        read()
    assert torch.equal(batch_loop(model), batch_loop(model))  # nothing stays on


def test_with_the_number_of_steps_it_is_an_error_before_anything_runs() -> None:
    model = attached("unet")

    def late() -> None:
        with model.denoising(guidance="batch", steps=20), model.editing(hw.edit.zero("L0H0", scope="steps:20-30")):
            raise AssertionError("the block was entered")

    def too_many() -> None:
        with model.denoising(guidance="batch", steps=4), model.editing(hw.edit.zero("L0H0")):
            batch_loop(model)

    with pytest.raises(InputError, match="is for step 20, and the loop has 20, counted from 0"):
        late()
    with pytest.raises(InputError, match="begins step 4, and the loop was said to have 4 steps"):
        too_many()
    batch_loop(model)


def test_a_loop_that_broke_off_is_not_blamed_a_second_time() -> None:
    model = attached("dit")
    late = hw.edit.zero("L0H0", scope="steps:3")
    with model.denoising(), model.editing(late, strict=True):
        model(noise(), timestep=timesteps()[:1], class_labels=torch.tensor([1]))
        handle = model.model.transformer_blocks[1].register_forward_hook(stumble)
        with pytest.raises(ValueError, match="the user's own"):
            model(noise(), timestep=timesteps()[1:2], class_labels=torch.tensor([1]))
        handle.remove()
    assert not model.planned


def stumble(*_: Any) -> None:
    raise ValueError("the user's own")


def test_strict_looks_at_the_whole_loop() -> None:
    model = attached("dit")

    def loop_of(edit: hw.Edit) -> None:
        with model.denoising(), model.editing(edit, spans={"none": []}, strict=True):
            for t in timesteps():
                model(noise(), timestep=t[None], class_labels=torch.tensor([1]))

    loop_of(hw.edit.zero("L0H0", scope="steps:2"))
    with pytest.raises(NotFired, match=r"met no position at L0 \(strict=True\)"):
        loop_of(hw.edit.zero("L0H0", scope="steps:2 span:none"))


def refused(make: Callable[[Any], Any], model: Any) -> str:
    with pytest.raises((InputError, Refusal, PlanConflict)) as error:
        make(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def opened(*blocks: Callable[[Any], Any]) -> Callable[[Any], None]:
    def make(model: Any) -> None:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block(model))

    return make


def called(**arguments: Any) -> Callable[[Any], None]:
    def make(model: Any) -> None:
        with model.denoising(guidance="batch"), model.editing(hw.edit.zero("L0H0", scope="branch:conditional")):
            model(**{**model.example, **arguments})

    return make


ZERO = hw.edit.zero("L0H0", scope="branch:conditional")

MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no loop": (opened(lambda m: m.editing(ZERO)), "open one around this block, with model.denoising()"),
    "no guidance": (
        opened(lambda m: m.denoising(), lambda m: m.editing(ZERO)),
        "say how the loop has them, model.denoising(guidance='batch')",
    ),
    "another branch": (
        opened(lambda m: m.denoising(guidance="calls", branches=["a", "b"]), lambda m: m.editing(ZERO)),
        "there is no branch 'conditional'; there are a, b",
    ),
    "a read of a batch's branch": (
        opened(lambda m: m.denoising(guidance="batch"), lambda m: m.reading(hw.read.z(scope="branch:conditional"))),
        "take the branch's rows of what was read",
    ),
    "two loops": (opened(lambda m: m.denoising(), lambda m: m.denoising()), "a denoising loop is open already"),
    "a dual run within": (opened(lambda m: m.denoising(), lambda m: m.dual()), "open one of both"),
    "a loop in a dual run": (opened(lambda m: m.dual(), lambda m: m.denoising()), "open one of both"),
    "guidance": (opened(lambda m: m.denoising(guidance="both")), "guidance='both' is not 'batch'"),
    "branches": (opened(lambda m: m.denoising(branches=["a", "a"])), "does not name branches"),
    "steps": (opened(lambda m: m.denoising(steps=0)), "steps=0 is not a number of steps"),
    "rows": (
        called(hidden_states=torch.zeros(3, 4, 8, 8), class_labels=torch.arange(3), timestep=torch.tensor([5])),
        "the model was given 3 rows",
    ),
    "no timestep": (called(timestep=None), "without timestep="),
    "timesteps": (called(timestep=torch.tensor([1, 2])), "the rows of one call are at 2 timesteps"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_in_one_line(what: str) -> None:
    make, line = MISTAKES[what]
    assert line in refused(make, attached("dit"))
    assert not attached("dit").planned


def test_what_never_ran_because_its_processor_was_exchanged_says_so() -> None:
    with hw.load("zoo:tiny-unet") as model, torch.no_grad():
        with model.reading(hw.read.z("L0")) as got:
            model(**model.example)
        before = got.z["L0"]
        model.model.set_attention_slice(1)
        line = r"read.rows did not fire: .*; the processor of .*attn1 was AttnProcessor2_0 at attach and is Sliced"
        told = pytest.raises(NotFired, match=line + ".*: set it back, or attach again")
        with told, model.reading(hw.read.rows("L0")):
            model(**model.example)
        with model.reading(hw.read.z("L0")) as got:
            model(**model.example)
        torch.testing.assert_close(got.z["L0"], before, atol=2e-6, rtol=1e-4)


# -- words ---------------------------------------------------------------------------------------------------


def test_scopes_are_read_word_by_word() -> None:
    assert parse_scope("last") == Scope("last")
    assert not parse_scope("span:a").timed
    together = parse_scope("branch:conditional  span:text steps:0-1,5,8-")
    assert together == Scope("span:text", ((0, 1), (5, 5), (8, None)), "conditional")
    assert [step for step in range(12) if together.holds_step(step)] == [0, 1, 5, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("scope", "line"),
    [
        ("steps:", "'' is no stretch of steps"),
        ("steps:a", "'a' is no stretch of steps"),
        ("steps:-3", "'-3' is no stretch"),
        ("steps:5-2", "'5-2' ends before it begins"),
        ("steps:1 steps:2", "names more than one steps"),
        ("branch:", "names no branch"),
        ("span:a span:b", "names more than one place"),
        ("all steps:1 somewhere", "names more than one place"),
        ("somewhere steps:1", "scope='somewhere' is not one of"),
        ("", "scope='' is not one of"),
    ],
)
def test_what_is_no_scope_is_told_in_one_line(scope: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        hw.edit.zero("L0H0", scope=scope)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_read_takes_its_positions_as_queries() -> None:
    with pytest.raises(InputError, match="a read takes positions as queries="):
        hw.read.z(scope="span:text")
