"""Exercises that come before the probes: find a value by its key, in one form and with few words first.

Heads that find by content (a token, the one before it, what stood behind it the last time) hardly form when words and
forms are many: after a million tokens nothing is there. With one form and sixteen words they form in half of that, and
what was learnt carries over to more of both.
"""

from __future__ import annotations

from functools import cache
from random import Random

from headwise.probes import Item
from headwise.probes.item import Passage
from headwise.words import word_list

FRAMES = {
    "adjacent": (" {key}", " {value}", ""),
    "colon": (" {key}:", " {value}", ""),
    "is": (" The {key} is", " {value}", "."),
    "reversed": (" {key}", " {value}", ","),
    "behind": (" Of the {key} it is", " {value}", "."),
}
"""How a key, then its value, is written; the pairs are told once and asked for in another order."""

FORMS = tuple(FRAMES)
FIRST = FORMS[:2]
"""Taught alone until they are mastered on all words; the others, which build on them, then take a fifth of the time."""

LEVELS = (16, 24, 40, 64, 1000)
"""Most words in use; every form goes to the next level by itself, when it is mastered on the present one."""

PAIRS = 6
"""With fewer, values that were not asked for yet are too easily guessed."""

TOLD_BACKWARDS = ("reversed", "behind")
"""In these forms a pair is told as `a VALUE KEY`, as colors stand before their things."""


@cache
def words() -> tuple[str, ...]:
    """All words of the exercises in a fixed order of no meaning."""
    found = {word for name in ("objects", "animals", "places", "materials", "colors") for word in word_list(name)}
    ordered = sorted(found)
    Random("exercises").shuffle(ordered)
    return tuple(ordered)


def pairs_asked_again(random: Random, *, form: str, level: int) -> Item:
    """Pairs of words, and then each key once more in another order; every value behind a key can be foretold."""
    drawn = random.sample(words()[: LEVELS[level]], 2 * PAIRS)
    told = list(zip(drawn[:PAIRS], drawn[PAIRS:], strict=True))
    key_form, value_form, end = FRAMES[form]
    passage = Passage()
    for key, value in told:
        if form in TOLD_BACKWARDS:
            passage.add(f" a {value} {key},")
        else:
            passage.add(key_form.format(key=key)).add(value_form.format(value=value)).add(end)
    random.shuffle(told)
    for key, value in told[:-1]:
        passage.add(key_form.format(key=key)).add(value_form.format(value=value), "told").add(end)
    key, value = told[-1]
    passage.add(key_form.format(key=key))
    return passage.item(value_form.format(value=value), level=level)
