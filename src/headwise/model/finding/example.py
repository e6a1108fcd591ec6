"""Inputs for the probe forward, made up from a model's configuration, and a short generation that shows its cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.model.finding.denoiser_example import denoiser_inputs, is_denoiser
from headwise.model.running.run import named_arguments

LENGTH = 24
DECODER_LENGTH = 7  # unlike LENGTH, so that cross-attention is told from self-attention by its shape
_GAP = 5  # columns of padding in the second row
_PLACEHOLDERS = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi")
_SPECIAL = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *(f"{name}_token_{ending}" for name in _PLACEHOLDERS for ending in ("id", "index")),
)


def example_inputs(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Two rows of random tokens (the second one padded), of pixels, or of sound, as the model's main input asks.

    A language model that sees gets one picture per row where a form that it takes is found by trying, else text alone.

    Raises:
        InputError: the configuration does not say enough.
    """
    if is_denoiser(model):
        return denoiser_inputs(model)
    main = getattr(model, "main_input_name", "input_ids")
    accepted = named_arguments(model, (), {})
    if main in ("input_ids", "inputs_embeds"):
        inputs = _text(model, tokenizer)
    elif main == "pixel_values":
        inputs = {"pixel_values": _pixels(model)}
    elif main in ("input_features", "input_values"):
        inputs = {main: _sound(model, main)}
    else:
        raise InputError(f"inputs for {type(model).__name__} (main input {main!r}) cannot be made up; pass example=...")
    if _config(model, "is_encoder_decoder") and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(model, DECODER_LENGTH, seed=1)
    if "pixel_values" in accepted and main == "input_ids" and "input_ids" in inputs:
        pixels = _config(model, "image_size")
        if pixels is not None and _config(model, "image_token_id") is None:
            inputs["pixel_values"] = _pixels(model)  # two towers side by side, as in CLIP
        inputs = _with_pictures(model, inputs) or inputs
    return inputs


