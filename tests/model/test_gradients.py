"""Gradient reads against autograd at an offset that plain torch hooks add, in float64, and against factors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, NotFired
from headwise.model import read

close = torch.testing.assert_close


def attached(name: str, **options: Any) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name, dtype=torch.float64, **options)
    organism.model.set_experts_implementation("eager")  # the grouped product of the default one has no float64
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), organism.example


def loss_of(model: Any, example: Mapping[str, Tensor]) -> Tensor:
    """A sum over attended positions, uneven, so that no gradient vanishes by symmetry.

    Padding queries stay out: eager kernels let them attend to everything, sdpa to nothing.
    """
    logits = model(**example, use_cache=False).logits
    weights = torch.linspace(0.2, 1.0, logits.shape[1], dtype=logits.dtype)
    if "decoder_input_ids" not in example:
        weights = weights * example["attention_mask"]
    return (logits.log_softmax(-1)[..., 7:11] * weights[..., None]).sum()


@contextmanager
def offset(model: nn.Module, path: str, *, entering: bool = False) -> Iterator[Callable[[], Tensor]]:
    """Add zeros with a gradient to what enters or leaves a module; the result gives that gradient."""
    added: list[Tensor] = []

    def plus(x: Tensor) -> Tensor:
        added.append(torch.zeros_like(x).requires_grad_())
        return x + added[-1]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (plus(output[0]), *output[1:]) if isinstance(output, tuple) else plus(output)

    module = model.get_submodule(path)
    if entering:
        handle = module.register_forward_pre_hook(lambda module, args: (plus(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(after)
    try:
        yield lambda: added[-1].grad if added[-1].grad is not None else torch.zeros(0)
    finally:
        handle.remove()


def gradient_at(model: nn.Module, example: Mapping[str, Tensor], path: str, *, entering: bool = False) -> Tensor:
    with offset(model, path, entering=entering) as gradient:
        loss_of(model, example).backward()
    return gradient()


# -- values -------------------------------------------------------------------------------------------------------

LLAMA, GPT2 = "model.layers.1", "transformer.h.1"


@pytest.mark.parametrize(
    ("name", "variable", "make", "path", "entering"),
    [
        ("tiny-llama", "z", read.z, f"{LLAMA}.self_attn.o_proj", True),
        ("tiny-gpt2", "z", read.z, f"{GPT2}.attn.c_proj", True),
        ("tiny-bert", "z", read.z, "bert.encoder.layer.1.attention.output.dense", True),
        ("tiny-qwen3_next", "z", read.z, f"{LLAMA}.self_attn.o_proj", True),
        ("tiny-llama", "v", read.v, f"{LLAMA}.self_attn.v_proj", False),
        ("tiny-llama", "write", read.write, f"{LLAMA}.self_attn.o_proj", False),
        ("tiny-llama", "mlp", read.mlp, f"{LLAMA}.mlp", False),
        ("tiny-llama", "residual_pre", lambda *a, **o: read.residual(*a, where="pre", **o), LLAMA, True),
        ("tiny-llama", "residual_post", read.residual, LLAMA, False),
        ("tiny-gpt2", "residual_post", read.residual, GPT2, False),
    ],
)
def test_gradients_of_values_are_those_at_an_offset_added_by_a_hook(
    name: str, variable: str, make: Callable[..., read.Read], path: str, entering: bool
) -> None:
    model, example = attached(name)
    expected = gradient_at(model.model, example, path, entering=entering)
    with model.reading(make("L1", grad=True)) as got:
        loss_of(model, example).backward()
    found = getattr(got, variable).grad["L1"]
    assert expected.abs().max() > 1e-4
    close(found.reshape(expected.shape), expected)
    if variable == "z":
        close(getattr(got, variable).grad["L1H2"], found[:, :, 2])
    if variable == "write":
        assert found.shape[2] == 1  # one for all heads, so any head's label gives it
        close(got.write.grad["L1H3"], expected)


def test_q_k_and_v_gradients_of_a_fused_projection() -> None:
    model, example = attached("tiny-gpt2")
    expected = gradient_at(model.model, example, f"{GPT2}.attn.c_attn").view(2, 32, 3, 4, 12)
    with model.reading(*(make("L1", grad=True) for make in (read.q, read.k, read.v))) as got:
        loss_of(model, example).backward()
    for place, variable in enumerate("qkv"):
        close(getattr(got, variable).grad["L1"], expected[:, :, place])


@pytest.mark.parametrize("variable", ["q", "k"])
def test_q_and_k_gradients_are_after_rotary_embedding_and_summed_over_a_group(variable: str) -> None:
    """Rotation is orthogonal: the gradient behind it is the rotated gradient before it."""
    model, example = attached("tiny-llama")
    rotate = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    angles: list[Any] = []
    handle = model.model.get_submodule("model.rotary_emb").register_forward_hook(lambda m, a, out: angles.append(out))
    before = gradient_at(model.model, example, f"{LLAMA}.self_attn.{variable}_proj").view(2, 32, -1, 12)
    handle.remove()
    expected = rotate(before.transpose(1, 2), before.transpose(1, 2), *angles[0])[0].transpose(1, 2)
    make = {"q": read.q, "k": read.k}[variable]
    with model.reading(make("L1", grad=True)) as got:
        loss_of(model, example).backward()
    close(getattr(got, variable).grad["L1"], expected, atol=1e-7, rtol=1e-5)  # the angles are fp32
    assert getattr(got, variable).grad["L1"].shape[2] == {"q": 4, "k": 2}[variable]


@pytest.mark.parametrize("variable", ["k", "v"])
def test_gradients_of_the_keys_and_values_that_cross_attention_reads(variable: str) -> None:
    model, example = attached("tiny-bart")
    expected = gradient_at(model.model, example, f"model.decoder.layers.1.encoder_attn.{variable}_proj")
    make = {"k": read.k, "v": read.v}[variable]
    with model.reading(make("cross.L1", grad=True), make("cross.L1", queries=[-1], grad=True, name="last")) as got:
        loss_of(model, example).backward()
    close(getattr(got, variable).grad["cross.L1"].flatten(2), expected)
    ends = torch.stack([expected[0, 31:], expected[1, 19:20]])  # the second source is padded from column 20 on
    close(got.last.grad["cross.L1"].flatten(2), ends)


def test_k_and_v_gradients_of_a_step_with_a_cache_are_of_its_own_positions() -> None:
    model, example = attached("tiny-gpt2")
    ids = example["input_ids"][:1]
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
    copies = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with offset(model.model, f"{GPT2}.attn.c_attn") as gradient:
        model(ids[:, 30:], past_key_values=cache).logits.log_softmax(-1)[..., 5].sum().backward()
    expected = gradient().view(1, 2, 3, 4, 12)
    for layer, (keys, values) in zip(cache.layers, copies, strict=True):
        layer.keys, layer.values = keys, values
    with model.reading(read.k("L1", grad=True), read.v("L1", grad=True)) as got:
        model(ids[:, 30:], past_key_values=cache).logits.log_softmax(-1)[..., 5].sum().backward()
    close(got.k.grad["L1"], expected[:, :, 1])
    close(got.v.grad["L1"], expected[:, :, 2])


# -- rows ---------------------------------------------------------------------------------------------------------


@contextmanager
def rows_offset(ordinal: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Add zeros before and after the softmax number `ordinal` of an eager model."""
    added: dict[str, Tensor] = {}
    softmax, count = torch.nn.functional.softmax, 0

    def patched(scores: Tensor, dim: int = -1, dtype: Any = None) -> Tensor:
        nonlocal count
        count += 1
        if count - 1 != ordinal:
            return softmax(scores, dim=dim)
        added["scores"] = torch.zeros_like(scores).requires_grad_()
        added["rows"] = torch.zeros_like(scores).requires_grad_()
        return softmax(scores + added["scores"], dim=dim) + added["rows"]

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", patched)
        yield added


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_score_and_row_gradients_against_offsets_around_the_eager_softmax(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = zoo.build(name, dtype=torch.float64, attn="eager")
    with rows_offset(1, monkeypatch) as added:
        loss_of(eager.model, eager.example).backward()
    model, example = attached(name)
    reads = (read.scores("L1", grad=True), read.rows("L1H1 L1H3", grad=True))
    with model.reading(*reads) as got:
        loss_of(model, example).backward()
    for row, padding in enumerate((0, 12)):
        for query in range(padding, 32):  # what is hidden or padded has no gradient, whatever eager says of it
            seen = slice(padding, query + 1)
            expected = added["scores"].grad[row, :, query, seen]
            close(got.scores.grad["L1"][row, :, query, seen], expected, atol=1e-9, rtol=1e-6)
            expected = added["rows"].grad[row, [1, 3], query, seen]
            close(got.rows.grad["L1"][row, :, query, seen], expected, atol=1e-9, rtol=1e-6)
    assert not got.scores.grad["L1"][:, :, 4, 5:].any()


def test_gradients_at_some_queries_are_those_of_all_queries_there() -> None:
    model, example = attached("tiny-llama")
    spans = {"verb": [[4, 6], [30, 31]]}
    makers = {"z": read.z, "q": read.q, "k": read.k, "rows": read.rows, "scores": read.scores, "gate": read.gate}
    makers |= {"write": read.write, "mlp": read.mlp}
    everything = [make("L1", grad=True, name=f"all_{name}") for name, make in makers.items() if name != "gate"]
    some = [make("L1", queries="span:verb", grad=True) for name, make in makers.items() if name != "gate"]
    gates = [read.gate("L1", name="all_gate"), read.gate("L1", queries="span:verb")]
    with model.reading(*everything, gates[0]) as full:
        loss_of(model, example).backward()
    with model.reading(*some, gates[1], spans=spans) as got:
        loss_of(model, example).backward()
    for name in makers:
        axis = 1 if name in ("rows", "scores") else 0
        wanted = getattr(full, f"all_{name}").grad["L1"]
        wanted = torch.stack([wanted[row].index_select(axis, torch.tensor(at)) for row, at in enumerate(spans["verb"])])
        close(getattr(got, name).grad["L1"], wanted, msg=name)
        if name != "gate":
            values = getattr(got, name)["L1"]
            assert values.shape[:2] == wanted.shape[:2] or name == "write"


def test_row_gradients_beside_an_edited_pattern() -> None:
    """A head whose columns are scaled by g has, for the scores, the gradient of the scaled pattern."""
    model, example = attached("tiny-llama")
    factor = torch.tensor(0.5, dtype=torch.float64)
    edit = hw.edit.scale("L1H1", factor, variable="pattern")
    with model.editing(edit), model.reading(read.scores("L1H1", grad=True), read.rows("L1H1", grad=True)) as got:
        loss_of(model, example).backward()
    upstream = got.rows.grad["L1"]  # at the edited pattern
    pattern = got.scores["L1"].softmax(-1)
    pattern = torch.where(pattern.isnan(), 0.0, pattern)
    close(got.rows["L1"], factor * pattern)
    reaching = factor * upstream
    expected = pattern * (reaching - (reaching * pattern).sum(-1, keepdim=True))
    close(got.scores.grad["L1"], expected)


# -- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("tiny-llama", LLAMA), ("tiny-qwen3_next", LLAMA)])
def test_gate_is_the_derivative_by_a_factor_on_each_head_and_position(name: str, path: str) -> None:
    model, example = attached(name)
    factors = torch.ones(2, 32, 4, 1, dtype=torch.float64, requires_grad=True)
    handle = model.model.get_submodule(f"{path}.self_attn.o_proj").register_forward_pre_hook(
        lambda module, args: ((args[0].reshape(2, 32, 4, 12) * factors).reshape(args[0].shape),)
    )
    loss_of(model, example).backward()
    handle.remove()
    reads = (read.gate("L1"), read.gate("L1H3 L1H0", name="two"), read.gate("L1", point="pre_gate", name="before"))
    with model.reading(*reads) as got:
        loss_of(model, example).backward()
    close(got.gate.grad["L1"], factors.grad[..., 0])
    close(got.before.grad["L1"], factors.grad[..., 0])  # a factor commutes with the model's own gate
    close(got.two.grad["L1H3"], factors.grad[:, :, 3, 0])


def test_gate_against_finite_differences_of_a_scaled_head() -> None:
    model, example = attached("tiny-gpt2")  # Llama-like norms fall back to fp32
    with model.reading(read.gate("L1")) as got:
        loss_of(model, example).backward()

    def scaled(factor: float) -> Tensor:
        def scale(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., 2 * 12 : 3 * 12] *= factor
            return (z,)

        handle = model.model.get_submodule(f"{GPT2}.attn.c_proj").register_forward_pre_hook(scale)
        with torch.no_grad():
            loss = loss_of(model, example)
        handle.remove()
        return loss

    step = 1e-5
    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    close(got.gate.grad["L1"][..., 2].sum(), slope, atol=1e-7, rtol=1e-5)


def test_the_points_of_a_gated_site_have_gradients_that_differ_by_the_gate() -> None:
    model, example = attached("tiny-qwen3_next")
    reads = (read.z("L1", grad=True), read.z("L1", point="pre_gate", grad=True, name="before"))
    with model.reading(*reads) as got:
        loss_of(model, example).backward()
    close(got.before.grad["L1"] * got.before["L1"], got.z.grad["L1"] * got.z["L1"])
    assert not torch.allclose(got.before.grad["L1"], got.z.grad["L1"])


# -- under any circumstances --------------------------------------------------------------------------------------


def everything_of(label: str) -> list[read.Read]:
    makers = (read.q, read.k, read.v, read.z, read.scores, read.rows, read.write, read.mlp, read.residual)
    return [*(make(label, grad=True) for make in makers), read.gate(label)]


def test_reads_do_not_disturb_each_others_gradients_and_frozen_weights_change_none() -> None:
    model, example = attached("tiny-llama")
    single: dict[str, Tensor] = {}
    for one in everything_of("L1"):
        with model.reading(one) as got:
            loss_of(model, example).backward()
        single[one.name] = getattr(got, one.name).grad["L1"]
    model.model.requires_grad_(False)
    with model.reading(*everything_of("L1"), *(read.z("L0", grad=True, name="below"),)) as got:
        loss_of(model, example).backward()
    for name, expected in single.items():
        close(getattr(got, name).grad["L1"], expected, msg=name)
    assert got.below.grad["L0"].abs().max() > 0
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("make", [read.z, read.gate, read.rows, read.k, read.residual])
def test_frozen_weights_and_one_read_suffice(make: Callable[..., read.Read]) -> None:
    model, example = attached("tiny-llama")
    model.model.requires_grad_(False)
    options = {} if make is read.gate else {"grad": True}
    with model.reading(make("L1", **options, name="one")) as got:
        loss_of(model, example).backward()
    assert got.one.grad["L1"].abs().max() > 0


@pytest.mark.parametrize("make", [read.z, read.v, read.rows, read.write])
def test_without_gradients_it_is_said_what_to_do(make: Callable[..., read.Read]) -> None:
    model, example = attached("tiny-llama")
    with pytest.raises(InputError, match=r"needs gradients: leave torch\.no_grad\(\)"):  # noqa: SIM117
        with torch.no_grad(), model.reading(make("L1", grad=True)):
            model(**example)
    with model.reading(make("L1", grad=True, name="one")) as got:
        loss = loss_of(model, example)
        with pytest.raises(NotFired, match=r"L1 has no \w+ gradient \(call backward\(\) first\)"):
            got.one.grad["L1"]
        loss.backward()
    assert got.one.grad["L1"].abs().max() > 0


def test_a_gate_has_no_value_and_says_where_it_is() -> None:
    model, example = attached("tiny-llama")
    with model.reading(read.gate("L1")) as got:
        loss_of(model, example).backward()
        with pytest.raises(NotFired, match=r"L1 has no gate value: it is a gradient, found under \.grad"):
            got.gate["L1"]


def test_a_batch_has_the_gradients_of_its_rows_run_one_by_one() -> None:
    model, example = attached("tiny-llama")
    with model.reading(*everything_of("L1")) as together:
        loss_of(model, example).backward()
    with model.reading(*everything_of("L1")) as alone:
        loss_of(model, {name: value[1:] for name, value in example.items()}).backward()
    for one in everything_of("L1"):
        close(getattr(together, one.name).grad["L1"][1:], getattr(alone, one.name).grad["L1"], msg=one.name)


def test_gradients_see_edited_values_and_carry_to_an_edits_own_tensor() -> None:
    """For z := f z the gradient at z is that behind the edit, and df sums <z_before, dM/dz>."""
    model, example = attached("tiny-llama")
    with torch.no_grad(), model.reading(read.z("L1H2")) as plain:
        model(**example)
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with model.editing(hw.edit.scale("L1H2", factor)), model.reading(read.z("L1H2", grad=True)) as got:
        loss_of(model, example).backward()
    close(got.z["L1"], 0.7 * plain.z["L1"])
    close(factor.grad, (plain.z["L1"] * got.z.grad["L1"]).sum())
