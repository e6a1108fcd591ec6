"""Blocks, feed-forward writes and final norms found on tiny random models, each shown again in an independent way.

Every parameter is moved off its initial value, so that norms have gains, biases are not zero and no two writes agree by
chance. The second way to a write is to switch the module off and see the stream lose exactly `mlp_scale` times its
output; the second way to a final norm is to rebuild the logits from `scale`, gain and bias.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from headwise.errors import InputError
from headwise.model.finding.norms import FinalNorm
from headwise.model.finding.sublayers import Sublayers, find_sublayers, first_tensor, with_first_tensor

VOCAB = 99
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BERT: dict[str, Any] = {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode with noise on every parameter; vectors (norms, biases) get 0.3, matrices 0.05."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.ndim < 2 else 0.05
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def build(model_class: str, config_class: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)))


def tokens(length: int = 9) -> Tensor:
    ids = torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(2))
    ids[1, -2:] = 0
    return ids


def text() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def text_to_text() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": tokens(9)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def speech() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": tokens(9)}


@dataclass(frozen=True)
class Case:
    """A tiny model and what is to be found: `stacks` maps a stack to (its list of layers, MLP in the layer, norm)."""

    name: str
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    stacks: Mapping[str, tuple[str, str, str | None]]
    closing_norm: Mapping[str, str]
    mlp_scale: float = 1.0
    n_layers: int = 2

    def blocks(self) -> dict[str, str]:
        return {
            (f"L{i}" if stack == "main" else f"{stack}.L{i}"): f"{layers}.{i}"
            for stack, (layers, _, _) in self.stacks.items()
            for i in range(self.n_layers)
        }


def case(
    name: str,
    classes: tuple[str, str],
    settings: Mapping[str, Any],
    *stacks: tuple[str, str, str, str | None],
    inputs: Callable[[], dict[str, Tensor]] = text,
    closing_norm: Mapping[str, str] | None = None,
    **more: Any,
) -> Case:
    found = {stack: (layers, mlp, norm) for stack, layers, mlp, norm in stacks}
    return Case(name, lambda: build(*classes, **settings), inputs, found, closing_norm or {}, **more)


def llama_like(name: str, family: str, mlp: str = "mlp", scale: float = 1.0, **settings: Any) -> Case:
    classes = (f"{family}ForCausalLM", f"{family}Config")
    return case(name, classes, LLAMA | settings, ("main", "model.layers", mlp, "model.norm"), mlp_scale=scale)


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
DEEPSEEK_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
CLIP_TEXT = BERT | {"eos_token_id": 98}
POST_NORM = {"main": "output.LayerNorm"}

CASES = [
    case("gpt2", ("GPT2LMHeadModel", "GPT2Config"), GPT2, ("main", "transformer.h", "mlp", "transformer.ln_f")),
    case(
        "opt",
        ("OPTForCausalLM", "OPTConfig"),
        BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        ("main", "model.decoder.layers", "fc2", "model.decoder.final_layer_norm"),
    ),
    case(
        "opt-post-norm",
        ("OPTForCausalLM", "OPTConfig"),
        BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        ("main", "model.decoder.layers", "fc2", None),
        closing_norm={"main": "final_layer_norm"},
    ),
    case(
        "gpt_neox",
        ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        BERT,
        ("main", "gpt_neox.layers", "mlp", "gpt_neox.final_layer_norm"),
    ),
    case(
        "gpt_neox-sequential",
        ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        BERT | {"use_parallel_residual": False},
        ("main", "gpt_neox.layers", "mlp", "gpt_neox.final_layer_norm"),
    ),
    case(
        "phi",
        ("PhiForCausalLM", "PhiConfig"),
        BERT,
        ("main", "model.layers", "mlp", "model.final_layernorm"),
    ),
    case("falcon", ("FalconForCausalLM", "FalconConfig"), BERT, ("main", "transformer.h", "mlp", "transformer.ln_f")),
    llama_like("llama", "Llama"),
    llama_like("qwen3", "Qwen3", head_dim=8),
    llama_like("mixtral", "Mixtral", **MOE),
    llama_like("gemma2", "Gemma2", "post_feedforward_layernorm", head_dim=8),
    llama_like("olmo2", "Olmo2", "post_feedforward_layernorm"),
    llama_like("olmo", "Olmo"),
    llama_like("granite", "Granite", scale=0.22, residual_multiplier=0.22),
    llama_like("cohere", "Cohere"),
    llama_like("deepseek_v3", "DeepseekV3", **MLA, **DEEPSEEK_MOE),
    case(
        "gemma3_text",
        ("Gemma3ForCausalLM", "Gemma3TextConfig"),
        LLAMA | {"head_dim": 8},
        ("main", "model.layers", "post_feedforward_layernorm", "model.norm"),
    ),
    case(
        "jamba",
        ("JambaForCausalLM", "JambaConfig"),
        LLAMA | JAMBA,
        ("main", "model.layers", "feed_forward", "model.final_layernorm"),
        n_layers=4,
    ),
    case(
        "bert",
        ("BertModel", "BertConfig"),
        BERT,
        ("main", "encoder.layer", "output.dense", None),
        closing_norm=POST_NORM,
    ),
    case(
        "roberta",
        ("RobertaModel", "RobertaConfig"),
        BERT,
        ("main", "encoder.layer", "output.dense", None),
        closing_norm=POST_NORM,
    ),
    case(
        "distilbert",
        ("DistilBertModel", "DistilBertConfig"),
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
        ("main", "transformer.layer", "ffn", None),
        closing_norm={"main": "output_layer_norm"},
    ),
    case(
        "t5",
        ("T5ForConditionalGeneration", "T5Config"),
        T5,
        ("encoder", "encoder.block", "layer.1.DenseReluDense", "encoder.final_layer_norm"),
        ("main", "decoder.block", "layer.2.DenseReluDense", "decoder.final_layer_norm"),
        inputs=text_to_text,
    ),
    case(
        "bart",
        ("BartForConditionalGeneration", "BartConfig"),
        BART,
        ("encoder", "model.encoder.layers", "fc2", None),
        ("main", "model.decoder.layers", "fc2", None),
        inputs=text_to_text,
        closing_norm={"encoder": "final_layer_norm", "main": "final_layer_norm"},
    ),
    case(
        "whisper",
        ("WhisperForConditionalGeneration", "WhisperConfig"),
        WHISPER,
        ("encoder", "model.encoder.layers", "fc2", "model.encoder.layer_norm"),
        ("main", "model.decoder.layers", "fc2", "model.decoder.layer_norm"),
        inputs=speech,
    ),
    case("vit", ("ViTModel", "ViTConfig"), VISION, ("main", "layers", "mlp", "layernorm"), inputs=image),
    case(
        "clip",
        ("CLIPModel", "CLIPConfig"),
        {"text_config": CLIP_TEXT, "vision_config": VISION},
        ("main", "text_model.encoder.layers", "mlp", "text_model.final_layer_norm"),
        ("vision", "vision_model.encoder.layers", "mlp", "vision_model.post_layernorm"),
        inputs=lambda: text() | image(),
    ),
]
BY_NAME = {case.name: case for case in CASES}


FINAL_NORMS = [(case, stack) for case in CASES for stack, (_, _, norm) in case.stacks.items() if norm is not None]
LANGUAGE_MODELS = [case for case, stack in FINAL_NORMS if stack == "main" and case.inputs is text]


def search(model: nn.Module, inputs: Mapping[str, Tensor], blocks: Mapping[str, str]) -> Sublayers:
    with torch.no_grad():
        return find_sublayers(model, lambda: model(**inputs), blocks)


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor], *names: str, off: str | None = None) -> list[Tensor]:
    """First tensors that the named modules return in one forward, with the module `off` returning zeros."""
    got: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: got.update({name: first_tensor(output).clone()})

    def switch_off(module: nn.Module, args: Any, output: Any) -> Any:
        return with_first_tensor(output, torch.zeros_like(first_tensor(output)))

    with ExitStack() as undo, torch.no_grad():
        if off is not None:
            undo.callback(model.get_submodule(off).register_forward_hook(switch_off).remove)
        for name in names:
            undo.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        model(**inputs)
    return [got[name] for name in names]


def input_of(model: nn.Module, inputs: Mapping[str, Tensor], name: str, off: str | None = None) -> Tensor:
    got: list[Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: got.append(args[0].clone())):
        outputs_of(model, inputs, off=off)
    return got[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finds_what_is_there(case: Case) -> None:
    model = case.make()
    found = search(model, case.inputs(), case.blocks())
    assert list(found.blocks) == list(case.blocks())
    for label, block in found.blocks.items():
        stack = label.rpartition(".")[0] or "main"
        _, mlp, _ = case.stacks[stack]
        closing = case.closing_norm.get(stack)
        assert block.reasons == {}
        assert (block.label, block.module) == (label, case.blocks()[label])
        assert (block.residual, block.input_key, block.calls) == (True, 0, 1)
        assert block.mlp == f"{block.module}.{mlp}"
        assert block.mlp_scale == pytest.approx(case.mlp_scale, rel=1e-6)
        assert block.closing_norm == (None if closing is None else f"{block.module}.{closing}")
    norms = {stack: norm for stack, (_, _, norm) in case.stacks.items() if norm is not None}
    assert {stack: norm.module for stack, norm in found.final_norms.items()} == norms
    assert set(found.reasons) == set(case.stacks) - set(norms)
    assert not any(tensor.requires_grad for tensor in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_switching_the_mlp_off_takes_exactly_its_write_from_the_stream(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    for block in search(model, inputs, case.blocks()).blocks.values():
        assert block.mlp is not None
        if block.closing_norm is None:
            with_it, output = outputs_of(model, inputs, block.module, block.mlp)
            (without,) = outputs_of(model, inputs, block.module, off=block.mlp)
        else:
            (output,) = outputs_of(model, inputs, block.mlp)
            with_it = input_of(model, inputs, block.closing_norm)
            without = input_of(model, inputs, block.closing_norm, off=block.mlp)
        write = block.mlp_scale * output.view_as(with_it)
        assert write.abs().max() > 1e-3
        torch.testing.assert_close(with_it - without, write, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "stack"), FINAL_NORMS, ids=lambda value: getattr(value, "name", value))
def test_scale_gain_and_bias_rebuild_the_final_norm(case: Case, stack: str) -> None:
    model, inputs = case.make(), case.inputs()
    norm = search(model, inputs, case.blocks()).final_norms[stack]
    (after,) = outputs_of(model, inputs, norm.module)
    x = input_of(model, inputs, norm.module)
    x = x if x.ndim == 3 else x[:, None]
    torch.testing.assert_close(rebuilt(norm, model, x).view_as(after), after, rtol=1e-4, atol=1e-5)
    module = model.get_submodule(norm.module)
    eps = [float(getattr(module, name)) for name in ("eps", "variance_epsilon") if hasattr(module, name)]
    assert norm.eps == pytest.approx(eps[0] if eps else 1e-5, rel=1e-4)
    assert norm.d_model == 32


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=lambda case: case.name)
def test_the_last_blocks_stream_gives_the_logits(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    found = search(model, inputs, case.blocks())
    if model.get_output_embeddings() is None:
        pytest.skip("a tower without a vocabulary")
    last = [block for label, block in found.blocks.items() if label.startswith("L")][-1]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    stream, logits = outputs_of(model, inputs, last.module, head)
    with torch.no_grad():
        again = model.get_output_embeddings()(rebuilt(found.final_norms["main"], model, stream))
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


def rebuilt(norm: FinalNorm, model: nn.Module, x: Tensor) -> Tensor:
    affine = norm.affine(model)
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    return affine.gain * centred * norm.scale(x)[..., None] + affine.bias


def test_gain_is_what_the_module_does_not_what_it_stores() -> None:
    model = BY_NAME["gemma2"].make()
    norm = search(model, text(), BY_NAME["gemma2"].blocks()).final_norms["main"]
    torch.testing.assert_close(norm.affine(model).gain, 1 + model.model.norm.weight.detach())
    torch.testing.assert_close(norm.affine(model).bias, torch.zeros(32))


BF16 = ("gpt2", "gpt_neox", "llama", "mixtral", "gemma2", "olmo2", "granite", "bert", "t5", "whisper", "jamba")


@pytest.mark.parametrize("name", BF16)
def test_bfloat16_finds_the_same(name: str) -> None:
    case = BY_NAME[name]
    model = case.make()
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in case.inputs().items()}
    expected = search(model, case.inputs(), case.blocks())
    found = search(model.bfloat16(), inputs, case.blocks())
    for label, block in expected.blocks.items():
        got = found.blocks[label]
        assert (got.mlp, got.closing_norm, got.reasons) == (block.mlp, block.closing_norm, {})
        assert got.mlp_scale == pytest.approx(block.mlp_scale, rel=2**-8)
    for stack, norm in expected.final_norms.items():
        got_norm = found.final_norms[stack]
        assert (got_norm.module, got_norm.kind) == (norm.module, norm.kind)
        assert got_norm.eps == pytest.approx(norm.eps, rel=1e-3)
        gain = got_norm.affine(model).gain
        assert gain.dtype == torch.float32
        torch.testing.assert_close(gain, got_norm.affine(model.float()).gain, rtol=1e-6, atol=1e-6)
        model.bfloat16()


def test_a_block_called_several_times_is_measured_on_its_last_call() -> None:
    model = build("AlbertModel", "AlbertConfig", **BERT, embedding_size=16)
    found = search(model, text(), {"L0": "encoder.albert_layer_groups.0.albert_layers.0"}).blocks["L0"]
    assert found.calls == 2
    assert found.mlp == f"{found.module}.ffn_output"
    assert found.closing_norm == f"{found.module}.full_layer_layer_norm"


def test_a_mamba_block_without_feed_forward_has_none() -> None:
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    found = search(build("MambaForCausalLM", "MambaConfig", **settings), text(), {"L0": "backbone.layers.0"})
    assert found.blocks["L0"].residual
    assert found.blocks["L0"].mlp is None
    assert "at each position alone" in found.blocks["L0"].reasons["mlp"]


# ------------------------------------------------------------------------------------------------- blocks made by hand


class Model(nn.Module):
    """Blocks in a list, then what stands after them; `states` goes to each block as a keyword if given."""

    def __init__(self, *layers: nn.Module, after: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.after = nn.ModuleDict(after or {})
        perturbed(self)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **kwargs)
        return sum((norm(x) for norm in self.after.values()), x)


class MLP(nn.Sequential):
    def __init__(self, out: int = 8) -> None:
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, out))


class Sum(nn.Module):
    """`forward` is a function of the block and x; parts are modules by name."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.compute(self, x, **kwargs)


