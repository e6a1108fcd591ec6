"""Plans on an attached model: what fires, what is refused, and what is left behind when something goes wrong.

The second way is always the bare model: plain torch hooks that zero a slice of the projection's input or multiply it by
a parameter, the same model without checkpointing, the same model alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TextIteratorStreamer

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel
from headwise.zoo import Organism

Census = dict[str, tuple[Any, ...]]


@pytest.fixture
def llama() -> Organism:
    return zoo.build("tiny-llama")


@pytest.fixture
def attached(llama: Organism) -> Iterator[AttachedModel]:
    with hw.attach(llama.model, llama.tokenizer) as attached:
        yield attached


def census(model: nn.Module) -> Census:
    """Everything that a plan may put on a model: hooks, and attributes of its own (a wrapped `generate`)."""
    return {
        path: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            len(module._backward_hooks),
            len(module._backward_pre_hooks),
            sorted(vars(module)),
        )
        for path, module in model.named_modules()
    }


@torch.no_grad()
def logits(organism: Organism) -> Tensor:
    return organism.model(**organism.example).logits


def generate(organism: Organism, **inputs: Any) -> Any:
    return organism.model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)


@contextmanager
def head_zeroed(projection: nn.Module, head: int, width: int) -> Iterator[None]:
    def entering(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    hook = projection.register_forward_pre_hook(entering)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def before(module: nn.Module, act: Callable[[], object]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(lambda module, args: act() and None)
    try:
        yield
    finally:
        hook.remove()


def boom(*ignored: Any) -> Any:
    raise ZeroDivisionError("boom")


def interrupt() -> None:
    raise KeyboardInterrupt


# -- an exception in the middle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "generate", "reduce", "edit function", "Ctrl-C", "Ctrl-C in generate"])
def test_an_exception_in_the_middle_leaves_nothing(llama: Organism, attached: AttachedModel, where: str) -> None:
    plain, clean = census(llama.model), logits(llama)
    act = interrupt if where.startswith("Ctrl-C") else boom
    reduce = boom if where == "reduce" else None
    value: Any = boom if where == "edit function" else 0.0
    run = partial(generate, llama) if "generate" in where else llama.model
    middle = llama.model.model.layers[1].mlp if where in ("forward", "generate") or act is interrupt else None
    edits = hw.edit.set("L0H0", value), hw.edit.zero("L0", variable="mlp")
    reads = hw.read.z(reduce=reduce), hw.read.write("L2"), hw.read.residual("L1")

    def failing() -> None:
        with attached.editing(*edits), attached.reading(*reads):
            assert census(llama.model) != plain
            with before(middle or nn.Identity(), act):
                run(**llama.example)

    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        failing()
    assert census(llama.model) == plain
    assert torch.equal(logits(llama), clean)
    with attached.editing(hw.edit.zero("L1H1")) as opened:
        again = logits(llama)
    assert [(fired.calls, fired.positions) for fired in opened.fired] == [(1, llama.example["input_ids"].numel())]
    with head_zeroed(llama.model.model.layers[1].self_attn.o_proj, 1, 12):
        assert torch.equal(again, logits(llama))


@pytest.mark.parametrize("act", [boom, interrupt], ids=["exception", "Ctrl-C"])
def test_a_run_after_one_that_failed_in_the_same_block(
    llama: Organism, attached: AttachedModel, act: Callable[[], None]
) -> None:
    middle = llama.model.model.layers[1]
    with attached.reading(hw.read.z()), before(middle, boom), pytest.raises(ZeroDivisionError):
        llama.model(**llama.example)  # the block ends without a second error
    with attached.reading(hw.read.z(), strict=True) as got:
        with before(middle, act), pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            llama.model(**llama.example)
        llama.model(**llama.example)
        assert {fired.calls for fired in got.fired} == {1}
        assert got.z["L0"].shape == (2, 32, 4, 12)


def test_a_refused_plan_leaves_the_open_one_as_it_was(llama: Organism, attached: AttachedModel) -> None:
    plain = census(llama.model)
    with attached.editing(hw.edit.zero("L0H0")) as opened:
        edited, inside = logits(llama), census(llama.model)
        for wrong in (hw.edit.zero("L9H0"), hw.edit.scale("L0", torch.ones(3)), hw.edit.zero("L0H0", stream="second")):
            with pytest.raises(hw.InputError), attached.editing(wrong):
                pass
            assert census(llama.model) == inside
        assert torch.equal(logits(llama), edited)
        assert [fired.calls for fired in opened.fired] == [1]
    assert census(llama.model) == plain


# -- firing -----------------------------------------------------------------------------------------------------------


def test_nothing_run_in_the_block_or_only_another_model(attached: AttachedModel) -> None:
    with pytest.raises(hw.NotFired, match="nothing ran"), attached.editing(hw.edit.zero("L0H0")):
        pass
    other = zoo.build("tiny-llama", seed=1)
    with pytest.raises(hw.NotFired, match="nothing ran"), attached.reading(hw.read.z()):
        other.model(**other.example)
    with pytest.raises(ZeroDivisionError), attached.reading(hw.read.z()):  # the error that came first is the one told
        boom()


def test_a_vision_edit_of_a_text_only_call_did_not_fire() -> None:
    organism = zoo.build("tiny-llava")
    text = {"input_ids": torch.randint(20, 200, (1, 6), generator=torch.Generator().manual_seed(0))}
    with hw.attach(organism.model, example=organism.example) as attached:
        for run in (organism.model, partial(generate, organism)):
            with pytest.raises(hw.NotFired, match=r"vision\.L1 never ran"), attached.editing(hw.edit.zero("vision.L1")):
                run(**text)
        with attached.editing(hw.edit.zero("vision.L1")) as opened:
            organism.model(**organism.example)
        assert [fired.calls for fired in opened.fired] == [1]


def test_a_part_of_the_model_may_run_but_what_never_ran_is_told() -> None:
    organism = zoo.build("tiny-bart")
    encoder = organism.model.get_encoder()
    source = {name: organism.example[name] for name in ("input_ids", "attention_mask")}
    rest = {"attention_mask": source["attention_mask"], "decoder_input_ids": organism.example["decoder_input_ids"]}
    with hw.attach(organism.model, example=organism.example) as attached:
        for missing in (hw.edit.zero("L0H0"), hw.edit.zero("cross.L0H0"), hw.edit.zero("encoder.L0H0,L0H0")):
            with pytest.raises(hw.NotFired, match="L0 never ran in this block"), attached.editing(missing):
                encoder(**source)
        with pytest.raises(hw.NotFired, match=r"read\.z.*L0 never ran"), attached.reading(hw.read.z()):
            encoder(**source)
        with attached.editing(hw.edit.zero("encoder.L0H0")) as opened:
            states = encoder(**source)
            assert [fired.calls for fired in opened.fired] == [1]
            with pytest.raises(hw.NotFired, match=r"encoder\.L0 never ran in this run"):
                organism.model(encoder_outputs=states, **rest)
        with attached.editing(hw.edit.zero("L0H0")):
            in_parts = organism.model(encoder_outputs=states, **rest).logits
        with attached.editing(hw.edit.zero("encoder.L0H0,L0H0")):
            assert torch.equal(organism.model(**organism.example).logits, in_parts)


def test_a_scope_that_meets_no_position_is_recorded_and_with_strict_an_error(
    llama: Organism, attached: AttachedModel
) -> None:
    clean = logits(llama)
    with attached.editing(hw.edit.zero("L0H0", scope="decode"), hw.edit.zero("L1H0", scope="prompt")) as opened:
        logits(llama)
    assert [(fired.site, fired.calls, fired.positions) for fired in opened.fired] == [("L0", 1, 0), ("L1", 1, 64)]
    decoding = hw.edit.zero("L0H0", scope="decode")
    with pytest.raises(hw.NotFired, match=r"no position at L0 \(strict"), attached.editing(decoding, strict=True):
        logits(llama)
    with attached.editing(decoding, strict=True) as opened:
        generate(llama, **llama.example)
    assert [(fired.calls, fired.positions) for fired in opened.fired] == [(3, 2 * 2)]
    assert torch.equal(logits(llama), clean)


def test_opening_with_nothing_asked_for(attached: AttachedModel) -> None:
    with pytest.raises(hw.InputError, match=r"takes reads .* given nothing"), attached.reading():
        pass
    with pytest.raises(hw.InputError, match=r"takes edits .* given nothing"), attached.editing():
        pass


def test_blocks_are_looked_for_outside_of_the_open_plan() -> None:
    """The first read of a block makes the model run; under outer edits, or in a dual run, that would be no probe."""
    fresh = {name: hw.load("zoo:tiny-llama") for name in ("plain", "edited", "dual")}
    plain, edited, dual = fresh.values()
    example = plain.example
    with plain, edited, dual, torch.no_grad():
        with plain.reading(hw.read.mlp("L1"), hw.read.residual("L1")) as expected:
            plain(**example)
        with edited.editing(hw.edit.scale("L0", 0.0)) as outer, edited.reading(hw.read.z("L0")) as kept:
            edited(input_ids=example["input_ids"][:, :7])
            before = outer.fired
            z = kept.z["L0"]
            with edited.editing(hw.edit.scale("L1", 1.0)), edited.reading(hw.read.mlp("L1")):
                assert outer.fired == before
                assert torch.equal(kept.z["L0"], z)
                edited(**example)
        with dual.dual(mode="caches"), dual.reading(hw.read.mlp("L1"), hw.read.residual("L1")) as got:
            dual(**example)
        for label in ("plain", "edited", "dual"):
            assert fresh[label].table.block("L1") == plain.table.block("L1")
        assert (got.mlp["L1"] - expected.mlp["L1"]).abs().max() < 1e-5
        assert (got.residual_post["L1"] - expected.residual_post["L1"]).abs().max() < 1e-5


# -- threads ----------------------------------------------------------------------------------------------------------


class Aside(threading.Thread):
    """A thread whose result or exception can be asked for."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.act, self.result, self.error = act, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.act()
        except BaseException as error:
            self.error = error

    def done(self) -> Aside:
        self.join(timeout=60)
        assert not self.is_alive()
        return self


