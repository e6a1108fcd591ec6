"""What the rule of `shrinking.py` cannot know, by model type, or by `type task` where the tasks of a type differ.

`defaults` are arguments without which the class has no default configuration.
"""

from __future__ import annotations

from typing import Any

from headwise.benches.coverage.shrinking import DROPPED

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_3D = _ROPE | {"mrope_section": [3, 3, 2]}
_BY_LAYER_KIND = {"sliding_attention": _ROPE, "full_attention": _ROPE}

_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
"""In place of a backbone of the optional package timm."""

_WITHOUT_TIMM: dict[str, Any] = {
    "defaults": {"use_timm_backbone": False, "backbone": None, "backbone_config": _RESNET},
}
_LAST_STAGE = _RESNET | {"out_features": ["stage4"]}
_WITHOUT_TIMM_ONE_MAP: dict[str, Any] = {
    "defaults": {"use_timm_backbone": False, "backbone": None, "backbone_config": _LAST_STAGE},
}

_NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

_EMU3_TOKENS = {"<image>": 96, "<|extra_200|>": 97} | {f"<|visual token {n:06d}|>": 100 + n for n in range(32)}
# Codes of pictures are words of the vocabulary; this family spells their numbers in letters.
_CHAMELEON_TOKENS = {"<image>": 96} | {
    f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(n))}Z": 100 + n for n in range(32)
}

