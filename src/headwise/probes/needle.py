"""Something to be found again in a long text: a password in filler, a value under a key."""

from __future__ import annotations

from random import Random

from headwise.errors import InputError
from headwise.probes.item import Item, Passage
from headwise.probes.stream import MANY, Probe, require
from headwise.probes.text import filler
from headwise.words import nouns, word_list

CODE_WORDS = 3
HEX = "0123456789abcdef"


def _needle(random: Random, *, words: int, depth: float) -> Item:
    require("words", words, range(MANY))
    if not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
        raise InputError(f"setting 'depth' must be a part of the text, from 0 to 1; it is {depth!r}")
    place, elsewhere = random.sample(word_list("places"), 2)
    drawn = random.sample(nouns(), 3 * CODE_WORDS)
    code, other, absent = (drawn[first : first + CODE_WORDS] for first in range(0, len(drawn), CODE_WORDS))
    lines = filler(random, words)
    at = round(depth * len(lines))
    also_at = random.randrange(len(lines) + 1)

    def text(value: list[str]) -> Passage:
        passage = Passage()
        for index in range(len(lines) + 1):
            blank = " " if passage.text else ""
            if index == also_at:
                passage.add(f"{blank}The password of the {elsewhere} is {' '.join(other)}.", "distractor")
                blank = " "
            if index == at:
                start = len(passage.text) + len(blank)
                passage.add(f"{blank}The password of the").add(f" {place}", "key").add(" is")
                passage.add(" " + " ".join(value), "value").add(".").mark("needle", start)
                blank = " "
            if index < len(lines):
                passage.add(blank + lines[index])
        start = len(passage.text) + 1
        passage.add("\nQuestion: What is the password of the").add(f" {place}", "question_key")
        return passage.add(f"?\nAnswer: The password of the {place} is").mark("question", start)

    return text(code).item(
        " " + " ".join(code),
        twin=text(absent),
        twin_answer=" " + " ".join(absent),
        foils=(" " + " ".join(other),),
        words=words,
        depth=depth,
    )


def _hash(random: Random, *, pairs: int, key_length: int) -> Item:
    require("key_length", key_length, range(1, MANY))
    require("pairs", pairs, range(2, min(len(nouns()), len(HEX) ** key_length + 1)))
    keys: list[str] = []
    while len(keys) < pairs:
        key = "".join(random.choice(HEX) for _ in range(key_length))
        if key not in keys:
            keys.append(key)
    *values, absent = random.sample(nouns(), pairs + 1)
    asked = random.randrange(pairs)

    def text(value: str) -> Passage:
        passage = Passage()
        for index, key in enumerate(keys):
            if index == asked:
                passage.add(key, "key").add(":").add(f" {value}", "value").add("\n")
            else:
                passage.add(f"{key}: {values[index]}\n")
        return passage.add(keys[asked], "question_key").add(":")

    return text(values[asked]).item(
        f" {values[asked]}",
        twin=text(absent),
        twin_answer=f" {absent}",
        foils=tuple(f" {value}" for index, value in enumerate(values) if index != asked),
        pairs=pairs,
        key_length=key_length,
    )


NEEDLE = Probe(
    id="needle",
    title="a password told once in a long text, asked for at the end",
    page="probes.md#needle",
    make=_needle,
    metric="answer-log-probability",
    chance=None,
    spans=("needle", "key", "value", "distractor", "question", "question_key"),
    grid={"words": (40, 80, 160), "depth": (0.0, 0.25, 0.5, 0.75, 1.0)},
)

HASH = Probe(
    id="hash",
    title="the value that stands under a key of random letters and digits",
    page="probes.md#hash",
    make=_hash,
    metric="logit-difference",
    chance=0.0,
    spans=("key", "value", "question_key"),
    grid={"pairs": (4, 8, 16), "key_length": (4,)},
)
