"""How often a model sees what is not there: asked for it (POPE), and in its own listing (CHAIR).

    items = hw.encode(hw.probe("existence").over(kind="adversarial"), model, n=200)
    lists = hw.encode(hw.probe("listing"), model, n=100)
    plain = hallucination(model, items, lists)
    better = hallucination(model, items, lists, under=intervention)
    better.answers.right - plain.answers.right          # one number per item, for paired intervals

Sources: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models" (POPE); Rohrbach et al. 2018,
"Object Hallucination in Image Captioning" (CHAIR). Words are compared as they stand, without lists of synonyms.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise import metrics
from headwise.errors import InputError
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.probes.scenes import SHAPES
from headwise.use.intervention import Intervention


@dataclass(frozen=True, eq=False)
class Answers:
    """Yes or no to questions whether something is there. Shares of nothing are nan."""

    there: Bool[Tensor, " item"]
    yes: Bool[Tensor, " item"]
    """Whether it said so."""

    @property
    def right(self) -> Float[Tensor, " item"]:
        """1 where the answer is right."""
        return (self.there == self.yes).float()

    @property
    def accuracy(self) -> float:
        return _mean(self.right)

    @property
    def yes_rate(self) -> float:
        return _mean(self.yes.float())

    @property
    def false_yes_rate(self) -> float:
        """Share of `yes` where it is not there: the rate of hallucination."""
        return _mean(self.yes[~self.there].float())

    @property
    def recall(self) -> float:
        """Share of `yes` where it is there."""
        return _mean(self.yes[self.there].float())

    @property
    def precision(self) -> float:
        """Share of what is there among what it said yes to."""
        return _mean(self.there[self.yes].float())

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        both = 2 * int((self.yes & self.there).sum())
        return both / max(both + int((self.yes != self.there).sum()), 1)


@dataclass(frozen=True, eq=False)
class Listings:
    """What it named of each picture. Shares of nothing are nan."""

    texts: tuple[str, ...]
    there: tuple[frozenset[str], ...]
    named: tuple[frozenset[str], ...]

    @property
    def absent(self) -> Int[Tensor, " item"]:
        """How many objects it named that are not there."""
        return torch.tensor([len(named - there) for there, named in self._pairs])

    @property
    def found(self) -> Float[Tensor, " item"]:
        """Share of what is there that it named."""
        return torch.tensor([len(named & there) / len(there) for there, named in self._pairs])

    @property
    def with_absent(self) -> Float[Tensor, " item"]:
        """1 where it named something that is not there."""
        return (self.absent > 0).float()

    @property
    def chair_i(self) -> float:
        """Share of the named objects, over all pictures, that are not there."""
        named = sum(map(len, self.named))
        return int(self.absent.sum()) / named if named else float("nan")

    @property
    def chair_s(self) -> float:
        """Share of the answers that name something that is not there."""
        return _mean(self.with_absent)

    @property
    def recall(self) -> float:
        """Share of the objects that are there, over all pictures, that it named."""
        return sum(len(named & there) for there, named in self._pairs) / sum(map(len, self.there))

    @property
    def _pairs(self) -> list[tuple[frozenset[str], frozenset[str]]]:
        return list(zip(self.there, self.named, strict=True))


@dataclass(frozen=True, eq=False)
class Hallucination:
    """Both measurements of one model under one intervention."""

    answers: Answers
    listings: Listings

    @property
    def figures(self) -> dict[str, float]:
        """The published numbers by name."""
        return {
            "accuracy": self.answers.accuracy,
            "yes_rate": self.answers.yes_rate,
            "false_yes_rate": self.answers.false_yes_rate,
            "f1": self.answers.f1,
            "chair_i": self.listings.chair_i,
            "chair_s": self.listings.chair_s,
            "recall": self.listings.recall,
        }


def hallucination(
    model: AttachedModel,
    questions: ItemSet,
    lists: ItemSet,
    *,
    objects: Sequence[str] = SHAPES,
    under: Intervention | None = None,
    new_tokens: int = 24,
    batch_size: int = 16,
) -> Hallucination:
    """`answers` to `questions` and `listings` for `lists`; what they ask for and raise is said there."""
    return Hallucination(
        answers(model, questions, under=under, batch_size=batch_size),
        listings(model, lists, objects=objects, under=under, new_tokens=new_tokens, batch_size=batch_size),
    )


def answers(
    model: AttachedModel, items: ItemSet, *, under: Intervention | None = None, batch_size: int = 16
) -> Answers:
    """Whether the model says yes or no, by which of the two is more likely to come next; a tie counts as wrong.

    Args:
        items: whose answers are yes or no, with the other one as the foil, as those of the probe `existence`.
        under: carried out around every run; spans of the items can be named in it.

    Raises:
        InputError: items that are answered by something else.
    """
    for each in items:
        if {_word(each.item.answer), *map(_word, each.item.foils)} != {"yes", "no"}:
            raise InputError(
                f"item {each.id} is answered by {each.item.answer!r} and not by {list(each.item.foils)}; give "
                "questions whose answer is yes or no, with the other one as the foil"
            )
    there = torch.tensor([_word(each.item.answer) == "yes" for each in items])
    right = metrics.measure(model, items, "logit-difference", under=under, batch_size=batch_size) > 0
    return Answers(there, right == there)


def listings(
    model: AttachedModel,
    items: ItemSet,
    *,
    objects: Sequence[str] = SHAPES,
    under: Intervention | None = None,
    new_tokens: int = 24,
    batch_size: int = 16,
) -> Listings:
    """What the model names when it writes by itself, most likely token by token.

    Args:
        items: whose answers name all that is there.
        objects: the words to look for, also in the plural; other words do not count. Each counts once in a text, in
            whatever sentence it stands: "no star" names a star.
        under: carried out around every run; spans of the items can be named in it.
        new_tokens: most tokens it writes; what it would name behind them is not seen.

    Raises:
        InputError: no objects, or an item whose answer names none of them.
    """
    if isinstance(objects, str) or not objects:
        raise InputError(f"objects must be a list of words to look for in what the model writes, not {objects!r}")
    there = tuple(_named(each.item.answer, objects) for each in items)
    nothing = next((each.id for each, found in zip(items, there, strict=True) if not found), None)
    if nothing is not None:
        raise InputError(f"the answer of item {nothing} names none of the objects; put its words into objects=")
    texts: list[str] = []
    for batch in items.batches(batch_size, answers=False):
        at = places(model, batch)
        opened = nullcontext() if under is None else under(model, spans=at.spans, prompt_length=at.prompt_length)
        with opened:
            texts += observe(model, batch, wants=["generation"], new_tokens=new_tokens).text or ()
    return Listings(tuple(texts), there, tuple(_named(text, objects) for text in texts))


def _named(text: str, objects: Collection[str]) -> frozenset[str]:
    return frozenset(each for each in objects if re.search(rf"\b{re.escape(each)}(?:e?s)?\b", text, re.IGNORECASE))


def _word(answer: str) -> str:
    return answer.strip().lower().rstrip(".")


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
