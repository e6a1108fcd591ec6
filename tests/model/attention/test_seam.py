"""The patch on transformers' look-up: on while a model is attached, off after, and never felt by anything else.

The traps of this field are here as well: a function registered under a new name (the mask is lost), slices of the
projection's output instead of its input (wrong heads), `hidden_size // n_heads` instead of the true `head_dim`.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import headwise as hw
from headwise import zoo
from headwise.model.attention import seam
from headwise.zoo import Organism

LOOK_UPS = ("get_interface", "__getitem__", "get")


def look_up() -> dict[str, Any]:
    """What the class itself defines, inherited attributes left out."""
    return {name: vars(AttentionInterface).get(name) for name in LOOK_UPS}


UNTOUCHED = look_up()


@pytest.fixture(autouse=True)
def _patch_comes_off() -> Iterator[None]:
    yield
    gc.collect()
    assert look_up() == UNTOUCHED
    assert not seam._switches


@pytest.fixture
def llama() -> Organism:
    return zoo.build("tiny-llama")


@torch.no_grad()
def logits(organism: Organism) -> Tensor:
    return organism.model(**organism.example).logits


@contextmanager
def slice_zeroed(projection: nn.Module, columns: slice, *, of: str = "input") -> Iterator[None]:
    """The second way: columns of the projection's input (or, wrongly, of its output) zeroed by a plain torch hook."""

    def entering(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., columns] = 0
        return (changed, *args[1:])

    def leaving(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., columns] = 0
        return changed

    hook = (
        projection.register_forward_pre_hook(entering) if of == "input" else projection.register_forward_hook(leaving)
    )
    try:
        yield
    finally:
        hook.remove()


# -- on and off -----------------------------------------------------------------------------------------------------


