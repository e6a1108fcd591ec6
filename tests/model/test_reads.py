"""Every read against a second way that does not pass through headwise: plain torch hooks, transformers' own eager
attentions and hidden states, closed forms."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.errors import Refusal
from headwise.model import read
from headwise.model.attention.statistics import RowStatistics

LEFT_PADDING = (0, 12)  # of the zoo's decoder example
close = torch.testing.assert_close


def attached(name: str, **options: Any) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name, **options)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), organism.example


@contextmanager
def noting(model: nn.Module, paths: dict[str, str], *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inputs or outputs of modules, by plain torch hooks, under names of one's own."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            value = args[0] if inputs else output
            seen[name] = (value[0] if isinstance(value, tuple) else value).clone()

        return hook

    modules = {name: model.get_submodule(path) for name, path in paths.items()}
    handles = [
        module.register_forward_pre_hook(note(name)) if inputs else module.register_forward_hook(note(name))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def softmax_rows(name: str, example: dict[str, Tensor], **fields: str) -> dict[str, tuple[Tensor, ...]]:
    """transformers' own eager attentions of the same weights, by stack."""
    model = zoo.build(name, attn="eager").model
    with torch.no_grad():
        out = model(**example, output_attentions=True)
    return {stack: getattr(out, field) for stack, field in fields.items()}


# -- z and write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "projections"),
    [
        ("tiny-llama", {"L1": "model.layers.1.self_attn.o_proj"}),
        ("tiny-gpt2", {"L2": "transformer.h.2.attn.c_proj"}),
        ("tiny-deepseek_v3", {"L0": "model.layers.0.self_attn.o_proj"}),
        ("tiny-bert", {"L1": "bert.encoder.layer.1.attention.output.dense"}),
        ("tiny-qwen3_next", {"L1": "model.layers.1.self_attn.o_proj"}),
        (
            "tiny-bart",
            {
                "L1": "model.decoder.layers.1.self_attn.out_proj",
                "cross.L1": "model.decoder.layers.1.encoder_attn.out_proj",
                "encoder.L1": "model.encoder.layers.1.self_attn.out_proj",
            },
        ),
        (
            "tiny-llava",
            {
                "L0": "model.language_model.layers.0.self_attn.o_proj",
                "vision.L1": "model.vision_tower.encoder.layers.1.self_attn.out_proj",
            },
        ),
    ],
)
def test_z_is_the_projections_input_and_writes_are_what_each_slice_of_it_gives(
    name: str, projections: dict[str, str]
) -> None:
    model, example = attached(name)
    sites = list(projections)
    with (
        torch.no_grad(),
        noting(model.model, projections, inputs=True) as entering,
        noting(model.model, projections) as leaving,
        model.reading(read.z(sites), read.write(sites)) as got,
    ):
        model(**example)
    for label, path in projections.items():
        site, projection = model.site(label), model.model.get_submodule(path)
        given = entering[label].reshape(*got.z[label].shape[:2], -1)
        assert got.z[label].shape[2:] == (site.n_heads, site.head_dim)
        assert torch.equal(got.z[label].flatten(2), given)
        nothing = projection(torch.zeros_like(given[:1, :1]))
        for head in range(site.n_heads):
            alone = torch.zeros_like(given)
            block = slice(head * site.head_dim, (head + 1) * site.head_dim)
            alone[:, :, block] = given[:, :, block]
            close(got.write[f"{label}H{head}"], projection(alone) - nothing, atol=2e-6, rtol=1e-5)
        close(got.write[label].sum(2) + nothing, leaving[label].reshape(*given.shape[:2], -1), atol=5e-6, rtol=1e-5)


def test_the_gate_stands_between_the_two_points_of_z() -> None:
    model, example = attached("tiny-qwen3_next")
    attention = "model.layers.1.self_attn"
    reads = (read.z("L1", point="pre_gate", name="before"), read.z("L1"))
    with torch.no_grad(), noting(model.model, {"q": f"{attention}.q_proj"}) as seen, model.reading(*reads) as got:
        model(**example)
    gate = seen["q"].view(2, 32, 4, 2 * 12)[..., 12:]  # q_proj makes a query and a gate for every head
    close(got.z["L1"], got.before["L1"] * gate.sigmoid())
    assert not torch.allclose(got.z["L1"], got.before["L1"])


