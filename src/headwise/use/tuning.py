"""One of several interventions, chosen on items: by how many it gets right, then by how sure it is of them.

    chosen = tuned(model, [HeadScaling("L3H1", g) for g in (0.5, 2.0, 4.0)], validation)
    chosen.best, chosen.accuracy, chosen.plain

What was chosen here is judged on other items. The rule is that of JUICE (Li et al. 2025): accuracy, then confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from headwise.errors import InputError
from headwise.metrics import answer_log_probability, exact_match
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.use.intervention import Intervention


@dataclass(frozen=True, slots=True)
class Reached:
    """Means over items.

    Attributes:
        accuracy: share of items whose answer is the most probable one (`exact-match`).
        confidence: probability of the whole answer.
    """

    accuracy: float
    confidence: float

    @property
    def order(self) -> tuple[float, float]:
        return self.accuracy, self.confidence


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was tried and what came of it, in the order given.

    Attributes:
        best: the one chosen; of equals the first.
        tried: each with what it reached.
        plain: what the model reaches without any.
        item_ids: the items chosen on. What is judged on others.
    """

    best: Intervention
    tried: tuple[tuple[Intervention, Reached], ...]
    plain: Reached
    item_ids: tuple[str, ...]

    @property
    def reached(self) -> Reached:
        """What the best one reaches, on the items that it was chosen on."""
        return next(reached for each, reached in self.tried if each is self.best)

    @property
    def helps(self) -> bool:
        """Whether the best one is better than none, on these items."""
        return self.reached.order > self.plain.order

    def to_pandas(self) -> pd.DataFrame:
        """One row per intervention: intervention, accuracy, confidence; the first row is none."""
        rows = [("none", self.plain), *((repr(each), reached) for each, reached in self.tried)]
        return pd.DataFrame(
            [(name, reached.accuracy, reached.confidence) for name, reached in rows],
            columns=["intervention", "accuracy", "confidence"],
        )

    def __repr__(self) -> str:
        return (
            f"<{self.best!r}, best of {len(self.tried)} on {len(self.item_ids)} items: accuracy "
            f"{self.reached.accuracy:.3f}, without {self.plain.accuracy:.3f}>"
        )


def tuned(model: AttachedModel, candidates: Sequence[Intervention], items: ItemSet, *, batch_size: int = 16) -> Tuned:
    """The best of some interventions on items, by accuracy and then confidence; of equals the first.

    Raises:
        InputError: no candidates or items.
        InputError, Refusal: as the interventions, and as `observe`.
    """
    if not candidates or not items.items:
        raise InputError(f"tuned needs interventions and items; got {len(candidates)} and {len(items)}")
    tried = tuple((each, reached(model, each, items, batch_size=batch_size)) for each in candidates)
    best = max(tried, key=lambda each: each[1].order)[0]  # max takes the first of equals
    return Tuned(best, tried, reached(model, None, items, batch_size=batch_size), items.ids)


def reached(
    model: AttachedModel, intervention: Intervention | None, items: ItemSet, *, batch_size: int = 16
) -> Reached:
    """Accuracy and confidence under an intervention, or under none. Raises as `tuned`."""
    right, sure = 0.0, 0.0
    for batch in items.batches(batch_size):
        at = places(model, batch)
        if intervention is None:
            outcome = observe(model, batch, wants={"logits"})
        else:
            with intervention(model, spans=at.spans, prompt_length=at.prompt_length):
                outcome = observe(model, batch, wants={"logits"})
        right += float(exact_match(outcome).sum())
        sure += float(answer_log_probability(outcome).exp().sum())
    return Reached(right / len(items), sure / len(items))


__all__ = ["Reached", "Tuned", "reached", "tuned"]
