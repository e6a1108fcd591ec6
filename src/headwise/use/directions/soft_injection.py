"""Soft Injection: what demonstrations leave in the heads, mixed in where there are none.

Park and Rhee 2025, Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning.

    z_h <- (1 - alpha_h) z_h + alpha_h e_h     at the last token of the prompt, when it is read, and nowhere else

e_h is the mean of z_h at the last token of prompts with demonstrations; alpha_h is learned (`fit.fit_injection`).
Exact. Which token that is comes from the recorded length of the prompt: the released code takes every call of several
tokens for the prompt, which goes wrong where decoding feeds several. It also drops the bias of the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.use.intervention import Intervention, finite, named_heads
from headwise.use.scaling import Vectors, by_head


@dataclass(frozen=True, eq=False, repr=False)
class SoftInjection(Intervention):
    """Mix a task's embedding into heads at the last token of the prompt.

    In runs outside `generate` give `prompt_length` where something stands behind the prompt.

    Attributes:
        embedding: by head label, `[head_dim]`, in units of z.
        alpha: the share of the embedding, 0 to 1, one number or one by head label. 0.5 is what the fit begins with.
    """

    id: ClassVar[str] = "soft-injection"
    embedding: Vectors
    alpha: float | Mapping[str, float] = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.embedding, Mapping) or not self.embedding:
            raise InputError(f"{self.id} takes embedding=, a mapping from head label to a vector [head_dim]")
        object.__setattr__(self, "embedding", by_head(self.embedding, self.heads, f"{self.id}: embedding"))
        alpha = by_head(self.alpha, self.heads, f"{self.id}: alpha")
        for value in alpha.values() if isinstance(alpha, Mapping) else (alpha,):
            finite(value, f"{self.id}: alpha", 0.0, 1.0)
        object.__setattr__(self, "alpha", alpha)

    @property
    def heads(self) -> HeadSet:
        return named_heads([*self.embedding], self.id)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        mixed = self.heads.filter(lambda head: self._alpha(head.label) != 0)
        if not mixed:
            return ()
        value = {label: self.embedding[label] for label in mixed.labels}
        weight = {label: self._alpha(label) for label in mixed.labels}
        return (edit.mix(mixed, value, weight, scope="prompt", queries=[-1]),)

    def _alpha(self, label: str) -> float:
        return self.alpha[label] if isinstance(self.alpha, Mapping) else self.alpha


INTERVENTIONS = (
    InterventionEntry(
        id=SoftInjection.id,
        title="Mix a task's mean z into heads at the last token of the prompt",
        page="use/fitting.md#soft-injection",
        paper="Park and Rhee, Soft Injection of Task Embeddings",
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward",
        made=SoftInjection,
    ),
)

__all__ = ["INTERVENTIONS", "SoftInjection"]