class RunningMean(nn.Module):
    """A causal token mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class FromStates(nn.Module):
    """A cross-attention in small: it reads the stream at each position alone, and states that come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.out((self.query(x) @ states.transpose(1, 2)).softmax(-1) @ states)


def find(block: nn.Module, x: Tensor | None = None, **kwargs: Any) -> Any:
    model = Model(block)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4)) if x is None else x
    with torch.no_grad():
        return find_sublayers(model, lambda: model(x, **kwargs), {"L0": "layers.0"}).blocks["L0"]


STATES = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(5))


def test_a_token_mixer_is_not_a_feed_forward() -> None:
    alone = find(Sum(lambda block, x: x + block.mix(x), mix=RunningMean()))
    assert alone.mlp is None
    beside = find(Sum(lambda block, x: x + block.mix(x) + block.mlp(x), mix=RunningMean(), mlp=MLP()))
    assert beside.mlp == "layers.0.mlp"


def test_cross_attention_is_not_a_feed_forward() -> None:
    block = Sum(lambda block, x, states: x + block.cross(x, states), cross=FromStates())
    assert find(block, states=STATES).mlp is None


def test_after_cross_attention_the_feed_forward_is_found() -> None:
    def forward(block: Any, x: Tensor, states: Tensor) -> Tensor:
        x = x + block.cross(x, states)
        return x + block.mlp(x)

    assert find(Sum(forward, cross=FromStates(), mlp=MLP()), states=STATES).mlp == "layers.0.mlp"


