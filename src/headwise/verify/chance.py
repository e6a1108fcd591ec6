"""The value of a metric for a model that knows nothing of a behaviour: what there is to lose begins there.

| metric | chance |
|---|---|
| the probe's own | the probe's number, where it has one |
| `logit-difference`, `probability-difference` | 0: right and wrong answers are equally likely |
| `cosine-to-clean` | 0: an embedding that has nothing to do with the clean one |
| `refusal` | 0: nothing is refused |
| `kl-to-clean` | none: it has no end, so it says how far a model drifts and not how much it can do |
| all others | measured: every item keeps its prompt and gets the answer of another item |

A measured chance holds what the model gives to answers of this kind whatever was asked: their form, their frequency.
"""

from __future__ import annotations

import random
from dataclasses import replace

from headwise.errors import InputError, Refusal
from headwise.metrics import Metric, measure
from headwise.model.attached import AttachedModel
from headwise.probes import EncodedItem, ItemSet, probe

BY_CONSTRUCTION = {"logit-difference": 0.0, "probability-difference": 0.0, "cosine-to-clean": 0.0, "refusal": 0.0}


def chance_of(model: AttachedModel, items: ItemSet, metric: Metric, seed: int = 0) -> float:
    """Chance of `metric` on these items, in its unit.

    Raises:
        Refusal: the metric has no chance level (`kl-to-clean`), or all items have the same answer.
    """
    if metric.id == "kl-to-clean":
        raise Refusal(
            "kl-to-clean says how far a model drifts, and there is no drift at which nothing is left to lose; "
            "verify heads on a metric of the answer, and use kl-to-clean off target"
        )
    own = _of_the_probe(items, metric)
    if own is not None:
        return own
    if metric.id in BY_CONSTRUCTION:
        return BY_CONSTRUCTION[metric.id]
    return float(measure(model, with_answers_of_others(items, seed), metric).double().mean())


def with_answers_of_others(items: ItemSet, seed: int = 0) -> ItemSet:
    """Every item with the answer of another one, drawn by the seed; items that find no other answer are left out.

    Raises:
        Refusal: all items have the same answer.
    """
    order = list(items.items)
    random.Random(f"chance/{seed}").shuffle(order)
    swapped = {}
    for place, each in enumerate(order):
        right = {each.answer, *each.also}
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = next((one for one in following if one.answer and one.answer not in right), None)
        if other is not None:
            swapped[each.id] = _answering(each, other)
    if not swapped:
        raise Refusal(
            f"all {len(items)} items of {items.probe} have the same answer, so chance cannot be measured on them; "
            "use items with different answers, or a metric with foils"
        )
    kept = items.only([each.id in swapped for each in items], "no other item has another answer")
    return replace(kept, items=tuple(swapped[each.id] for each in kept))


def _of_the_probe(items: ItemSet, metric: Metric) -> float | None:
    try:
        known = probe(items.probe)
    except InputError:  # items of the user's own
        return None
    return known.chance if known.metric == metric.id == items.metric else None


def _answering(each: EncodedItem, other: EncodedItem) -> EncodedItem:
    item = replace(each.item, answer=other.item.answer, also=(), foils=(), twin=None)
    return replace(each, item=item, answer=other.answer, also=(), foils=(), twin=None)
