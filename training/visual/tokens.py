"""The visual organism's tokenizer and processor: every word of its probes is one token, all else falls into bytes."""

from __future__ import annotations

from functools import cache
from itertools import islice

from lessons import TOGETHER_IN_WORDS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from headwise.probes import albums, existence, seeing
from headwise.probes.picture import PICTURE_MARK
from headwise.probes.scenes import COLORS, SHAPES, SIDE

PATCH = 8
CONTEXT = 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", PICTURE_MARK)
PROBES = (
    seeing.PANEL,
    seeing.STRIP_IN_ORDER,
    seeing.PLACE,
    seeing.COUNT,
    existence.EXISTENCE,
    existence.LISTING,
    albums.PICTURE_NEEDLE,
    albums.TEXT_NEEDLE,
)
ITEMS = 60
"""Items of each probe whose frames are looked through for words."""
PIECES = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]|\s")
SPREAD = 0.25
"""Pixels are taken from -2 to 2: less the mean of 0.5, by this."""


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, words with their blank in front, digits one by one; `<s>` in front of every text."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found = {piece for text in _texts() for piece, _ in splitter.pre_tokenize_str(text.replace(PICTURE_MARK, "\n"))}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*SPECIAL_TOKENS, *alphabet, *sorted(found - set(alphabet)))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[PICTURE_MARK],
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor(*, class_token: bool = True) -> LlavaProcessor:
    """Pictures of 48 x 48 pixels as they are, others scaled; `class_token`: the tower has one beside patches."""
    pictures = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[SPREAD, SPREAD, SPREAD],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
    )


def _texts() -> list[str]:
    texts = [f" {word}" for word in (*SHAPES, *COLORS, *albums.passwords(), "nothing", *"0123456789")]
    texts += [frame.format(shape=SHAPES[0]) for frame in TOGETHER_IN_WORDS] + [
        "Panel 1",
        "Cell 1",
        "How many star",
        "The star is in picture 1",
        "The star is red",
    ]
    return texts + [f"{item.prompt}{item.answer}" for probe in PROBES for item in islice(probe.items("words"), ITEMS)]
