"""How edits go together, what gradients they carry, and what is refused, in one line and before anything runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.model.attached import AttachedModel

EFFECT = 1e-3


OPEN = ExitStack()


@functools.cache
def attached(name: str, dtype: torch.dtype = torch.float32) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}", dtype=dtype)
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


def logits(model: AttachedModel, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or model.example)).logits  # type: ignore[no-any-return]


def edited(*edits: Any, name: str = "llama", **options: Any) -> Tensor:
    with attached(name).editing(*edits, **options):
        return logits(attached(name))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# -- composition -------------------------------------------------------------------------------------------------------


def test_edits_of_one_variable_apply_in_the_order_given() -> None:
    vector = numbers(12)
    scale, add = hw.edit.scale("L1H0", -2.0), hw.edit.add("L1H0", vector)
    one = hw.edit.set("L1H0", lambda z, here: -2 * z + vector)
    other = hw.edit.set("L1H0", lambda z, here: -2 * (z + vector))
    assert torch.allclose(edited(scale, add), edited(one), atol=1e-6)
    assert torch.allclose(edited(add, scale), edited(other), atol=1e-6)
    assert (edited(one) - edited(other)).abs().max() > EFFECT


def test_edits_of_different_heads_meet_where_they_overlap() -> None:
    together = edited(hw.edit.scale("L1H0, L1H1", 3.0), hw.edit.zero("L1H1, L1H2"))
    assert torch.allclose(together, edited(hw.edit.scale("L1H0", 3.0), hw.edit.zero("L1H1, L1H2")), atol=1e-6)


def test_variables_apply_in_the_order_of_the_computation_whatever_the_order_given() -> None:
    edits = [
        hw.edit.scale("L1H0", 2.0, variable="q"),
        hw.edit.scale("L1G0", 0.5, variable="v"),
        hw.edit.bias("L1H0", 1.5, keys=[14, 20]),
        hw.edit.scale("L1H0", 0.7, variable="pattern"),
        hw.edit.add("L1H0", numbers(12)),
    ]
    assert torch.equal(edited(*edits), edited(*reversed(edits)))
    assert all((edited(*edits) - edited(*(e for e in edits if e is not left))).abs().max() > EFFECT for left in edits)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_blocks_nest_outer_edits_first_and_readings_see_what_the_model_used(name: str) -> None:
    model = attached(name)
    scale, add = hw.edit.scale("L1H0, L1H3", -2.0), hw.edit.add("L1H3", 1.0)
    with model.reading(hw.read.z("L1", name="outside")) as outside, model.editing(scale):
        with model.editing(add), model.reading(hw.read.z("L1", name="inside")) as inside:
            nested = logits(model)
        between = logits(model)
    assert torch.equal(nested, edited(scale, add, name=name))
    assert torch.equal(between, edited(scale, name=name))
    with model.reading(hw.read.z("L1")) as plain:
        logits(model)
    assert torch.allclose(inside.inside["L1H3"], -2 * plain.z["L1H3"] + 1, atol=1e-5)
    assert torch.allclose(outside.outside["L1H3"], -2 * plain.z["L1H3"], atol=1e-5)


def test_a_blocked_key_stays_hidden_for_the_edits_after_it() -> None:
    model = attached("llama")
    block, uniform = hw.edit.block("L1H0", keys=[15]), hw.edit.uniform("L1H0")
    anything = hw.edit.set("L1H0", 0.0, variable="score")
    for edits in ([block, uniform], [block, anything]):
        with model.editing(*edits), model.reading(hw.read.rows("L1H0", queries=[20])) as got:
            logits(model)
        row = got.rows["L1H0"][0, 0]
        assert row[15] == 0
        assert torch.allclose(row[:21][torch.arange(21) != 15], torch.tensor(1 / 20))


def test_a_run_can_take_the_place_of_another_position_by_position() -> None:
    """Patching every head of a layer from a corrupted run is replacing the attention output by that run's."""
    model, inputs = attached("gpt2"), attached("gpt2").example
    corrupted = dict(inputs, input_ids=inputs["input_ids"].flip(0))
    corrupted["attention_mask"] = inputs["attention_mask"].flip(0)
    outputs: list[Tensor] = []
    projection = model.model.get_submodule("transformer.h.1.attn.c_proj")
    with model.reading(hw.read.z("L1")) as donor:
        handle = projection.register_forward_hook(lambda _, __, output: outputs.append(output))
        logits(model, **corrupted)
        handle.remove()
    kept = (torch.arange(32) < 20)[None, :, None]
    handle = projection.register_forward_hook(lambda _, __, output: torch.where(kept, outputs[0], output))
    theirs = logits(model)
    handle.remove()
    ours = edited(hw.edit.patch("L1", donor.z, queries=slice(0, 20)), name="gpt2")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - logits(model)).abs().max() > EFFECT