def test_two_feed_forwards_side_by_side_are_not_chosen_between() -> None:
    found = find(Sum(lambda block, x: x + block.a(x) + block.b(x), a=MLP(), b=MLP()))
    assert found.mlp is None
    assert "a, b" in found.reasons["mlp"]


def test_two_feed_forwards_in_a_row_give_the_last() -> None:
    def forward(block: Any, x: Tensor) -> Tensor:
        x = x + 0.5 * block.a(x)
        return x + 0.5 * block.b(x)

    found = find(Sum(forward, a=MLP(), b=MLP()))
    assert (found.mlp, found.mlp_scale) == ("layers.0.b", 0.5)


def test_stream_and_write_may_both_be_scaled() -> None:
    found = find(Sum(lambda block, x: 0.25 * x - 2 * block.mlp(x), mlp=MLP()))
    assert (found.mlp, found.mlp_scale) == ("layers.0.mlp", -2.0)


def test_equal_values_off_the_path_are_not_the_write() -> None:
    def forward(block: Any, x: Tensor) -> Tensor:
        block.copy(x)
        return x + block.mlp(x)

    mlp, copy = MLP(), MLP()
    block = Sum(forward, copy=copy, mlp=mlp)
    model = Model(block)
    copy.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        found = find_sublayers(model, lambda: model(x), {"L0": "layers.0"}).blocks["L0"]
    assert found.mlp == "layers.0.mlp"