# -- q, k, v, scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("tiny-llama", "llama"), ("tiny-gemma2", "gemma2")])
def test_q_k_v_and_scores_against_projections_and_rotary(name: str, kind: str) -> None:
    model, example = attached(name)
    attention = "model.layers.1.self_attn"
    rotate = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb
    angles: list[tuple[Tensor, Tensor]] = []
    rotary = model.model.get_submodule("model.rotary_emb").register_forward_hook(lambda m, a, out: angles.append(out))
    reads = (read.q("L1"), read.k("L1"), read.v("L1"), read.scores("L1"))
    parts = {part: f"{attention}.{part}_proj" for part in "qkv"}
    with torch.no_grad(), noting(model.model, parts) as seen, model.reading(*reads) as got:
        model(**example)
    rotary.remove()
    q, k, v = (seen[part].view(2, 32, -1, 12) for part in "qkv")
    q, k = (part.transpose(1, 2) for part in rotate(q.transpose(1, 2), k.transpose(1, 2), *angles[0]))
    close(got.q["L1"], q)
    close(got.k["L1"], k)
    close(got.v["L1"], v)
    close(got.v["L1G1"], v[:, :, 1])

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) * 12**-0.5
    if kind == "gemma2":
        scores = 2.0 * torch.tanh(scores / 2.0)
    columns = torch.arange(32)
    seen_keys = (columns <= columns[:, None]) & (columns >= torch.tensor(LEFT_PADDING)[:, None, None])
    if kind == "gemma2" and model.model.config.layer_types[1] == "sliding_attention":
        seen_keys = seen_keys & (columns > columns[:, None] - model.model.config.sliding_window)
    for row, padding in enumerate(LEFT_PADDING):
        expected = scores[row].masked_fill(~seen_keys[row], -torch.inf)
        close(got.scores["L1"][row, :, padding:], expected[:, padding:], atol=5e-6, rtol=1e-5)


def test_keys_and_values_of_cross_attention_are_those_of_the_source() -> None:
    model, example = attached("tiny-bart")
    parts = {part: f"model.decoder.layers.0.encoder_attn.{part}_proj" for part in "kv"}
    reads = (read.k("cross.L0"), read.v("cross.L0"), read.k("cross.L0", queries=[0, -1], name="ends"))
    with torch.no_grad(), noting(model.model, parts) as seen, model.reading(*reads) as got:
        model(**example)
    close(got.k["cross.L0"].flatten(2), seen["k"])
    close(got.v["cross.L0"].flatten(2), seen["v"])
    assert got.k["cross.L0"].shape[1] == 32 != example["decoder_input_ids"].shape[1]
    ends = torch.stack([seen["k"][0, [0, 31]], seen["k"][1, [0, 19]]])  # the second source ends at column 19
    close(got.ends["cross.L0"].flatten(2), ends)


# -- rows and statistics ------------------------------------------------------------------------------------------

PATTERNS = [
    ("tiny-llama", {"": "attentions"}),
    ("tiny-gpt2", {"": "attentions"}),
    ("tiny-gemma2", {"": "attentions"}),
    ("tiny-gpt_oss", {"": "attentions"}),
    ("tiny-mistral", {"": "attentions"}),
    ("tiny-bert", {"": "attentions"}),
    ("tiny-vit", {"": "attentions"}),
    ("tiny-t5", {"": "decoder_attentions", "cross.": "cross_attentions", "encoder.": "encoder_attentions"}),
    ("tiny-bart", {"": "decoder_attentions", "cross.": "cross_attentions", "encoder.": "encoder_attentions"}),
    ("tiny-whisper", {"": "decoder_attentions", "cross.": "cross_attentions", "encoder.": "encoder_attentions"}),
    ("tiny-llava", {"": "attentions"}),
]


@pytest.mark.parametrize(("name", "fields"), PATTERNS)
def test_rows_are_the_models_eager_attentions(name: str, fields: dict[str, str]) -> None:
    model, example = attached(name)
    dense = softmax_rows(name, example, **fields)
    with torch.no_grad(), model.reading(read.rows(None), read.scores(None)) as got:
        model(**example)
    for stack, layers in dense.items():
        for layer, expected in enumerate(layers):
            label = f"{stack}L{layer}"
            assert got.rows[label].dtype == torch.float32
            of_tokens = stack == "encoder." or (stack == "" and len(fields) == 1)  # whose queries the mask is about
            mask = example.get("attention_mask") if of_tokens else None
            alive = torch.ones(expected.shape[0], expected.shape[2]).bool() if mask is None else mask.bool()
            found, wanted = got.rows[label].transpose(1, 2)[alive], expected.transpose(1, 2)[alive]
            close(found, wanted, atol=2e-6, rtol=1e-5)
            if name != "tiny-gpt_oss":  # its sink takes a share of each row
                scores = got.scores[label].transpose(1, 2)[alive]
                visible = wanted > 1e-6
                close(scores.log_softmax(-1)[visible], wanted.log()[visible], atol=1e-4, rtol=1e-4)


