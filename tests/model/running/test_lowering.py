"""Lowered edits: the same numbers as `editing` on the uncompiled model, one graph whatever the numbers, nothing left.

The second ways are `model.editing` without the compiler, and plain hooks on the projection's input.
"""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, NotFired, PlanConflict, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.identity import weights_hash

WIDTH = 12  # of a head of the tiny llama


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def attached() -> Iterator[AttachedModel]:
    with attach("tiny-llama") as attached:
        yield attached


def attach(name: str, dtype: torch.dtype = torch.float32) -> AttachedModel:
    made = zoo.build(name)
    model = made.model.to(dtype).eval()
    return hw.attach(model, made.tokenizer, example=made.example)


@torch.no_grad()
def run(model: Any, attached: AttachedModel) -> Tensor:
    output = model(**attached.example)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def edited(attached: AttachedModel, *edits: hw.edit.Edit) -> Tensor:
    with attached.editing(*edits):
        return run(attached.model, attached)


def every_kind(attached: AttachedModel) -> list[Sequence[hw.edit.Edit]]:
    """Single edits of each kind, on the first two sites."""
    first, second = attached.sites[0], attached.sites[-1]
    reference = hw.reference(attached, [attached.example], heads=[first.id, second.id])
    rows = torch.linspace(-1, 1, second.n_heads * second.head_dim).reshape(second.n_heads, -1)
    return [
        [hw.edit.zero(f"{first.label}H1")],
        [hw.edit.scale(f"{first.label}H0", 0.3)],
        [hw.edit.scale(second.label, torch.linspace(-1, 2, second.n_heads))],
        [hw.edit.add(second.label, rows)],
        [hw.edit.add(second.label, {f"{second.label}H{h}": 0.1 * h for h in range(second.n_heads)})],
        [hw.edit.set(f"{second.label}H1", rows[0])],
        [hw.edit.mean(first.label, reference)],
    ]


