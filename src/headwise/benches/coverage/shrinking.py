"""Tiny configurations by rule: every width, depth and count of a type's default configuration made small.

The default configuration of a type is taken as a dictionary, parts and all. Widths become one number, so that whatever
has to agree does; head counts, depths, vocabularies and pictures become small; layers are chosen so that every kind of
layer which the type has is there once. What a rule by name cannot know stands in `particulars.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

WIDTH = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = WIDTH // HEADS
LAYERS = 2
VOCABULARY = 160
FIRST_SPECIAL = 96
"""Special tokens that lie beyond the tiny vocabulary get ids from here on."""
POSITIONS = 512
IMAGE = 32
PATCH = 8
EXPERTS = 4

_KINDS_AT_MOST = 4
_DEPTH = re.compile(
    r"^(n|num|encoder|decoder)?_?(hidden_)?(layers?|blocks|depth)$|^(\w+_)?num_(hidden_)?layers$|^depth$"
)
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "attention_layers", "attn_layers")
_TOKEN = re.compile(r"(_id|_index|_token|_ids|_tokens)$")


def shrunk(config_class: type[PreTrainedConfig], special: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The default configuration of a class, made tiny; `special` are settings that replace what the rule made.

    A key of `special` may name a setting of a part, as `text_config.num_hidden_layers`.
    """
    special = dict(special or {})
    settings = _whole(config_class, special.pop("defaults", {}))
    _shrink(settings, _Tokens())
    for path, value in special.items():
        *parts, name = path.split(".")
        part = settings
        for each in parts:
            part = part[each]
        if value is DROPPED:
            part.pop(name, None)
        else:
            part[name] = copy.deepcopy(value)
    return config_class.from_dict(settings)


class _Dropped:
    """Stands for a setting that is left to the class."""


DROPPED = _Dropped()


