"""The tokenizer that every tiny text model shares: one token per byte, so any text can be expressed."""

from __future__ import annotations

from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, MASK, IMAGE, VIDEO, IMAGE_START, IMAGE_END = range(8)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<mask>", "<image>", "<video>", "<image-start>", "<image-end>")

VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""Rows of the embedding of every tiny text model: the special tokens, then the 256 bytes."""


def byte_tokenizer(padding_side: Literal["left", "right"], *, max_length: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer built in memory: `<s>` in front, then one token per UTF-8 byte; `decode` inverts it.

    `padding_side` is `left` for models that generate from a prompt and `right` for encoders. `max_length` is the
    number of positions the model has; it is what `truncation=True` cuts to.
    """
    # The alphabet comes from a set, so its order differs between processes until it is sorted.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        # Processors ask the tokenizer for these by name.
        extra_special_tokens=dict(
            zip(("image_token", "video_token", "boi_token", "eoi_token"), SPECIAL_TOKENS[4:], strict=True)
        ),
        padding_side=padding_side,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