@pytest.mark.parametrize(
    "forward",
    [
        lambda block, x: x * block.mlp(x),
        lambda block, x: x + block.mlp(x) * torch.arange(1.0, 9.0),
        lambda block, x: x + block.mlp(x).relu(),
        lambda block, x: x + torch.tanh(x + block.mlp(x)),
        lambda block, x: block.mlp(x),
        lambda block, x: 2 * block.mlp(x),
        lambda block, x: x + block.mlp(x) + block.mlp(x),
    ],
    ids=["product", "per-channel", "clipped", "saturated", "no-stream", "no-stream-scaled", "called-twice"],
)
def test_what_does_not_add_its_output_as_it_is_is_not_the_write(forward: Callable[..., Tensor]) -> None:
    block = Sum(forward, mlp=nn.ModuleDict({"inner": nn.Linear(8, 8)}))
    block.mlp.forward = lambda x: block.mlp["inner"](x).tanh()  # type: ignore[method-assign]
    found = find(block)
    assert found.residual
    assert found.mlp is None
    assert found.reasons["mlp"]


def test_adding_to_the_output_in_place_is_followed() -> None:
    def forward(block: Any, x: Tensor) -> Tensor:
        write = block.mlp(x)
        write += x + block.mix(x)
        return write

    assert find(Sum(forward, mix=RunningMean(), mlp=MLP())).mlp == "layers.0.mlp"