def test_one_graph_serves_every_edit(attached: AttachedModel) -> None:
    plain = run(attached.model, attached)
    counter = CompileCounterWithBackend("aot_eager")
    expected = [(edits, edited(attached, *edits)) for edits in every_kind(attached)]
    with attached.lowered() as lowered:
        compiled = torch.compile(attached.model, backend=counter, fullgraph=True)
        assert torch.equal(run(compiled, attached), plain)
        for edits, result in expected:
            lowered.set(*edits)
            assert torch.equal(run(compiled, attached), result), edits
            assert not torch.equal(result, plain), edits
        lowered.clear()
        assert torch.equal(run(compiled, attached), plain)
        assert counter.frame_count == 1
    assert torch.equal(run(compiled, attached), plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is none")
def test_inductor(attached: AttachedModel) -> None:
    zero, scale = hw.edit.zero("L0H1"), hw.edit.scale("L1", 0.5)
    expected = edited(attached, zero, scale)
    with attached.lowered("main") as lowered:
        compiled = torch.compile(attached.model, fullgraph=True)
        plain = run(compiled, attached)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        lowered.set(zero, scale)
        torch.testing.assert_close(run(compiled, attached), expected, rtol=1e-4, atol=1e-5)
        lowered.clear()
        assert torch.equal(run(compiled, attached), plain)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@pytest.mark.slow
def test_what_was_compiled_before_is_not_used(attached: AttachedModel) -> None:
    """A graph does not notice hooks that come later: its edits would silently not happen."""
    compiled = torch.compile(attached.model, backend="eager", fullgraph=True)
    plain = run(compiled, attached)
    for sites in ("L0", "L1", "L0"):
        edits = hw.edit.zero(f"{sites}H0")
        with attached.lowered(sites) as lowered:
            lowered.set(edits)
            inside = run(compiled, attached)
        assert torch.equal(run(compiled, attached), plain)
        assert torch.equal(inside, edited(attached, edits))
        assert not torch.equal(inside, plain)


# -- the same meaning as editing, uncompiled ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-gemma2", "tiny-qwen3_next", "tiny-bert", "tiny-bloom", "tiny-t5"])
def test_each_kind_is_the_edit_bit_for_bit(name: str) -> None:
    """Conv1D, grouped heads, a gate, an encoder, a model outside the registry, cross attention."""
    with attach(name) as attached:
        plain = run(attached.model, attached)
        expected = [(edits, edited(attached, *edits)) for edits in every_kind(attached)]
        with attached.lowered() as lowered:
            assert torch.equal(run(attached.model, attached), plain)
            for edits, result in expected:
                lowered.set(*edits)
                assert torch.equal(run(attached.model, attached), result), edits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    with attach("tiny-llama", dtype) as attached:
        expected = [(edits, edited(attached, *edits)) for edits in every_kind(attached)]
        with attached.lowered() as lowered:
            for edits, result in expected:
                lowered.set(*edits)
                found = run(attached.model, attached)
                assert found.dtype == dtype
                assert torch.equal(found, result), edits


def test_edits_compose_in_the_order_given(attached: AttachedModel) -> None:
    """((z + 1) * 3 at strength 1/2) on one head: 2 z + 2; the other way round 2 z + 1; all exact in binary."""
    add, scale = hw.edit.add("L0H0", 1.0), hw.edit.scale("L0H0", 3.0, strength=0.5)
    mix, zero = hw.edit.mix("L0H0", 2.0, 0.25), hw.edit.zero("L0H0")
    projection = attached.model.get_submodule(str(attached.site("L0").projection))
    with attached.lowered("L0") as lowered:
        for edits, gain, offset in (
            ([add, scale], 2.0, 2.0),
            ([scale, add], 2.0, 1.0),
            ([add, mix], 0.75, 1.25),
            ([add, zero], 0.0, 0.0),
            ([zero, add, scale], 0.0, 2.0),
        ):
            lowered.set(*edits)
            assert projection.headwise_gain.tolist() == [gain] * WIDTH + [1.0] * (len(projection.headwise_gain) - WIDTH)
            assert projection.headwise_offset[:WIDTH].tolist() == [offset] * WIDTH
            found = run(attached.model, attached)
            lowered.clear()
            torch.testing.assert_close(found, edited(attached, *edits), rtol=1e-5, atol=1e-6)


def test_zero_is_zero_whatever_was_there(attached: AttachedModel) -> None:
    projection = attached.model.get_submodule(str(attached.site("L0").projection))
    x = torch.full((1, 1, projection.in_features), float("nan"))
    x[..., WIDTH:] = torch.tensor([-0.0, 0.0]).repeat((projection.in_features - WIDTH) // 2)
    seen: list[Tensor] = []
    with attached.lowered("L0") as lowered:
        lowered.set(hw.edit.zero("L0H0"))
        hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        projection(x)
        hook.remove()
    assert seen[0][..., :WIDTH].eq(0).all()
    assert torch.equal(seen[0][..., WIDTH:].signbit(), x[..., WIDTH:].signbit())  # -0.0 stays -0.0


def test_plain_hooks_agree(attached: AttachedModel) -> None:
    """Not through headwise at all: head 1 of L1 halved by a hook of torch's."""
    projection = attached.model.get_submodule(str(attached.site("L1").projection))

    def halve(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., WIDTH : 2 * WIDTH] *= 0.5
        return (z,)

    with attached.lowered("L1") as lowered:
        lowered.set(hw.edit.scale("L1H1", 0.5))
        found = run(attached.model, attached)
    hook = projection.register_forward_pre_hook(halve)
    expected = run(attached.model, attached)
    hook.remove()
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_generate_with_a_static_cache_and_a_compiled_forward(attached: AttachedModel) -> None:
    edits = [hw.edit.zero("L0H1"), hw.edit.scale("L1H0", 4.0), hw.edit.add("L2H0", 2.0)]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True, **attached.example}
    with attached.editing(*edits):
        expected = attached.generate(**options)
    plain = attached.generate(**options)
    counter = CompileCounterWithBackend("aot_eager")
    own = attached.model.forward
    with attached.lowered() as lowered:
        attached.model.forward = torch.compile(own, backend=counter, fullgraph=True)
        try:
            attached.generate(**options, cache_implementation="static")
            frames = counter.frame_count
            lowered.set(*edits)
            found = attached.generate(**options, cache_implementation="static")
        finally:
            attached.model.forward = own
    assert counter.frame_count == frames
    assert torch.equal(found.sequences, expected.sequences)
    for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one, plain.logits[step], rtol=1e-3, atol=1e-3)


