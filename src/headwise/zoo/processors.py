"""Processors for the tiny models that see: how each family writes pictures into a prompt, at their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from headwise.zoo.examples import IMAGE_SIZE, PATCH_SIZE

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['role'] }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

TILES = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)))
"""What stands before each tile of a picture in the layout of Idefics and SmolVLM."""


class PicturesOfQwen(Qwen2VLProcessor):  # type: ignore[misc]
    """The processor of Qwen's models without the one for videos, which needs packages that pictures do not."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
        self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _llava(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("MARK", "<image>"),
    )


def _qwen(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    side = 2 * PATCH_SIZE
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE, merge_size=2, min_pixels=side**2, max_pixels=(6 * side) ** 2, temporal_patch_size=2
    )
    return PicturesOfQwen(images, tokenizer, CHAT_TEMPLATE.replace("MARK", "<image-start><image><image-end>"))


def _gemma3(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    images = Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    template = CHAT_TEMPLATE.replace("MARK", "<image-start>")
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def _idefics(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    tokenizer.add_special_tokens({"additional_special_tokens": list(TILES)})
    side = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size=side)
    template = CHAT_TEMPLATE.replace("MARK", "<image>")
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


PROCESSORS: dict[str, Callable[[PreTrainedTokenizerBase], ProcessorMixin]] = {
    "llava": _llava,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "gemma3": _gemma3,
    "idefics3": _idefics,
    "smolvlm": _idefics,
}
"""By model type."""
