"""Context-aware decoding: what the model says with a passage, less what it says without it.

After Shi et al. (2023), "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding":

    s_t = (1 + alpha) l(y_t | c, x, y_<t) - alpha l(y_t | x, y_<t),       alpha = 0.5

with l the logits, c the passage and x the rest of the prompt. No head is edited; it is what head-based ways of trusting
the context are compared with.

The second stream is the prompt *without the passage*: the tokens of the span `context` are taken out of it, by masking
them for every query and counting positions as if they had never been there. That is the same as running the shorter
prompt, and is tried on the model before anything runs; a model of which it is not true (positions told from columns,
recurrent layers, a window that is full) is refused. What it is not: another wording of the prompt without a passage.
Tokens are not cut anew where the passage was, so let the span take its separators along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.model.attached import AttachedModel
from headwise.use.decoding.contrast import checked_share, contrasted, plausible
from headwise.use.intervention import Beside, Intervention, finite


@dataclass(frozen=True, eq=False, repr=False)
class ContextAware(Intervention):
    """`with ContextAware()(model, spans={"context": columns}): model.generate(...)`.

    s is given as log-probabilities of both streams, which moves every token alike and so chooses the same.

    Attributes:
        alpha: from 0 on; 0 is plain decoding.
        context: the name of the span that the second stream lacks. Its columns are given when the block is opened.
        relative_top: tokens with less than this share of the likeliest one's p are ruled out; 0, as in the paper, none.
        mode: `batch`, one forward of twice the rows; `caches`, one forward and cache for each stream.
    """

    id: ClassVar[str] = "context-aware"
    alpha: float = 0.5
    context: str = "context"
    relative_top: float = 0.0
    mode: Literal["batch", "caches"] = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha", low=0.0))
        object.__setattr__(self, "relative_top", checked_share(self.relative_top, f"{self.id}: relative_top"))
        if not isinstance(self.context, str) or not self.context:
            raise InputError(f"{self.id}: context={self.context!r} is not the name of a span")
        if self.mode not in ("batch", "caches"):
            raise InputError(f"{self.id}: mode={self.mode!r} is not one of batch, caches")

    @property
    def named_spans(self) -> tuple[str, ...]:
        return (self.context,)

    def beside(self, model: AttachedModel) -> Beside | None:
        if self.alpha == 0 and not self.relative_top:
            return None
        return Beside((), self._combine, self.mode, without=self.context)

    def _combine(self, first: Tensor, second: Tensor) -> Tensor:
        return plausible(contrasted(first, second, self.alpha), first, self.relative_top)


INTERVENTIONS = (
    InterventionEntry(
        id=ContextAware.id,
        title="Contrast the model with itself when a passage is taken out of the prompt",
        page="use/decoding.md#context-aware",
        paper="Shi et al., Trusting Your Evidence: Context-aware Decoding",
        year=2023,
        tier="B",
        status="reconstruction",
        cost="1 forward of twice the rows",
        made=ContextAware,
    ),
)

__all__ = ["INTERVENTIONS", "ContextAware"]
