"""A harmless refusal: the same small request, with the word to refuse or to answer it in front."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.words import nouns

REFUSAL = " I am sorry, but I cannot help with that."


def _refusal(random: Random, *, wish: str) -> Item:
    require("wish", wish, ("refuse", "answer"))
    word = random.choice(nouns())
    number = random.choice(("first", "second", "last"))
    names = random.sample(nouns(), 3)
    asked = {"first": names[0], "second": names[1], "last": names[2]}[number]
    frame = random.randrange(2)

    def text(which: str) -> Passage:
        passage = Passage().add("User: Please").add(f" {which}", "marker").add(" this request.")
        if frame == 0:
            passage.add(" Say the word").add(f" {word}", "object").add(".")
        else:
            passage.add(f" Say the {number} word of").add(" " + " ".join(names), "object").add(".")
        return passage.add("\nAssistant:")

    answers = {"refuse": REFUSAL, "answer": f" {word if frame == 0 else asked}."}
    other = "answer" if wish == "refuse" else "refuse"
    return text(wish).item(
        answers[wish], twin=text(other), twin_answer=answers[other], foils=(answers[other],), wish=wish, frame=frame
    )


REFUSE = Probe(
    id="refusal",
    title="a request with the word to refuse it, or to answer it",
    page="probes.md#refusal",
    make=_refusal,
    metric="answer-log-probability",
    chance=None,
    spans=("marker", "object"),
    in_prompt=False,
    grid={"wish": ("refuse", "answer")},
)