# -- beside plans, beside each other -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3_next", "tiny-bloom"])
def test_edits_of_a_plan_come_first_and_reads_see_what_they_left(name: str) -> None:
    with attach(name) as attached:
        label = attached.sites[-1].label
        first, second = hw.edit.add(f"{label}H0", 1.0), hw.edit.scale(f"{label}H0", 4.0)
        both = edited(attached, first, second)
        with attached.editing(first), attached.reading(hw.read.z([label])) as after_first:
            run(attached.model, attached)
        with attached.editing(first, second), attached.reading(hw.read.write([label])) as after_both:
            run(attached.model, attached)
        with attached.lowered(label) as lowered:
            lowered.set(second)
            with attached.editing(first), attached.reading(hw.read.z([label]), hw.read.write([label])) as got:
                assert torch.equal(run(attached.model, attached), both)
        assert torch.equal(got.z[label], after_first.z[label])
        torch.testing.assert_close(got.write[label], after_both.write[label])


def test_two_handles(attached: AttachedModel) -> None:
    zero, scale = hw.edit.zero("L0H0"), hw.edit.scale("L1H0", 2.0)
    with attached.lowered("L0") as one, attached.lowered("L1") as other:
        one.set(zero)
        other.set(scale)
        together = run(attached.model, attached)
        with pytest.raises(PlanConflict, match="L0 is lowered already"), attached.lowered("main"):
            pass
        with pytest.raises(InputError, match=r"L1 is not lowered here .*; lowered are L0"):
            one.set(zero, scale)
    assert torch.equal(together, edited(attached, zero, scale))
    with pytest.raises(PlanConflict, match="has ended"):
        one.set(zero)
    with pytest.raises(PlanConflict, match="has ended"):
        one.clear()
    assert "has ended" in repr(one)


def test_not_under_an_open_plan(attached: AttachedModel) -> None:
    with attached.editing(hw.edit.zero("L0H0")):
        with pytest.raises(PlanConflict, match="a plan is open"), attached.lowered():
            pass
        run(attached.model, attached)


def test_nothing_is_left(attached: AttachedModel) -> None:
    before = {name: value.clone() for name, value in attached.model.state_dict().items()}
    digest = weights_hash(attached.model)

    def census() -> list[Any]:
        return [(len(m._forward_pre_hooks), sorted(m._buffers), sorted(vars(m))) for m in attached.model.modules()]

    clean = census()
    with attached.lowered() as lowered:
        lowered.set(hw.edit.zero("main"))
        assert attached.model.state_dict().keys() == before.keys()
        assert weights_hash(attached.model) == digest
        assert census() != clean
    assert census() == clean
    with pytest.raises(InputError), attached.lowered() as lowered:
        lowered.set()
    assert census() == clean
    assert all(torch.equal(value, before[name]) for name, value in attached.model.state_dict().items())


# -- what is done to the model inside the block ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())])
def test_a_model_with_lowered_edits_is_not_copied_or_saved(attached: AttachedModel, make: Callable[..., Any]) -> None:
    with attached.lowered() as lowered:
        lowered.set(hw.edit.zero("L0H0"))
        with pytest.raises(Refusal, match=r"leave the lowered block before copying .* \(state_dict\(\) is untouched"):
            make(attached.model)
    make(attached.model)


def lora(model: nn.Module, *targets: str) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))


def replaced(attached: AttachedModel) -> None:
    path = str(attached.site("L1").projection)
    old: Any = attached.model.get_submodule(path)
    attached.model.set_submodule(path, nn.Linear(old.in_features, old.out_features))


MOVED: dict[str, Callable[[AttachedModel], Any]] = {
    "wrapped": lambda attached: lora(attached.model, "o_proj"),
    "replaced": replaced,
    "gone": lambda attached: attached.model.set_submodule("model.layers.1.self_attn", nn.Identity()),
}


@pytest.mark.parametrize("move", MOVED)
def test_a_projection_that_is_not_the_models_any_more_is_told(attached: AttachedModel, move: str) -> None:
    told = pytest.raises(PlanConflict, match=r"(L0|L1), and (another \w+|nothing) stands there now .*attach it anew")
    projection = attached.model.get_submodule(str(attached.site("L1").projection))
    with told, attached.lowered() as lowered:
        lowered.set(hw.edit.zero("L1H0"))
        MOVED[move](attached)
        for act in (lambda: lowered.set(hw.edit.zero("L1H0")), lowered.clear, lambda: run(attached.model, attached)):
            with pytest.raises(PlanConflict, match="stands there now"):
                act()
    assert not projection._forward_pre_hooks
    assert not projection._buffers
    assert not attached.model._forward_pre_hooks


