"""PH3: one kind of head taken out, so that the model answers from the other source.

After Jin et al. (2024), "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating Knowledge
Conflicts in Language Models". With the k heads of highest score s_h of `find("memory-context")`

    z_h <- 0      h among the k best context heads, to answer from memory
    z_h <- 0      h among the k best memory heads, to answer from the text

    context_heads = hw.find("memory-context", model, items, heads="context")
    chosen = choose_pruned(model, context_heads, validation)     # k, on other items; the context heads go: memory
    with chosen.best(model): ...

The pruning is exact; the scores and the rule for k are reconstructions: neither was to be had. k is the best of
1, 3, 5, 7, 9, 15 on validation items, as in the comparison of Li et al. (2025, JUICE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores
from headwise.use.intervention import Intervention, named_heads
from headwise.use.knowledge.conflicts import SOURCES, Source, answered_from, other_source, refuse_shared
from headwise.use.tuning import Tuned, tuned

SIZES = (1, 3, 5, 7, 9, 15)


@dataclass(frozen=True, eq=False, repr=False)
class PH3(Intervention):
    """Take out context heads to answer from memory, or memory heads to answer from the text.

    Attributes:
        heads: the heads that are taken out.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "ph3"
    heads: HeadSet
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        return (edit.zero(model.heads(self.heads), scope=self.scope),)


def choose_pruned(
    model: AttachedModel, scores: HeadScores, validation: ItemSet, *, sizes: Sequence[int] = SIZES
) -> Tuned:
    """How many of the heads found to take out, chosen on items: `PH3` of the first k, for each k of `sizes`.

    Args:
        scores: of `find("memory-context", ..., heads="context")`, and the model is to answer from memory; or with
            `heads="memory"`, and it is to answer from the text. Only heads with a score above 0 are of the kind.
        validation: conflicts, with either answer as the right one, that did not find the heads.

    Raises:
        InputError: scores of another method, items that found the heads, or a size below 1.
        Refusal: fewer heads of the kind than the smallest size.
    """
    source = favoured(scores)
    refuse_shared(scores.item_ids, validation)
    if not sizes or min(sizes) < 1:
        raise InputError(f"sizes={tuple(sizes)!r} are no numbers of heads; give some from 1 on")
    n_found = len(scores.above(0.0))
    fitting = sorted(size for size in set(sizes) if size <= n_found)
    if not fitting:
        raise Refusal(
            f"{n_found} heads of {model.name} speak for {other_source(source)}, fewer than sizes={tuple(sizes)}; "
            "nothing can be pruned"
        )
    return tuned(model, [PH3(scores.top(size)) for size in fitting], answered_from(validation, source))


def favoured(scores: HeadScores) -> Source:
    """The source that the model answers from when the heads of these scores are taken out. Raises InputError."""
    kind = scores.provenance.settings.get("heads")
    if scores.provenance.method != "memory-context" or kind not in SOURCES:
        raise InputError(
            f"PH3 takes heads by find('memory-context', ..., heads='context'), not by {scores.provenance.method}"
        )
    return other_source("memory" if kind == "memory" else "context")


INTERVENTIONS = (
    InterventionEntry(
        id=PH3.id,
        title="Take out context heads to answer from memory, or memory heads to answer from the text",
        page="use/knowledge.md#ph3",
        paper="Jin et al., Cutting Off the Head Ends the Conflict",
        year=2024,
        tier="B",
        status="reconstruction",
        cost="1 forward",
        made=PH3,
    ),
)

__all__ = ["INTERVENTIONS", "PH3", "SIZES", "choose_pruned", "favoured"]