def test_a_streamed_generation_in_another_thread_sees_the_plan(llama: Organism, attached: AttachedModel) -> None:
    row = {name: value[:1] for name, value in llama.example.items()}
    options: dict[str, Any] = {**row, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

    def streamed() -> str:
        streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, timeout=60)
        aside = Aside(lambda: llama.model.generate(**options, streamer=streamer))
        text = "".join(streamer)
        assert aside.done().error is None
        return text

    plain = streamed()
    with attached.editing(hw.edit.zero("L2H1")) as opened:
        edited = streamed()
    assert [(fired.calls, fired.positions) for fired in opened.fired] == [(8, 32 + 7)]
    with head_zeroed(llama.model.model.layers[2].self_attn.o_proj, 1, 12):
        assert streamed() == edited
    assert edited != plain
    assert streamed() == plain


def test_a_second_plan_from_another_thread_is_a_conflict(llama: Organism, attached: AttachedModel) -> None:
    def open_another() -> None:
        with attached.editing(hw.edit.zero("L1H0")):
            llama.model(**llama.example)

    with attached.editing(hw.edit.zero("L0H0")) as opened:
        inside = census(llama.model)
        error = Aside(open_another).done().error
        assert isinstance(error, hw.PlanConflict)
        assert "another thread has a plan open" in str(error)
        assert census(llama.model) == inside
        logits(llama)
        assert [fired.site for fired in opened.fired] == ["L0"]
    assert Aside(open_another).done().error is None  # its turn now


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_a_plan_cannot_be_opened_nor_the_model_detached_during_a_run(
    llama: Organism, attached: AttachedModel, run: str
) -> None:
    caught: list[str] = []

    def meddle() -> None:
        for act in (attached.reading(hw.read.z()).__enter__, attached.dual().__enter__, attached.detach):
            with pytest.raises(hw.PlanConflict, match="the model is running") as error:
                act()
            caught.append(str(error.value))

    act = llama.model if run == "forward" else partial(generate, llama)
    with attached.editing(hw.edit.zero("L0H0")):
        inside, edited = census(llama.model), logits(llama)
        with before(llama.model.model.layers[1], meddle):
            act(**llama.example)
        assert len(caught) >= 3
        assert census(llama.model) == inside
        assert torch.equal(logits(llama), edited)


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_leaving_the_block_while_another_thread_runs_is_a_conflict(
    llama: Organism, attached: AttachedModel, run: str
) -> None:
    plain, clean = census(llama.model), logits(llama)
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        go_on.wait(60)

    def leave_early() -> None:
        with attached.editing(hw.edit.zero("L0H0")):
            asides.append(Aside(lambda: act(**llama.example)))
            assert inside.wait(60)

    act = llama.model if run == "forward" else partial(generate, llama)
    asides: list[Aside] = []
    with before(llama.model.model.layers[1], wait):
        with pytest.raises(hw.PlanConflict, match="has not ended"):
            leave_early()
        go_on.set()
        asides[0].done()
    assert census(llama.model) == plain
    assert torch.equal(logits(llama), clean)
    with attached.editing(hw.edit.zero("L0H0")) as opened:  # and the handle is not stuck
        logits(llama)
    assert [fired.calls for fired in opened.fired] == [1]


