"""Dual runs of one forward, against two runs of the same model that know nothing of each other.

The second way is plain torch: hooks on output projections and blocks, and a stand-in for the attention kernel
(`Attention`) that is written out here and lets one run's tensors be put into another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise import zoo

MODES = ("batch", "caches")
DIM = 12  # of every head here

# Where heads write, and what stands in for "the second stream's edits": half of one head's z, twice another's.
PROJECTIONS = {
    "tiny-llama": "model.layers.{}.self_attn.o_proj",
    "tiny-gpt2": "transformer.h.{}.attn.c_proj",
    "tiny-mistral": "model.layers.{}.self_attn.o_proj",
    "tiny-gpt_oss": "model.layers.{}.self_attn.o_proj",
    "tiny-qwen3_next": "model.layers.{}.self_attn.o_proj",
    "tiny-jamba": "model.layers.{}.self_attn.o_proj",
    "tiny-bert": "bert.encoder.layer.{}.attention.output.dense",
    "tiny-t5": "decoder.block.{}.layer.0.SelfAttention.o",
    "tiny-bart": "model.decoder.layers.{}.self_attn.out_proj",
    "tiny-whisper": "model.decoder.layers.{}.self_attn.out_proj",
    "tiny-llava": "model.language_model.layers.{}.self_attn.o_proj",
    "tiny-qwen2_vl": "model.language_model.layers.{}.self_attn.o_proj",
}
BATCHED = sorted(PROJECTIONS.keys() - {"tiny-qwen2_vl"})


@contextmanager
def scaled(model: nn.Module, name: str, *changes: tuple[int, int, float]) -> Iterator[None]:
    """Each `(layer, head, factor)` carried out by a plain hook on that layer's output projection."""

    def by(head: int, factor: float) -> Callable[..., tuple[Tensor]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., head * DIM : (head + 1) * DIM] *= factor
            return (z,)

        return hook

    with ExitStack() as undo:
        for layer, head, factor in changes:
            projection = model.get_submodule(PROJECTIONS[name].format(layer))
            undo.callback(projection.register_forward_pre_hook(by(head, factor)).remove)
        yield


def attached(name: str) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), dict(organism.example)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[hw.AttachedModel, dict[str, Tensor]]]:
    model, inputs = attached("tiny-llama")
    with model:
        yield model, inputs


def close(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=tolerance, atol=tolerance))


# -- two streams are two runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in PROJECTIONS for mode in MODES if mode == "caches" or name in BATCHED]
)
@torch.no_grad()
def test_both_streams_equal_runs_alone(name: str, mode: str) -> None:
    model, inputs = attached(name)
    layer = model.heads().sites[0].layer
    clean = model(**inputs)
    with scaled(model.model, name, (layer, 1, 0.5), (layer, 3, 2.0)):
        second = model(**inputs).logits
    with scaled(model.model, name, (layer, 1, 3.0)):
        first = model(**inputs).logits
    edits = hw.edit.scale(f"L{layer}H1", 0.5), hw.edit.scale(f"L{layer}H3", 2.0)
    tolerance = 2e-5 if mode == "batch" else 0.0
    with model, model.dual(*edits, mode=mode) as dual:
        output = model(**inputs)
        assert close(dual.second, second, tolerance)
        assert close(output.logits, clean.logits, tolerance)
        assert output.keys() == clean.keys()
        assert all(output[key].shape == clean[key].shape for key in clean if isinstance(clean[key], Tensor))
        with model.editing(hw.edit.scale(f"L{layer}H1", 3.0)):  # both streams edited, and the same head in each
            output = model(**inputs)
        assert close(dual.second, second, tolerance)
        assert close(output.logits, first, tolerance)
    assert not close(second, clean.logits, 1e-3)
    assert not close(first, second, 1e-3)


@torch.no_grad()
def test_cross_heads_and_encoders_of_a_plain_forward_belong_to_their_stream() -> None:
    model, inputs = attached("tiny-bart")
    clean = model(**inputs).logits
    expected = {}
    paths = {"cross.L1H2": "model.decoder.layers.1.encoder_attn", "encoder.L0H2": "model.encoder.layers.0.self_attn"}
    for label, path in paths.items():
        hook = model.model.get_submodule(f"{path}.out_proj").register_forward_pre_hook(
            lambda module, args: (torch.cat([args[0][..., :24], 0 * args[0][..., 24:36], args[0][..., 36:]], -1),)
        )
        expected[label] = model(**inputs).logits
        hook.remove()
    with model:
        for mode in MODES:
            for label, logits in expected.items():
                with model.dual(hw.edit.zero(label), mode=mode) as dual:
                    assert close(model(**inputs).logits, clean)
                    assert close(dual.second, logits)


