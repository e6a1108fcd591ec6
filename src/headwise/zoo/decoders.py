"""Tiny decoder-only language models."""

from __future__ import annotations

from typing import Any

from headwise.zoo.examples import left_padded
from headwise.zoo.table import TinyType, tags
from headwise.zoo.tokens import BOS, EOS, PAD, VOCAB_SIZE

N_POSITIONS = 512

WINDOW = 8
"""Keys a sliding-window layer sees; far fewer than the example has, so that the window is felt."""

TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

# 4 heads of 12 are 48, not the hidden size: whoever computes head_dim as hidden_size // n_heads gets it wrong.
WIDE_HEADS: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": N_POSITIONS,
}

# For types whose file computes head_dim from the hidden size.
TIED_HEADS: dict[str, Any] = {key: value for key, value in WIDE_HEADS.items() if key != "head_dim"} | {
    "hidden_size": 48
}

MHA: dict[str, Any] = {key: value for key, value in TIED_HEADS.items() if key != "num_key_value_heads"}

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

MIXED_WINDOW: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# Query and key have 12 + 4 dimensions, the value 12: D_qk is not D_v.
LATENT: dict[str, Any] = {key: value for key, value in WIDE_HEADS.items() if key != "head_dim"} | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# With few heads most index scores are exactly 0 after their relu, and ties fall differently once a row is padded.
INDEXER: dict[str, Any] = {"index_topk": WINDOW, "index_n_heads": 16, "index_head_dim": 12}


def decoder(model_type: str, classname: str, title: str, features: str, **sizes: Any) -> TinyType:
    return TinyType(model_type, classname, title, tags("decoder " + features), sizes, left_padded)


DECODERS = (
    decoder(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT-2: learned positions, one fused projection for q, k and v",
        "mha",
        **TOKENS,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=N_POSITIONS,
    ),
    decoder(
        "opt",
        "OPTForCausalLM",
        "OPT: learned positions, biases",
        "mha",
        **TOKENS,
        hidden_size=48,
        ffn_dim=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        max_position_embeddings=N_POSITIONS,
    ),
    decoder("gpt_neox", "GPTNeoXForCausalLM", "GPT-NeoX (Pythia): parallel attention and MLP", "mha", **MHA),
    decoder("phi", "PhiForCausalLM", "Phi: parallel block, rotary on part of the head", "mha", **MHA),
    decoder("llama", "LlamaForCausalLM", "Llama: grouped queries", "gqa", **WIDE_HEADS),
    decoder("qwen2", "Qwen2ForCausalLM", "Qwen2: biases on q, k, v", "gqa", **WIDE_HEADS),
    decoder("qwen3", "Qwen3ForCausalLM", "Qwen3: q and k normalised", "gqa qk-norm", **WIDE_HEADS),
    decoder(
        "mistral",
        "MistralForCausalLM",
        "Mistral: sliding window",
        "gqa window",
        **WIDE_HEADS,
        sliding_window=WINDOW,
    ),
    decoder("mixtral", "MixtralForCausalLM", "Mixtral: mixture of experts", "gqa moe", **WIDE_HEADS, **EXPERTS),
    decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma 2: soft-capped scores, norms after the sublayer, window",
        "gqa softcap window",
        **WIDE_HEADS,
        **MIXED_WINDOW,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
    ),
    decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma 3: window, q and k normalised, norms after the sublayer",
        "gqa window qk-norm",
        **WIDE_HEADS,
        **MIXED_WINDOW,
        query_pre_attn_scalar=12,
    ),
    decoder(
        "olmo2",
        "Olmo2ForCausalLM",
        "OLMo 2: q and k normalised over all heads, norms after the sublayer",
        "gqa qk-norm",
        **TIED_HEADS,
    ),
    decoder(
        "cohere2",
        "Cohere2ForCausalLM",
        "Command R7B: parallel block, window, full layers without positions",
        "gqa window",
        **WIDE_HEADS,
        **MIXED_WINDOW,
        logit_scale=0.5,
    ),
    decoder(
        "granite",
        "GraniteForCausalLM",
        "Granite: its own factors on scores and residual",
        "gqa",
        **TIED_HEADS,
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
    ),
    decoder(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "StarCoder2: one key/value head, window, biases",
        "mqa window",
        **TIED_HEADS | {"num_key_value_heads": 1},
        sliding_window=WINDOW,
    ),
    decoder(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss: attention sinks, window, mixture of experts",
        "gqa sink window moe",
        **WIDE_HEADS,
        **EXPERTS,
        **MIXED_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    decoder(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "Qwen3-Next: gated attention every other layer, linear attention between",
        "gqa gated qk-norm hybrid moe",
        **WIDE_HEADS,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    decoder(
        "afmoe",
        "AfmoeForCausalLM",
        "Trinity: gated attention, window, mixture of experts",
        "gqa gated qk-norm window moe",
        **WIDE_HEADS,
        **MIXED_WINDOW,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_shared_experts=1,
        num_dense_layers=1,
    ),
    decoder(
        "deepseek_v3", "DeepseekV3ForCausalLM", "DeepSeek V3: latent attention, mixture of experts", "mla moe", **LATENT
    ),
    decoder(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        "DeepSeek V3.2: latent attention over the keys an indexer picks",
        "mla indexer moe",
        **LATENT,
        **INDEXER,
    ),
    decoder(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        "GLM-5: latent attention over the keys an indexer picks",
        "mla indexer moe",
        **LATENT,
        **INDEXER,
    ),
    decoder(
        "jamba",
        "JambaForCausalLM",
        "Jamba: one attention layer among Mamba layers, mixture of experts",
        "gqa hybrid moe",
        **TIED_HEADS,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    decoder(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "Granite 4: attention among Mamba-2 layers",
        "gqa hybrid moe",
        **TIED_HEADS,
        **EXPERTS,
        layer_types=["mamba", "attention", "attention"],
        shared_intermediate_size=24,
        attention_multiplier=0.4,
        mamba_n_heads=8,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    decoder(
        "bitnet",
        "BitNetForCausalLM",
        "BitNet: a norm over all heads before the projection",
        "gqa not-separable",
        **TIED_HEADS,
    ),
    decoder(
        "diffllama",
        "DiffLlamaForCausalLM",
        "DiffLlama: differences of two attention calls",
        "gqa not-separable two-calls",
        **WIDE_HEADS,
    ),
    decoder(
        "jetmoe",
        "JetMoeForCausalLM",
        "JetMoe: the output projection is routed to experts",
        "moe not-separable",
        **TOKENS,
        **EXPERTS,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_key_value_heads=2,
        kv_channels=12,
        max_position_embeddings=N_POSITIONS,
    ),
)
