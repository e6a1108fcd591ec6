"""What is read against what is known: a text contradicts memory, and an instruction says which to trust."""

from __future__ import annotations

from random import Random

from headwise.probes.facts import FRAMES, others_of
from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.words import facts

INSTRUCTIONS = {"context": "Trust the text.", "memory": "Trust your memory."}


def _conflict(random: Random, *, trust: str) -> Item:
    require("trust", trust, tuple(INSTRUCTIONS))
    fact = random.choice(facts())
    told = random.choice(others_of(fact)).object
    statement, question = FRAMES[fact.relation]

    def text(instruction: str) -> Passage:
        passage = Passage().add(instruction, "instruction").add("\nText: ")
        before, after = statement.split("{}")
        passage.add(before).add(fact.subject, "text_subject").add(after).add(f" {told}", "told").add(".\n")
        before, after = question.split("{}")
        return passage.add(before).add(fact.subject, "question_subject").add(after)

    answers = {"context": f" {told}", "memory": f" {fact.object}"}
    other = "memory" if trust == "context" else "context"
    return text(INSTRUCTIONS[trust]).item(
        answers[trust],
        twin=text(INSTRUCTIONS[other]),
        twin_answer=answers[other],
        foils=(answers[other],),
        trust=trust,
        relation=fact.relation,
        subject=fact.subject,
    )


CONFLICT = Probe(
    id="conflict",
    title="a text that contradicts memory, and which of them to trust",
    page="probes.md#conflict",
    make=_conflict,
    metric="logit-difference",
    chance=0.0,
    spans=("instruction", "text_subject", "told", "question_subject"),
    in_prompt=False,
    grid={"trust": ("context", "memory")},
)