def shortened(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with a shorter sequence for the decoder, or for the whole of a model that has no encoder beside it."""
    if _config(model, "is_encoder_decoder"):
        own = {name: value for name, value in inputs.items() if not name.startswith("decoder_") and name != "labels"}
        given = next((inputs[name] for name in ("decoder_input_ids", "labels") if name in inputs), None)
        rows = len(next(value for value in own.values() if isinstance(value, Tensor)))
        length = DECODER_LENGTH if given is None else int(given.shape[1]) - 1
        return own | {"decoder_input_ids": _tokens(model, length, seed=1)[:1].expand(rows, -1)}
    shape = next((value.shape[:2] for name, value in inputs.items() if name in ("input_ids", "inputs_embeds")), None)
    return {
        name: value[:, :-1] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in inputs.items()
    }


def can_generate(model: nn.Module) -> bool:
    """Whether the model has a `generate` that its class stands by."""
    can = getattr(model, "can_generate", None)
    return callable(getattr(model, "generate", None)) and (bool(can()) if callable(can) else False)


def placeholder_tokens(model: nn.Module) -> list[int]:
    """Tokens that stand for a picture or a sound, or mark its ends."""
    given = (_config(model, name) for name in _SPECIAL if name.startswith(_PLACEHOLDERS))
    return sorted({token for token in given if isinstance(token, int)})


def generate_two(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Generate two tokens with a cache after `inputs`: a prefill and one decode step."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    generate = cast(Any, model).generate
    greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    generate(**given, **greedy, max_new_tokens=2, min_new_tokens=2, use_cache=True)


def _text(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    ids = _tokens(model, LENGTH, seed=0)
    mask = torch.ones_like(ids)
    accepted = named_arguments(model, (), {})
    if "attention_mask" not in accepted:
        return {"input_ids": ids}
    decoder = callable(getattr(model, "generate", None)) and not _config(model, "is_encoder_decoder")
    if decoder or getattr(tokenizer, "padding_side", "right") == "left":
        mask[1, :_GAP] = 0
    else:
        mask[1, -_GAP:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _with_pictures(model: nn.Module, text: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The text with one picture in each row, its tokens counted by running the image tower; None if no form runs."""
    marker = next((_config(model, name) for name in ("image_token_id", "image_token_index")), None)
    see = getattr(model, "get_image_features", None)
    if marker is None or not callable(see) or "attention_mask" not in text:
        return None
    for pictures in _picture_forms(model):
        try:
            with torch.no_grad():
                features = see(**pictures).pooler_output
                count = sum(math.prod(part.shape[:-1]) for part in features) // len(features)
                inputs = {name: _with_gap(value, count) for name, value in text.items()}
                inputs["input_ids"][:, _GAP : _GAP + count] = marker
                if "mm_token_type_ids" in named_arguments(model, (), {}):
                    inputs["mm_token_type_ids"] = (inputs["input_ids"] == marker).long()
                model(**inputs, **pictures)
        except Exception:  # what a model wants with its pictures is not declared anywhere: this was not it
            continue
        return inputs | pictures
    return None


def _picture_forms(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The ways in which models take one picture per row."""
    if "image_grid_thw" in named_arguments(model, (), {}):  # a list of flattened patches for all rows
        vision = getattr(cast(Any, model).config, "vision_config", None)
        merged, side = getattr(vision, "spatial_merge_size", None), getattr(vision, "patch_size", None)
        if not isinstance(merged, int) or not isinstance(side, int):
            return
        named = (getattr(vision, name, None) for name in ("in_channels", "in_chans", "num_channels"))
        channels = next((number for number in named if number is not None), 3)
        grid = torch.tensor([[1, 2 * merged, 3 * merged]] * 2)
        values = channels * getattr(vision, "temporal_patch_size", 1) * side**2
        patches = _noise(model, int(grid.prod(dim=1).sum()), values)
        yield {"pixel_values": patches, "image_grid_thw": grid.to(_device(model))}
    elif _config(model, "image_size") is not None:
        yield {"pixel_values": _pixels(model)}
        yield {"pixel_values": _pixels(model)[:, None]}  # with an axis for several pictures in a row


def _with_gap(text: Tensor, count: int) -> Tensor:
    """Room for a picture's tokens after the columns that padding may take."""
    room = torch.ones(len(text), count, dtype=text.dtype, device=text.device)
    return torch.cat([text[:, :_GAP], room, text[:, _GAP:]], dim=1)


def _tokens(model: nn.Module, length: int, seed: int) -> Tensor:
    try:
        vocabulary = getattr(cast(Any, model).get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # models of two towers have no one table of tokens
        vocabulary = None
    vocabulary = vocabulary or _config(model, "vocab_size")
    if vocabulary is None:
        raise InputError(
            f"{type(model).__name__} says no vocabulary size, so it is no model with attention whose inputs can be "
            "made up; pass example={...}, inputs that it runs on, if it attends"
        )
    special = {_config(model, name) for name in _SPECIAL}
    ordinary = torch.tensor([token for token in range(min(int(vocabulary), 4096)) if token not in special])
    picks = torch.randint(len(ordinary), (2, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[picks].to(_device(model))


def _pixels(model: nn.Module) -> Tensor:
    size, channels = _config(model, "image_size"), _config(model, "num_channels") or 3
    if size is None:
        raise InputError(f"the image size of {type(model).__name__} is not known; pass example=...")
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return _noise(model, 2, channels, height, width)


def _sound(model: nn.Module, main: str) -> Tensor:
    if main == "input_values":
        return _noise(model, 2, 4000)
    bins = _config(model, "num_mel_bins")
    if bins is None:
        raise InputError(f"the number of mel bins of {type(model).__name__} is not known; pass example=...")
    positions = _config(model, "max_source_positions")
    frames = 2 * positions if positions else 96
    return _noise(model, 2, bins, frames)


def _noise(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(_device(model), _dtype(model))


def _config(model: nn.Module, name: str) -> Any:
    """A setting of the model's configuration, or of the text or vision part of it."""
    config = getattr(model, "config", None)
    for part in (config, *(getattr(config, key, None) for key in ("text_config", "vision_config", "audio_config"))):
        try:
            value = getattr(part, name, None)
        except Exception:  # configurations with settings per layer refuse a global read
            value = None
        if value is not None:
            return value
    return None


def _device(model: nn.Module) -> torch.device:
    """Where inputs belong; parameters that are offloaded are nowhere between calls."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
