"""Plain sentences: what a model should lose nothing on when heads for something else are edited."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import MANY, Probe, require
from headwise.words import word_list


def with_article(word: str) -> str:
    """`a` or `an` in front, by the first letter."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentence(random: Random) -> str:
    """One sentence from a few frames and the word lists."""

    def some(kind: str) -> str:
        return random.choice(word_list(kind))

    # The words of a sentence are drawn in the order in which they stand.
    frame = random.randrange(6)
    if frame == 0:
        said = f"{some('times')} the {some('people')} {some('verbs')} the {some('adjectives')} {some('objects')}"
        return f"{said} near the {some('places')}."
    if frame == 1:
        said = f"{some('names')} {some('verbs')} {with_article(some('colors'))} {some('objects')}"
        return f"{said} and went to the {some('places')}."
    if frame == 2:
        return f"There was {with_article(some('adjectives'))} {some('animals')} behind the {some('places')}."
    if frame == 3:
        return f"The {some('animals')} and the {some('animals')} slept in the {some('adjectives')} {some('places')}."
    if frame == 4:
        return f"{some('times')} {some('names')} asked the {some('people')} for some {some('materials')}."
    return f"The {some('people')} {some('verbs')} {some('materials')} and {some('materials')} at the {some('places')}."


def filler(random: Random, words: int) -> list[str]:
    """Sentences of about `words` words in all, at least `words`."""
    lines: list[str] = []
    length = 0
    while length < words:
        lines.append(sentence(random))
        length += len(lines[-1].split())
    return lines


def _text(random: Random, *, sentences: int) -> Item:
    require("sentences", sentences, range(2, MANY))
    first, *rest = (sentence(random) for _ in range(sentences))
    return Passage().add(first, "first").item(" " + " ".join(rest), sentences=sentences)


TEXT = Probe(
    id="text",
    title="plain sentences, for the loss that an edit should leave alone",
    page="probes.md#text",
    make=_text,
    metric="cross-entropy",
    chance=None,
    spans=("first",),
    in_prompt=False,
    grid={"sentences": (8,)},
)
