"""A chain of thought about kinds that do not exist: each step follows from two sentences of the text."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.words import word_list


def _ontology(random: Random, *, steps: int) -> Item:
    require("steps", steps, range(1, len(word_list("kinds")) - 1))
    *kinds, stranger = random.sample(word_list("kinds"), steps + 2)
    name = random.choice(word_list("names"))
    traits = random.sample(word_list("adjectives"), 2)
    order = list(range(steps + 2))  # the rules, then what is not needed
    random.shuffle(order)

    def text(trait: str, spare: str) -> Passage:
        rules = [(f"Every {kinds[step]} is a {kinds[step + 1]}.", "rule") for step in range(steps)]
        rules.append((f"Every {kinds[steps]} is {trait}.", "last_rule"))
        rules.append((f"Every {stranger} is {spare}.", "distractor"))
        passage = Passage()
        for place, rule in enumerate(order):
            sentence, label = rules[rule]
            passage.add(f"{' ' if place else ''}{sentence}", label)
        passage.add(f" {name} is a {kinds[0]}.", "start")
        return passage.add(f"\nQuestion: What is {name} like?\nAnswer: {name} is a {kinds[0]}.")

    def chain(trait: str) -> str:
        said = "".join(f" Every {kinds[i]} is a {kinds[i + 1]}. {name} is a {kinds[i + 1]}." for i in range(steps))
        return f"{said} Every {kinds[steps]} is {trait}. {name} is {trait}."

    trait, spare = traits
    return text(trait, spare).item(
        chain(trait), twin=text(spare, trait), twin_answer=chain(spare), foils=(chain(spare),), steps=steps, name=name
    )


ONTOLOGY = Probe(
    id="ontology",
    title="a chain of thought over invented kinds",
    page="probes.md#ontology",
    make=_ontology,
    metric="answer-log-probability",
    chance=None,
    spans=("rule", "last_rule", "distractor", "start"),
    grid={"steps": (1, 2, 3)},
)
