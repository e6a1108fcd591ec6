"""A function of words with demonstrations and without, its words parted: what is shown and tuned on is never tested.

    task = function_task("capital", model.tokenizer)
    hw.measure(model, task.test, "exact-match").mean()         # Q: France / A:           which function is meant?
    hw.measure(model, task.test_shown, "exact-match").mean()   # the same behind ten examples

The prompts are those of the probe `fewshot`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from headwise.errors import InputError
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.fewshot import asked
from headwise.probes.item import Item
from headwise.words import functions


@dataclass(frozen=True)
class FunctionTask:
    """One function, its words in three parts: half to fit on, a quarter to validate and a quarter to test.

    Attributes:
        function: its name.
        shown: prompts with demonstrations; query and demonstrations are words to fit on.
        fit, validation, test: the words of each part without demonstrations.
        test_shown: the words of the test behind demonstrations, which are words to fit on.
    """

    function: str
    shown: ItemSet
    fit: ItemSet
    validation: ItemSet
    test: ItemSet
    test_shown: ItemSet


def function_task(
    function: str, tokenizer: Any, *, shots: int = 10, prompts: int = 50, seed: int | str = 0
) -> FunctionTask:
    """The items of a function that the probe `fewshot` asks for: opposite, plural, past, capital, continent, language.

    Args:
        shots: demonstrations in a prompt; `prompts`: how many prompts with them. 10 and 50 as Park and Rhee.

    Raises:
        InputError: no such function, or not so many words.
    """
    tables = functions()
    if function not in tables:
        raise InputError(f"no function {function!r}; choose one of: {', '.join(tables)}")
    words = list(tables[function].items())
    random = Random(f"function task/{function}/{seed}")
    random.shuffle(words)
    half, quarter = len(words) // 2, len(words) // 4
    known, validated, tested = words[:half], words[half : half + quarter], words[half + quarter :]
    if not 1 <= shots < half or prompts < 1:
        raise InputError(
            f"shots={shots} of {half} words of {function} to fit on, and {prompts} prompts, cannot be made; "
            f"use 1 to {half - 1} shots, and at least one prompt"
        )

    def shown() -> Iterator[Item]:
        seen = set()
        while True:
            (query, answer), *examples = random.sample(known, shots + 1)
            item = _item(function, examples, query, answer)
            if item.id not in seen:
                seen.add(item.id)
                yield item

    def encoded(items: Any, n: int | None = None) -> ItemSet:
        return encode(items, tokenizer, n=n, seed=seed, name=f"fewshot {function}")

    return FunctionTask(
        function,
        shown=encoded(shown(), prompts),
        fit=encoded([_item(function, (), *pair) for pair in known]),
        validation=encoded([_item(function, (), *pair) for pair in validated]),
        test=encoded([_item(function, (), *pair) for pair in tested]),
        test_shown=encoded([_item(function, random.sample(known, shots), *pair) for pair in tested]),
    )


def _item(function: str, examples: Sequence[tuple[str, str]], query: str, answer: str) -> Item:
    made = asked(examples, query).item(f" {answer}", function=function, shots=len(examples))
    return made.named("fewshot")


__all__ = ["FunctionTask", "function_task"]
