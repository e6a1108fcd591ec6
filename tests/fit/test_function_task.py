"""Functions of words: the parts of a task share no word that is asked for, and tests show none of their own."""

from __future__ import annotations

import pytest

from headwise.errors import InputError
from headwise.fit.function_task import function_task
from headwise.probes import probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.words import functions
from headwise.zoo.planted.lexicon import own_tokenizer


def queries(items: ItemSet) -> list[str]:
    return [str(each.item.prompt).rsplit("Q: ", 1)[1].removesuffix("\nA:") for each in items]


def examples(each: EncodedItem) -> list[str]:
    return [line.removeprefix("Q: ") for line in str(each.item.prompt).splitlines() if line.startswith("Q: ")][:-1]


@pytest.mark.parametrize("name", list(functions()))
def test_what_is_tested_was_never_shown(name: str) -> None:
    task = function_task(name, own_tokenizer(), prompts=20, seed=1)
    table = functions()[name]
    fit, validation, test = (set(queries(each)) for each in (task.fit, task.validation, task.test))
    assert fit | validation | test == set(table)
    assert len(fit) + len(validation) + len(test) == len(table)
    assert queries(task.test_shown) == queries(task.test)
    assert set(queries(task.shown)) <= fit
    assert len(task.shown) == 20
    for each in (*task.shown, *task.test_shown):
        assert len(examples(each)) == 10
        assert set(examples(each)) <= fit
    for items in (task.shown, task.fit, task.validation, task.test, task.test_shown):
        for query, each in zip(queries(items), items, strict=True):
            assert each.item.answer == f" {table[query]}"
            assert query not in examples(each)


def test_prompts_are_those_of_the_probe() -> None:
    item = next(probe("fewshot").over(shots=3).items(0))
    name, lines = str(item.attributes["function"]), str(item.prompt).splitlines()
    assert len(lines) == 8
    asked = f"{lines[-2]}\n{lines[-1]}"
    task = function_task(name, own_tokenizer(), shots=3, prompts=1)
    assert asked in {str(each.item.prompt) for part in (task.fit, task.validation, task.test) for each in part}
    assert [line[:2] for line in str(task.shown.items[0].item.prompt).splitlines()] == [line[:2] for line in lines]


def test_a_seed_parts_the_words() -> None:
    one, same, other = (function_task("past", own_tokenizer(), prompts=2, seed=seed) for seed in (0, 0, 1))
    assert one.test.ids == same.test.ids
    assert one.shown.ids == same.shown.ids
    assert set(one.test.ids) != set(other.test.ids)


def test_what_cannot_be_made_is_refused() -> None:
    for name, given, said in (
        ("colour", {}, "no function 'colour'"),
        ("past", {"shots": 11}, "1 to 10 shots"),
        ("past", {"shots": 0}, "shots=0"),
        ("past", {"prompts": 0}, "at least one prompt"),
    ):
        with pytest.raises(InputError, match=said):
            function_task(name, own_tokenizer(), **given)