# -- what the first stream reads of the second ------------------------------------------------------------------------


class Attention:
    """Attention by its formula, in place of torch's; records each call and lets its tensors be changed."""

    def __init__(self, **change: Callable[[int, Tensor], Tensor]) -> None:
        self.change = change
        self.calls: list[dict[str, Tensor]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call: dict[str, Tensor] = {}
        self.calls.append(call)

        def passed(name: str, tensor: Tensor) -> Tensor:
            call[name] = self.change.get(name, lambda layer, same: same)(len(self.calls) - 1, tensor)
            return call[name]

        groups = query.shape[1] // key.shape[1]
        query = passed("q", query)
        key = passed("k", key.repeat_interleave(groups, dim=1))
        value = passed("v", value.repeat_interleave(groups, dim=1))
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        if attn_mask is not None:
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1e30
        score = passed("score", (query @ key.mT * (scale or query.shape[-1] ** -0.5)).masked_fill(hidden, -1e30))
        pattern = passed("pattern", (score.softmax(-1) * ~hidden))
        return passed("z", pattern @ value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variable", ["q", "k", "v", "score", "pattern", "z"])
@torch.no_grad()
def test_other_at_attention(variable: str, mode: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1H2 and L1H3 (one KV group) take a share of what the second stream, without L0H1, has there."""
    model, inputs = llama
    share = 0.7
    donor = Attention()
    with monkeypatch.context() as patched, scaled(model.model, "tiny-llama", (0, 1, 0.0)):
        patched.setattr(nn.functional, "scaled_dot_product_attention", donor)
        model(**inputs)

    def patch(layer: int, tensor: Tensor) -> Tensor:
        if layer != 1:
            return tensor
        mixed = tensor.clone()
        mixed[:, 2:] += share * (donor.calls[1][variable][:, 2:] - tensor[:, 2:])
        return mixed

    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", Attention(**{variable: patch}))
        expected = model(**inputs).logits
    heads: Any = "L1G1" if variable in "kv" else ["L1H2", "L1H3"]
    with model.dual(hw.edit.zero("L0H1"), mode=mode):
        for edit in (
            hw.edit.mix(heads, hw.edit.OTHER, share, variable=variable),
            hw.edit.patch(heads, hw.edit.OTHER, variable=variable, strength=share),
            hw.edit.set(heads, lambda now, here: now + share * (here.other() - now), variable=variable),
        ):
            with model.editing(edit):
                assert close(model(**inputs).logits, expected)
        assert not close(model(**inputs).logits, expected, 1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", ["mlp", "residual_pre", "residual_post"])
@torch.no_grad()
def test_other_at_blocks(point: str, mode: str, llama: Any) -> None:
    model, inputs = llama
    block, held = model.model.model.layers[1], {}

    def record(tensor: Tensor) -> Tensor:
        held["donor"] = tensor
        return tensor

    def replace(tensor: Tensor) -> Tensor:
        return held["donor"]

    def hook(act: Callable[[Tensor], Tensor]) -> Any:
        if point == "residual_pre":
            return block.register_forward_pre_hook(lambda module, args: (act(args[0]), *args[1:]))
        module = block.mlp if point == "mlp" else block
        return module.register_forward_hook(lambda module, args, output: act(output))

    with scaled(model.model, "tiny-llama", (0, 1, 0.0)):
        recording = hook(record)
        model(**inputs)
        recording.remove()
    replacing = hook(replace)
    expected = model(**inputs).logits
    replacing.remove()
    # Opened inside and outside: the second stream's own edits come first whatever the order of the blocks.
    with model.dual(hw.edit.zero("L0H1"), mode=mode), model.editing(hw.edit.patch("L1", hw.edit.OTHER, variable=point)):
        assert close(model(**inputs).logits, expected)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_feed_forward_on_flattened_rows(mode: str) -> None:
    """OPT's goes over `[batch * position, d_model]`."""
    model, inputs = attached("tiny-opt")
    last = model.model.model.decoder.layers[1].fc2
    second_row = torch.arange(64)[:, None] >= 32
    handle = last.register_forward_hook(lambda module, args, output: torch.where(second_row, 0.25 * output, output))
    expected = model(**inputs).logits
    handle.remove()
    with model, model.dual(hw.edit.scale("L1", 0.25, variable="mlp", rows=[1]), mode=mode) as dual:
        model(**inputs)
        assert close(dual.second, expected)
        with model.editing(hw.edit.patch("L1", hw.edit.OTHER, variable="mlp")):
            assert close(model(**inputs).logits, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variable", ["score", "pattern", "z"])
@torch.no_grad()
def test_other_is_what_the_second_stream_made_of_it(variable: str, mode: str, llama: Any) -> None:
    """The second stream's edits of one head, all taken over, make the first one equal to it."""
    model, inputs = llama
    edits = (
        hw.edit.bias("L1H2", 2.0, keys="first"),
        *([hw.edit.reweight("L1H2", 0.2, keys=[-2])] if variable != "score" else []),
        *([hw.edit.scale("L1H2", -2.0)] if variable == "z" else []),
    )
    with model.editing(*edits):
        expected = model(**inputs).logits
    outside = model.editing(hw.edit.scale("L2H0", 1.0))
    with outside, model.dual(*edits, mode=mode), model.editing(hw.edit.patch("L1H2", hw.edit.OTHER, variable=variable)):
        assert close(model(**inputs).logits, expected)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_other_before_and_after_a_gate_at_once(mode: str) -> None:
    """The gate of L1 is the same in both streams where the second differs at L1 alone: z' gate = (z gate)'."""
    model, inputs = attached("tiny-qwen3_next")
    with model:
        with model.reading(hw.read.z(), hw.read.z(point="pre_gate", name="before")) as got:
            clean = model(**inputs).logits
        before, after = got.before["L1"][:, :, :1] * 5, got.z["L1"][:, :, 1:2] * -3
        second = (
            hw.edit.set("L1H0", lambda now, here: before, point="pre_gate"),
            hw.edit.set("L1H1", lambda now, here: after),
        )
        first = (
            hw.edit.patch("L1H0", hw.edit.OTHER, point="pre_gate"),
            hw.edit.patch("L1H1", hw.edit.OTHER),
        )
        with scaled(model.model, "tiny-qwen3_next", (1, 0, 5.0), (1, 1, -3.0)):
            expected = model(**inputs).logits
        with model.dual(*second, mode=mode) as dual, model.editing(*first):
            assert close(model(**inputs).logits, expected, 1e-4)
            assert close(dual.second, expected, 1e-4)
        assert not close(clean, expected, 1e-3)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_encoder_positions_are_those_of_each_row(mode: str) -> None:
    model, inputs = attached("tiny-t5")
    edit = hw.edit.block("cross.L1H2", keys=[-1])  # the last attended column: rows are padded on the right
    with model:
        with model.editing(edit):
            expected = model(**inputs).logits
        with model.dual(edit, mode=mode) as dual:
            clean = model(**inputs).logits
        assert close(dual.second, expected)
        assert not close(clean, expected, 1e-3)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_each_stream_s_edits_see_its_own_rows_only(mode: str, llama: Any) -> None:
    """Donors, drawn samples and functions get B rows in both streams, as they would in a run alone."""
    model, inputs = llama
    with model.reading(hw.read.z("L1H2")) as donor:
        model(input_ids=inputs["input_ids"].flip(1), attention_mask=inputs["attention_mask"])
    reference = hw.reference(model, [inputs])
    seen: list[tuple[int, ...]] = []

    def watched(now: Tensor, here: Any) -> Tensor:
        seen.append((here.batch, *now.shape[:2], *(() if here.window is None else here.window.frame.mask.shape)))
        return now - now.mean(dim=0, keepdim=True)  # mixes the rows it is given

    edits = (
        hw.edit.patch("L1H2", donor.z),
        hw.edit.resample("L0H0", reference, seed=3, rows=[1]),
        hw.edit.set("L2H1", watched),
        hw.edit.redistribute("L1H0", 0.5, keys="first", to=[-1]),
        hw.edit.zero("L0H3", scope="span:word"),
    )
    spans = {"word": [[14, 15], [25]]}
    with model.editing(*edits, spans=spans):
        expected = model(**inputs).logits
    clean = model(**inputs).logits
    with model.dual(*edits, mode=mode, spans=spans) as dual:
        assert close(model(**inputs).logits, clean)
        assert close(dual.second, expected)
        with model.editing(*edits):
            assert close(model(**inputs).logits, expected)
            assert close(dual.second, expected)
    assert set(seen) == {(2, 2, 32, 2, 32)}


# -- reads, counts, gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_reads_show_the_first_stream(mode: str, llama: Any) -> None:
    model, inputs = llama
    every = (
        hw.read.q("L1", grad=True),
        hw.read.k(),
        hw.read.v(),
        hw.read.z(grad=True),
        hw.read.write("L1", grad=True),
        hw.read.scores("L1H2"),
        hw.read.rows(["L1H1", "L2H0"], grad=True),
        hw.read.rows("L1", queries=[-1], name="last"),
        hw.read.statistics(spans=["word"]),
        hw.read.mlp(),
        hw.read.residual(where="pre"),
        hw.read.final_scale(),
        hw.read.gate("L1"),
    )
    spans = {"word": [[14, 15], [25]]}

    def facts(got: Any, output: Any) -> dict[str, Any]:
        output.logits[0, -1, 5].backward()
        values = {}
        for name, held in got.captures.items():
            for label in held:
                if name == "statistics":
                    for part in ("entropy", "max", "mean_distance"):
                        values[f"{label} {part}"] = getattr(held[label], part)
                    values[f"{label} word"] = held[label].span_mass["word"]
                elif name != "gate":
                    values[f"{name} {label}"] = held[label]
                if held.read.grad:
                    values[f"{name} {label} grad"] = held.grad[label]
        return values

    with model.reading(*every, spans=spans) as got:
        alone, counts = facts(got, model(**inputs)), got.fired
    second = hw.edit.zero("L0H1"), hw.edit.uniform("L1H2")
    with model.dual(*second, mode=mode), model.reading(*every, spans=spans) as got:
        beside = facts(got, model(**inputs))
        assert got.fired == counts
    assert alone.keys() == beside.keys()
    for name, value in alone.items():
        same = torch.nan_to_num(value.detach(), neginf=-1e9), torch.nan_to_num(beside[name].detach(), neginf=-1e9)
        assert close(*same, 1e-4), name


@torch.no_grad()
def test_what_fired_is_counted_once_per_stream(llama: Any) -> None:
    model, inputs = llama
    told = []
    for mode in MODES:
        with (
            model.dual(hw.edit.zero("L0H1"), hw.edit.uniform("L1H0", scope="last"), mode=mode) as dual,
            model.editing(hw.edit.patch("L2H3", hw.edit.OTHER, queries=[-2, -1])) as opened,
        ):
            model(**inputs)
        told.append([(fired.site, fired.calls, fired.positions) for fired in (*dual.fired, *opened.fired)])
    assert told[0] == told[1] == [("L0", 1, 64), ("L1", 1, 2), ("L2", 1, 4)]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_through_both_streams(mode: str) -> None:
    organism = zoo.build("tiny-llama", dtype=torch.float64)
    inputs = organism.example
    loss = lambda logits: logits[:, -1].log_softmax(-1)[:, 7].sum()  # noqa: E731
    weight = organism.model.model.layers[0].mlp.down_proj.weight
    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        first = organism.model(**inputs).logits

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (torch.cat([args[0][..., :DIM], factor * args[0][..., DIM : 2 * DIM], args[0][..., 2 * DIM :]], -1),)

        handle = organism.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
        second = organism.model(**inputs).logits
        handle.remove()
        return loss(1.5 * first - 0.5 * second)

    expected = torch.autograd.grad(plain(), (factor, weight))
    with (
        hw.attach(organism.model, example=inputs) as model,
        model.dual(hw.edit.scale("L1H1", factor), combine=lambda first, second: 1.5 * first - 0.5 * second, mode=mode),
    ):
        gradients = torch.autograd.grad(loss(model(**inputs).logits), (factor, weight))
    assert close(gradients[0], expected[0], 1e-9)
    assert close(gradients[1], expected[1], 1e-9)
    assert expected[0].abs() > 1e-4
