"""One head made stronger or weaker, so that the model answers from memory or from the text.

After Yu, Merullo and Pavlick (2023), "Characterizing Mechanisms for Factual Recall in Language Models". The head is
found by what it itself writes, at the position that predicts the answer, into the logit of what is remembered, less
that of what is told (`find("direct-logit")`, the scales of norms held):

    s_h = < W_O^h z_h,  sigma * gamma * (W_U[remembered] - W_U[told]) >

The head with the largest s_h is the memory head, that with the smallest the in-context head. Its values are multiplied
by alpha, v_j -> alpha v_j for this head alone, which is

    z_h <- alpha * z_h

and so serves grouped queries, where heads share their values.

    attributed = attributions(model, items)
    chosen = choose_scaled(model, attributed, validation, "context")     # head and alpha, on other items
    with chosen.best(model): ...

Exact: the scaling. Reconstruction: no code was to be had, and the paper's grid of alpha was not recovered; `FACTORS` is
ours. A later reproduction says of such heads that they copy less in general, and not only what contradicts memory: so
the control is the same alpha on heads of like attribution (`of_like_attribution`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.find import find
from headwise.heads import Head, HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores
from headwise.use.intervention import Intervention, finite, named_heads
from headwise.use.knowledge.conflicts import Source, answered_from, refuse_shared
from headwise.use.tuning import Tuned, tuned

FACTORS = (0.5, 2.0, 0.0, 3.0, -1.0, 5.0, -2.0, 10.0, -5.0)
"""From the least change to the largest: of equals the first is chosen."""


@dataclass(frozen=True, eq=False, repr=False)
class FactualScaling(Intervention):
    """Multiply the values of one head.

    Attributes:
        heads: one head.
        alpha: what its values are multiplied by; 1 changes nothing.
        scope: where, in the words of `hw.edit`; of positions that the head answers at.
    """

    id: ClassVar[str] = "factual-scaling"
    heads: HeadSet
    alpha: float = 1.0
    scope: str = "all"

    def __post_init__(self) -> None:
        heads = named_heads(self.heads, self.id)
        if len(heads) != 1:
            raise InputError(f"{self.id} scales one head, and {len(heads)} were named; use HeadScaling for several")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = model.heads(self.heads)
        return () if self.alpha == 1 else (edit.scale(heads, self.alpha, scope=self.scope),)


def attributions(model: AttachedModel, items: ItemSet) -> HeadScores:
    """What each head itself writes for the answer remembered, less the answer told, in logits: `direct-logit`.

    `items` are conflicts, with either answer as the right one. Raises as `find` and `answered_from`.
    """
    return find("direct-logit", model, answered_from(items, "memory"))


def choose_scaled(
    model: AttachedModel,
    attributed: HeadScores,
    validation: ItemSet,
    source: Source,
    *,
    factors: Sequence[float] = FACTORS,
) -> Tuned:
    """The memory head or the in-context head and its alpha, whichever answers best from `source` on items.

    Args:
        attributed: of `attributions`.
        validation: conflicts, with either answer as the right one, that did not find the heads.

    Raises:
        InputError: scores of another method, items that found the heads, no factors, or no such source.
    """
    if attributed.provenance.method != "direct-logit":
        raise InputError(f"{FactualScaling.id} takes attributions(model, items), not {attributed.provenance.method}")
    refuse_shared(attributed.item_ids, validation)
    ranked = attributed.ranked()
    extremes = dict.fromkeys((ranked[0].head, ranked[-1].head))
    candidates = [FactualScaling(HeadSet((head,)), alpha) for alpha in factors for head in extremes]
    return tuned(model, candidates, answered_from(validation, source))


def of_like_attribution(attributed: HeadScores, heads: HeadSet, n: int) -> tuple[HeadSet, ...]:
    """Controls for one head: the `n` others whose |attribution| is nearest to its own, the nearest first.

    Raises:
        InputError: not one head, one without a score, or fewer others than `n`.
    """
    if len(heads) != 1:
        raise InputError(f"of_like_attribution is of one head, and {len(heads)} were named")
    scored: dict[Head, float] = {each.head: each.score for each in attributed.ranked()}
    head = heads.heads[0]
    if head not in scored or not 1 <= n < len(scored):
        raise InputError(f"{head} and n={n} do not fit {len(scored)} heads with a score; ask for fewer of another head")
    size = abs(scored.pop(head))
    nearest = sorted(scored, key=lambda other: (abs(abs(scored[other]) - size), other))
    return tuple(HeadSet((other,)) for other in nearest[:n])


INTERVENTIONS = (
    InterventionEntry(
        id=FactualScaling.id,
        title="Multiply the values of the one head that writes what is remembered, or what is told",
        page="use/knowledge.md#factual-scaling",
        paper="Yu, Merullo and Pavlick, Characterizing Mechanisms for Factual Recall in Language Models",
        year=2023,
        tier="B",
        status="reconstruction",
        cost="1 forward",
        made=FactualScaling,
    ),
)

__all__ = ["FACTORS", "INTERVENTIONS", "FactualScaling", "attributions", "choose_scaled", "of_like_attribution"]