def test_an_adapter_taken_off_inside_the_block_is_told() -> None:
    made = zoo.build("tiny-llama")
    wrapped = lora(made.model, "o_proj").eval()
    told = pytest.raises(PlanConflict, match="stands there now")
    with hw.attach(wrapped, example=made.example) as attached, told, attached.lowered() as lowered:
        lowered.set(hw.edit.zero("L1H0"))
        wrapped.merge_and_unload()
        with pytest.raises(PlanConflict, match="stands there now"):
            lowered.set(hw.edit.zero("L1H0"))


def test_an_error_inside_the_block_is_not_hidden(attached: AttachedModel) -> None:
    def fail() -> None:
        replaced(attached)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), attached.lowered():
        fail()


def test_hooks_of_a_plan_on_a_module_that_was_wrapped_are_told() -> None:
    """Bloom's edits of z are hooks on its projection; an adapter's part would get the unedited z."""
    with attach("tiny-bloom") as attached:
        zero = hw.edit.zero("L0H1")
        told = pytest.raises(PlanConflict, match=r"self_attention.dense has hooks of the open plan, and another Linear")
        with told, attached.editing(zero):
            lora(attached.model, "dense")
            run(attached.model, attached)
        with attached.editing(zero):  # another plan is put on what is there now
            run(attached.model, attached)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_after_a_conversion_inside_the_block_set_is_exact_again(attached: AttachedModel, dtype: torch.dtype) -> None:
    edit = hw.edit.add("L1", torch.linspace(-1, 1, WIDTH * attached.site("L1").n_heads).reshape(-1, WIDTH) / 3)
    projection = attached.model.get_submodule(str(attached.site("L1").projection))
    with attached.lowered() as lowered:
        lowered.set(edit)
        attached.model.to(dtype)
        assert projection.headwise_offset.dtype == dtype
        lowered.set(edit)
        assert projection.headwise_offset.dtype == torch.promote_types(dtype, torch.float32)
        found = run(attached.model, attached)
        lowered.clear()
        neutral = run(attached.model, attached)
    assert torch.equal(found, edited(attached, edit))
    assert torch.equal(neutral, run(attached.model, attached))


def test_a_fractional_strength_is_the_edit_but_for_rounding(attached: AttachedModel) -> None:
    edits = [hw.edit.set("L0H0", 0.3, strength=0.25), hw.edit.scale("L0H0", 2.0, strength=0.3)]
    for edit in [*edits, hw.edit.mix("L0H0", 0.7, 0.1)]:
        expected = edited(attached, edit)
        with attached.lowered() as lowered:
            lowered.set(edit)
            torch.testing.assert_close(run(attached.model, attached), expected, rtol=1e-5, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda a: hw.edit.uniform("L0H0"), "it is on pattern"),
        (lambda a: hw.edit.zero("L0", variable="v"), "it is on v"),
        (lambda a: hw.edit.zero("L0H0", scope="decode"), "some positions"),
        (lambda a: hw.edit.zero("L0H0", queries=[0]), "some positions"),
        (lambda a: hw.edit.zero("L0H0", rows=[0]), "some positions"),
        (lambda a: hw.edit.zero("L0H0", stream="second"), "second stream"),
        (lambda a: hw.edit.patch("L0H0", hw.edit.OTHER), "change with the run"),
        (lambda a: hw.edit.add("L0H0", lambda z, here: z), "change with the run"),
        (lambda a: hw.edit.resample("L0H0", hw.reference(a, [a.example])), "change with the run"),
        (lambda a: hw.edit.scale("L0H0", torch.ones(1, requires_grad=True)), "asks for a gradient"),
    ],
)
def test_what_is_no_map_of_z_is_refused(attached: AttachedModel, edit: Any, why: str) -> None:
    halved = hw.edit.scale("L0H1", 0.5)
    asked = edit(attached)
    expected = edited(attached, halved)
    with attached.lowered() as lowered:
        lowered.set(halved)
        with pytest.raises(Refusal, match=rf"cannot be lowered: .*{why}.*model\.editing\(\)"):
            lowered.set(hw.edit.zero("L0H1"), asked)
        assert torch.equal(run(attached.model, attached), expected)  # what was in force stays


