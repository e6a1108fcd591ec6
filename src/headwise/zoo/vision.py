"""Tiny image models: plain encoders, two towers, and language models that see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from headwise.zoo.decoders import MHA, MIXED_WINDOW, TIED_HEADS, WIDE_HEADS
from headwise.zoo.examples import (
    IMAGE_SIZE,
    N_PATCHES,
    PATCH_SIZE,
    image,
    image_and_caption,
    image_in_prompt,
    image_in_prompt_gemma3,
    image_in_prompt_idefics,
    image_in_prompt_qwen,
)
from headwise.zoo.table import TinyType, tags
from headwise.zoo.tokens import IMAGE, IMAGE_END, IMAGE_START, PAD, VIDEO, VOCAB_SIZE

# 3 heads of 8: unlike the text towers in everything, so that a mix-up of the two shows.
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}

# 24 x 24 pixels are 36 patches.
PLAIN: dict[str, Any] = TOWER | {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24}

TWO_TOWERS: dict[str, Any] = {
    "text_config": MHA | {"max_position_embeddings": 64, "num_hidden_layers": 3},
    "vision_config": TOWER | {"image_size": 24},
}

# SigLIP compares the towers as they are, with no projection to a common width.
SAME_WIDTH: dict[str, Any] = TWO_TOWERS | {"vision_config": TWO_TOWERS["vision_config"] | {"hidden_size": 48}}

ROTARY_3D: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}

QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}

# Rotary positions in two dimensions need a head_dim divisible by 4.
QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 3, "patch_size": PATCH_SIZE, "spatial_merge_size": 2}


def vlm(
    model_type: str,
    classname: str,
    title: str,
    features: str,
    example: Callable[[PreTrainedConfig], dict[str, Tensor]],
    **sizes: Any,
) -> TinyType:
    return TinyType(model_type, classname, title, tags("vlm " + features), sizes, example)


IMAGE_ENCODERS = (
    TinyType("vit", "ViTModel", "ViT", tags("vision encoder mha"), PLAIN, image),
    TinyType(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "DINOv2 with register tokens",
        tags("vision encoder mha"),
        PLAIN | {"mlp_ratio": 1, "num_register_tokens": 2},
        image,
    ),
    TinyType(
        "clip",
        "CLIPModel",
        "CLIP: a causal text tower and an image tower",
        tags("vision encoder mha two-towers"),
        TWO_TOWERS | {"projection_dim": 16},
        image_and_caption,
    ),
    TinyType(
        "siglip",
        "SiglipModel",
        "SigLIP: two towers, attention pooling outside the registry",
        tags("vision encoder mha two-towers"),
        SAME_WIDTH,
        image_and_caption,
    ),
)

VLMS = (
    vlm(
        "llava",
        "LlavaForConditionalGeneration",
        "LLaVA: CLIP in front of Llama",
        "gqa",
        image_in_prompt,
        text_config=WIDE_HEADS | {"model_type": "llama"},
        vision_config=TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 3},
        image_token_index=IMAGE,
        image_seq_length=N_PATCHES,
    ),
    vlm(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2-VL: images of any size, three-part rotary",
        "gqa",
        image_in_prompt_qwen,
        text_config=TIED_HEADS | {"rope_parameters": ROTARY_3D},
        vision_config=QWEN_TOWER | {"embed_dim": 24, "hidden_size": 48, "mlp_ratio": 2},
        **QWEN_TOKENS,
    ),
    vlm(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2.5-VL: windows in the image tower",
        "gqa window",
        image_in_prompt_qwen,
        text_config=TIED_HEADS | {"rope_parameters": ROTARY_3D},
        vision_config=QWEN_TOWER
        | {
            "hidden_size": 24,
            "intermediate_size": 40,
            "out_hidden_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    ),
    vlm(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3-VL: image features enter several text layers",
        "gqa qk-norm",
        image_in_prompt_qwen,
        text_config=WIDE_HEADS | {"rope_parameters": ROTARY_3D | {"mrope_interleaved": True}},
        vision_config=QWEN_TOWER
        | {
            "hidden_size": 24,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **QWEN_TOKENS,
    ),
    vlm(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma 3 with SigLIP: image tokens see each other",
        "gqa window qk-norm",
        image_in_prompt_gemma3,
        text_config=WIDE_HEADS | MIXED_WINDOW | {"query_pre_attn_scalar": 12},
        vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    ),
    vlm(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemma: SigLIP in front of Gemma",
        "gqa",
        image_in_prompt,
        text_config=WIDE_HEADS | {"model_type": "gemma"},
        vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    vlm(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "Idefics3: patches shuffled together, then Llama",
        "gqa",
        image_in_prompt_idefics,
        text_config=WIDE_HEADS | {"model_type": "llama", "vocab_size": VOCAB_SIZE + 16},  # tiles have tokens, too
        vision_config=TOWER,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    ),
    vlm(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "SmolVLM: as Idefics3, for small machines",
        "gqa",
        image_in_prompt_idefics,
        text_config=WIDE_HEADS | {"model_type": "llama", "vocab_size": VOCAB_SIZE + 16},  # tiles have tokens, too
        vision_config=TOWER,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    ),
)
