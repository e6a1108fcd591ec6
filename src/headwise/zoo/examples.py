"""Inputs for one plain forward of a tiny model: they reach every attention module it has.

Two rows; the second is shorter, so that padding is part of every proof. Functions take the model's configuration and
return what `model(**inputs)` takes. Nothing here touches the global random state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from headwise.zoo.tokens import BOS, IMAGE, IMAGE_END, IMAGE_START, PAD, byte_tokenizer

LONG_TEXT = "the cat sat on the mat, the cat"
SHORT_TEXT = "one two one two one"

IMAGE_SIZE = 16
PATCH_SIZE = 4
N_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def left_padded(config: PreTrainedConfig) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[2, 32]`, the second row padded on the left by 12."""
    return dict(byte_tokenizer("left")([LONG_TEXT, SHORT_TEXT], padding=True, return_tensors="pt"))


def right_padded(config: PreTrainedConfig) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[2, 32]`, the second row padded on the right by 12."""
    return dict(byte_tokenizer("right")([LONG_TEXT, SHORT_TEXT], padding=True, return_tensors="pt"))


def text_to_text(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Right-padded encoder inputs `[2, 32]` and unpadded `decoder_input_ids` `[2, 9]`: no two lengths are equal."""
    return right_padded(config) | {"decoder_input_ids": decoder_tokens()}


def speech_to_text(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Log-mel `input_features` `[2, mel, 2 * source position]` (two frames make one position), decoder ids `[2, 9]`."""
    frames = 2 * config.max_source_positions
    return {"input_features": noise(2, config.num_mel_bins, frames), "decoder_input_ids": decoder_tokens()}


def waveform(config: PreTrainedConfig) -> dict[str, Tensor]:
    """`input_values` `[2, 640]` samples and their right-padded mask; strides of 5, 2 and 2 leave 31 positions."""
    attention_mask = torch.ones(2, 640, dtype=torch.long)
    attention_mask[1, 400:] = 0
    return {"input_values": noise(2, 640) * attention_mask, "attention_mask": attention_mask}


def image(config: PreTrainedConfig) -> dict[str, Tensor]:
    """`pixel_values` `[2, 3, 24, 24]`: 36 patches of 4 x 4 pixels."""
    return {"pixel_values": noise(2, 3, config.image_size, config.image_size)}


def image_and_caption(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Two towers, each with its own input: right-padded text that ends in `</s>`, and an image."""
    captions = [LONG_TEXT + "</s>", SHORT_TEXT + "</s>"]
    text = dict(byte_tokenizer("right")(captions, padding=True, return_tensors="pt"))
    return text | image(config.vision_config)


def image_in_prompt(config: PreTrainedConfig) -> dict[str, Tensor]:
    """One image per row as one token per patch, then text; the shorter row padded on the left."""
    return prompt_after_images((N_PATCHES, N_PATCHES)) | image(config.vision_config)


def image_in_prompt_idefics(config: PreTrainedConfig) -> dict[str, Tensor]:
    """As `image_in_prompt` with an axis for several images per row, and `scale_factor ** 2` patches to a token."""
    n_tokens = N_PATCHES // config.scale_factor**2
    pixels = image(config.vision_config)["pixel_values"]
    return prompt_after_images((n_tokens, n_tokens)) | {"pixel_values": pixels[:, None]}


def image_in_prompt_gemma3(config: PreTrainedConfig) -> dict[str, Tensor]:
    """As `image_in_prompt` with patches pooled; `token_type_ids` let the tokens of an image see each other."""
    n_tokens = config.mm_tokens_per_image
    prompt = prompt_after_images((n_tokens, n_tokens))
    return prompt | image(config.vision_config) | {"token_type_ids": (prompt["input_ids"] == IMAGE).long()}


def image_in_prompt_qwen(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Images of different size, 6 x 8 and 4 x 6 patches, flattened into one list of patches for both rows.

    `pixel_values` is `[48 + 24, 3 * time * height * width]` of a patch; four patches make one token of the prompt.
    """
    vision = config.vision_config
    grid = torch.tensor([[1, 6, 8], [1, 4, 6]])
    patches = grid.prod(dim=1)
    n_tokens = (patches // vision.spatial_merge_size**2).tolist()
    prompt = prompt_after_images((n_tokens[0], n_tokens[1]))
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return prompt | {
        "pixel_values": noise(int(patches.sum()), patch_values),
        "image_grid_thw": grid,
        "mm_token_type_ids": (prompt["input_ids"] == IMAGE).long(),
    }


def prompt_after_images(n_image_tokens: tuple[int, int]) -> dict[str, Tensor]:
    """Left-padded `input_ids` and `attention_mask`; each row is `<s>`, its image between two marks, then its text."""
    tokenizer = byte_tokenizer("left")
    rows = [
        [BOS, IMAGE_START, *[IMAGE] * count, IMAGE_END, *tokenizer.encode(text, add_special_tokens=False)]
        for count, text in zip(n_image_tokens, (LONG_TEXT, SHORT_TEXT), strict=True)
    ]
    return dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


def decoder_tokens() -> Int[Tensor, "batch position"]:
    """What the decoder of an encoder-decoder has written so far; starts with the pad token, as T5 and BART do."""
    text = byte_tokenizer("left")(["the mat ", "one two "], add_special_tokens=False, return_tensors="pt")
    start = torch.full((2, 1), PAD)
    return torch.cat([start, text["input_ids"]], dim=1)


def noise(*shape: int) -> Float[Tensor, " *shape"]:
    """Standard normal values, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
