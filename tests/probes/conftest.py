"""Four tokenizers that differ in all that matters to an item: bytes, pieces of lower-cased words, pieces of a text with
its blanks, and the package's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import islice

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headwise.probes import PROBES
from headwise.zoo.planted.lexicon import own_tokenizer


@pytest.fixture(scope="session")
def built() -> Callable[[str], PreTrainedTokenizerBase]:
    """A tokenizer by its name: `bytes`, `words`, `pieces` or `own`."""
    makers = {"bytes": _bytes, "words": _words, "pieces": _pieces, "own": own_tokenizer}
    return cache(lambda name: makers[name]())


def _texts() -> list[str]:
    return [str(item.prompt) + item.answer for probe in PROBES for item in islice(probe.items("tokenizers"), 20)]


def _bytes() -> PreTrainedTokenizerBase:
    """Byte-level BPE without special tokens around a text, as GPT-2's; numbers go in twos from the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    twos = [f"{number:02}" for number in range(100)] * 50
    tokenizer.train_from_iterator([*_texts(), *twos], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


def _words() -> PreTrainedTokenizerBase:
    """WordPiece on lower-cased words between [CLS] and [SEP], as BERT's; blanks and line ends are gone."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
    )


def _pieces() -> PreTrainedTokenizerBase:
    """Unigram over a text whose blanks are letters, with `</s>` behind, as T5's; short words are whole."""
    texts = _texts()
    letters = sorted(set("".join(texts)) - set("\n "))
    words = sorted({f"▁{word}" for text in texts for word in re.findall(r"[A-Za-z]{1,6}\b", text)})
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    scored += [(letter, -6.0) for letter in letters] + [(word, -4.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.normalizer = normalizers.Replace(Regex("\n"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
