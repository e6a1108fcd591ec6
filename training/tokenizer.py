"""The organism's tokenizer: every word of the probes is one token, everything else falls apart into bytes."""

from __future__ import annotations

from functools import cache
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headwise.probes import PROBES
from headwise.words import dated_facts, facts, functions, word_list

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
LISTS = (
    "adjectives",
    "animals",
    "colors",
    "kinds",
    "materials",
    "names",
    "objects",
    "people",
    "places",
    "times",
    "verbs",
)
ITEMS = 400
"""Items of each probe whose frames are looked through for words."""

PIECES = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]|\s")


@cache
def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Byte-level, words with their blank in front, digits one by one; `<s>` in front of every text."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found = {piece for text in _texts() for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(found - set(alphabet))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet, *words))}
    # With ignore_merges a piece that is in the vocabulary is one token; no merges: any other one is its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _texts() -> list[str]:
    texts = [f" {word}" for name in LISTS for word in word_list(name)]
    texts += [f" {fact.subject} {fact.object}" for fact in facts()]
    texts += [f" {fact.relation} {fact.subject} {fact.object}" for fact in dated_facts()]
    texts += [f" {word}" for table in functions().values() for pair in table.items() for word in pair]
    for probe in PROBES:
        if probe.id != "hash":  # its keys are random letters and digits, and stay so
            texts += [item.prompt + item.answer for item in islice(probe.items("vocabulary"), ITEMS)]
    return texts
