"""Decoding by contrasting retrieval heads: what the model says less what it says when it cannot look things up.

After Gema et al. (2024), "DeCoRe: Decoding by Contrasting Retrieval Heads to Mitigate Hallucinations". A second stream
runs beside the first in which the N heads with the highest retrieval scores attend equally to all that they see:

    s_t = (1 + alpha_t) log p_t - alpha_t log q_t,       alpha_t = H(p_t) = - sum_v p_t(v) log p_t(v)

p_t is the model's own next-token distribution and q_t the second stream's. Both are given the token chosen from s_t.
`alpha="entropy"` is the paper's alpha_t, in nats; a number is its static variant (0.5 there).

From the card of the paper's code: N = 50, no cap, alpha_t not divided by log |V|, no plausibility filter. With alpha_t
of some nats and no filter a token that both streams find next to impossible can win; `relative_top=0.1` rules such out.
The paper's generation masks from the last prompt token on (`mask_prompt=False`), its scoring of given answers the whole
text (`mask_prompt=True`): these are two different functions. Uniform here is over the keys that a query sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores
from headwise.use.decoding.contrast import checked_share, contrasted, entropy, plausible
from headwise.use.intervention import Beside, Intervention, finite, named_heads

N_HEADS = 50
"""Of the paper's code."""


@dataclass(frozen=True, eq=False, repr=False)
class DeCoRe(Intervention):
    """`DeCoRe.from_scores(scores)`, or `DeCoRe("L4H0, L5H2")`, then `with decore(model): model.generate(...)`.

    Attributes:
        heads: the retrieval heads; none of them is plain decoding.
        alpha: `entropy`, or a number from 0 on; 0 is plain decoding.
        alpha_cap: the most that the entropy counts for, after the scaling.
        scale_alpha: divide the entropy by its largest value, log |V|.
        mask_prompt: whether the second stream's heads are uniform in the whole prompt, or from its last token on.
        relative_top: tokens with less than this share of the likeliest one's p are ruled out; 0 rules out none.
        mode: `batch`, one forward of twice the rows; `caches`, one forward and cache for each stream, for models whose
            batch cannot be doubled.
    """

    id: ClassVar[str] = "decore"
    heads: HeadSet
    alpha: float | str = "entropy"
    alpha_cap: float | None = None
    scale_alpha: bool = False
    mask_prompt: bool = False
    relative_top: float = 0.0
    mode: Literal["batch", "caches"] = "batch"

    def __post_init__(self) -> None:
        none = isinstance(self.heads, (HeadSet, list, tuple)) and not self.heads
        object.__setattr__(self, "heads", HeadSet.parse([], "head") if none else named_heads(self.heads, self.id))
        if self.alpha != "entropy":
            if isinstance(self.alpha, str):
                raise InputError(f"{self.id}: alpha={self.alpha!r} is neither 'entropy' nor a number from 0 on")
            object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha", low=0.0))
            if self.alpha_cap is not None or self.scale_alpha:
                raise InputError(f"{self.id}: alpha_cap and scale_alpha are for alpha='entropy'; leave them out")
        if self.alpha_cap is not None:
            object.__setattr__(self, "alpha_cap", finite(self.alpha_cap, f"{self.id}: alpha_cap", low=0.0))
        object.__setattr__(self, "relative_top", checked_share(self.relative_top, f"{self.id}: relative_top"))
        for name in ("scale_alpha", "mask_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{self.id}: {name}={getattr(self, name)!r} is not True or False")
        if self.mode not in ("batch", "caches"):
            raise InputError(f"{self.id}: mode={self.mode!r} is not one of batch, caches")

    @classmethod
    def from_scores(cls, scores: HeadScores, n: int = N_HEADS, **settings: object) -> Self:
        """With the n heads of the highest mean score, as `find("retrieval", ...)` gives them.

        Raises:
            InputError: n is no number of these heads; no scores.
        """
        if not isinstance(scores, HeadScores):
            raise InputError(f"decore: from_scores takes the HeadScores of find(), not a {type(scores).__name__}")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= len(scores.heads):
            raise InputError(
                f"decore: n={n!r} is not a number of heads from 0 to {len(scores.heads)}, all that have scores"
            )
        return cls(scores.top(n) if n else HeadSet.parse([], "head"), **settings)  # type: ignore[arg-type]

    def beside(self, model: AttachedModel) -> Beside | None:
        if self.heads:
            model.heads(self.heads)
        if (not self.heads or 0 in (self.alpha, self.alpha_cap)) and not self.relative_top:
            return None
        if not self.heads:  # the filter alone
            return Beside((), self._combine, self.mode)
        scope = "all" if self.mask_prompt else "last"  # while text is generated `last` is all from the prompt's last on
        return Beside((edit.uniform(self.heads, scope=scope),), self._combine, self.mode)

    def _combine(self, first: Tensor, second: Tensor) -> Tensor:
        alpha = self.alpha if not isinstance(self.alpha, str) else self._from_entropy(first)
        return plausible(contrasted(first, second, alpha), first, self.relative_top)

    def _from_entropy(self, first: Tensor) -> Tensor:
        found = entropy(first)
        found = found / math.log(first.shape[-1]) if self.scale_alpha else found
        return found if self.alpha_cap is None else found.clamp(max=self.alpha_cap)


INTERVENTIONS = (
    InterventionEntry(
        id=DeCoRe.id,
        title="Contrast the model with itself when its retrieval heads attend to everything alike",
        page="use/decoding.md#decore",
        paper="Gema et al., DeCoRe: Decoding by Contrasting Retrieval Heads",
        year=2024,
        tier="B",
        status="exact",
        cost="1 forward of twice the rows",
        made=DeCoRe,
    ),
)

__all__ = ["INTERVENTIONS", "N_HEADS", "DeCoRe"]