def test_overwriting_what_a_module_read_is_a_reason_not_a_wrong_answer() -> None:
    def forward(block: Any, x: Tensor) -> Tensor:
        x += block.mlp(x)
        return x

    found = find(Sum(forward, mlp=MLP()))
    assert found.mlp is None
    assert "modified by an inplace operation" in found.reasons["mlp"]


def test_a_dropout_or_wrapper_after_the_write_does_not_take_its_place() -> None:
    found = find(Sum(lambda block, x: x + block.drop(block.mlp(x)), drop=nn.Dropout(), mlp=MLP()))
    assert found.mlp == "layers.0.mlp"


def test_what_the_block_takes_and_returns() -> None:
    def forward(block: Any, hidden: Tensor, *, states: Tensor) -> tuple[Tensor, str]:
        return hidden + block.mlp(hidden), "more"

    class Keywords(Sum):
        def forward(self, mask: Any, hidden: Tensor, states: Tensor) -> Any:  # type: ignore[override]
            return self.compute(self, hidden, states=states)

    block = Keywords(forward, mlp=MLP())
    model = Model(block)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        found = find_sublayers(model, lambda: block(states=x + 1, hidden=x, mask=None), {"L0": "layers.0"}).blocks["L0"]
    assert (found.residual, found.input_key, found.mlp) == (True, "hidden", "layers.0.mlp")


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Sum(lambda block, x: {}), "no tensor first"),
        (Sum(lambda block, x: x[0]), "[5, 8]"),
        (Sum(lambda block, x: x[:, :2]), "[2, 2, 8]"),
    ],
    ids=["no-tensor", "two-axes", "other-shape"],
)
def test_a_block_without_a_stream_says_so(block: nn.Module, said: str) -> None:
    model = nn.Sequential(block)
    with torch.no_grad():
        found = find_sublayers(model, lambda: model(torch.randn(2, 5, 8)), {"L0": "0"}).blocks["L0"]
    assert (found.residual, found.input_key, found.mlp) == (False, None, None)
    assert said in found.reasons["residual"]
    assert said in found.reasons["mlp"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda block, x: block.last(x + block.mlp(x)),
        lambda block, x: block.norm(x + block.mlp(x)).exp(),
    ],
    ids=["not-a-norm", "norm-not-last"],
)
def test_only_a_norm_at_the_very_end_closes_a_block(forward: Callable[..., Tensor]) -> None:
    assert find(Sum(forward, mlp=MLP(), last=nn.Linear(8, 8), norm=nn.LayerNorm(8))).mlp is None