def test_one_model_from_two_threads_under_a_plan(llama: Organism, attached: AttachedModel) -> None:
    second: list[Aside] = []

    def run_beside() -> None:
        if not second:
            second.append(Aside(lambda: llama.model(**llama.example)).done())

    with attached.editing(hw.edit.zero("L0H0")) as opened:
        edited = logits(llama)
        with before(llama.model.model.layers[1], run_beside):
            assert torch.equal(logits(llama), edited)
        assert [fired.calls for fired in opened.fired] == [1]
    assert isinstance(second[0].error, hw.PlanConflict)
    assert "running in another thread" in str(second[0].error)
    both = [Aside(lambda: logits(llama)) for _ in range(2)]  # with no plan open, headwise has no say in it
    assert torch.equal(both[0].done().result, both[1].done().result)


# -- training mode ----------------------------------------------------------------------------------------------------


def test_dropout_in_training_mode_is_refused() -> None:
    organism = zoo.build("tiny-gpt2")
    model, clean = organism.model, logits(organism)
    model.train()
    with pytest.raises(hw.InputError, match=r"training mode and transformer\.drop applies dropout.*model\.eval"):
        hw.attach(model)
    with hw.attach(model.eval()) as attached:
        plain = census(model)
        model.train()
        with pytest.raises(hw.InputError, match="dropout"), attached.reading(hw.read.z()):
            pass
        assert census(model) == plain
        model.eval()
        with attached.reading(hw.read.z()):
            assert torch.equal(logits(organism), clean)