PARTICULARS: dict[str, dict[str, Any]] = {
    # -- language ---------------------------------------------------------------------------------------------
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER_KIND, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere_compass": {
        "text_config.rope_parameters": _BY_LAYER_KIND,
        "text_config.layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note causal": {"head_dim": 40},
    "dots3_note_text": {"head_dim": 40},
    "dots3_note": {"text_config.head_dim": 40, "vision_config.adapter_in_dim": 64},
    "bailing_hybrid": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"defaults": {"text_config": {"model_type": "gemma4_text", **_NO_PER_LAYER_INPUT}}},
    "bit": {"num_groups": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "L_cycles": 1, "L_bp_cycles": [1, 1], "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mimo_v2_flash": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            kind: _ROPE | {"partial_rotary_factor": 0.5} for kind in ("full_attention", "sliding_attention")
        },
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2]},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2]},
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp causal": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer causal": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "num_buckets": 2,
    },
    "reformer masked": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8], "num_buckets": 2},
    "mobilebert": {"true_hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 64, "intermediate_size": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
    },
    # -- images and text --------------------------------------------------------------------------------------
    "blip-2": {"image_token_index": 95},
    "instructblip": {"image_token_index": 95},
    "instructblipvideo": {"video_token_index": 95},
    "kosmos-2": {"latent_query_num": 8},
    "chameleon": {"vocabulary_map": _CHAMELEON_TOKENS, "image_token_id": 96, "vq_config.num_embeddings": 32},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "mllama image-text": {"vision_config.vision_output_dim": 128},
    "llama4": {"vision_config.intermediate_size": 256},
    "llama4 causal": {},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _ROPE_3D, "vision_start_token_id": 110},
    "qwen3_omni_moe_thinker": {"text_config.rope_parameters": _ROPE_3D, "vision_start_token_id": 110},
    "kosmos-2.5": {"latent_query_num": 8},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
        "canvas_length": 8,
    },
    "emu3 image-text": {"vocabulary_map": _EMU3_TOKENS, "image_token_id": 96, "vq_config.codebook_size": 32},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _ROPE_3D},
    "glm5_next": {"text_config.index_kpool": 4},
    "glm5_next_text": {"index_kpool": 4},
    **{
        kind: {"text_config.rope_parameters": _ROPE_3D}
        for kind in (
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "hunyuan_vl",
            "paddleocr_vl",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "glm4v_moe": {"text_config.rope_parameters": _ROPE_3D | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    **{
        kind: {"rope_parameters": _ROPE_3D}
        for kind in (
            *("glm4v_text", "glm_image_text", "glm_ocr_text", "hunyuan_vl_text", "qwen2_vl_text", "qwen2_5_vl_text"),
        )
    },
    "glm4v_moe_text": {"rope_parameters": _ROPE_3D | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm_image": {"text_config.rope_parameters": _ROPE_3D},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
        "image_grid_pinpoints": [[32, 32]],
    },
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "gemma4_unified image-text": {"vision_config.output_proj_dims": 64},
    "colqwen2": {"vlm_config.text_config.rope_parameters": _ROPE_3D},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256, "audio_config.num_hidden_layers": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    # -- sound ------------------------------------------------------------------------------------------------
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "voxtral": {"audio_token_id": 95},
    "granite_speech5_ctc": {"encoder_config.num_key_value_heads": 4},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    # -- time series ------------------------------------------------------------------------------------------
    "autoformer": {
        "defaults": {"label_length": 4, "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
    },
    "informer": {"defaults": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}},
    "time_series_transformer": {"defaults": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}},
    # -- detection --------------------------------------------------------------------------------------------
    "conditional_detr": _WITHOUT_TIMM_ONE_MAP,
    "dab-detr": _WITHOUT_TIMM_ONE_MAP,
    "deformable_detr": _WITHOUT_TIMM,
    "detr": _WITHOUT_TIMM_ONE_MAP,
    "omdet-turbo": _WITHOUT_TIMM
    | {
        "apply_layernorm_after_vision_backbone": False,
        "text_config.hidden_size": 32,
        "text_projection_in_dim": 32,
        "text_projection_out_dim": 32,
        "class_embed_dim": 32,
        "task_encoder_hidden_dim": 64,
    },
    "table-transformer": _WITHOUT_TIMM_ONE_MAP,
    "efficientloftr": {
        "out_features": [8, 16, 32, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        **{f"stage_{part}": DROPPED for part in ("in_channels", "block_stride")},
        **{f"stage_block_{part}": DROPPED for part in ("stride", "out_channels", "in_channels")},
        "fine_fusion_dims": DROPPED,
        "rope_parameters.partial_rotary_factor": 2.0,
        "num_key_value_heads": 4,
    },
    "lw_detr_vit": {"num_windows": 4, "num_windows_side": 2},
    "bros": dict.fromkeys(("dim_bbox_sinusoid_emb_2d", "dim_bbox_sinusoid_emb_1d", "dim_bbox_projection"), DROPPED),
    "clap": {
        "audio_config.num_mel_bins": 64,
        "audio_config.spec_size": 64,
        "audio_config.patch_embeds_hidden_size": 16,
        "audio_config.hidden_size": 128,
        "audio_config.window_size": 2,
    },
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": 64},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 64,
        "talker_config.spatial_merge_size": 2,
    },
    "vitmatte": {"backbone_config.patch_size": 16},
    "zoedepth": {"bottleneck_features": 64},
    "clvp": {
        "decoder_config.decoder_fixing_codes": [83, 45, 45, 90],
        "text_config.num_attention_heads": 2,
        "speech_config.num_attention_heads": 2,
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "sam2": {
        "prompt_encoder_config.patch_size": 16,
        "vision_config.backbone_config.hidden_size": 8,
        "vision_config.backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    },
    **{
        kind: {"encoder_in_channels": [512, 1024, 2048], "backbone_config.hidden_sizes": [256, 512, 1024, 2048]}
        for kind in ("d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4]},
    "align": {"projection_dim": 640},
    "efficientnet": {"hidden_dim": 2560},
    "step3p7": {
        "text_config.sliding_window": 8,
        "text_config.rope_parameters": _BY_LAYER_KIND,
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.share_expert_dim": 64,
    },
    **{kind: {"image_size": 64, "window_size": 2} for kind in ("donut-swin", "maskformer-swin", "swin", "swinv2")},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config.model_in_dim": 16},
    "lw_detr": {
        "backbone_config.num_windows": 4,
        "backbone_config.num_windows_side": 2,
        "projector_scale_factors": [1.0],
        "projector_in_channels": [64],
        "num_feature_levels": 1,
    },
    "sam2_hiera_det_model": {"hidden_size": 8},
    "sam2_vision_model": {
        "backbone_config.hidden_size": 8,
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    },
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "vits": {"noise_scale": 0.0, "noise_scale_duration": 0.0},
    "sam": {"prompt_encoder_config.image_embedding_size": 4},
    "sam_hq": {"prompt_encoder_config.image_embedding_size": 4, "mask_decoder_config.vit_dim": 64},
    "seggpt": {
        "image_size": [64, 32],
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [0, 1, 2, 3],
    },
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "mobilevit": {"hidden_sizes": [32, 48, 64]},
    "pocket_tts": {"flow_head_config.condition_dim": 64},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 64},
    "lilt": {"hidden_size": 48},
    "mgp-str": {"num_bpe_labels": 50, "num_wordpiece_labels": 50},
}


_ALL_SHARED = "transformers asks that every layer of it shares keys and values, and its text model then refuses"
UNBUILDABLE = {"gemma4_assistant": _ALL_SHARED, "gemma4_unified_assistant": _ALL_SHARED}
"""Types that the transformers this table is of cannot build from any configuration, and why."""