def test_a_mixer_that_shuts_the_last_position_off_is_still_a_mixer() -> None:
    class Padded(RunningMean):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x[:, :-1]), self.out(x[:, -1:])], dim=1)

    assert find(Sum(lambda block, x: x + block.mix(x), mix=Padded())).mlp is None


def test_one_position_cannot_tell() -> None:
    found = find(Sum(lambda block, x: x + block.mlp(x), mlp=MLP()), x=torch.randn(2, 1, 8))
    assert found.residual
    assert "one position" in found.reasons["mlp"]


def test_a_block_that_does_not_run_says_so() -> None:
    model = Model(MLP(), MLP())
    with torch.no_grad():
        found = find_sublayers(
            model, lambda: model.layers[0](torch.randn(2, 5, 8)), {"L0": "layers.0", "v.L0": "layers.1"}
        )
    assert (found.blocks["v.L0"].calls, found.blocks["v.L0"].residual) == (0, False)
    assert "did not run" in found.blocks["v.L0"].reasons["mlp"]
    assert "did not run" in found.reasons["v"]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("not written: for this kernel")


def test_a_kernel_without_gradient_is_a_reason_not_a_crash() -> None:
    found = find(Sum(lambda block, x: x + Opaque.apply(block.mlp(x)), mlp=MLP()))
    assert found.mlp is None
    assert found.reasons["mlp"] == "gradients do not pass through the block: not written"


@pytest.mark.parametrize("after", [nn.Dropout(), nn.Identity(), nn.Linear(8, 8), nn.GELU(), nn.Softmax(-1), nn.Tanh()])
def test_what_is_not_a_norm_is_not_taken_for_one(after: nn.Module) -> None:
    model = Model(MLP(), after={"it": after})
    with torch.no_grad():
        found = find_sublayers(model, lambda: model(torch.randn(2, 5, 8)), {"L0": "layers.0"})
    assert found.final_norms == {}
    assert "no norm" in found.reasons["main"]


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("width", [7, 8])
def test_eps_is_measured(kind: Any, eps: float, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, width), perturbed(kind(width, eps=eps)))
    with torch.no_grad():
        norm = find_sublayers(model, lambda: model(torch.randn(2, 5, width)), {"L0": "0"}).final_norms["main"]
    assert norm.kind == ("rms" if kind is nn.RMSNorm else "layer")
    assert norm.eps == pytest.approx(eps, rel=1e-4, abs=1e-15)


def test_two_final_norms_are_not_chosen_between() -> None:
    model = Model(MLP(), after={"a": nn.LayerNorm(8), "b": nn.RMSNorm(8)})
    with torch.no_grad():
        found = find_sublayers(model, lambda: model(torch.randn(2, 5, 8)), {"L0": "layers.0"})
    assert found.final_norms == {}
    assert "2 norms" in found.reasons["main"]
    assert "after.a, after.b" in found.reasons["main"]


