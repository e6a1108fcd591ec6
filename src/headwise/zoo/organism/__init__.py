"""The trained organism: a small Llama-shaped model that shows a dozen behaviours, shipped with the package.

How it was made, and what it gets right, is in its model card, `README.md` beside this file; `training/` makes it again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.errors import InputError
from headwise.zoo.tiny import Organism

CHECKPOINT = Path(__file__).parent
TITLE = "trained organism: Llama shape, 6 layers of 12 heads, a dozen behaviours"
EXAMPLE = (
    "When Mary and John went to the store, John gave a book to",
    "The capital of France is",
)


def load_organism(*, dtype: torch.dtype = torch.float32, attn: str | None = None) -> Organism:
    """The trained organism as it lies in the package, in evaluation mode on the CPU; needs no network.

    Raises `InputError` for an attention implementation that it does not have.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype=dtype, attn_implementation=attn, local_files_only=True
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"organism cannot run with attn={attn!r}: {str(error).splitlines()[0]}") from error
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    example = tokenizer(list(EXAMPLE), padding=True, return_tensors="pt")
    return Organism("organism", model.eval(), tokenizer, dict(example), TITLE)
