"""Words that come again: a random list said twice, and every word said twice."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.words import nouns


def _repeat(random: Random, *, words: int) -> Item:
    require("words", words, range(4, len(nouns())))  # so many that the second time is two words long or more
    *listed, absent = random.sample(nouns(), words + 1)
    stop = random.randrange(words // 2, words)

    def text(at_stop: str) -> Passage:
        passage = Passage().add("Words:")
        for index, word in enumerate(listed):
            names = {stop: ("source",), stop - 1: ("match",)}.get(index, ())
            passage.add(f" {at_stop if index == stop else word}", *names)
        start = len(passage.text) + len(listed[0]) + 2  # from the second word on, the list says what comes
        for index in range(stop):
            passage.add(f" {listed[index]}", *(("current",) if index == stop - 1 else ()))
        return passage.mark("repeated", start)

    return text(listed[stop]).item(
        f" {listed[stop]}",
        twin=text(absent),
        twin_answer=f" {absent}",
        foils=tuple(f" {word}" for word in listed if word not in (listed[stop], listed[stop - 1])),
        words=words,
    )


def _echo(random: Random, *, words: int) -> Item:
    require("words", words, range(2, len(nouns())))
    *listed, absent = random.sample(nouns(), words + 1)

    def text(last: str) -> Passage:
        passage = Passage().add("Every word is said twice.")
        for word in listed[:-1]:
            passage.add(f" {word} {word}")
        return passage.add(f" {last}", "source")

    return text(listed[-1]).item(
        f" {listed[-1]}",
        twin=text(absent),
        twin_answer=f" {absent}",
        foils=tuple(f" {word}" for word in listed[:-1]),
        words=words,
    )


REPEAT = Probe(
    id="repeat",
    title="a list of random words that begins again",
    page="probes.md#repeat",
    make=_repeat,
    metric="logit-difference",
    chance=0.0,
    spans=("source", "match", "current", "repeated"),
    grid={"words": (8, 16, 32)},
)

ECHO = Probe(
    id="echo",
    title="every word is said twice",
    page="probes.md#echo",
    make=_echo,
    metric="logit-difference",
    chance=0.0,
    spans=("source",),
    grid={"words": (4, 8)},
)
