"""The right answer of every probe, found again from the text alone by a reader that shares nothing with the maker."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

import headwise.words
from headwise.probes import PROBES, Item, probe

TABLES = Path(headwise.words.__file__).parent
ITEMS = 120


def drawn(id: str) -> list[Item]:
    return list(islice(probe(id).items("right"), ITEMS))


def table(name: str) -> list[dict[str, str]]:
    with (TABLES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def matched(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    assert found, f"{text!r} does not read as {pattern!r}"
    return found.groups()


def only(found: set[str]) -> str:
    (one,) = found
    return one


def solve_arithmetic(prompt: str) -> str:
    first, sign, second = matched(r"(\d+) ([+-]) (\d+) =", prompt)
    return f" {int(first) + int(sign + second)}"


def solve_choice(prompt: str) -> str:
    told_of, color, asked, options = matched(
        r"The (\w+) is (\w+)\.\nQuestion: What color is the (\w+)\?\n(.*)Answer:", prompt
    )
    assert told_of == asked
    return only({f" {letter}" for letter, said in re.findall(r"([A-D])\. (\w+)\n", options) if said == color})


def solve_colored_objects(prompt: str) -> str:
    things, asked = matched(r"On the table there is (.*)\.\nQuestion: What color is the (\w+)\?\nAnswer:", prompt)
    return only({f" {color}" for color, thing in re.findall(r"\ban? (\w+) (\w+)", things) if thing == asked})


def solve_conflict(prompt: str) -> str:
    trusted, text, question = matched(r"Trust (the text|your memory)\.\nText: (.*)\.\n(Question: .*)", prompt)
    relation, subject, told = matched(r"The (\w+) of (\w+) is (\w+)", text)
    known = solve_facts(question)
    assert known == only({f" {row['object']}" for row in asked_facts(relation, subject)})
    assert f" {told}" != known
    return f" {told}" if trusted == "the text" else known


def asked_facts(relation: str, subject: str) -> list[dict[str, str]]:
    return [row for row in table("facts") if (row["relation"], row["subject"]) == (relation, subject)]


QUESTIONS = {
    r"The capital of (\w+) is": "capital",
    r"Question: What is the capital of (\w+)\?\nAnswer:": "capital",
    r"The continent of (\w+) is": "continent",
    r"Question: On which continent is (\w+)\?\nAnswer:": "continent",
    r"The language of (\w+) is": "language",
    r"Question: Which language do people speak in (\w+)\?\nAnswer:": "language",
}


def solve_facts(prompt: str) -> str:
    asked = {(relation, m[1]) for form, relation in QUESTIONS.items() if (m := re.fullmatch(form, prompt))}
    ((relation, subject),) = asked
    return only({f" {row['object']}" for row in asked_facts(relation, subject)})


def solve_dated(prompt: str) -> str:
    said = re.fullmatch(r"In (\d+), the ([a-z ]+) of ([\w ]+) was", prompt)
    asked = re.fullmatch(r"Question: In (\d+), who was the ([a-z ]+) of ([\w ]+)\?\nAnswer:", prompt)
    year, office, country = (said or asked).groups()  # type: ignore[union-attr]
    rows = [row for row in table("dated") if (row["relation"], row["subject"]) == (office, country)]
    return only({f" {row['object']}" for row in rows if int(row["first"]) <= int(year) <= int(row["last"])})


def solve_echo(prompt: str) -> str:
    start, *words = prompt.removeprefix("Every word is said twice.").split()
    words = [start, *words]
    assert words[0:-1:2] == words[1::2]
    return f" {words[-1]}"


def solve_entity_tracking(prompt: str) -> str:
    first, second, asked = re.findall(r"[Bb]ox ([A-F])", prompt)[-3:]
    boxes = dict(re.findall(r"Box ([A-F]) contains the (\w+)\.", prompt))
    boxes[first], boxes[second] = boxes[second], boxes[first]
    assert prompt.endswith(f"The things in box {first} and box {second} change places. Box {asked} contains the")
    return f" {boxes[asked]}"


def functions() -> list[dict[str, str]]:
    """Each function, as input -> output."""
    found: dict[str, dict[str, str]] = {}
    for row in table("pairs"):
        found.setdefault(row["function"], {})[row["input"]] = row["output"]
    for row in table("facts"):
        found.setdefault(row["relation"], {})[row["subject"]] = row["object"]
    return list(found.values())


def solve_fewshot(prompt: str) -> str:
    shown = re.findall(r"Q: (\w+)\nA: (\w+)\n", prompt)
    (query,) = re.findall(r"Q: (\w+)\nA:$", prompt)
    fitting = [each for each in functions() if all(each.get(given) == out for given, out in shown)]
    return only({f" {each[query]}" for each in fitting if query in each})


def solve_hash(prompt: str) -> str:
    *rows, last = prompt.split("\n")
    pairs = dict(row.split(": ") for row in rows)
    assert len(pairs) == len(rows)
    return f" {pairs[last.removesuffix(':')]}"


def solve_ioi(prompt: str) -> str:
    names = set((TABLES / "names.txt").read_text("utf-8").split())
    mentions = [word for word in re.findall(r"\w+", prompt) if word in names]
    assert len(mentions) == 3
    assert mentions.count(mentions[2]) == 2, "who acts was named before"
    return only({f" {name}" for name in mentions if mentions.count(name) == 1})


def solve_needle(prompt: str) -> str:
    text, question = prompt.split("\n", 1)
    asked, again = matched(
        r"Question: What is the password of the (\w+)\?\nAnswer: The password of the (\w+) is", question
    )
    assert asked == again
    told = re.findall(r"The password of the (\w+) is (\w+ \w+ \w+)\.", text)
    assert len(told) == len(dict(told)) == 2
    return f" {dict(told)[asked]}"


def solve_refusal(prompt: str) -> str:
    wish, request = matched(r"User: Please (refuse|answer) this request\. (.*)\nAssistant:", prompt)
    if wish == "refuse":
        return " I am sorry, but I cannot help with that."
    if request.startswith("Say the word"):
        return f" {request.removeprefix('Say the word ')}"
    which, *words = matched(r"Say the (first|second|last) word of (\w+) (\w+) (\w+)\.", request)
    return f" {words[('first', 'second', 'last').index(which)]}."


SOLVERS: dict[str, Callable[[str], str]] = {
    "arithmetic": solve_arithmetic,
    "choice": solve_choice,
    "colored-objects": solve_colored_objects,
    "conflict": solve_conflict,
    "dated": solve_dated,
    "echo": solve_echo,
    "entity-tracking": solve_entity_tracking,
    "facts": solve_facts,
    "fewshot": solve_fewshot,
    "hash": solve_hash,
    "ioi": solve_ioi,
    "needle": solve_needle,
    "refusal": solve_refusal,
}
OTHERWISE = {"greater-than", "ontology", "repeat", "text"}  # their tests stand below


def test_no_probe_is_forgotten() -> None:
    assert {each.id for each in PROBES} == SOLVERS.keys() | OTHERWISE


@pytest.mark.parametrize("id", sorted(SOLVERS))
def test_the_answer_follows_from_the_prompt(id: str) -> None:
    for item in drawn(id):
        assert isinstance(item.prompt, str)
        assert item.answer == SOLVERS[id](item.prompt)
        assert item.answer not in item.foils
        if item.twin is not None and item.twin.answer:
            assert item.twin.answer == SOLVERS[id](str(item.twin.prompt))
            assert item.twin.answer != item.answer


@pytest.mark.parametrize("id", ["ioi", "fewshot"])
def test_a_twin_without_an_answer_has_none(id: str) -> None:
    ambiguous = 0
    for item in drawn(id):
        assert item.twin is not None
        assert not item.twin.answer
        try:
            SOLVERS[id](str(item.twin.prompt))
        except (AssertionError, ValueError):
            ambiguous += 1
    # A shuffle of few-shot answers may give the right ones back, mostly where all are the same continent.
    assert ambiguous == ITEMS if id == "ioi" else ambiguous > 0.75 * ITEMS


def test_greater_than_sorts_all_years() -> None:
    for item in drawn("greater-than"):
        century, start, again = matched(
            r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)", str(item.prompt)
        )
        assert century == again
        right, wrong = {item.answer, *item.also}, set(item.foils)
        assert right == {f"{year:02}" for year in range(100) if year > int(start)}
        assert wrong == {f"{year:02}" for year in range(100) if year <= int(start)}
        assert len(item.also) + 1 + len(item.foils) == 100
        assert item.twin is not None
        assert str(item.twin.prompt) == str(item.prompt).replace(f"{century}{start} ", f"{century}01 ")


def test_every_step_of_the_ontology_follows() -> None:
    for item in drawn("ontology"):
        assert item.twin is not None
        text, question = str(item.prompt).split("\n", 1)
        rules = set(re.findall(r"Every \w+ is [^.]*\.", text))
        assert len(rules) == int(item.attributes["steps"]) + 2
        assert follows(item.answer, rules, str(item.prompt))
        assert not follows(item.foils[0], rules, str(item.prompt))
        twin_rules = set(re.findall(r"Every \w+ is [^.]*\.", str(item.twin.prompt)))
        assert follows(item.twin.answer, twin_rules, str(item.twin.prompt))
        assert (
            matched(r"Question: What is (\w+) like\?\nAnswer: (\w+) is a (\w+)\.", question)[0]
            == item.attributes["name"]
        )


def follows(chain: str, rules: set[str], prompt: str) -> bool:
    """Whether each rule in the chain is told, each statement follows from the rule before it and what was known of the
    person, and the last one is no kind."""
    known = {re.findall(r"\w+ is a \w+\.", prompt)[-1]}
    steps = re.findall(r"\w[^.]*\.", chain)
    for rule, statement in zip(steps[::2], steps[1::2], strict=True):
        name, rest = statement.split(" is ")
        kind = rule.removeprefix("Every ").split(" ")[0]
        if rule not in rules or f"{name} is a {kind}." not in known or rule != f"Every {kind} is {rest}":
            return False
        known.add(statement)
    return " is a " not in steps[-1]


def test_repeat_goes_on_where_the_list_went_on() -> None:
    for item in drawn("repeat"):
        length = int(item.attributes["words"])
        words = str(item.prompt).removeprefix("Words:").split()
        said, again = words[:length], words[length:]
        assert len(set(said)) == length
        assert again == said[: len(again)]
        assert length // 2 <= len(again) < length
        assert item.answer == f" {said[len(again)]}"
        assert {foil.strip() for foil in item.foils} == set(said) - {said[len(again)], again[-1]}
        assert item.twin is not None
        twin = str(item.twin.prompt).removeprefix("Words:").split()
        assert [place for place in range(len(words)) if twin[place] != words[place]] == [len(again)]
        assert item.twin.answer == f" {twin[len(again)]}"


def test_text_is_as_many_sentences() -> None:
    for item in drawn("text"):
        sentences = re.findall(r"[A-Z][^.]*\.", str(item.prompt) + item.answer)
        assert len(sentences) == item.attributes["sentences"]
        assert " ".join(sentences) == str(item.prompt) + item.answer
        assert item.prompt == sentences[0]


def test_the_needle_stands_at_its_depth() -> None:
    for item in drawn("needle"):
        text = str(item.prompt).split("\n", maxsplit=1)[0]
        place = str(item.prompt).split("?")[0].split()[-1]
        filler = [s for s in re.findall(r"[A-Z][^.]*\.", text) if not s.startswith("The password of")]
        before = re.findall(r"[A-Z][^.]*\.", text.split(f"The password of the {place} is")[0])
        before = [sentence for sentence in before if not sentence.startswith("The password of")]
        assert sum(len(s.split()) for s in filler) >= item.attributes["words"]
        assert abs(len(before) - float(item.attributes["depth"]) * len(filler)) <= 0.5


def test_the_tables_are_without_a_contradiction() -> None:
    """One answer to every question, no year that two people share, no word twice in a list."""
    pairs = [(row["relation"], row["subject"]) for row in table("facts")]
    assert len(pairs) == len(set(pairs))
    held = [
        (row["relation"], row["subject"], year)
        for row in table("dated")
        for year in range(int(row["first"]), int(row["last"]) + 1)
    ]
    assert len(held) == len(set(held)) > 200
    inputs = [(row["function"], row["input"]) for row in table("pairs")]
    assert len(inputs) == len(set(inputs))
    for file in TABLES.glob("*.txt"):
        words = file.read_text("utf-8").split("\n")
        assert len(words) == len(set(words)), file.name
    nouns = [
        w for name in ("objects", "animals", "materials") for w in (TABLES / f"{name}.txt").read_text("utf-8").split()
    ]
    assert len(nouns) == len(set(nouns)) == 100
