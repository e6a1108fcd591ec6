"""Tiny models whose files compute their attention in code of their own, past the registry (or in part past it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from headwise.zoo.decoders import MHA, N_POSITIONS, TOKENS, WINDOW
from headwise.zoo.encoders import BART_SIZES, WAVEFORM
from headwise.zoo.examples import left_padded, right_padded, text_to_text, waveform
from headwise.zoo.table import TinyType, tags
from headwise.zoo.tokens import VOCAB_SIZE

GPT: dict[str, Any] = TOKENS | {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": N_POSITIONS}

FALCON: dict[str, Any] = TOKENS | {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_POSITIONS,
}

# Content to position and position to content, on top of content to content.
DISENTANGLED: dict[str, Any] = MHA | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}

SEQ2SEQ: dict[str, Any] = TOKENS | BART_SIZES | {"max_position_embeddings": N_POSITIONS}


def _decoder(model_type: str, classname: str, title: str, features: str, **sizes: Any) -> TinyType:
    return _own(model_type, classname, title, f"decoder {features}", sizes, left_padded)


def _encoder(model_type: str, classname: str, title: str, features: str, **sizes: Any) -> TinyType:
    return _own(model_type, classname, title, f"encoder {features}", sizes, right_padded)


def _own(
    model_type: str,
    classname: str,
    title: str,
    features: str,
    sizes: dict[str, Any],
    example: Callable[[PreTrainedConfig], dict[str, Tensor]],
    variant: str = "",
) -> TinyType:
    return TinyType(model_type, classname, title, tags(f"{features} outside-registry"), sizes, example, variant)


OUTSIDE_REGISTRY = (
    _decoder("bloom", "BloomForCausalLM", "BLOOM: ALiBi", "mha", **TOKENS, hidden_size=48, n_layer=3, n_head=4),
    _own(
        "falcon",
        "FalconForCausalLM",
        "Falcon, the new decoder: grouped queries, keys repeated before the kernel",
        "decoder gqa",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        left_padded,
    ),
    _own(
        "falcon",
        "FalconForCausalLM",
        "Falcon 7B: one key/value head, parallel block",
        "decoder mqa",
        FALCON | {"multi_query": True},
        left_padded,
        variant="mqa",
    ),
    _decoder("gptj", "GPTJForCausalLM", "GPT-J: rotary on part of the head", "mha", **GPT, rotary_dim=8),
    _decoder(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPT-Neo: every other layer sees a window, no score scaling",
        "mha window",
        **TOKENS,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=N_POSITIONS,
    ),
    _decoder(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseForCausalLM",
        "GPT-NeoX-Japanese: its projection's bias added outside",
        "mha",
        **{key: value for key, value in MHA.items() if key != "intermediate_size"},
        attention_dropout=0.0,
    ),
    _decoder("codegen", "CodeGenForCausalLM", "CodeGen: q, v and k interleaved by shard", "mha", **GPT, rotary_dim=8),
    _decoder("mpt", "MptForCausalLM", "MPT: ALiBi", "mha", **TOKENS, d_model=48, n_heads=4, n_layers=3, max_seq_len=64),
    _decoder("openai-gpt", "OpenAIGPTLMHeadModel", "GPT: norms after the sublayer, no cache", "mha", **GPT),
    _decoder(
        "xglm",
        "XGLMForCausalLM",
        "XGLM: sinusoidal positions",
        "mha",
        **TOKENS,
        d_model=48,
        ffn_dim=40,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=N_POSITIONS,
    ),
    _encoder("deberta", "DebertaForMaskedLM", "DeBERTa: positions attend, too", "mha", **DISENTANGLED),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM", "DeBERTa v2 and v3: positions attend, too", "mha", **DISENTANGLED),
    _encoder("roformer", "RoFormerForMaskedLM", "RoFormer: rotary positions", "mha", **MHA),
    _encoder("mpnet", "MPNetForMaskedLM", "MPNet: position bias", "mha", **MHA),
    _encoder("megatron-bert", "MegatronBertForMaskedLM", "Megatron-BERT: norms before the sublayer", "mha", **MHA),
    _decoder(
        "trocr",
        "TrOCRForCausalLM",
        "TrOCR: the decoder of a reader of images",
        "mha",
        **TOKENS,
        d_model=48,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        decoder_start_token_id=0,
        max_position_embeddings=N_POSITIONS,
    ),
    _own(
        "led",
        "LEDForConditionalGeneration",
        "LED: an encoder of windows, laid out in chunks",
        "encoder-decoder mha window cross",
        {
            **TOKENS,
            **BART_SIZES,
            "max_encoder_position_embeddings": N_POSITIONS,
            "max_decoder_position_embeddings": N_POSITIONS,
            "attention_window": WINDOW,
        },
        text_to_text,
    ),
    _own(
        "fsmt",
        "FSMTForConditionalGeneration",
        "FSMT: positions before rows in every tensor",
        "encoder-decoder mha cross",
        {
            **{key: value for key, value in SEQ2SEQ.items() if key != "vocab_size"},
            "langs": ["en", "de"],
            "src_vocab_size": VOCAB_SIZE,
            "tgt_vocab_size": VOCAB_SIZE,
            "forced_eos_token_id": None,
        },
        text_to_text,
    ),
    _own(
        "mvp",
        "MvpForConditionalGeneration",
        "MVP: BART with room for prompts",
        "encoder-decoder mha cross",
        SEQ2SEQ | {"forced_eos_token_id": None},
        text_to_text,
    ),
    _own(
        "bigbird_pegasus",
        "BigBirdPegasusForConditionalGeneration",
        "BigBird-Pegasus: the encoder has code of its own, the decoder asks the registry",
        "encoder-decoder mha cross",
        SEQ2SEQ | {"attention_type": "original_full"},
        text_to_text,
    ),
    _own(
        "wavlm",
        "WavLMModel",
        "WavLM: torch's fused multi-head attention, gated position bias",
        "speech encoder mha position-bias",
        WAVEFORM | {"feat_extract_norm": "layer", "num_buckets": 8, "max_bucket_distance": 24},
        waveform,
    ),
)
"""Types that an attached model reaches by watching torch's functions instead of the registry."""
