"""Tiny encoders, encoder-decoders and speech models."""

from __future__ import annotations

from typing import Any

from headwise.zoo.decoders import MHA, N_POSITIONS, TOKENS, WIDE_HEADS, WINDOW
from headwise.zoo.examples import right_padded, speech_to_text, text_to_text, waveform
from headwise.zoo.table import TinyType, tags
from headwise.zoo.tokens import BOS, EOS, PAD

BART_SIZES: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "decoder_start_token_id": PAD,
}

T5GEMMA_STACK: dict[str, Any] = WIDE_HEADS | {
    "num_hidden_layers": 2,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# Strides of 5, 2 and 2: 640 samples become 31 positions.
WAVEFORM: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def encoder(model_type: str, classname: str, title: str, features: str, **sizes: Any) -> TinyType:
    return TinyType(model_type, classname, title, tags("encoder " + features), sizes, right_padded)


ENCODERS = (
    encoder("bert", "BertForMaskedLM", "BERT", "mha", **MHA),
    # RoBERTa counts positions from pad_token_id + 1.
    encoder(
        "roberta",
        "RobertaForMaskedLM",
        "RoBERTa",
        "mha",
        **MHA | {"max_position_embeddings": N_POSITIONS + PAD + 1},
    ),
    encoder(
        "albert",
        "AlbertForMaskedLM",
        "ALBERT: three layers that are one module",
        "mha shared-layers",
        **MHA,
        embedding_size=24,
    ),
    encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBERT",
        "mha",
        **TOKENS,
        dim=48,
        hidden_dim=40,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=N_POSITIONS,
    ),
    encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBERT: two-sided window, one fused projection",
        "mha window",
        **MHA,
        local_attention=WINDOW,
        cls_token_id=BOS,
        sep_token_id=EOS,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
)

ENCODER_DECODERS = (
    TinyType(
        "t5",
        "T5ForConditionalGeneration",
        "T5: position bias, no score scaling",
        tags("encoder-decoder mha position-bias cross"),
        {
            **TOKENS,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 40,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": PAD,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 24,
        },
        text_to_text,
    ),
    TinyType(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        "T5Gemma: soft-capped scores, window, grouped queries",
        tags("encoder-decoder gqa softcap window cross"),
        {**TOKENS, "encoder": T5GEMMA_STACK, "decoder": T5GEMMA_STACK},
        text_to_text,
    ),
    TinyType(
        "bart",
        "BartForConditionalGeneration",
        "BART",
        tags("encoder-decoder mha cross"),
        {**TOKENS, **BART_SIZES, "max_position_embeddings": N_POSITIONS, "forced_eos_token_id": None},
        text_to_text,
    ),
)

SPEECH = (
    TinyType(
        "whisper",
        "WhisperForConditionalGeneration",
        "Whisper: speech in, text out",
        tags("speech encoder-decoder mha cross"),
        {
            **TOKENS,
            **BART_SIZES,
            "num_mel_bins": 16,
            "max_source_positions": 28,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
        },
        speech_to_text,
    ),
    TinyType(
        "wav2vec2",
        "Wav2Vec2Model",
        "wav2vec 2.0: raw samples in",
        tags("speech encoder mha"),
        WAVEFORM | {"feat_extract_norm": "layer"},
        waveform,
    ),
    TinyType(
        "hubert",
        "HubertModel",
        "HuBERT: raw samples in",
        tags("speech encoder mha"),
        WAVEFORM | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        waveform,
    ),
)