def test_rows_of_a_vision_tower_inside_another_model() -> None:
    model, example = attached("tiny-llava")
    tower = zoo.build("tiny-llava", attn="eager").model.get_submodule("model.vision_tower")
    with torch.no_grad(), model.reading(read.rows("vision"), read.z("vision.L0")) as got:
        model(**example)
        expected = tower(example["pixel_values"], output_attentions=True).attentions
    for layer, wanted in enumerate(expected):
        close(got.rows[f"vision.L{layer}"], wanted, atol=2e-6, rtol=1e-5)


def expected_statistics(pattern: Tensor, first: tuple[int, ...], span: Tensor) -> dict[str, Tensor]:
    p, columns = pattern.double(), torch.arange(pattern.shape[-1], dtype=torch.float64)
    queries = torch.arange(pattern.shape[2], dtype=torch.float64)
    return {
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "max": p.amax(-1),
        "top1": p.argmax(-1).double(),
        "sink_mass": torch.stack([p[row, :, :, column] for row, column in enumerate(first)]),
        "learned_sink": 1 - p.sum(-1),
        "mean_distance": queries[:, None].squeeze(-1) - (p * columns).sum(-1) / p.sum(-1),
        "span": (p * span[:, None, None]).sum(-1),
    }


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt_oss", "tiny-mistral"])
def test_statistics_are_those_of_the_eager_attentions(name: str) -> None:
    model, example = attached(name)
    dense = softmax_rows(name, example, main="attentions")["main"]
    span = torch.zeros(2, 32).bool()
    span[0, 5:9] = span[1, 20:22] = True
    spans = {"words": [[5, 6, 7, 8], [20, 21]]}
    with torch.no_grad(), model.reading(read.statistics(None, spans=["words"]), spans=spans) as got:
        model(**example)
    for layer, pattern in enumerate(dense):
        found: RowStatistics = got.statistics[f"L{layer}"]
        for what, wanted in expected_statistics(pattern, LEFT_PADDING, span).items():
            values = found.span_mass["words"] if what == "span" else getattr(found, what)
            for row, padding in enumerate(LEFT_PADDING):
                close(values[row, :, padding:].double(), wanted[row, :, padding:], atol=3e-5, rtol=1e-4, msg=what)
                blank = values[row, :, :padding]
                assert (blank == -1).all() if what == "top1" else blank.isnan().all()
    close(got.statistics["L1H2"].max, got.statistics["L1"].max[:, 2], atol=0, rtol=0, equal_nan=True)
    if name == "tiny-gpt_oss":
        assert got.statistics["L0"].learned_sink[0].min() > 0.001


def test_statistics_of_edited_scores_are_those_of_the_rows_read_beside_them() -> None:
    model, example = attached("tiny-llama")
    edit = hw.edit.bias("L1H2", 1.5, keys=[3, -2])
    with torch.no_grad(), model.editing(edit), model.reading(read.statistics("L1"), read.rows("L1")) as got:
        model(**example)
    with torch.no_grad(), model.reading(read.rows("L1")) as plain:
        model(**example)
    assert not torch.allclose(got.rows["L1H2"], plain.rows["L1H2"], atol=1e-2)
    span = torch.zeros(2, 32).bool()
    for what, wanted in expected_statistics(got.rows["L1"], LEFT_PADDING, span).items():
        if what != "span":
            for row, padding in enumerate(LEFT_PADDING):
                values = getattr(got.statistics["L1"], what)[row, :, padding:].double()
                close(values, wanted[row, :, padding:], atol=3e-5, rtol=1e-4, msg=what)


def test_statistics_of_edited_patterns_are_refused_with_the_way_out() -> None:
    model, example = attached("tiny-llama")
    with pytest.raises(Refusal, match=r"L1: statistics of heads whose pattern is edited.*read\.rows gives them"):  # noqa: SIM117
        with model.editing(hw.edit.uniform("L1H2")), model.reading(read.statistics("L1")):
            model(**example)