def _whole(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """The default settings of a class, with default parts where the class itself leaves them out."""
    settings: dict[str, Any] = config_class(**copy.deepcopy(dict(given))).to_dict()
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if settings.get(name) is None and part.__name__ != "AutoConfig":
            settings[name] = _whole(part, {})
    return settings


class _Tokens:
    """Ids of special tokens within the tiny vocabulary: equal where they were equal, apart where they were apart."""

    def __init__(self) -> None:
        self._given: dict[int, int] = {}

    def small(self, token: int) -> int:
        if token < FIRST_SPECIAL:
            return token
        return self._given.setdefault(token, FIRST_SPECIAL + len(self._given))


def _shrink(part: dict[str, Any], tokens: _Tokens) -> None:
    """One configuration in place, its parts with it."""
    _choose_layers(part)
    _fill_in(part)
    before = dict(part)  # numbers are compared as they were
    for name, value in list(part.items()):
        if isinstance(value, dict):
            if name not in ("id2label", "label2id", "per_layer_config"):
                _shrink(value, tokens)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            part[name] = _smaller(name, value, before, tokens)
        elif isinstance(value, list):
            part[name] = _smaller_list(name, value, part, tokens)
    for each in part.get("per_layer_config", {}).values():
        single = dict(each)
        for name, value in each.items():
            if isinstance(value, int) and not isinstance(value, bool):
                each[name] = _smaller(name, value, before | single, tokens)
                whole = before.get(name)
                if isinstance(whole, int) and value != whole and each[name] == part[name]:  # stays another one
                    each[name] = 2 * each[name] if value > whole else max(1, each[name] // 2)
    part.pop("id2label", None)
    part.pop("label2id", None)


def _fill_in(part: dict[str, Any]) -> None:
    """Settings that model files read although a default configuration leaves them open."""
    if part.get("is_encoder_decoder") and part.get("decoder_start_token_id") is None:
        part["decoder_start_token_id"] = part.get("bos_token_id") or part.get("pad_token_id") or 0
    heads = part.get("num_attention_heads")
    if isinstance(heads, int) and "head_dim" in part and part["head_dim"] is None:
        part["head_dim"] = HEAD_DIM
    if isinstance(heads, int) and "num_key_value_heads" in part and part["num_key_value_heads"] is None:
        part["num_key_value_heads"] = heads
    rope, nope = part.get("qk_rope_head_dim"), part.get("qk_nope_head_dim")
    if isinstance(rope, int) and isinstance(nope, int) and part.get("head_dim") == rope:
        part["head_dim"] = min(rope, HEAD_DIM // 2)
    if any(isinstance(part.get(name), list) for name in ("upsampling_ratios", "downsampling_ratios")):
        for name in ("num_filters", "n_filters"):
            if isinstance(part.get(name), int):  # these double by stage, too
                part[name] = 2
    if isinstance(part.get("depths"), list) and isinstance(part.get("embed_dim"), int):  # widths double by stage
        part["embed_dim"] = 16
        if isinstance(part.get("num_heads"), list):
            part["num_heads"] = [min(2**stage, HEADS) for stage in range(len(part["num_heads"]))]


# -- layers --------------------------------------------------------------------------------------------------


def _choose_layers(part: dict[str, Any]) -> None:
    """As few layers as hold every kind of layer that there is, and lists by layer cut accordingly."""
    depth_names = [name for name, value in part.items() if _is_depth(name) and isinstance(value, int)]
    stages = part.pop("stage_names", None)
    if stages and len(depth_names) == 1 and len(stages) == part[depth_names[0]] + 1:
        _cut_stages(part, depth_names[0])
        return
    by_layer = next((name for name in _PER_LAYER if isinstance(part.get(name), list) and part[name]), None)
    if by_layer is None and not part.get("per_layer_config"):
        for name in depth_names:
            _cut_lists(part, int(part[name]), list(range(min(LAYERS, int(part[name])))))
            part[name] = min(LAYERS, int(part[name]))
        return
    depth = len(part[by_layer]) if by_layer else max(int(part[name]) for name in depth_names)
    lists = [value for value in part.values() if isinstance(value, list) and len(value) == depth and _is_kind(value)]
    single = part.get("per_layer_config") or {}
    kinds: dict[str, int] = {}
    for layer in range(depth):
        own = single.get(f"{layer:02d}", single.get(str(layer), single.get(layer)))
        kinds.setdefault(repr([[each[layer] for each in lists], own]), layer)
    chosen = sorted(kinds.values())[:_KINDS_AT_MOST]
    for layer in range(depth):
        if len(chosen) < LAYERS and layer not in chosen:
            chosen.append(layer)
    chosen.sort()
    _cut_lists(part, depth, chosen)
    if single:
        own_settings = {}
        for new, old in enumerate(chosen):
            for key in (f"{old:02d}", str(old), old):
                if key in single:
                    own_settings[f"{new:02d}" if isinstance(key, str) else new] = single[key]
        part["per_layer_config"] = own_settings
    for name in depth_names:
        if int(part[name]) == depth or len(depth_names) == 1:
            part[name] = len(chosen)


def _cut_stages(part: dict[str, Any], depth_name: str) -> None:
    """A backbone with a stage by layer: as many layers as it gives out, and the stages that they are."""
    given_out = len(part.pop("out_indices", None) or part.get("out_features") or [0])
    depth = max(LAYERS, given_out)
    part["out_features"] = [f"stage{stage}" for stage in range(depth - given_out + 1, depth + 1)]
    part[depth_name] = depth


def _is_depth(name: Any) -> bool:
    return isinstance(name, str) and bool(_DEPTH.match(name))


def _is_kind(values: list[Any]) -> bool:
    return all(isinstance(value, str | bool) for value in values) or (
        all(isinstance(value, int | float) for value in values) and len(set(values)) <= 3
    )


def _cut_lists(part: dict[str, Any], depth: int, chosen: list[int]) -> None:
    if depth < 5:  # short lists are by stage, by axis or by level
        return
    for name, value in part.items():
        if isinstance(value, list) and len(value) == depth:
            part[name] = [value[layer] for layer in chosen]


# -- numbers -------------------------------------------------------------------------------------------------

_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    # (name, what becomes of it), the first that matches
    (r"vocab_size|num_embeddings$|vocab_size_per_layer_input|num_embeds", lambda v: min(v, VOCABULARY)),
    (r"^num_pos_feats$", lambda v: min(v, WIDTH // 2)),
    (r"^keypoint_decoder_dim$|num_feat_extract_layers|^num_stages|^head_?dim_?ratio", lambda v: v),
    (r"^type_vocab_size|^num_channels|^in_channels|^in_chans|_ratio$|^scale$|num_labels|num_classes", lambda v: v),
    (r"linear_num_key_heads|linear_num_heads", lambda v: min(v, KV_HEADS)),
    (r"index_n_heads", lambda v: min(v, 16)),  # with few of them most scores are 0 after their relu, and tie
    (r"linear_num_value_heads", lambda v: min(v, HEADS)),
    (r"linear_(key|value)_head_dim|linear_head_dim|index_head_dim|mamba_d_head|mamba_head_dim", lambda v: min(v, 16)),
    (r"qk_rope_head_dim", lambda v: min(v, 8)),
    (r"^rotary_dim$", lambda v: min(v, HEAD_DIM // 2)),
    (r"^d_head$", lambda v: HEAD_DIM),
    (r"upsample_groups|codebook_(size|dim)$|descriptor_(\w+_)?dim$|^audio_channels$", lambda v: min(v, WIDTH)),
    (r"qk_head_dim", lambda v: min(v, HEAD_DIM + 8)),
    (r"(head_dim|dim_head|d_kv|head_size|kv_channels|_nope_head_dim)$", lambda v: min(v, HEAD_DIM)),
    (r"lora_rank$", lambda v: min(v, 32)),
    (r"(mamba_num_heads|mamba_n_heads)", lambda v: 8),
    (r"(^|_)heads?$|attention_heads|_n_heads|num_heads|query_groups", lambda v: min(v, HEADS)),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions", lambda v: min(v, POSITIONS)),
    (r"image_size$|img_size", lambda v: min(v, IMAGE)),
    (r"^patch_size$", lambda v: min(v, PATCH)),
    (r"(num|n|moe)_(local_|routed_)?(num_)?experts?$|num_experts$|expert_num$", lambda v: min(v, EXPERTS)),
    (r"experts_per_tok|moe_topk|top_k_experts|moe_top_k|num_selected_experts|moe_k$", lambda v: min(v, 2)),
    (r"n_group|expert_group|topk_group|shared_experts$|n_shared", lambda v: min(v, 1)),
    (r"(intermediate|ffn|ff|mlp|inner)_?(size|dim)?$|ffn_hidden_size", lambda v: min(v, WIDTH)),
    (r"(^|_)hidden_(size|dim)|d_model|n_embd|embed_dim|embedding_(size|dim)|(^|_)width$", lambda v: min(v, WIDTH)),
    (r"(projection|proj|out|output|input|feat|latent|model|decoder|encoder|text|vision|audio|projector)_(dim|size)$",
     lambda v: min(v, WIDTH)),
    (r"^(d_ff|dim|dff|embed_dim|hidden|channels|output_channels|emb_dim|d_inner)$|_channels$|_units$|_filters$",
     lambda v: min(v, WIDTH)),
    (r"sliding_window|attention_window|window_size$", lambda v: min(v, 8)),
    (r"index_topk|^(mamba_|attention_)?chunk_size$", lambda v: min(v, 8)),
    (r"(state_size|d_state|dt_rank|time_step_rank)$", lambda v: min(v, 8)),
    (r"num_quer|num_latents|query_tokens|num_denoising|image_seq_length|mm_tokens_per_image", lambda v: min(v, 4)),
    (r"query_pre_attn_scalar", lambda v: HEAD_DIM),
    (r"num_mel_bins|n_mels|mel_bins", lambda v: min(v, 16)),
    (r"(encoder|decoder)_layers$|_layers$|(^|_)depth$|num_blocks$", lambda v: min(v, LAYERS)),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), rule) for pattern, rule in _RULES]


def _smaller(name: str, value: int, part: Mapping[str, Any], tokens: _Tokens) -> int:
    if not isinstance(name, str) or _is_depth(name):
        return value
    if re.search(r"(kv|key_value)\w*_heads|kv_n_heads", name) and "linear" not in name:
        queries = next((part[key] for key in _queries_of(name) if isinstance(part.get(key), int)), None)
        return min(value, HEADS if queries is None or value == queries else KV_HEADS)
    if name == "window_size" and "spatial_merge_size" in part:  # in pixels: two by two merged patches
        return 2 * PATCH * int(part["spatial_merge_size"])
    if _TOKEN.search(name) and "num" not in name and value > 0:
        return tokens.small(value)
    for pattern, rule in _COMPILED:
        if pattern.search(name):
            return rule(value) if value > 0 else value
    return value


def _queries_of(name: str) -> tuple[str, ...]:
    """Settings that may hold the number of query heads to the number of key-value heads `name`."""
    return (re.sub(r"key_value_", "attention_", name), "num_attention_heads", "num_heads", "n_heads")


_WIDTHS_BY_STAGE = re.compile(r"(hidden_sizes|embed_dims?|^dims|hidden_dims|channels|channel_list|_dim_per_stage)$")


def _smaller_list(name: str, value: list[Any], part: dict[str, Any], tokens: _Tokens) -> list[Any]:
    if name == "image_grid_pinpoints":
        return [[IMAGE, IMAGE]]
    if not value or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return [_shrunk_element(each, tokens) for each in value]
    if name == "mrope_section":
        return [4, 2, 2]
    if name in ("depths", "num_block_repeats"):
        return [1] * len(value)
    if _TOKEN.search(name):
        return [tokens.small(each) for each in value]
    if name == "conv_dim":
        return [min(each, 32) for each in value]
    if name in ("in_channels", "out_channels") or name.startswith(("stem_", "stage_")):
        return value
    if max(value) > WIDTH and _WIDTHS_BY_STAGE.search(name):
        return [max(1, each * WIDTH // max(value)) if each > 4 else each for each in value]
    if name in ("image_size", "img_size"):
        return [IMAGE] * len(value)
    if re.search(r"(indexes|indices|_idxs|_indexs)$", name):
        depth = next((int(each) for key, each in part.items() if _is_depth(key) and isinstance(each, int)), LAYERS)
        return sorted({min(each, depth - 1) for each in value}) if name != "out_indices" else value
    if re.search(r"heads", name):
        return [min(each, HEADS) for each in value]
    return value


def _shrunk_element(element: Any, tokens: _Tokens) -> Any:
    if isinstance(element, dict):
        _shrink(element, tokens)
    return element
