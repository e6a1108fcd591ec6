"""Inputs of the types whose inputs are not found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from headwise.benches.coverage.parts import LENGTH, Inputs, noise, setting, text, tokens

GIVEN: dict[str, Callable[[nn.Module], Inputs]] = {
    "xlstm": lambda model: text(model) | {"use_cache": False},
    "blt": lambda model: text(model) | {"use_cache": False},
    "kosmos-2.5": lambda model: (
        text(model)
        | {
            "flattened_patches": _flattened(model),
            "image_embeds_position_mask": _first(int(setting(model, "latent_query_num"))),
        }
    ),
    "emu3 image-text": text,  # its pictures need a codebook of 32,768 words of the vocabulary
    "idefics": lambda model: (
        text(model)
        | {"pixel_values": _images(model)[:, None], "image_attention_mask": torch.ones(2, LENGTH, 1, dtype=torch.long)}
    ),
    "mllama": lambda model: (
        text(model)
        | {
            "pixel_values": _images(model, 2, 1, int(setting(model, "max_num_tiles"))),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, int(setting(model, "max_num_tiles")), dtype=torch.long),
            "cross_attention_mask": torch.ones(2, LENGTH, 1, int(setting(model, "max_num_tiles")), dtype=torch.long),
        }
    ),
    "kosmos-2": lambda model: (
        text(model)
        | {"pixel_values": _images(model), "image_embeds_position_mask": _first(setting(model, "latent_query_num"))}
    ),
    "blip-2": lambda model: _with_queries(model),
    "instructblip": lambda model: _with_queries(model) | {"qformer_input_ids": tokens(model, 6, seed=2)},
    "instructblipvideo": lambda model: _with_queries(model, frames=4) | {"qformer_input_ids": tokens(model, 6, seed=2)},
    "oneformer": lambda model: {
        "pixel_values": noise(2, 3, 64, 64),
        "task_inputs": noise(2, int(setting(model, "task_seq_len"))),
    },
    "seggpt": lambda model: {
        "pixel_values": noise(2, 3, 32, 32),  # picture and prompt are put one above the other
        "prompt_pixel_values": noise(2, 3, 32, 32),
        "prompt_masks": noise(2, 3, 32, 32),
    },
    "sam": lambda model: {"pixel_values": _images(model), "input_points": torch.full((2, 1, 1, 2), 9.0)},
    "sam2": lambda model: {"pixel_values": _images(model), "input_points": torch.full((2, 1, 1, 2), 9.0)},
    "sam_hq": lambda model: {"pixel_values": _images(model), "input_points": torch.full((2, 1, 1, 2), 9.0)},
    "sam3": lambda model: text(model) | {"pixel_values": _images(model)},
    "sam3_lite_text": lambda model: text(model) | {"pixel_values": _images(model)},
    "lightglue": lambda model: {"pixel_values": noise(1, 2, 3, 64, 64)},
    "superglue": lambda model: {"pixel_values": noise(1, 2, 3, 64, 64)},
    "efficientloftr": lambda model: {"pixel_values": noise(1, 2, 3, 64, 64)},
    "tvp": lambda model: {"input_ids": tokens(model)[:1], "pixel_values": noise(1, 2, 3, 64, 64)},  # takes one row
    "lxmert": lambda model: (
        text(model)
        | {"visual_feats": noise(2, 5, int(setting(model, "visual_feat_dim"))), "visual_pos": noise(2, 5, 4)}
    ),
    "visual_bert": lambda model: (
        text(model)
        | {
            "visual_embeds": noise(2, 5, int(setting(model, "visual_embedding_dim"))),
            "visual_attention_mask": torch.ones(2, 5, dtype=torch.long),
            "visual_token_type_ids": torch.ones(2, 5, dtype=torch.long),
        }
    ),
    "omdet-turbo": lambda model: {
        "pixel_values": noise(2, 3, 64, 64),
        "classes_input_ids": tokens(model, 6).repeat(2, 1),
        "classes_attention_mask": torch.ones(4, 6, dtype=torch.long),
        "tasks_input_ids": tokens(model, 6, seed=1),
        "tasks_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    },
    "blip_2_qformer": lambda model: {
        "query_embeds": noise(2, 6, int(setting(model, "hidden_size"))),
        "encoder_hidden_states": noise(2, 9, int(setting(model, "encoder_hidden_size"))),
    },
    # -- text laid out on a page --
    "bros": lambda model: text(model) | {"bbox": noise(2, LENGTH, 4).sigmoid()},
    "udop": lambda model: text(model) | {"bbox": _boxes() / 64},
    "layoutlmv3": lambda model: text(model) | {"bbox": _boxes()},
    "owlv2": lambda model: {"input_ids": tokens(model, 12), "pixel_values": _images(model)},
    "owlvit": lambda model: {"input_ids": tokens(model, 12), "pixel_values": _images(model)},
    "depth_pro": lambda model: {"pixel_values": noise(2, 3, 128, 128)},
    "video_llama_3_vision": lambda model: {
        "pixel_values": noise(32, 3 * int(setting(model, "patch_size")) ** 2),
        "grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "merge_sizes": torch.tensor([2, 2]),
    },
    "vit_mae": lambda model: {"pixel_values": _images(model), "noise": noise(2, _patches(model))},  # else it draws them
    # -- sound --
    "gemma4_audio": lambda model: {"input_features": noise(2, 48, 64), "attention_mask": torch.ones(2, 48).bool()},
    "granite_speech5_ctc": lambda model: {"input_features": noise(2, 96, 64)},
    "granite_speech5_encoder": lambda model: {"input_features": noise(2, 96, 64)},
    "kyutai_speech_to_text": lambda model: {
        "input_ids": torch.randint(3, 60, (2, 12, 33), generator=torch.Generator().manual_seed(1))
    },
    "nemotron_h_omni": text,
    "mimi_decoder": lambda model: {"latents": noise(2, int(setting(model, "hidden_size")), 10)},
    "muse_spark_audio": lambda model: {"input_values": noise(2, 2 * 1920)},
    "pocket_tts_audio_tokenizer_decoder": lambda model: {"latents": noise(2, int(setting(model, "hidden_size")), 10)},
    "vibevoice_acoustic_tokenizer_encoder": lambda model: {"hidden_states": noise(2, 1, 6400)},
    "vits": lambda model: text(model) | {"speaking_rate": 20.0},
    "xcodec": lambda model: {"input_values": noise(2, 1, 3200)},
    "pop2piano": lambda model: {
        "input_features": noise(2, 30, int(setting(model, "d_model"))),
        "decoder_input_ids": tokens(model, 7, seed=1),
    },
    "pe_audio": lambda model: text(model) | {"input_values": noise(2, 1, 1920)},
    "pe_audio_encoder": lambda model: {"input_values": noise(2, 1, 1920)},
    "audio-spectrogram-transformer": lambda model: {
        "input_values": noise(2, int(setting(model, "max_length")), int(setting(model, "num_mel_bins")))
    },
    "voxtral_realtime": lambda model: {
        "input_ids": tokens(model),
        "input_features": noise(2, int(setting(model, "num_mel_bins")), 8 * LENGTH),
        "num_delay_tokens": 6,
    },
    "dia": lambda model: (
        text(model) | {"decoder_input_ids": torch.randint(3, 60, (2, 7, 9), generator=torch.Generator().manual_seed(1))}
    ),
    "seamless_m4t": lambda model: _speech_frames(model),
    "seamless_m4t_v2": lambda model: _speech_frames(model),
    "clap": lambda model: (
        text(model) | {"input_features": noise(2, 1, 64, 64), "is_longer": torch.tensor([[True]] * 2)}
    ),
    "clvp": lambda model: text(model) | {"input_features": noise(2, int(setting(model, "feature_size")), 40)},
    # -- series --
    "autoformer": lambda model: _series(model),
    "informer": lambda model: _series(model),
    "time_series_transformer": lambda model: _series(model),
    "patchtst": lambda model: {
        "past_values": noise(2, int(setting(model, "context_length")), int(setting(model, "num_input_channels")))
    },
    "patchtsmixer": lambda model: {
        "past_values": noise(2, int(setting(model, "context_length")), int(setting(model, "num_input_channels")))
    },
    "timesfm": lambda model: {
        "past_values": noise(2, 4 * int(setting(model, "patch_length"))),
        "past_values_padding": torch.zeros(2, 4 * int(setting(model, "patch_length")), dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda model: {"past_values": noise(2, 4 * int(setting(model, "patch_length")))},
    "decision_transformer": lambda model: {
        "states": noise(2, 8, int(setting(model, "state_dim"))),
        "actions": noise(2, 8, int(setting(model, "act_dim"))),
        "rewards": noise(2, 8, 1),
        "returns_to_go": noise(2, 8, 1),
        "timesteps": torch.arange(8).expand(2, -1).contiguous(),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
    },
    "pi0": lambda model: (
        text(model)
        | {
            "pixel_values": _images(model, 2, 1),
            "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
            "state": noise(2, int(setting(model, "max_state_dim"))),
            "noise": noise(2, int(setting(model, "chunk_size")), int(setting(model, "max_action_dim"))),
            "timestep": torch.full((2,), 0.5),
        }
    ),
    "pix2struct": lambda model: {
        "flattened_patches": _flattened(model),
        "attention_mask": torch.ones(2, 16),
        "decoder_input_ids": tokens(model, 7, seed=1),
    },
}


def _images(model: nn.Module, *lead: int) -> torch.Tensor:
    size = setting(model, "image_size") or 32
    return noise(*(lead or (2,)), 3, *((size, size) if isinstance(size, int) else size))


def _patches(model: nn.Module) -> int:
    return (int(setting(model, "image_size")) // int(setting(model, "patch_size"))) ** 2


def _flattened(model: nn.Module) -> torch.Tensor:
    """`[2, 16, 2 + values]` patches, each with its row and column in front."""
    places = torch.arange(2 * 16).reshape(1, 16, 2).expand(2, -1, -1) % 8.0
    values = setting(model, "patch_embed_hidden_size") or 3 * int(setting(model, "patch_size")) ** 2
    return torch.cat([places, noise(2, 16, int(values))], dim=-1)


def _boxes() -> torch.Tensor:
    """`[2, LENGTH, 4]`: left, top, right, bottom of each token, growing along the line."""
    left = 2 * torch.arange(LENGTH)
    return torch.stack([left, left, left + 3, left + 5], dim=-1).expand(2, -1, -1).contiguous()


def _speech_frames(model: nn.Module) -> Inputs:
    """Frames as wide as the speech encoder's projection takes them, and what was written so far."""
    width = int(setting(model, "feature_projection_input_dim"))
    return {"input_features": noise(2, 40, width), "decoder_input_ids": tokens(model, 7, seed=1)}


