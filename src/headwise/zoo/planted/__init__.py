"""Models whose heads do known things, because their weights were written by hand: `docs/planted.md`."""

from __future__ import annotations

from headwise.zoo.planted.build import PLANTED_NAMES, Planted, null, planted, planted_named, random_net
from headwise.zoo.planted.circuits import BEHAVIOURS, CIRCUITS, DIALS
from headwise.zoo.planted.examples import Example
from headwise.zoo.planted.lexicon import Fact, Lexicon
from headwise.zoo.planted.truth import Effect, HeadTruth, Truth, TruthRow

__all__ = [
    "BEHAVIOURS",
    "CIRCUITS",
    "DIALS",
    "PLANTED_NAMES",
    "Effect",
    "Example",
    "Fact",
    "HeadTruth",
    "Lexicon",
    "Planted",
    "Truth",
    "TruthRow",
    "null",
    "planted",
    "planted_named",
    "random_net",
]
