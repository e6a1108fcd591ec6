"""Run a replication on a model that the user has, and hold what is found beside what was published."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError, Refusal
from headwise.find.method import scored_sites
from headwise.find.search import find
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.replications.published import Expectation, Replication, replication
from headwise.scores import HeadScores


@dataclass(frozen=True, slots=True)
class Found:
    """A number found anew, beside what was expected; NaN, which passes no rule, where it could not be measured."""

    expected: Expectation
    value: float

    @property
    def passed(self) -> bool:
        return self.expected.passes(self.value)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What running a replication gave.

    `answered` counts the items, of `items`, on which the method gave a score; for a retrieval score those are the ones
    that the model answered.
    """

    replication: Replication
    model: str
    items: int
    answered: int
    max_tokens: int
    seed: int
    found: tuple[Found, ...]
    scores: HeadScores

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.found)

    def to_json(self) -> dict[str, object]:
        """What `headwise replicate NAME MODEL --json` prints."""
        return {
            "replication": self.replication.id,
            "model": self.model,
            "passed": self.passed,
            "items": self.items,
            "answered": self.answered,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "expectations": [
                each.expected.to_json()
                | {"found": each.value if math.isfinite(each.value) else None, "passed": each.passed}
                for each in self.found
            ],
        }


def replicate(
    name: str | Replication,
    model: AttachedModel,
    *,
    items: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    began: Callable[[int, int], None] = lambda index, of: None,
) -> Outcome:
    """Run a published result's method on `model` with the paper's settings, and judge by the rule written beforehand.

    Args:
        items, max_tokens: how many questions, and the longest prompt in tokens; the replication's own if left out.
        began: is called before each item with its index and the number of items.

    Raises:
        InputError: no such replication; the model has no tokenizer; prompts longer than the model takes.
        Refusal: the model has another shape than the published one, or answers too few items to judge.
    """
    chosen = replication(name) if isinstance(name, str) else name
    _require_shape(chosen, model)
    longest = chosen.max_tokens if max_tokens is None else max_tokens
    _require_length(model, longest)
    given = _items(chosen, model, chosen.items if items is None else items, longest, seed)
    scores, refused = _item_by_item(chosen, model, given, began)
    answered = int(np.isfinite(_rows(scores)).any(axis=1).sum()) if scores is not None else 0
    if scores is None or answered < chosen.fewest:
        raise Refusal(
            f"{chosen.id}: {model.name} has a score on {answered} of {len(given)} items and {chosen.fewest} are needed "
            f"to judge; ask for more --items, or see why{f': {refused}' if refused else ''}"
        )
    found = tuple(Found(each, float(each.measure(scores))) for each in chosen.expectations)
    return Outcome(chosen, model.name, len(given), answered, longest, seed, found, scores)


def _require_shape(chosen: Replication, model: AttachedModel) -> None:
    sites = [model.table.site(id) for id in scored_sites(model)]
    shapes = {(site.n_heads, site.n_kv_heads) for site in sites}
    wanted = chosen.shape
    if len(sites) != wanted.layers or shapes != {(wanted.heads, wanted.kv_heads)}:
        has = " and ".join(f"{heads} heads ({kv} key/value heads)" for heads, kv in sorted(shapes))
        raise Refusal(
            f"{chosen.id} is about {chosen.model}: {wanted}; {model.name} has {len(sites)} layers of {has}; name "
            "a copy of that model"
        )


def _require_length(model: AttachedModel, longest: int) -> None:
    if longest < 1:
        raise InputError(f"--max-tokens {longest} must be a number of tokens, at least 1")
    config: Any = model.model.config
    takes = getattr(config.get_text_config(), "max_position_embeddings", None)
    if takes is not None and longest > takes:
        raise InputError(f"--max-tokens {longest} is more than the {takes} that {model.name} takes; ask for fewer")


def _items(chosen: Replication, model: AttachedModel, n: int, longest: int, seed: int) -> ItemSet:
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so no question can be written for it; attach it with one")
    if n < chosen.fewest:
        raise InputError(f"--items {n} is too few to judge {chosen.id}; ask for {chosen.fewest} or more")
    return encode(chosen.probe(model.tokenizer, n, longest), model.tokenizer, n=n, seed=seed)


def _item_by_item(
    chosen: Replication, model: AttachedModel, items: ItemSet, began: Callable[[int, int], None]
) -> tuple[HeadScores | None, str]:
    """Scores of all items, NaN for those that the method refuses, and the last reason why it did.

    Long prompts one at a time: the least memory, and a place to say how far it is.
    """
    parts: list[HeadScores | None] = []
    refused = ""
    for index, item in enumerate(items):
        began(index, len(items))
        try:
            parts.append(find(chosen.method, model, replace(items, items=(item,)), **chosen.settings))
        except Refusal as refusal:
            # A model that does not answer an item is no mistake: the method has no score there.
            refused = str(refusal)
            parts.append(None)
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None, refused
    none = {stack: np.full_like(values, np.nan) for stack, values in like.values.items()}
    values = {
        stack: np.concatenate([part.values[stack] if part is not None else none[stack] for part in parts])
        for stack in like.stacks
    }
    return HeadScores(values, like.sites, items.ids, like.provenance), refused


def _rows(scores: HeadScores) -> Float[np.ndarray, "item head"]:
    return np.concatenate([values.reshape(len(scores.item_ids), -1) for values in scores.values.values()], axis=1)