@pytest.mark.parametrize("variable", ["residual_pre", "residual_post", "mlp"])
def test_edits_of_blocks_are_those_of_plain_hooks(variable: Any) -> None:
    model, vectors = attached("llama"), numbers(2, 32)
    ours = edited(hw.edit.add(["L0", "L2"], vectors, variable=variable, queries=[15, -1], rows=[1]))
    where = torch.zeros(2, 32, 1)
    where[1, [15, 31]] = 1
    handles = []
    for layer, vector in zip((0, 2), vectors, strict=True):
        block = model.model.get_submodule(f"model.layers.{layer}")
        if variable == "residual_pre":
            handles.append(block.register_forward_pre_hook(lambda _, args, v=vector: (args[0] + where * v, *args[1:])))
        else:
            module = block.mlp if variable == "mlp" else block
            handles.append(module.register_forward_hook(lambda _, __, output, v=vector: output + where * v))
    theirs = logits(model)
    for handle in handles:
        handle.remove()
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - logits(model)).abs().max() > EFFECT


# -- gradients ---------------------------------------------------------------------------------------------------------


GRADED: dict[str, Callable[[Tensor], Any]] = {
    "scale z": lambda t: hw.edit.scale("L1H0, L2H3", t),
    "mix z": lambda t: hw.edit.mix("L1H0, L2H3", 0.3, t),
    "strength z": lambda t: hw.edit.zero("L1H0, L2H3", strength=t),
    "scale q": lambda t: hw.edit.scale("L0H0, L1H3", t, variable="q"),
    "scale score": lambda t: hw.edit.scale("L1H0, L2H3", t, variable="score"),
    "strength score": lambda t: hw.edit.scale("L1H0, L2H3", 1.7, variable="score", strength=t),
    "bias": lambda t: hw.edit.bias("L1H0, L2H3", t, keys=[1, 3]),
    "after a block": lambda t: (hw.edit.block("L1H0, L2H3", keys=[1]), hw.edit.scale("L1H0, L2H3", t, "score")),
    "reweight": lambda t: hw.edit.reweight("L1H0, L2H3", t, keys=[1, 3]),
    "redistribute": lambda t: hw.edit.redistribute("L1H0, L2H3", t, keys=[1], to=[0, 2]),
    "strength uniform": lambda t: hw.edit.uniform("L1H0, L2H3", strength=t),
    "by name": lambda t: hw.edit.scale("L1H0, L2H3", {"L1H0": t[0], "L2H3": t[1]}),
    "last": lambda t: hw.edit.scale("L1H0, L2H3", t, scope="last"),
}