def test_statistics_hold_no_pattern() -> None:
    """Two layers of 2048 tokens: one dense pattern is 128 MB, and the statistics of all heads stay far below it."""
    script = """
import resource, sys, torch, headwise as hw
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8)
model = hw.attach(LlamaForCausalLM(config).eval())
inputs = {"input_ids": torch.arange(2048)[None] % 64}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    model(**inputs)
    before = peak()
    with model.reading(hw.read.statistics()) as got:
        model(**inputs)
assert got.statistics["L1"].entropy.shape == (1, 8, 2048)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 90, out.stdout


# -- the residual stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention_write", "final"),
    [
        ("tiny-llama", "model.layers.{}.self_attn", "model.norm"),
        ("tiny-gpt2", "transformer.h.{}.attn", "transformer.ln_f"),
        ("tiny-gemma2", "model.layers.{}.post_attention_layernorm", "model.norm"),
        ("tiny-gpt_neox", "gpt_neox.layers.{}.attention", "gpt_neox.final_layer_norm"),
        ("tiny-opt", "model.decoder.layers.{}.self_attn", "model.decoder.final_layer_norm"),
    ],
)
def test_residual_is_the_hidden_states_and_mlp_what_attention_leaves(
    name: str, attention_write: str, final: str
) -> None:
    model, example = attached(name)
    paths = {f"L{layer}": attention_write.format(layer) for layer in range(3)}
    reads = (read.residual(where="pre"), read.residual(), read.mlp())
    with torch.no_grad(), noting(model.model, paths) as attention, model.reading(*reads) as got:
        states = model(**example, output_hidden_states=True).hidden_states
        last = model.model.get_submodule(final)(got.residual_post["L2"])
    for layer in range(3):
        label = f"L{layer}"
        assert torch.equal(got.residual_pre[label], states[layer])
        assert torch.equal(got.residual_post[label], states[layer + 1]) or layer == 2
        rest = got.residual_post[label] - got.residual_pre[label] - attention[label]
        close(got.mlp[label], rest, atol=1e-5, rtol=1e-4)
        assert got.mlp[label].abs().max() > 0.01
    close(last, states[3])


def test_mlp_of_a_post_norm_block_enters_its_closing_norm() -> None:
    model, example = attached("tiny-bert")
    paths = {"middle": "bert.encoder.layer.1.attention"}
    with torch.no_grad(), noting(model.model, paths) as seen, model.reading(read.mlp("L1"), read.residual("L1")) as got:
        model(**example)
    norm = model.model.get_submodule("bert.encoder.layer.1.output.LayerNorm")
    close(norm(seen["middle"] + got.mlp["L1"]), got.residual_post["L1"])


def test_what_was_read_survives_a_model_that_writes_in_place() -> None:
    """Some models (Gemma 4, Falcon) add the residual into the very tensor that a sublayer returned."""
    model, example = attached("tiny-llama")
    reads = (read.mlp("L1"), read.z("L1"), read.residual("L1", where="pre"))
    with torch.no_grad(), model.reading(*reads) as clean:
        model(**example)

    def scribble(path: str, write: Callable[[Any, Any], object]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            write(args, output)

        return model.model.get_submodule(path).register_forward_hook(hook)

    with torch.no_grad(), model.reading(*reads) as got:
        handles = [
            scribble("model.layers.1.mlp", lambda args, output: output.mul_(0.5)),
            scribble("model.layers.1.self_attn.o_proj", lambda args, output: args[0].zero_()),
            scribble("model.layers.1", lambda args, output: args[0].zero_()),
        ]
        model(**example)
    for handle in handles:
        handle.remove()
    for name in ("mlp", "z", "residual_pre"):
        assert torch.equal(getattr(got, name)["L1"], getattr(clean, name)["L1"]), name
        assert getattr(got, name)["L1"].abs().max() > 0.1, name


@pytest.mark.parametrize(("name", "head"), [("tiny-llama", "lm_head"), ("tiny-gpt2", "lm_head")])
def test_final_scale_times_gain_gives_the_logits(name: str, head: str) -> None:
    model, example = attached(name)
    with torch.no_grad(), model.reading(read.final_scale(), read.residual("L2")) as got:
        logits = model(**example).logits
    norm = model.model.get_submodule("model.norm" if name == "tiny-llama" else "transformer.ln_f")
    stream = got.residual_post["L2"]
    centred = stream if name == "tiny-llama" else stream - stream.mean(-1, keepdim=True)
    standard = centred * got.final_scale["L0"][..., None] * norm.weight + getattr(norm, "bias", torch.zeros(()))
    close(model.model.get_submodule(head)(standard), logits, atol=1e-5, rtol=1e-4)
