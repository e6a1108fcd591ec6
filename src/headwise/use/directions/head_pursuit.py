"""Head Pursuit as an intervention: the heads that write a concept turned around, or made stronger.

After Basile et al. (2025), "Head Pursuit: Probing Attention Specialization in Multimodal Transformers". With the k
heads whose writes are explained best by the words of a concept (`find("head-pursuit")`)

    z_h <- alpha * z_h      alpha = -1 suppresses the concept, alpha = 5 enhances it

    scores = hw.find("head-pursuit", model, items, concept="Rome Paris Vienna")
    with HeadPursuit(scores.top(8))(model): ...

The paper takes 8 to 32 heads (0.8 to 3 percent), and looks at text that did not choose them. Its controls are as many
random heads of the same layers (`headwise.sweep.matched.matched_sets`) and heads chosen by the logit lens
(`find("head-pursuit", ..., by="logit-lens")`). The scaling is exact; the scores are a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headwise.catalogue import InterventionEntry
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.use.intervention import Intervention, finite, named_heads

SUPPRESS = -1.0
ENHANCE = 5.0


@dataclass(frozen=True, eq=False, repr=False)
class HeadPursuit(Intervention):
    """Multiply what the heads of a concept write.

    Attributes:
        heads: the heads.
        alpha: -1, the paper's, suppresses the concept; 5 enhances it; 1 changes nothing.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "head-pursuit"
    heads: HeadSet
    alpha: float = SUPPRESS
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = model.heads(self.heads)
        return () if self.alpha == 1 else (edit.scale(heads, self.alpha, scope=self.scope),)


INTERVENTIONS = (
    InterventionEntry(
        id=HeadPursuit.id,
        title="Turn around, or make stronger, the heads that write the words of a concept",
        page="use/directions.md#head-pursuit",
        paper="Basile et al., Head Pursuit",
        year=2025,
        tier="B",
        status="reconstruction",
        cost="1 forward",
        made=HeadPursuit,
    ),
)

__all__ = ["ENHANCE", "INTERVENTIONS", "SUPPRESS", "HeadPursuit"]