def is_the_gradient(name: str, make: Callable[[Tensor], Any], point: Tensor) -> None:
    """Autograd through the edit against central differences, in double precision, on a padded batch."""
    model = attached(name, torch.float64)
    inputs = {"input_ids": model.example["input_ids"][:, 11:17], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, :1] = 0

    def loss(parameter: Tensor) -> Tensor:
        edits = make(parameter)
        with model.editing(*(edits if isinstance(edits, tuple) else (edits,))):
            output: Tensor = model(**inputs).logits[inputs["attention_mask"].bool()]
        return output.square().mean()

    parameter = point.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(parameter), parameter)
    with torch.no_grad():
        for index in range(parameter.numel()):
            step = torch.zeros_like(parameter).flatten()
            step[index] = 1e-5
            step = step.reshape(parameter.shape)
            difference = (loss(parameter + step) - loss(parameter - step)) / 2e-5
            assert torch.allclose(gradient.flatten()[index], difference, rtol=1e-5, atol=1e-9)
    assert gradient.abs().min() > 1e-8


@pytest.mark.parametrize("what", GRADED)
@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_gradients_of_factors_are_those_of_finite_differences(name: str, what: str) -> None:
    is_the_gradient(name, GRADED[what], torch.tensor([0.6, 0.8]))


def test_gradients_of_vectors_and_of_a_shared_group() -> None:
    is_the_gradient("gpt2", lambda t: hw.edit.add("L0H1, L2H3", t), numbers(2, 12))
    is_the_gradient("starcoder2", lambda t: hw.edit.scale("L1G0", t, variable="k"), torch.tensor([0.7]))
    is_the_gradient("starcoder2", lambda t: hw.edit.add("L1G0", t, variable="v"), numbers(1, 12))


# -- refusals ----------------------------------------------------------------------------------------------------------


