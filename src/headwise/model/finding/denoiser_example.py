"""Inputs for the probe forward of a denoiser (a diffusion transformer or U-Net), made up from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.model.running.run import named_arguments

ROWS = 2
TEXT_LENGTH = 7  # no square and no power of two, so that no grid of image tokens is as long
LARGEST_SIDE = 16  # in latents; a model meant for more still runs on so few, and attach stays cheap
TIMESTEP = 500


def is_denoiser(model: nn.Module) -> bool:
    """Whether the model is given noisy latents and a timestep, and is none of transformers."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return False
    return "timestep" in named_arguments(model, (), {}) and image_argument(model) is not None


def image_argument(model: nn.Module) -> str | None:
    """Name of the argument that holds the noisy latents, or None."""
    accepted = named_arguments(model, (), {})
    return next((name for name in ("sample", "hidden_states") if name in accepted), None)


def denoiser_inputs(model: nn.Module) -> dict[str, Any]:
    """Two rows of noise at one timestep, with a short text (its second row padded) or a class, as the model asks.

    Raises:
        InputError: the configuration does not say how wide something has to be.
    """
    accepted = named_arguments(model, (), {})
    inputs: dict[str, Any] = {}
    for name in accepted:
        make = _MAKERS.get(name)
        made = None if make is None else make(model)
        if made is not None:
            inputs[name] = made
    return inputs


def _latents(model: nn.Module) -> Tensor:
    channels = _needed(model, "in_channels")
    if _by_tokens(model):
        return _noise(model, ROWS, _side(model) ** 2, channels)
    return _noise(model, ROWS, channels, _side(model), _side(model))


def _timestep(model: nn.Module) -> Tensor:
    # Models that take tokens take the timestep as a share of the whole, the others as one of a thousand steps.
    if _by_tokens(model):
        return torch.full((ROWS,), TIMESTEP / 1000, device=_device(model), dtype=_dtype(model))
    return torch.full((ROWS,), TIMESTEP, device=_device(model))


def _text(model: nn.Module) -> Tensor:
    widths = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    width = next((found for name in widths if isinstance(found := _setting(model, name), int)), None)
    if width is None:
        raise InputError(f"the width of the text states of {type(model).__name__} is not known; pass example=...")
    return _noise(model, ROWS, TEXT_LENGTH, width)


def _text_mask(model: nn.Module) -> Tensor:
    mask = torch.ones(ROWS, TEXT_LENGTH, dtype=torch.long, device=_device(model))
    mask[1, -2:] = 0
    return mask


def _pooled(model: nn.Module) -> Tensor:
    return _noise(model, ROWS, _needed(model, "pooled_projection_dim"))


def _classes(model: nn.Module) -> Tensor | None:
    count: int | None = _setting(model, "num_embeds_ada_norm") or _setting(model, "num_class_embeds")
    if count is None or _setting(model, "norm_type") == "ada_norm_single":
        return None
    return torch.arange(1, ROWS + 1, device=_device(model)) % count


def _guidance(model: nn.Module) -> Tensor | None:
    return torch.full((ROWS,), 3.5, device=_device(model)) if _setting(model, "guidance_embeds") else None


def _image_places(model: nn.Module) -> Tensor:
    """Row and column of each image token, behind an axis that is 0."""
    side = torch.arange(_side(model), device=_device(model))
    return torch.stack([torch.zeros(len(side) ** 2, device=side.device), *_grid(side)], dim=1).to(_dtype(model))


def _text_places(model: nn.Module) -> Tensor:
    return torch.zeros(TEXT_LENGTH, 3, device=_device(model), dtype=_dtype(model))


def _conditions(model: nn.Module) -> dict[str, Tensor] | None:
    """What a few models take beside the text: large PixArts their size, SDXL a pooled text and six numbers."""
    if _setting(model, "addition_embed_type") == "text_time":
        numbers = 6
        width = _needed(model, "projection_class_embeddings_input_dim") - numbers * _needed(
            model, "addition_time_embed_dim"
        )
        return {"text_embeds": _noise(model, ROWS, width), "time_ids": torch.ones(ROWS, numbers, device=_device(model))}
    large = _setting(model, "use_additional_conditions")
    if large or (large is None and _setting(model, "caption_channels") and _setting(model, "sample_size") == 128):
        side = torch.full((ROWS, 2), 1024.0, device=_device(model), dtype=_dtype(model))
        return {"resolution": side, "aspect_ratio": torch.ones_like(side[:, :1])}
    return None


_MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "sample": _latents,
    "hidden_states": _latents,
    "timestep": _timestep,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": _text_mask,
    "pooled_projections": _pooled,
    "class_labels": _classes,
    "guidance": _guidance,
    "img_ids": _image_places,
    "txt_ids": _text_places,
    "added_cond_kwargs": _conditions,
}


def _by_tokens(model: nn.Module) -> bool:
    """Whether the latents come as a sequence of tokens with their places beside them."""
    return "img_ids" in named_arguments(model, (), {})


def _side(model: nn.Module) -> int:
    size = _setting(model, "sample_size")
    side = min(size) if isinstance(size, (tuple, list)) else size or LARGEST_SIDE
    return min(int(side), LARGEST_SIDE // 2 if _by_tokens(model) else LARGEST_SIDE)


def _grid(side: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    return rows.reshape(-1), columns.reshape(-1)


def _noise(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(*shape, generator=generator).to(_device(model), _dtype(model))


def _needed(model: nn.Module, name: str) -> int:
    value = _setting(model, name)
    if not isinstance(value, int):
        raise InputError(f"{type(model).__name__} does not say its {name}; pass example=...")
    return value


def _setting(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