def _series(model: nn.Module) -> Inputs:
    """A past, long enough for the context and the largest lag, and a future; times of one feature."""
    past = int(setting(model, "context_length")) + max(setting(model, "lags_sequence"))
    future = int(setting(model, "prediction_length"))
    features = int(setting(model, "num_time_features") or 0)
    return {
        "past_values": noise(2, past),
        "past_time_features": noise(2, past, features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": noise(2, future),
        "future_time_features": noise(2, future, features),
    }


def _first(count: int) -> torch.Tensor:
    """`[2, LENGTH]`, 1 at `count` columns after the first."""
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + count] = 1
    return mask


def _with_queries(model: nn.Module, frames: int = 1) -> Inputs:
    """Text with a placeholder for each query that looks at the picture."""
    ids = tokens(model)
    count = int(setting(model, "num_query_tokens")) * frames
    marker = setting(model, "image_token_index" if frames == 1 else "video_token_index")
    ids = torch.cat([ids[:, :6], torch.full((2, count), int(marker)), ids[:, 6:]], dim=1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    pixels = _images(model) if frames == 1 else _images(model, 2, frames)
    inputs: Inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if setting(model, "is_encoder_decoder"):
        inputs["decoder_input_ids"] = tokens(model, 7, seed=1)
    return inputs
