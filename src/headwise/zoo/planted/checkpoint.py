"""Matrices into ordinary transformers models: GPT-2 (learned positions) and Llama (rotary, with and without GQA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.errors import InputError
from headwise.zoo.planted.heads import THETA, HeadMatrices

Architecture = Literal["llama", "llama-gqa", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

POSITIONS = 1024
GQA_GROUP = 2
INNER = 192
"""Width of the feed-forward parts."""

GATE_OPEN = 4.0
"""Input of the gate of a relaying neuron. silu(4) is 3.928, the same for every text."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a planted model; `group_size` query heads share a key/value head."""

    architecture: Architecture
    layers: int
    heads: int
    head_dim: int
    width: int
    vocabulary: int

    @property
    def group_size(self) -> int:
        return GQA_GROUP if self.architecture == "llama-gqa" else 1


@dataclass(frozen=True)
class BlockMatrices:
    """One block. `up` and `down` are the feed-forward part, `gate` its gate (Llama)."""

    heads: tuple[HeadMatrices, ...]
    up: Float[Tensor, "inner width"]
    gate: Float[Tensor, "inner width"]
    down: Float[Tensor, "width inner"]


@dataclass(frozen=True)
class ModelMatrices:
    """A whole model, in float64; `norms` are the weights of the norms: two for each block, then the final one."""

    embedding: Float[Tensor, "vocabulary width"]
    positions: Float[Tensor, "position width"] | None
    blocks: tuple[BlockMatrices, ...]
    unembedding: Float[Tensor, "vocabulary width"]
    norms: Float[Tensor, "norm width"]


@torch.no_grad()
def assemble(
    geometry: Geometry, matrices: ModelMatrices, *, bos: int, pad: int | None, dtype: torch.dtype, attn: str | None
) -> PreTrainedModel:
    """The transformers model with these weights. The global random state is left as it was.

    Raises InputError for an attention implementation that the type does not have.
    """
    build = _gpt2 if geometry.architecture == "gpt2" else _llama
    config, weights = build(geometry, matrices)
    config.bos_token_id, config.pad_token_id, config.eos_token_id = bos, pad, None
    model_class = GPT2LMHeadModel if geometry.architecture == "gpt2" else LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            model = model_class._from_config(config, dtype=dtype, **({"attn_implementation": attn} if attn else {}))
        except (ValueError, ImportError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"planted models cannot run with attn={attn!r}: {first}") from error
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()})
    return model.eval()


def _llama(geometry: Geometry, matrices: ModelMatrices) -> tuple[LlamaConfig, Mapping[str, Tensor]]:
    config = LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.width,
        intermediate_size=INNER,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads // geometry.group_size,
        head_dim=geometry.head_dim,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    norms = matrices.norms
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": matrices.embedding,
        "model.norm.weight": norms[-1],
        "lm_head.weight": matrices.unembedding / norms[-1],
    }
    for layer, block in enumerate(matrices.blocks):
        before, between = norms[2 * layer], norms[2 * layer + 1]
        groups = block.heads[:: geometry.group_size]
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": before,
                "self_attn.q_proj": torch.cat([head.query for head in block.heads]) / before,
                "self_attn.k_proj": torch.cat([head.key for head in groups]) / before,
                "self_attn.v_proj": torch.cat([head.value for head in groups]) / before,
                "self_attn.o_proj": torch.cat([head.output for head in block.heads], dim=1),
                "post_attention_layernorm": between,
                "mlp.gate_proj": block.gate / between,
                "mlp.up_proj": block.up / between,
                "mlp.down_proj": block.down,
            }.items()
        }
    return config, weights


def _gpt2(geometry: Geometry, matrices: ModelMatrices) -> tuple[GPT2Config, Mapping[str, Tensor]]:
    config = GPT2Config(
        vocab_size=geometry.vocabulary,
        n_embd=geometry.width,
        n_inner=INNER,
        n_layer=geometry.layers,
        n_head=geometry.heads,
        n_positions=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    norms, width = matrices.norms, geometry.width
    weights: dict[str, Any] = {
        "transformer.wte.weight": matrices.embedding,
        "transformer.wpe.weight": matrices.positions,
        "transformer.ln_f.weight": norms[-1],
        "transformer.ln_f.bias": torch.zeros(width),
        "lm_head.weight": matrices.unembedding / norms[-1],
    }
    for layer, block in enumerate(matrices.blocks):
        before, between = norms[2 * layer], norms[2 * layer + 1]
        rows = [torch.cat([getattr(head, name) for head in block.heads]) for name in ("query", "key", "value")]
        weights |= {
            f"transformer.h.{layer}.{name}": value
            for name, value in {
                "ln_1.weight": before,
                "ln_1.bias": torch.zeros(width),
                # Conv1D keeps its matrix as [input, output].
                "attn.c_attn.weight": (torch.cat(rows) / before).T,
                "attn.c_attn.bias": torch.zeros(3 * width),
                "attn.c_proj.weight": torch.cat([head.output for head in block.heads], dim=1).T,
                "attn.c_proj.bias": torch.zeros(width),
                "ln_2.weight": between,
                "ln_2.bias": torch.zeros(width),
                "mlp.c_fc.weight": (block.up / between).T,
                "mlp.c_fc.bias": torch.zeros(INNER),
                "mlp.c_proj.weight": block.down.T,
                "mlp.c_proj.bias": torch.zeros(width),
            }.items()
        }
    return config, weights