def test_layers_that_are_skipped_at_random_are_refused() -> None:
    speech = zoo.build("tiny-wav2vec2").model
    for module in speech.modules():
        vars(module).update({key: 0.0 for key, value in vars(module).items() if "drop" in key and value})
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    speech.config.layerdrop = 0.5  # read from the configuration at every forward
    with pytest.raises(hw.InputError, match="dropout"):
        hw.attach(speech.train())
    speech.config.layerdrop = 0.0
    hw.attach(speech.train()).detach()


def test_inference_mode_and_no_grad_give_the_same(llama: Organism) -> None:
    edited = {}
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode(), hw.attach(llama.model) as attached:
            with attached.editing(hw.edit.zero("L0H0"), hw.edit.uniform("L1H1")), attached.reading(hw.read.z()) as got:
                edited[mode] = llama.model(**llama.example).logits.clone()
            assert got.z["L2"].isfinite().all()
    values = list(edited.values())
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3_next"])
def test_a_model_attached_in_inference_mode_can_be_trained_on_later(name: str) -> None:
    organism = zoo.build(name)
    with torch.inference_mode():
        attached = hw.attach(organism.model)
    with attached, attached.reading(hw.read.gate()) as got:
        organism.model(**organism.example, labels=organism.example["input_ids"]).loss.backward()
        assert all(got.gate.grad[site.label].any() for site in attached.sites)
