"""What fitting in heads makes small: the loss of the answer, or the preference of the answer over wrong ones.

Both see the answer's tokens alone, teacher-forced, under the edits that are being fitted and whatever plan is open on
the model. `first_token` cuts answers to the token that decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from headwise.errors import InputError
from headwise.fit.training import batch_of
from headwise.metrics import metric
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, observe, places, refuse_spans_in_the_decoder, refuse_two_sided

Rows = tuple[int, ...]
Loss = Callable[[Rows, Sequence[Edit]], Tensor]
"""The mean loss of some items, by their indices, under edits; with a graph where gradients are on."""


class Objective(ABC):
    """Base of the objectives."""

    @abstractmethod
    def on(self, model: AttachedModel, items: ItemSet) -> Loss:
        """The loss on these items; what has to be measured beforehand is measured now.

        Raises:
            InputError, Refusal: the items or the model do not serve it.
        """


@dataclass(frozen=True)
class AnswerLoss(Objective):
    """Supervised: the mean over items of the mean over answer tokens of -log p(token | prompt, tokens before)."""

    def on(self, model: AttachedModel, items: ItemSet) -> Loss:
        cross_entropy = metric("cross-entropy")
        return lambda rows, edits: cross_entropy(_observed(model, batch_of(items, rows), edits)).mean()


@dataclass(frozen=True)
class Preference(Objective):
    """Direct preference optimisation: each answer is preferred to each foil of its item.

        -log sigmoid(beta * [(log p(answer) - log p0(answer)) - (log p(foil) - log p0(foil))])

    p0 is the model without the fitted edits, measured once. The mean over an item's foils, and of that over the items.

    Rafailov et al. 2023, Direct Preference Optimization. `beta` as in LoFiT's TruthfulQA runs.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise InputError(f"beta={self.beta!r} is out of range; give a number above 0")

    def on(self, model: AttachedModel, items: ItemSet) -> Loss:
        poor = next((each.id for each in items if not each.foils), None)
        if poor is not None:
            raise InputError(f"item {poor} has no foil to prefer its answer to; use items with foils, or AnswerLoss()")
        # Answers stand in front, and behind them the foils of the first item, of the second, ...
        rejected = [(row, _answering(each, j)) for row, each in enumerate(items) for j in range(len(each.foils))]
        both = replace(items, items=(*items.items, *(each for _, each in rejected)))
        of_item: dict[int, list[int]] = {}
        for place, (row, _) in enumerate(rejected):
            of_item.setdefault(row, []).append(len(items) + place)
        with torch.no_grad():
            parts = [_log_probability(model, batch, ()) for batch in both.batches()]
        plain = torch.cat(parts)

        def loss(rows: Rows, edits: Sequence[Edit]) -> Tensor:
            pairs = [(place, foil) for place, row in enumerate(rows) for foil in of_item[row]]
            wanted = (*rows, *(foil for _, foil in pairs))
            gained = _log_probability(model, batch_of(both, wanted), edits) - plain[list(wanted)]
            chosen = gained[[place for place, _ in pairs]]
            shares = torch.tensor([1 / len(of_item[rows[place]]) for place, _ in pairs]).to(gained)
            return (shares * preference_loss(chosen, gained[len(rows) :], self.beta)).sum() / len(rows)

        return loss


def preference_loss(
    chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"], beta: float
) -> Float[Tensor, " pair"]:
    """-log sigmoid(beta (chosen - rejected)), both in log-probability gained over the reference."""
    return -logsigmoid(beta * (chosen - rejected))


def first_token(items: ItemSet) -> ItemSet:
    """The items with their answers cut to the first token, without foils and other right answers.

    Raises:
        InputError: an item has no answer.
    """
    silent = next((each.id for each in items if not each.answer), None)
    if silent is not None:
        raise InputError(f"item {silent} has no answer; use items with answers")
    return replace(items, items=tuple(replace(each, answer=each.answer[:1], also=(), foils=()) for each in items))


@torch.no_grad()
def mean_loss(loss: Loss, n: int, edits: Sequence[Edit], batch_size: int = 16) -> float:
    """The loss of `n` items, batch by batch, each item counted alike."""
    stretches = [tuple(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
    return sum(float(loss(rows, edits)) * len(rows) for rows in stretches) / n


def _answering(each: EncodedItem, foil: int) -> EncodedItem:
    """The item with one of its foils as the answer."""
    item = replace(each.item, answer=each.item.foils[foil], foils=(), also=())
    return replace(each, item=item, answer=each.foils[foil], foils=(), also=())


def _log_probability(model: AttachedModel, batch: Batch, edits: Sequence[Edit]) -> Float[Tensor, " item"]:
    return metric("answer-log-probability")(_observed(model, batch, edits))


def _observed(model: AttachedModel, batch: Batch, edits: Sequence[Edit]) -> Outcome:
    refuse_spans_in_the_decoder(model, edits)
    refuse_two_sided(model, batch)
    at = places(model, batch)
    opened = model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length) if edits else nullcontext()
    with opened:
        return observe(model, batch, wants=frozenset({"logits"}), gradients=torch.is_grad_enabled())


__all__ = ["AnswerLoss", "Loss", "Objective", "Preference", "first_token", "mean_loss", "preference_loss"]