def test_a_norm_that_reads_an_earlier_block_is_not_final() -> None:
    model = Model(MLP(8), MLP(8), after={"early": nn.LayerNorm(8), "late": nn.LayerNorm(8)})

    def run() -> None:
        x = model.layers[0](torch.randn(2, 5, 8))
        model.after["early"](x)
        model.after["late"](model.layers[1](x))

    with torch.no_grad():
        found = find_sublayers(model, run, {"L0": "layers.0", "L1": "layers.1"})
    assert found.final_norms["main"].module == "after.late"


# --------------------------------------------------------------------------------------------------- leaving no trace


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_left_as_it_was() -> None:
    case = BY_NAME["gpt2"]
    model = case.make()
    with torch.no_grad():
        before = model(**text()).logits
        search(model, text(), case.blocks())
        assert torch.equal(model(**text()).logits, before)
        assert not torch.is_grad_enabled()
    assert hooks(model) == 0


@pytest.mark.parametrize("grad", [True, False])
def test_an_exception_inside_a_block_leaves_nothing_behind(grad: bool) -> None:
    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise KeyError("stop")

    case = BY_NAME["gpt2"]
    model = case.make()
    handle = model.transformer.h[1].mlp.register_forward_hook(fail)
    with torch.set_grad_enabled(grad):
        with pytest.raises(KeyError, match="stop"):
            find_sublayers(model, lambda: model(**text()), case.blocks())
        assert torch.is_grad_enabled() == grad
    handle.remove()
    assert hooks(model) == 0


def test_gradients_are_on_inside_blocks_only() -> None:
    model, modes = Model(MLP(8)), []

    def run() -> None:
        model(torch.randn(2, 5, 8))
        modes.append(torch.is_grad_enabled())

    with torch.no_grad():
        find_sublayers(model, run, {"L0": "layers.0"})
    assert modes == [False]


def test_only_one_block_is_held_at_a_time() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def forward(block: Any, x: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        inner = block.mlp[0](x)
        seen.append(weakref.ref(inner))
        return x + block.mlp[2](block.mlp[1](inner))

    model = Model(*(Sum(forward, mlp=MLP(8)) for _ in range(3)))
    with torch.no_grad():
        find_sublayers(model, lambda: model(torch.randn(2, 5, 8)), {f"L{i}": f"layers.{i}" for i in range(3)})
    assert alive == [0, 0, 0]


def test_bad_input_is_one_clear_line() -> None:
    model = Model(nn.Sequential(MLP()))
    run: Callable[[], object] = lambda: model(torch.randn(2, 5, 8))  # noqa: E731
    with pytest.raises(InputError, match="blocks: empty"):
        find_sublayers(model, run, {})
    with pytest.raises(InputError, match=r"blocks\['L0'\]: Model has no module 'layers.7'"):
        find_sublayers(model, run, {"L0": "layers.7"})
    with pytest.raises(InputError, match=r"'layers.0.0' lies in 'layers.0'"):
        find_sublayers(model, run, {"L0": "layers.0", "L1": "layers.0.0"})
    with torch.inference_mode(), pytest.raises(InputError, match="inference mode"):
        find_sublayers(model, run, {"L0": "layers.0"})
    with pytest.raises(InputError, match="output: NoneType"):
        with_first_tensor(None, torch.zeros(1))
    with pytest.raises(InputError, match="no module 'gone'"):
        FinalNorm("gone", "rms", 1e-5, 8).affine(model)


def test_first_tensor_is_read_and_replaced_in_every_form() -> None:
    a, b, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert first_tensor(a) is a
    assert with_first_tensor(a, new) is new
    for output in ((a, b), [a, b]):
        changed = with_first_tensor(output, new)
        assert type(changed) is type(output)
        assert first_tensor(changed) is new
        assert changed[1] is b
        assert first_tensor(output) is a
    output = BaseModelOutput(last_hidden_state=a, attentions=(b,))
    changed = with_first_tensor(output, new)
    assert isinstance(changed, BaseModelOutput)
    assert changed.last_hidden_state is changed[0] is new
    assert changed.attentions == (b,)
    assert output.last_hidden_state is output[0] is a
    largest = torch.tensor([1.0, 3.0]).max(0)
    assert with_first_tensor(largest, new)[0] is new
    assert first_tensor((None, a)) is None
    assert first_tensor({}) is None
