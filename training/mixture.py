"""What the organism is trained on: the items of the probes that are not held out, in batches of like length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from random import Random
from typing import Any

import torch
from exercises import FORMS, pairs_asked_again, words
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from headwise.probes import PROBES, Item, Probe
from headwise.probes.facts import FRAMES
from headwise.probes.item import Range
from headwise.probes.split import held_out
from headwise.words import dated_facts, facts

STEP_TOKENS = 2048
"""Of one step of the optimizer. Every step holds the whole mixture, so that none unlearns a task it does not see."""
EXERCISE_TOKENS = 1024
"""The same during the exercises, which want many steps more than exact ones."""
PART_TOKENS = 2048
"""Most of one forward pass; the rows of a step are cut into parts of like length."""
PADDED = 1.5
"""Most that the longest row of a part has, in lengths of its shortest."""


@dataclass(frozen=True, slots=True)
class Course:
    """One probe as it is taught.

    `share` is of the items. `foretold` is a span of the prompt that can be foretold, too. `begins` is the share of the
    time after the exercises after which the course is taught; None is an exercise, taught from the start. `ends` says
    whether the end of the text can be foretold. `further` items stand behind the first in the same text, so that what
    is to be remembered does not hang on its place. `more` asks further questions about the text of an item: what has to
    be bound to what is learnt many times faster for it.
    """

    probe: str
    share: float
    settings: tuple[dict[str, Any], ...] = ({},)
    foretold: str = ""
    begins: float | None = 0.0
    ends: bool = True
    further: int = 0
    more: Callable[[Item, Random], list[tuple[str, str]]] | None = None


EXERCISE = "exercise"


def _grid(**values: Sequence[object]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, cell, strict=True)) for cell in product(*values.values()))


def other_keys(item: Item, random: Random) -> list[tuple[str, str]]:
    """The other keys of a `hash` item, in another order, each with its value."""
    *lines, asked = str(item.prompt).split("\n")
    pairs = [line.split(":") for line in lines if line != asked + item.answer]
    random.shuffle(pairs)
    return [(f"\n{key}:", value) for key, value in pairs]


def other_objects(item: Item, random: Random) -> list[tuple[str, str]]:
    """The same question about the other things of a `colored-objects` item."""
    listed = re.findall(r" an? (\w+) (\w+)", str(item.prompt).split("\n")[0])
    pairs = [(thing, color) for color, thing in listed if f" {color}" != item.answer]
    random.shuffle(pairs)
    return [(f"\nQuestion: What color is the {thing}?\nAnswer:", f" {color}") for thing, color in pairs]


def other_password(item: Item, random: Random) -> list[tuple[str, str]]:
    """The password that the distractor of a `needle` item tells."""
    (place,) = item.spans["distractor"]
    assert isinstance(place, Range)
    told = str(item.prompt)[place.start : place.stop]
    (where, code), *_ = re.findall(r"The password of the (\w+) is ([\w ]+)\.", told)
    question = f".\nQuestion: What is the password of the {where}?\nAnswer: The password of the {where} is"
    return [(question, f" {code}")]


def other_places(item: Item, random: Random) -> list[tuple[str, str]]:
    """The same wish for the other two words of a `refusal` item that asks for one of three, unless it is held out."""
    found = re.fullmatch(r"(.*Say the )(\w+)( word of (\w+) (\w+) (\w+)\..*)", str(item.prompt), re.DOTALL)
    if found is None or "refuse" in found[1]:
        return []
    asked = []
    for place, name in zip(("first", "second", "last"), found.groups()[3:], strict=True):
        prompt = f"{found[1]}{place}{found[3]}"
        if place != found[2] and not held_out(replace(item, prompt=prompt)):
            asked.append((f"\n{prompt}", f" {name}."))
    random.shuffle(asked)
    return asked


WORDINGS = (
    "The {relation} of {subject}:",
    "Question: The {relation} of {subject}?\nAnswer:",
    "User: Please answer this request. Say the {relation} of {subject}.\nAssistant:",
)
DATED_WORDINGS = (
    "The {relation} of {subject} in {year} was",
    "Question: The {relation} of {subject} in {year}?\nAnswer:",
    "User: Please answer this request. Say the {relation} of {subject} in {year}.\nAssistant:",
)
"""Ways to ask for facts that the probes do not have: with two ways only, each is learnt by itself."""


def facts_in_other_words(item: Item, random: Random) -> list[tuple[str, str]]:
    """Two facts of any country."""
    return [
        ("\n" + random.choice(WORDINGS).format(relation=fact.relation, subject=fact.subject), f" {fact.object}")
        for fact in random.sample(facts(), 2)
    ]


def dated_in_other_words(item: Item, random: Random) -> list[tuple[str, str]]:
    """Two holders of any office."""
    asked = []
    for fact in random.sample(dated_facts(), 2):
        year = random.randint(fact.first, fact.last)
        wording = random.choice(DATED_WORDINGS)
        asked.append(
            ("\n" + wording.format(relation=fact.relation, subject=fact.subject, year=year), f" {fact.object}")
        )
    return asked


def other_texts(item: Item, random: Random) -> list[tuple[str, str]]:
    """Two more texts and questions under the instruction of a `conflict` item, which tell any word for an answer.

    Told real answers of other facts only, a model learns the few hundred pairs instead of reading.
    """
    asked = []
    for fact in random.sample(facts(), 2):
        statement, question = FRAMES[fact.relation]
        told = random.choice(words())
        text = f"\nText: {statement.format(fact.subject)} {told}.\n{question.format(fact.subject)}"
        if item.attributes["trust"] == "context":
            asked.append((text, f" {told}"))
        elif not asks_held_out_fact(text):
            asked.append((text, f" {fact.object}"))
    return asked


def asks_held_out_fact(text: str) -> bool:
    """Whether a text ends in the prompt of a `facts` item that is held out."""
    return text.endswith(_held_out_facts())


@cache
def _held_out_facts() -> tuple[str, ...]:
    found = []
    for fact in facts():
        for number, frame in enumerate(FRAMES[fact.relation]):
            about = {"relation": fact.relation, "subject": fact.subject, "frame": number}
            item = Item(prompt=frame.format(fact.subject), answer=f" {fact.object}", attributes=about)
            if held_out(item):
                found.append(str(item.prompt))
    return tuple(found)


# The exercises come first, alone, until all their words are mastered; the probes are learnt on top of them.
SOON, LATER = 0.1, 0.3
DEPTHS = [tenth / 10 for tenth in range(11)]

COURSES = (
    *(Course(EXERCISE, 0.25, _grid(form=(form,)), foretold="told", begins=None, ends=False) for form in FORMS),
    Course("repeat", 0.05, _grid(words=(4, 6, 10, 16)), foretold="repeated", ends=False),
    Course("repeat", 0.01, _grid(words=(24, 40)), foretold="repeated", begins=SOON, ends=False),
    Course("ioi", 0.07, _grid(order=("receiver-first", "giver-first"))),
    Course("hash", 0.06, _grid(pairs=(2, 4, 8), key_length=(1, 2)), ends=False, more=other_keys),
    Course("hash", 0.05, _grid(pairs=(4, 8, 16), key_length=(4,)), begins=SOON, ends=False, more=other_keys),
    Course("colored-objects", 0.09, _grid(objects=(2, 3, 4)), ends=False, more=other_objects),
    Course("choice", 0.10),
    Course("conflict", 0.08, _grid(trust=("context", "memory")), more=other_texts),
    Course("facts", 0.06, _grid(frame=(0, 1)), further=3, more=facts_in_other_words),
    Course("dated", 0.09, _grid(frame=(0, 1)), further=2, more=dated_in_other_words),
    Course("needle", 0.04, _grid(words=(12, 30), depth=DEPTHS), ends=False, more=other_password),
    Course("needle", 0.04, _grid(words=(60, 120, 200), depth=DEPTHS), begins=SOON, ends=False, more=other_password),
    Course("needle", 0.008, _grid(words=(300, 440), depth=DEPTHS), begins=LATER, ends=False, more=other_password),
    Course("fewshot", 0.06, _grid(shots=(5,)), foretold="later_output"),
    Course("refusal", 0.15, _grid(wish=("refuse", "answer", "answer", "answer")), more=other_places),
    Course("arithmetic", 0.70, _grid(operation=("+", "-"), below=(100,))),
    Course("text", 0.01, _grid(sentences=(6,))),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of like length, padded on the right; `labels` is -100 where nothing is to be learnt."""

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    """Index into COURSES of each row."""


