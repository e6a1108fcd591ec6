"""The visual organism: a small LLaVA that answers questions about pictures of shapes, shipped with the package.

How it was made, and what it gets right, is in its model card, `README.md` beside this file; `training/visual/` makes it
again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from transformers import AutoProcessor, LlavaForConditionalGeneration

from headwise.errors import InputError
from headwise.zoo.tiny import Organism

CHECKPOINT = Path(__file__).parent
TITLE = "trained visual organism: LLaVA shape, 6 layers of 8 heads behind a CLIP tower of 3 layers"
SIDE = 48
GRAY, RED, BLUE = (150, 150, 150), (205, 45, 45), (45, 75, 215)
EXAMPLE = ("Is there a star?", "Name the shapes.")


def load_visual_organism(*, dtype: torch.dtype = torch.float32, attn: str | None = None) -> Organism:
    """The visual organism as it lies in the package, in evaluation mode on the CPU; needs no network.

    Raises `InputError` for an attention implementation that it does not have.
    """
    try:
        model = LlavaForConditionalGeneration.from_pretrained(
            CHECKPOINT, dtype=dtype, attn_implementation=attn, local_files_only=True
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"visual-organism cannot run with attn={attn!r}: {str(error).splitlines()[0]}") from error
    processor = AutoProcessor.from_pretrained(CHECKPOINT, local_files_only=True)
    texts = [f"{processor.image_token}\n{question}\nAnswer:" for question in EXAMPLE]
    example = processor(images=[_squares(RED), _squares(BLUE)], text=texts, padding=True, return_tensors="pt")
    example["pixel_values"] = example["pixel_values"].to(dtype)
    return Organism("visual-organism", model.eval(), processor.tokenizer, dict(example), TITLE, processor=processor)


def _squares(color: tuple[int, int, int]) -> UInt8[np.ndarray, "row column 3"]:
    """Two squares of a color on gray ground, in the first and in the last of nine cells."""
    picture = np.full((SIDE, SIDE, 3), GRAY, np.uint8)
    for start in (3, 35):
        picture[start : start + 10, start : start + 10] = color
    return picture