def test_importing_patches_nothing() -> None:
    program = (
        "from transformers import AttentionInterface as A\n"
        "before = dict(vars(A))\n"
        "import headwise, headwise.model.attached, headwise.model.proving.doctor, headwise.zoo\n"
        "assert dict(vars(A)) == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_attach_puts_the_patch_on_and_the_last_detach_takes_it_off(llama: Organism) -> None:
    other = zoo.build("tiny-gpt2")
    first = hw.attach(llama.model)
    on = look_up()
    assert on["get_interface"] is not UNTOUCHED["get_interface"]
    second = hw.attach(other.model)
    assert look_up() == on  # one patch for all
    first.detach()
    assert look_up() == on
    with second.editing(hw.edit.zero("L0H0")):
        edited = logits(other)
    second.detach()
    assert look_up() == UNTOUCHED
    assert not torch.equal(edited, logits(other))


def test_a_function_is_wrapped_once_and_the_masks_keep_theirs(llama: Organism) -> None:
    plain, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with hw.attach(llama.model):
        found = [
            ALL_ATTENTION_FUNCTIONS["sdpa"],
            ALL_ATTENTION_FUNCTIONS.get("sdpa"),
            ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", plain),
        ]
        assert all(function is found[0] for function in found)
        assert found[0].__headwise_base__ is plain
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is mask
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def test_a_model_that_is_not_attached_never_notices(llama: Organism) -> None:
    bystander = zoo.build("tiny-llama", seed=1)
    before = logits(bystander)
    with hw.attach(llama.model) as attached, attached.editing(hw.edit.zero("L0")) as opened:
        assert torch.equal(logits(bystander), before)
        assert opened.fired == ()
        logits(llama)
        calls = [fired.calls for fired in opened.fired]
        assert torch.equal(logits(bystander), before)
        assert [fired.calls for fired in opened.fired] == calls == [1]


def test_two_attached_models_keep_their_plans_apart(llama: Organism) -> None:
    twin = zoo.build("tiny-llama")
    base = logits(llama)
    with hw.attach(llama.model) as one, hw.attach(twin.model) as two:
        with one.editing(hw.edit.zero("L0H1")):
            edited = logits(llama)
            assert torch.equal(logits(twin), base)
            with two.editing(hw.edit.zero("L0H1")):
                assert torch.equal(logits(twin), edited)
        assert not torch.equal(edited, base)
        two.detach()
        with one.editing(hw.edit.zero("L0H1")):
            assert torch.equal(logits(llama), edited)


def test_attaching_twice_is_an_error_also_of_a_part_or_of_a_whole_around_it(llama: Organism) -> None:
    with hw.attach(llama.model) as attached:
        for again in (llama.model, llama.model.model, nn.ModuleList([llama.model])):
            with pytest.raises(hw.PlanConflict, match="attached already"):
                hw.attach(again, example=llama.example)
        with attached.editing(hw.edit.zero("L0H0")):  # the handle that came first still works
            logits(llama)
    with hw.attach(llama.model.model, example=llama.example) as part, part.editing(hw.edit.zero("L0H0")):
        llama.model(**llama.example)


def test_a_dropped_handle_frees_the_model_and_takes_the_patch_off() -> None:
    organism = zoo.build("tiny-llama")
    attached = hw.attach(organism.model)
    with attached.editing(hw.edit.zero("L0H0")):
        attached(**organism.example)
    handle, model = weakref.ref(attached), weakref.ref(organism.model)
    assert seam.is_on()
    del attached, organism
    gc.collect()
    assert handle() is None
    assert model() is None
    assert not seam.is_on()


def test_the_with_block_detaches_when_an_exception_passes(llama: Organism) -> None:
    with pytest.raises(ZeroDivisionError), hw.attach(llama.model) as attached:
        raise ZeroDivisionError
    assert look_up() == UNTOUCHED
    with pytest.raises(hw.PlanConflict, match="detached"), attached.editing(hw.edit.zero("L0H0")):
        pass
    attached.detach()  # a second time does no harm


@pytest.mark.parametrize("fault", ["no attention", "bad example", "not a mapping"])
def test_an_attach_that_fails_leaves_nothing(fault: str) -> None:
    organism = zoo.build("tiny-llama")
    model = nn.Sequential(nn.Linear(3, 3)) if fault == "no attention" else organism.model
    example: Any = {
        "no attention": {"input": torch.zeros(2, 3)},
        "bad example": {"input_ids": torch.tensor([[10**6]])},
        "not a mapping": organism.example["input_ids"],
    }[fault]
    with pytest.raises(hw.HeadwiseError) as caught:
        hw.attach(model, example=example)
    assert "\n" not in str(caught.value)
    assert look_up() == UNTOUCHED
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- untouched --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt_oss", "tiny-deepseek_v32", "tiny-bart"])
def test_an_attached_model_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    organism = zoo.build(name, dtype=dtype)
    before = logits(organism)
    with hw.attach(organism.model, example=organism.example) as attached:
        assert torch.equal(logits(organism), before)
        with attached.reading(hw.read.z()):
            assert torch.equal(logits(organism), before)
    assert torch.equal(logits(organism), before)


def test_copies_of_the_model_are_ordinary_models_and_handles_are_not_copied(llama: Organism) -> None:
    base = logits(llama)
    with hw.attach(llama.model) as attached:
        twins = [copy.deepcopy(llama.model), pickle.loads(pickle.dumps(llama.model))]
        with attached.editing(hw.edit.zero("L0")):
            assert not torch.equal(logits(llama), base)
            for twin in twins:
                assert torch.equal(twin(**llama.example).logits, base)
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(hw.Refusal, match=r"copy its \.model"):
                copied(attached)
        with hw.attach(twins[0]) as second, second.editing(hw.edit.zero("L0")):
            assert not torch.equal(second(**llama.example).logits, base)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_idle_attached_model_compiles_in_one_piece(llama: Organism, backend: str) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        base = torch.compile(llama.model, backend=backend, fullgraph=True)(**llama.example).logits
        torch._dynamo.reset()
        with hw.attach(llama.model) as attached:
            compiled = torch.compile(llama.model, backend=backend, fullgraph=True)  # a graph break would raise
            assert torch.equal(compiled(**llama.example).logits, base)
            attached.detach()
            assert torch.equal(compiled(**llama.example).logits, base)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_is_edited_or_says_that_it_is_not(llama: Organism) -> None:
    """Compiled before it was attached, a model runs past the look-up: that must be told."""
    torch._dynamo.reset()
    edit = hw.edit.zero("L0H0")
    with torch.no_grad():
        before = torch.compile(llama.model, backend="eager")
        base = before(**llama.example).logits
        with hw.attach(llama.model) as attached:
            with attached.editing(edit):
                edited = logits(llama)
            with pytest.raises(hw.NotFired, match="L0"), attached.editing(edit):
                before(**llama.example)
            torch._dynamo.reset()
            after = torch.compile(llama.model, backend="eager")
            assert torch.equal(after(**llama.example).logits, base)
            with attached.editing(edit):
                assert torch.equal(after(**llama.example).logits, edited)
            assert torch.equal(after(**llama.example).logits, base)
    torch._dynamo.reset()


# -- the traps --------------------------------------------------------------------------------------------------------


def depends_on_later_tokens(organism: Organism) -> bool:
    """Whether the logits of attended positions but the last change with the last token (padding sees what it likes)."""
    inputs = dict(organism.example)
    inputs["input_ids"] = inputs["input_ids"].clone()
    attended = inputs["attention_mask"][:, :-1].bool()
    with torch.no_grad():
        before = organism.model(**inputs).logits[:, :-1][attended]
        inputs["input_ids"][:, -1] += 1
        after = organism.model(**inputs).logits[:, :-1][attended]
    return not torch.allclose(after, before, atol=1e-5)  # equal up to how a matrix product adds up


def test_the_mask_trap() -> None:
    """Under a name of its own the very same kernel gets no mask, without a word; at the look-up it keeps its mask."""
    organism = zoo.build("tiny-llama")
    padded_row = organism.example["attention_mask"][1].bool()
    row = organism.example["input_ids"][1:, padded_row]
    alone = organism.model(input_ids=row).logits[0]
    assert not depends_on_later_tokens(organism)
    with hw.attach(organism.model) as attached, attached.reading(hw.read.rows("L0"), hw.read.z()) as got:
        assert not depends_on_later_tokens(organism)
        together = organism.model(**organism.example).logits[1, padded_row]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        assert not bool(got.rows["L0"][1][..., ~padded_row].any())  # padding is not looked at
        assert not bool(got.rows["L0"].triu(1).any())  # nor what comes later

    AttentionInterface.register("the_same_kernel", modeling_llama.eager_attention_forward)
    try:
        organism.model.set_attn_implementation("the_same_kernel")
        assert depends_on_later_tokens(organism)
    finally:
        AttentionInterface._global_mapping.pop("the_same_kernel")
        organism.model.set_attn_implementation("eager")
    assert not depends_on_later_tokens(organism)
    with hw.attach(organism.model) as attached, attached.reading(hw.read.z()):
        assert not depends_on_later_tokens(organism)


@pytest.mark.parametrize(("wrap", "kernel"), [(lambda function: function, "mine"), (functools.partial, "partial")])
def test_a_users_own_kernel_is_reached_through_the_seam(llama: Organism, wrap: Callable[..., Any], kernel: str) -> None:
    calls = 0
    plain, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args, **kwargs)

    base = logits(llama)
    AttentionInterface.register("mine", wrap(mine))
    type(ALL_MASK_ATTENTION_FUNCTIONS).register("mine", mask)
    try:
        llama.model.set_attn_implementation("mine")
        with hw.attach(llama.model) as attached:
            assert [site.kernel for site in attached.sites] == [kernel] * 3
            calls = 0
            with attached.reading(hw.read.z(), hw.read.rows("L1")):
                assert torch.equal(logits(llama), base)
            assert calls == 3
    finally:
        AttentionInterface._global_mapping.pop("mine")
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop("mine")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-bert", "tiny-qwen3_next", "tiny-deepseek_v3"])
def test_the_wrong_head_trap_and_the_head_dim_trap(name: str) -> None:
    """Zeroing a head equals zeroing its slice of the projection's INPUT, bit for bit."""
    organism = zoo.build(name)
    base = logits(organism)
    with hw.attach(organism.model, example=organism.example) as attached:
        site, head = attached.sites[-1], 1
        projection = organism.model.get_submodule(str(site.projection))
        width = site.head_dim
        with attached.editing(hw.edit.zero(f"{site.label}H{head}")):
            edited = logits(organism)
    assert not torch.equal(edited, base)
    with slice_zeroed(projection, slice(head * width, (head + 1) * width)):
        assert torch.equal(logits(organism), edited)
    with slice_zeroed(projection, slice(head * width, (head + 1) * width), of="output"):
        assert not torch.allclose(logits(organism), edited, atol=1e-4)
    hidden = organism.model.config.hidden_size
    guessed = hidden // site.n_heads
    if name in ("tiny-llama", "tiny-qwen3_next", "tiny-deepseek_v3"):
        assert guessed != width
        with slice_zeroed(projection, slice(head * guessed, (head + 1) * guessed)):
            assert not torch.allclose(logits(organism), edited, atol=1e-4)
