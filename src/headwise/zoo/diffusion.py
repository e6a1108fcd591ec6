"""Tiny randomly initialised denoisers, one of each way in which text and image meet in attention.

They are built with diffusers, which comes with the extra `diffusion`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.errors import InputError, Refusal
from headwise.model.finding.denoiser_example import denoiser_inputs
from headwise.zoo.tiny import Organism
from headwise.zoo.weights import roughen


@dataclass(frozen=True)
class Denoiser:
    """A model class of diffusers as a tiny build; `sizes` are the arguments of the class."""

    name: str
    classname: str
    title: str
    sizes: Mapping[str, Any]


_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
_GRID: dict[str, Any] = {"sample_size": 8, "patch_size": 2, "in_channels": 4}  # 16 image tokens

DENOISERS = (
    Denoiser(
        "tiny-sd3",
        "SD3Transformer2DModel",
        "Stable Diffusion 3: image and text in one attention, projected apart; the first block attends twice",
        _HEADS
        | _GRID
        | {
            "num_layers": 3,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    Denoiser(
        "tiny-flux",
        "FluxTransformer2DModel",
        "Flux: double blocks as in Stable Diffusion 3, then single blocks with one projection for attention and MLP",
        _HEADS
        | {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    Denoiser(
        "tiny-dit",
        "DiTTransformer2DModel",
        "DiT: image tokens and a class, no text",
        _HEADS | _GRID | {"num_layers": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10},
    ),
    Denoiser(
        "tiny-pixart",
        "PixArtTransformer2DModel",
        "PixArt: self-attention of the image, and cross-attention to a padded text",
        _HEADS
        | _GRID
        | {
            "out_channels": 8,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 32,
            "caption_channels": 12,
        },
    ),
    Denoiser(
        "tiny-unet",
        "UNet2DConditionModel",
        "the U-Net of Stable Diffusion 1: self- and cross-attention at two resolutions",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,  # the number of heads, whatever it is called
        },
    ),
)


def build_denoiser(
    row: Denoiser, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str | None = None
) -> Organism:
    """The tiny denoiser of one class; the same weights for the same seed, whatever was drawn before.

    The weights of another `dtype` are those of float32, rounded. The global random state is left as it was.

    Raises:
        InputError: an attention implementation, which these models do not choose by name.
        Refusal: diffusers is not installed.
    """
    if attn is not None:
        raise InputError(f"{row.name} has attention processors, and no attn={attn!r}; leave it out")
    model_class = _model_class(row)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the accelerators, whose state is not forked here.
        torch.default_generator.manual_seed(seed)
        model: nn.Module = model_class(**copy.deepcopy(dict(row.sizes)))
        roughen(model)
    if dtype != torch.float32:
        model = nn.Module.to(model, dtype)  # diffusers' own warns of layers to be kept in float32, and there are none
    model = model.eval()
    # The field is for what the zoo mostly holds; what reads it wants a module.
    held: Any = model
    return Organism(row.name, held, None, denoiser_inputs(model), row.title)


def _model_class(row: Denoiser) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise Refusal(
            f"zoo:{row.name} is built with diffusers, which is not installed; pip install 'headwise[diffusion]'"
        ) from error
    return getattr(diffusers, row.classname)