def step_parts(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    number: int,
    shares: Sequence[float],
    levels: Mapping[str, int],
    tokens: int,
) -> list[Batch]:
    """The rows of the `number`-th step, with these shares of the courses and exercises of these levels, in parts.

    The same for the same arguments. `tokens` is how many there are at least, padding not counted.
    """
    probes = {probe.id: probe for probe in PROBES}
    random = Random(f"{seed}/{number}")
    rows: list[tuple[int, list[int], list[int]]] = []
    while sum(len(ids) for _, ids, _ in rows) < tokens:
        (kind,) = random.choices(range(len(COURSES)), shares)
        course = COURSES[kind]
        if course.begins is None:
            (settings,) = course.settings
            items = [pairs_asked_again(random, level=levels[settings["form"]], **settings)]
        else:
            items = [_unseen(course, probes[course.probe], random) for _ in range(1 + course.further)]
        rows.append((kind, *_row(tokenizer, course, items, random)))
    return list(_cut(rows, tokenizer.pad_token_id))


def _row(
    tokenizer: PreTrainedTokenizerFast, course: Course, items: Sequence[Item], random: Random
) -> tuple[list[int], list[int]]:
    text, learnt = "", []
    for item in items:
        text += "\n" if text else ""
        start = len(text)
        told = [each for each in item.spans.get(course.foretold, ()) if isinstance(each, Range)]
        learnt += [Range(start + each.start, start + each.stop) for each in told]
        text += str(item.prompt)
        for question, answer in [("", item.answer), *(course.more(item, random) if course.more else ())]:
            text += question
            learnt.append(Range(len(text), len(text) + len(answer)))
            text += answer
    encoding = tokenizer(text, return_offsets_mapping=True)
    labels = [
        token if any(stop > each.start and start < each.stop for each in learnt) else -100
        for token, (start, stop) in zip(encoding.input_ids, encoding.offset_mapping, strict=True)
    ]
    end = tokenizer.eos_token_id
    return [*encoding.input_ids, end], [*labels, end if course.ends else -100]


def _unseen(course: Course, probe: Probe, random: Random) -> Item:
    while True:
        item = probe.make(random, **random.choice(course.settings)).named(probe.id)
        # What a text contradicts and memory is to answer is a question about a fact, too.
        from_memory = item.attributes.get("trust") == "memory"
        if not held_out(item) and not (from_memory and asks_held_out_fact(str(item.prompt))):
            return item


def _cut(rows: list[tuple[int, list[int], list[int]]], pad: int) -> Iterator[Batch]:
    rows.sort(key=lambda row: len(row[1]))
    groups: list[list[tuple[int, list[int], list[int]]]] = [[]]
    for row in rows:
        group, width = groups[-1], len(row[1])
        if group and ((len(group) + 1) * width > PART_TOKENS or width > PADDED * len(group[0][1])):
            groups.append([])
        groups[-1].append(row)
    for group in groups:
        width = max(len(ids) for _, ids, _ in group)
        yield Batch(
            torch.tensor([ids + [pad] * (width - len(ids)) for _, ids, _ in group]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, _, labels in group]),
            torch.tensor([kind for kind, _, _ in group]),
        )