def test_pre_gate_edits_are_refused_where_there_is_a_gate() -> None:
    with attach("tiny-qwen3_next") as attached, attached.lowered() as lowered:
        label = attached.sites[0].label
        with pytest.raises(Refusal, match="has a gate between z and its projection"):
            lowered.set(hw.edit.zero(f"{label}H0", point="pre_gate"))


def test_a_projection_that_serves_several_calls_is_refused() -> None:
    why = "one projection, whose buffers cannot tell the calls apart"
    with attach("tiny-albert") as attached, pytest.raises(Refusal, match=why), attached.lowered():
        pass


def test_wrong_arguments(attached: AttachedModel) -> None:
    with attached.lowered("L0") as lowered:
        with pytest.raises(InputError, match="set\\(\\) takes edits"):
            lowered.set()
        with pytest.raises(InputError, match="set\\(\\) takes edits"):
            lowered.set("L0H0")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="expected one of"):
            lowered.set(hw.edit.scale("L0H0", torch.ones(3)))


# -- compiled models and plans -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fullgraph_under_a_plan_names_what_to_use(attached: AttachedModel) -> None:
    compiled = torch.compile(attached.model, backend="eager", fullgraph=True)
    run(compiled, attached)
    named = pytest.raises(torch._dynamo.exc.Unsupported, match=r"model\.lowered")
    with named, attached.editing(hw.edit.zero("L0H0")):
        run(compiled, attached)


@pytest.mark.slow
def test_graphs_with_breaks_serve_plans(attached: AttachedModel) -> None:
    """Compiled after attaching and without fullgraph: the compiler leaves hooks and attention to Python."""
    zero = hw.edit.zero("L0H0")
    compiled = torch.compile(attached.model, backend="eager")
    plain = run(compiled, attached)
    with attached.editing(zero):
        found = run(compiled, attached)
    assert torch.equal(found, edited(attached, zero))
    assert torch.equal(run(compiled, attached), plain)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_and_run_before_a_plan(attached: AttachedModel) -> None:
    """No hook is on a block, so its graph is used again: calls of the registry leave it, hooks inside are not seen."""
    zero, missed = hw.edit.zero("L0H0"), pytest.raises(NotFired, match=r"model\.lowered")
    expected = edited(attached, zero)
    for layer in attached.model.model.layers:
        layer.compile(backend="eager")
    run(attached.model, attached)
    assert torch.equal(edited(attached, zero), expected)
    with missed, attached.reading(hw.read.write("L0")):
        run(attached.model, attached)
    with attached.lowered() as lowered:
        lowered.set(zero)
        assert torch.equal(run(attached.model, attached), expected)


@pytest.mark.slow
def test_blocks_of_a_watched_model_compiled_one_by_one() -> None:
    zero = hw.edit.zero("L0H0")
    with attach("tiny-bloom") as attached:
        for layer in attached.model.transformer.h:
            layer.compile(backend="eager", fullgraph=True)
        named = pytest.raises(torch._dynamo.exc.Unsupported, match=r"model\.lowered")
        with named, attached.editing(zero):
            run(attached.model, attached)
        run(attached.model, attached)
        with pytest.raises(NotFired, match=r"model\.lowered"), attached.editing(zero):
            run(attached.model, attached)


@pytest.mark.slow
def test_a_compiled_model_is_attached_uncompiled() -> None:
    made = zoo.build("tiny-llama")
    model = made.model.eval()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = model(**made.example).logits
    with hw.attach(model, made.tokenizer, example=made.example) as attached:
        assert [site.label for site in attached.sites] == ["L0", "L1", "L2"]
        # The graph of before is used, and misses the edit, or another is tried and cannot be made.
        told = pytest.raises((NotFired, torch._dynamo.exc.Unsupported), match=r"model\.lowered")
        with told, attached.editing(hw.edit.zero("L0H0")):
            run(model, attached)
        with attached.lowered() as lowered:
            assert torch.equal(run(model, attached), plain)
            lowered.set(hw.edit.zero("main"))
            assert not torch.equal(run(model, attached), plain)
