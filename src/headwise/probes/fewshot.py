"""A function given by examples: opposites, plurals, past tenses, capitals, continents, languages."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.words import functions


def _fewshot(random: Random, *, shots: int) -> Item:
    require("shots", shots, range(1, min(len(table) for table in functions().values())))
    name = random.choice(list(functions()))
    table = functions()[name]
    *examples, query = random.sample(list(table), shots + 1)
    shuffled = [table[example] for example in examples]
    random.shuffle(shuffled)
    wrong = random.choice([output for output in table.values() if output != table[query]])
    pairs = [(example, table[example]) for example in examples]
    twin = asked(list(zip(examples, shuffled, strict=True)), query)
    return asked(pairs, query).item(f" {table[query]}", twin=twin, foils=(f" {wrong}",), function=name, shots=shots)


def asked(examples: Sequence[tuple[str, str]], query: str) -> Passage:
    """The prompt that asks for the function of `query` behind examples of input and output, none or more."""
    passage = Passage()
    for index, (example, output) in enumerate(examples):
        passage.add("Q:").add(f" {example}", "input").add("\nA:")
        passage.add(f" {output}", "output", *(("later_output",) if index else ())).add("\n")
    return passage.add("Q:").add(f" {query}", "query").add("\nA:")


FEWSHOT = Probe(
    id="fewshot",
    title="a function of words given by examples; in the twin the examples are shuffled",
    page="probes.md#fewshot",
    make=_fewshot,
    metric="logit-difference",
    chance=0.0,
    spans=("input", "output", "query"),
    in_prompt=False,
    grid={"shots": (5,)},
)