e = hw.edit
REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "too few factors": ("llama", lambda: e.scale("L1", torch.ones(3)), r"edit.scale: the tensor has shape \[3\]"),
    "wrong width": ("llama", lambda: e.add("L1H0, L2H0", torch.ones(2, 11)), r"shape \[2, 11\]; expected one of .*12"),
    "width of q, not of v": ("deepseek_v3", lambda: e.add("L1G0", torch.ones(16), "v"), r"shape \[16\]; expected .*12"),
    "vectors for rows": ("llama", lambda: e.bias("L1", torch.ones(4, 12)), r"shape \[4, 12\]; expected one of"),
    "strength": ("llama", lambda: e.zero("L1", strength=torch.ones(3)), r"shape \[3\]; expected one of"),
    "a head without value": ("llama", lambda: e.scale("L1H0, L1H1", {"L1H0": 2.0}), "no entry for L1H1"),
    "values of two shapes": (
        "llama",
        lambda: e.scale("L1H0, L1H1", {"L1H0": 2.0, "L1H1": torch.ones(12)}),
        "entries have shapes",
    ),
    "no value": ("llama", lambda: e.scale("L1H0", None), "None is not a value; pass a number, a tensor"),
    "a list": ("llama", lambda: e.scale("L1H0", [1.0]), r"\[1.0\] is not a value"),
    "block width": ("llama", lambda: e.add("L1", torch.ones(31), "residual_post"), r"shape \[31\]; expected .*32"),
    "no head": ("llama", lambda: e.zero("L1H9"), "there is no L1H9: L1 has 4 heads"),
    "no layer": ("llama", lambda: e.zero("L9H0"), "there is no attention at L9"),
    "no block": ("llama", lambda: e.zero("L9", "mlp"), "this model has no block L9"),
    "nothing named": ("llama", lambda: e.zero(None), "edit.zero needs heads; name them, or pass model.heads"),
    "empty": ("llama", lambda: e.zero([], "mlp"), "no blocks were given"),
    "a head's own values": ("llama", lambda: e.zero("L1H1", "v"), "name KV groups here, for example L1G0, not heads"),
    "a head's own keys": ("mistral", lambda: e.scale("L0H3", 2.0, "k"), "name KV groups here, for example L0G1"),
    "option": ("llama", lambda: e.zero("L1H0", step=1), "edit.zero has no option 'step'; it takes keys, point"),
    "scope": ("llama", lambda: e.zero("L1H0", scope="prefill"), "scope='prefill' is not one of all, prompt"),
    "variable": ("llama", lambda: e.zero("L1H0", "w"), "variable='w' is not one of q, k, v"),
    "point": ("llama", lambda: e.zero("L1H0", point="gate"), "point='gate' is neither 'post_gate' nor 'pre_gate'"),
    "stream": ("llama", lambda: e.zero("L1H0", stream="second"), "second stream; open one with model.dual"),
    "a twin's value": ("llama", lambda: e.patch("L1H0", e.OTHER), "OTHER is the second stream of a dual run; open one"),
    "keys of z": ("llama", lambda: e.zero("L1H0", keys=[1]), "keys= selects columns of score and pattern edits"),
    "queries of k": ("llama", lambda: e.zero("L1G0", "k", queries=[1]), r"acts on key columns: use scope="),
    "rows": ("llama", lambda: e.zero("L1H0", rows=1), "rows=1 is not a list of rows"),
    "decoding without a cache": ("bert", lambda: e.zero("L1H0", scope="decode"), "scope='decode' has no meaning at L1"),
    "a block's, too": ("bert", lambda: e.zero("L1", "mlp", scope="decode"), "scope='decode' has no meaning at L1"),
    "heads that are mixed up again": ("bitnet", lambda: e.zero("L1H0"), "cannot be served at L1: .*still work"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line_before_anything_runs(what: str) -> None:
    name, make, line = REFUSED[what]
    model, forwards = attached(name), []
    before = logits(model)
    model.table.blocks(None)  # looked for by a forward of their own, once
    handle = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises((InputError, Refusal)) as error, model.editing(make()):
        model(**model.example)
    handle.remove()
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    assert not forwards
    assert torch.equal(logits(model), before)


WHILE_RUNNING: dict[str, tuple[str, Callable[[], Any], str]] = {
    "rows beyond the batch": ("llama", lambda: e.zero("L1H0", rows=[0, 2]), r"rows=\[0, 2\], and the batch has 2 rows"),
    "a function's shape": ("llama", lambda: e.set("L1H0", lambda z, here: z[:, :3]), r"L1: the value has shape \[2, 3"),
    "a pattern's shape": ("llama", lambda: e.rewrite("L1H0", lambda p, here: p[..., :4]), r"L1: the value has shape"),
    "a span that was not given": ("llama", lambda: e.zero("L1H0", scope="span:a"), "'span:a': no such span was given"),
    "patches in pieces": ("qwen2_vl", lambda: e.block("vision.L0H0", keys=[1]), "columns cannot be told at vision.L0"),
}


@pytest.mark.parametrize("what", WHILE_RUNNING)
def test_what_only_the_run_can_show_is_refused_in_one_line_and_leaves_nothing(what: str) -> None:
    name, make, line = WHILE_RUNNING[what]
    model = attached(name)
    with torch.no_grad():
        before = model(**model.example)[0]
        with pytest.raises(HeadwiseError) as error, model.editing(make()):
            model(**model.example)
        assert torch.equal(model(**model.example)[0], before)
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_a_donor_must_say_which_positions_and_heads_it_holds() -> None:
    model = attached("llama")
    with model.reading(hw.read.z("L1H0, L1H1"), hw.read.z("L2", queries=[-1], name="last")) as donor:
        logits(model)
    with pytest.raises(InputError, match="the donor run holds no z of L1H2"):
        edited(hw.edit.patch("L1H2", donor.z))
    with pytest.raises(InputError, match="queries="):
        edited(hw.edit.patch("L2H0", donor.last, queries=[-1]))


def test_an_edit_of_nothing_is_not_a_plan() -> None:
    with (
        pytest.raises(InputError, match=r"editing\(\) takes edits such as .* it was given nothing"),
        attached("llama").editing(),
    ):
        pass


def test_an_edit_is_printed_in_one_line_however_large_its_value() -> None:
    assert repr(hw.edit.scale("L1", torch.ones(4, 12))) == "edit.scale(L1, scope=all, factor=tensor[4, 12])"
