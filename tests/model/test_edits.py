"""Every edit against transformers' own eager functions, changed by plain code that does not know headwise.

The oracle is a second copy of the model on eager attention. Its `eager_attention_forward` is replaced, for one layer,
by one that edits q, k, v before the original and the returned weights after it; z is edited by a plain pre-hook on the
output projection. Score edits are judged by what they must do to the weights: adding b to a score multiplies its
weight by exp(b) before the row (with its learned sink) is normalised again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel

HEADS, KEYS, TO = (0, 2), (1, 5, 15), (0, 4, 16)
POINTS = ("pre_gate", "post_gate")
EFFECT, CLOSE = 1e-3, 3e-5


@dataclass(frozen=True)
class Place:
    """A layer to edit: its label, and where transformers has its attention module and its output projection."""

    model: str
    label: str
    attention: str
    projection: str
    groups: tuple[int, ...] = (0, 2)
    heads: tuple[int, ...] = HEADS
    n_keys: int = 32

    def within(self, columns: tuple[int, ...]) -> list[int]:
        return [column for column in columns if column < self.n_keys]

    def named(self, letter: str, indices: tuple[int, ...]) -> list[str]:
        return [f"{self.label}{letter}{index}" for index in indices]

    @property
    def head_labels(self) -> list[str]:
        return self.named("H", self.heads)

    @property
    def group_labels(self) -> list[str]:
        return self.named("G", self.groups)


def decoder(model: str, layer: int, **more: Any) -> Place:
    path = f"model.layers.{layer}.self_attn"
    return Place(model, f"L{layer}", path, f"{path}.o_proj", **more)


PLACES = {
    "mha": Place("gpt2", "L1", "transformer.h.1.attn", "transformer.h.1.attn.c_proj"),
    "gqa": decoder("llama", 1, groups=(1,)),
    "window": decoder("mistral", 0, groups=(1,)),
    "softcap": decoder("gemma2", 1, groups=(1,)),
    "sink": decoder("gpt_oss", 0, groups=(1,)),
    "mla": decoder("deepseek_v3", 1),
    "gated": decoder("qwen3_next", 1, groups=(1,)),
    "encoder": Place(
        "bert", "L1", "bert.encoder.layer.1.attention.self", "bert.encoder.layer.1.attention.output.dense"
    ),
    "t5": Place(
        "t5", "L1", "decoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention.o", n_keys=9
    ),
    "cross": Place(
        "bart", "cross.L1", "model.decoder.layers.1.encoder_attn", "model.decoder.layers.1.encoder_attn.out_proj"
    ),
    "bart-encoder": Place(
        "bart", "encoder.L1", "model.encoder.layers.1.self_attn", "model.encoder.layers.1.self_attn.out_proj"
    ),
    "vision": Place(
        "clip",
        "vision.L0",
        "vision_model.encoder.layers.0.self_attn",
        "vision_model.encoder.layers.0.self_attn.out_proj",
    ),
}


OPEN = ExitStack()


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


@functools.cache
def eager(name: str) -> Any:
    return zoo.build(f"tiny-{name}", attn="eager").model


Change = Callable[[Tensor], Tensor]


@dataclass
class Oracle:
    """What is done inside the one layer: to q, k, v `[batch, head, position, dim]`, to the weights, to z."""

    q: Change | None = None
    k: Change | None = None
    v: Change | None = None
    weights: Change | None = None
    kernel: Change | None = None  # what the kernel returns, [batch, position, head, dim]
    z: Change | None = None  # the projection's input, [batch, position, head, dim]
    head_dim: int = 0

    @contextmanager
    def within(self, model: Any, place: Place) -> Iterator[None]:
        target = model.get_submodule(place.attention)
        home = sys.modules[type(target).__module__]
        original = home.eager_attention_forward  # type: ignore[attr-defined]

        def changed(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **options: Any) -> Any:
            if module is not target:
                return original(module, q, k, v, mask, *args, **options)
            q, k, v = (x if change is None else change(x) for x, change in ((q, self.q), (k, self.k), (v, self.v)))
            out, weights = original(module, q, k, v, mask, *args, **options)
            if self.weights is not None:
                values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                out = (self.weights(weights) @ values).transpose(1, 2).contiguous()
            out = out if self.kernel is None else self.kernel(out)
            self.head_dim = out.shape[-1]
            return out, weights

        def pre_hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].reshape(*args[0].shape[:2], -1, self.head_dim)
            return (args[0] if self.z is None else self.z(z).reshape(args[0].shape),)

        handle = model.get_submodule(place.projection).register_forward_pre_hook(pre_hook)
        home.eager_attention_forward = changed  # type: ignore[attr-defined]
        try:
            yield
        finally:
            home.eager_attention_forward = original  # type: ignore[attr-defined]
            handle.remove()

    def run(self, place: Place) -> Tensor:
        model, inputs = eager(place.model), attached(place.model).example
        with torch.no_grad(), self.within(model, place):
            return outcome(model(**inputs), inputs)


def outcome(output: Any, inputs: Any) -> Tensor:
    """The model's main output where tokens are attended (what padding yields is nobody's business)."""
    if "logits" not in output:
        return output.logits_per_image  # type: ignore[no-any-return]
    mask = inputs.get("attention_mask")
    return output.logits if "decoder_input_ids" in inputs else output.logits[mask.bool()]


def edited(place: Place, *edits: Any, **options: Any) -> Tensor:
    model = attached(place.model)
    with torch.no_grad(), model.editing(*edits, **options):
        return outcome(model(**model.example), model.example)


def clean(place: Place) -> Tensor:
    model = attached(place.model)
    with torch.no_grad():
        return outcome(model(**model.example), model.example)


def agree(ours: Tensor, theirs: Tensor, before: Tensor) -> None:
    """Equal to rounding, and not because nothing happened."""
    effect = (theirs - before).abs().max()
    assert effect > EFFECT, f"the oracle's edit changed only {effect}: nothing is shown"
    assert (ours - theirs).abs().max() < CLOSE * max(1.0, float(effect))


def at(axis: int, indices: tuple[int, ...], change: Callable[[Tensor], Any]) -> Change:
    """Apply `change` to a few heads (axis 1 or 2) of a tensor."""

    def apply(x: Tensor) -> Tensor:
        x = x.clone()
        where = (slice(None),) * axis + (list(indices),)
        x[where] = change(x[where])
        return x

    return apply


def numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- values: z, q, k, v ----------------------------------------------------------------------------------------------


def value_cases(labels: list[str], dim: int) -> dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any]]]:
    """An edit of each kind on the members `labels`, and what it does to `[batch, position, member, dim]`."""
    n = len(labels)
    per_head, per_dim, vectors = numbers(n), numbers(n, dim), numbers(n, dim, seed=4)
    by_label = {label: per_dim[index] for index, label in enumerate(labels)}
    e = hw.edit
    return {
        "zero": (lambda **o: e.zero(labels, **o), torch.zeros_like),
        "scale": (lambda **o: e.scale(labels, -0.5, **o), lambda x: x * -0.5),
        "scale-heads": (lambda **o: e.scale(labels, per_head, **o), lambda x: x * per_head[:, None]),
        "scale-dims": (lambda **o: e.scale(labels, by_label, **o), lambda x: x * per_dim),
        "add": (lambda **o: e.add(labels, vectors, **o), lambda x: x + vectors),
        "set": (lambda **o: e.set(labels, vectors, **o), lambda x: vectors.expand_as(x)),
        "set-by-function": (lambda **o: e.set(labels, lambda x, here: x.flip(-1), **o), lambda x: x.flip(-1)),
        "mix": (lambda **o: e.mix(labels, vectors, 0.3, **o), lambda x: 0.7 * x + 0.3 * vectors),
        "strength": (lambda **o: e.zero(labels, strength=per_head, **o), lambda x: x * (1 - per_head[:, None])),
    }


OPERATIONS = tuple(value_cases(["L0H0"], 2))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", PLACES)
def test_a_z_edit_is_that_edit_of_the_projections_input(kind: str, operation: str) -> None:
    place = PLACES[kind]
    dim = attached(place.model).site(place.label).head_dim
    make, change = value_cases(place.head_labels, dim)[operation]
    agree(edited(place, make()), Oracle(z=at(2, place.heads, change)).run(place), clean(place))


@pytest.mark.parametrize("variable", ["q", "k", "v"])
@pytest.mark.parametrize("operation", ["zero", "scale-heads", "scale-dims", "strength"])
@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "softcap", "sink", "mla", "t5", "cross", "vision"])
def test_a_q_k_or_v_edit_is_that_edit_of_what_the_kernel_is_given(kind: str, operation: str, variable: str) -> None:
    place = PLACES[kind]
    site = attached(place.model).site(place.label)
    dim = site.head_dim if variable == "v" else site.qk_dim
    labels, indices = (place.head_labels, place.heads) if variable == "q" else (place.group_labels, place.groups)
    make, change = value_cases(labels, dim)[operation]

    def across(x: Tensor) -> Tensor:
        return at(2, indices, change)(x.transpose(1, 2)).transpose(1, 2)

    agree(edited(place, make(variable=variable)), Oracle(**{variable: across}).run(place), clean(place))


def test_before_the_gate_and_after_it_are_two_places() -> None:
    place, vector = PLACES["gated"], numbers(2, 12)

    def add(x: Tensor) -> Tensor:
        return x + vector

    ours = {point: edited(place, hw.edit.add(place.head_labels, vector, point=point)) for point in POINTS}
    agree(ours["pre_gate"], Oracle(kernel=at(2, HEADS, add)).run(place), clean(place))
    agree(ours["post_gate"], Oracle(z=at(2, HEADS, add)).run(place), clean(place))
    assert (ours["pre_gate"] - ours["post_gate"]).abs().max() > EFFECT


# -- rows: scores and patterns -----------------------------------------------------------------------------------------


def chosen(weights: Tensor, columns: tuple[int, ...] = KEYS) -> Tensor:
    """True at the columns."""
    keys = torch.arange(weights.shape[-1])
    return (keys[:, None] == torch.tensor(columns)).any(dim=1)


def biased(weights: Tensor, bias: Tensor | float) -> Tensor:
    """What softmax gives once `bias` is added to the scores; a learned sink keeps its own score."""
    raised = weights * torch.exp(torch.as_tensor(bias))
    left = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    return raised / (raised.sum(-1, keepdim=True) + left)


def renormalised(weights: Tensor, factor: Tensor | float) -> Tensor:
    scaled = torch.where(chosen(weights), weights * factor, weights)
    return scaled * weights.sum(-1, keepdim=True) / scaled.sum(-1, keepdim=True).clamp(min=1e-30)


def moved(weights: Tensor, share: float, to: tuple[int, ...] | None) -> Tensor:
    """ACT: a share of the mass on the keys goes to the others in proportion; nowhere to go, and the row stays."""
    given = chosen(weights)
    taking = ~given if to is None else chosen(weights, to) & ~given
    mass = (weights * given).sum(-1, keepdim=True) * share
    there = (weights * taking).sum(-1, keepdim=True)
    result = torch.where(given, weights * (1 - share), weights) + torch.where(taking, weights * mass / there, 0.0)
    return torch.where(there > 0, result, weights)


def visible(weights: Tensor) -> Tensor:
    return (weights > 0).to(weights)


PER_HEAD = torch.tensor([0.4, 2.5])
AMOUNT = PER_HEAD.log()[:, None, None]
ROW_CASES: dict[str, tuple[Callable[[Place], Any], Change]] = {
    "uniform": (
        lambda p: hw.edit.uniform(p.head_labels),
        lambda w: visible(w) / visible(w).sum(-1, keepdim=True).clamp(min=1),
    ),
    "bias": (
        lambda p: hw.edit.bias(p.head_labels, PER_HEAD.log(), keys=p.within(KEYS)),
        lambda w: biased(w, torch.where(chosen(w), AMOUNT, 0.0)),
    ),
    "block": (
        lambda p: hw.edit.block(p.head_labels, keys=p.within(KEYS)),
        lambda w: biased(w, torch.where(chosen(w), -torch.inf, 0.0)).nan_to_num(),
    ),
    "reweight": (
        lambda p: hw.edit.reweight(p.head_labels, PER_HEAD, keys=p.within(KEYS)),
        lambda w: renormalised(w, PER_HEAD[:, None, None]),
    ),
    "redistribute": (
        lambda p: hw.edit.redistribute(p.head_labels, 0.6, keys=p.within(KEYS)),
        lambda w: moved(w, 0.6, None),
    ),
    "redistribute-to": (
        lambda p: hw.edit.redistribute(p.head_labels, 0.6, keys=p.within(KEYS), to=p.within(TO)),
        lambda w: moved(w, 0.6, TO),
    ),
    "columns": (
        lambda p: hw.edit.scale(p.head_labels, PER_HEAD, variable="pattern", keys=p.within(KEYS)),
        lambda w: torch.where(chosen(w), w * PER_HEAD[:, None, None], w),
    ),
    "rewrite": (
        lambda p: hw.edit.rewrite(p.head_labels, lambda pattern, here: pattern.square() + here.visible * 0.01),
        lambda w: w.square() + visible(w) * 0.01,
    ),
    "strength": (
        lambda p: hw.edit.uniform(p.head_labels, strength=PER_HEAD),
        lambda w: w + PER_HEAD[:, None, None] * (visible(w) / visible(w).sum(-1, keepdim=True).clamp(min=1) - w),
    ),
}


PLACELESS = ("uniform", "rewrite", "strength")  # a vision tower's patches have no columns to name


@pytest.mark.parametrize(
    ("kind", "operation"), [(k, o) for k in PLACES for o in ROW_CASES if k != "vision" or o in PLACELESS]
)
def test_a_row_edit_gives_the_weights_of_its_closed_form(kind: str, operation: str) -> None:
    place, (make, change) = PLACES[kind], ROW_CASES[operation]
    agree(edited(place, make(place)), Oracle(weights=at(1, HEADS, change)).run(place), clean(place))


@pytest.mark.parametrize("kind", ["mha", "gqa", "window", "softcap", "mla", "t5"])
def test_a_scaled_score_is_an_inverse_temperature(kind: str) -> None:
    place = PLACES[kind]

    def colder(weights: Tensor) -> Tensor:
        return weights.pow(1.7) / weights.pow(1.7).sum(-1, keepdim=True)

    ours = edited(place, hw.edit.scale(place.head_labels, 1.7, variable="score"))
    agree(ours, Oracle(weights=at(1, HEADS, colder)).run(place), clean(place))


# -- donors ----------------------------------------------------------------------------------------------------------


def test_a_donor_of_a_tower_that_attends_in_pieces_is_put_in_piece_by_piece() -> None:
    """Qwen2-VL's vision tower calls its kernel once per picture."""
    organism = zoo.build("tiny-qwen2_vl")
    other = {**organism.example, "pixel_values": -organism.example["pixel_values"]}
    model = OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example))
    assert model.site("vision.L1").chunked
    with torch.no_grad():
        with model.reading(hw.read.z("vision.L1")) as donor:
            model(**other)
        held = donor.z["vision.L1"].clone()
        with (
            model.editing(hw.edit.patch("vision.L1H0", donor.z)),
            model.reading(hw.read.z("vision.L1", name="now")) as got,
        ):
            patched = model(**organism.example).logits
        plain = model(**organism.example).logits
    now = got.now["vision.L1"]
    assert torch.equal(now[:, :, 0], held[:, :, 0])
    assert not torch.equal(now[:, :, 1], held[:, :, 1])
    assert not torch.equal(patched, plain)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", ["uniform", "reweight", "redistribute"])
def test_half_precision_stays_near_the_closed_form_in_single(operation: str, dtype: torch.dtype) -> None:
    """Within 3 (bf16) or 0.4 (fp16) percent of the largest logit, which is what the unedited model keeps to as well."""
    place, (make, change) = PLACES["gqa"], ROW_CASES[operation]
    organism = zoo.build("tiny-llama", dtype=dtype)
    model = OPEN.enter_context(hw.attach(organism.model, organism.tokenizer))
    with torch.no_grad(), model.editing(make(place)):
        ours = outcome(model(**organism.example), organism.example)
    theirs = Oracle(weights=at(1, HEADS, change)).run(place)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert ours.dtype is dtype
    assert (ours.float() - theirs).abs().max() < tolerance * theirs.abs().max()
    assert (theirs - clean(place)).abs().max() > 2 * tolerance * theirs.abs().max()
