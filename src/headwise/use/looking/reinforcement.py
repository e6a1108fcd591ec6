"""VHR: what heads that see the picture write counts for more.

Vision-aware head reinforcement of He et al., 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence". For the prompt at hand, layer by layer, the earlier layers already reinforced, at the prompt's last token,
with z_i with the pictures and z'_i without them,

    VHD_i = || z_i - z'_i ||,    0 where  VHD_i > mean + std over the layer's heads  and  ||z'_i|| > ||z_i||
    H_l   = the heads of layer l whose VHD_i lies above their median
    z_i  <- alpha z_i    for i in H_l

What is set to 0 are outliers that surge when the picture is gone. H_l is chosen when the prompt runs and stays for what
is written, so that cached keys and values are of one model. alpha = 2.

A reconstruction, from two notes on the paper; its code was not to be had. Open there, and chosen here: the run without
pictures is the plain model's, so nothing is reinforced in it; an outlier has both, a large VHD and a surge; z is
multiplied at the prompt's last token and all after it (`scope`). Divergences that rounding alone can make count as 0.

The prompt without pictures runs once, before the first token; after that heads are multiplied by known numbers.
`fixed_heads` makes the paper's control: heads chosen once, the same for every prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.find.method import scored_sites
from headwise.find.vision_aware import IMAGE, divergence, picture_markers, prompts_of
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.use.intervention import Intervention, finite
from headwise.use.scaling import HeadScaling

BATCH = 16


@dataclass(frozen=True, eq=False, repr=False)
class VHR(Intervention):
    """Strengthen, prompt by prompt, the heads that see its pictures: `with VHR()(model): model.generate(**inputs)`.

    Attributes:
        alpha: what z of the chosen heads is multiplied by; 1 changes nothing.
        layers: how many layers, from the first on, have heads reinforced; None is all.
        outlier: how many standard deviations above its layer's mean makes an outlier of a surging head; None: no head
            is left out for that, the paper's ablation.
        scope: where z is multiplied; it must hold the prompt's last token (`last`, `all`, `prompt`).
    """

    id: ClassVar[str] = "vision-head-reinforcement"
    alpha: float = 2.0
    layers: int | None = None
    outlier: float | None = 1.0
    scope: str = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha", 0.0))
        if self.outlier is not None:
            object.__setattr__(self, "outlier", finite(self.outlier, f"{self.id}: outlier", 0.0))
        if self.layers is not None and (isinstance(self.layers, bool) or not isinstance(self.layers, int)):
            raise InputError(f"{self.id}: layers={self.layers!r} is no number of layers; give one from 1 on, or None")
        if self.layers is not None and self.layers < 1:
            raise InputError(f"{self.id}: layers={self.layers!r} leaves no layer; give a number from 1 on, or None")
        if parse_scope(self.scope).place not in ("last", "all", "prompt"):
            raise InputError(
                f"{self.id}: scope={self.scope!r} does not hold the last token of every prompt, which chooses the "
                "heads; give last, all or prompt"
            )

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        return self._noting(model, {})

    def _noting(self, model: AttachedModel, noted: dict[str, Tensor]) -> tuple[Edit, ...]:
        """Its edits, which note by site what they chose, `[batch, head]`."""
        markers = picture_markers(model)
        heads = self._heads(model)
        if self.alpha == 1:
            return ()

        def factors(
            seeing: Float[Tensor, "batch head dim"], lacking: Float[Tensor, "batch head dim"], here: Here
        ) -> Float[Tensor, "batch head"]:
            noted[here.label] = reinforced(seeing, lacking, self.outlier)
            return torch.where(noted[here.label], self.alpha, 1.0)

        return (edit.scale(heads, edit.decided(factors, without=IMAGE, markers=markers), scope=self.scope),)

    def _heads(self, model: AttachedModel) -> HeadSet:
        sites = [site for site in scored_sites(model) if model.table.site(site).kind == "self"]
        if self.layers is not None and self.layers > len(sites):
            raise InputError(
                f"{self.id}: layers={self.layers}, and {model.name} has {len(sites)}; give as many or fewer"
            )
        return model.heads([site.label for site in sites[: self.layers]])


def reinforced(
    seeing: Float[Tensor, "batch head dim"], lacking: Float[Tensor, "batch head dim"], outlier: float | None = 1.0
) -> Bool[Tensor, "batch head"]:
    """The heads of one layer that are reinforced, by their z with and without the pictures."""
    moved = divergence(seeing, lacking)
    with_, without = seeing.double().norm(dim=-1), lacking.double().norm(dim=-1)
    rounding = 1e-4 if seeing.dtype in (torch.float32, torch.float64) else 3e-2
    moved = torch.where(moved <= rounding * torch.maximum(with_, without), 0.0, moved)
    if outlier is not None:
        limit = moved.mean(-1, keepdim=True) + outlier * moved.std(-1, correction=0, keepdim=True)
        moved = torch.where((moved > limit) & (without > with_), 0.0, moved)
    return moved > moved.quantile(0.5, dim=-1, keepdim=True)


@dataclass(frozen=True)
class Chosen:
    """Which heads VHR reinforced, prompt by prompt.

    Attributes:
        rows: the heads of each prompt, in order.
    """

    rows: tuple[HeadSet, ...]

    @property
    def shares(self) -> dict[str, float]:
        """By head label, in how many of the prompts it was chosen, from 0 to 1; heads that never were are left out."""
        counts = Counter(head.label for row in self.rows for head in row)
        return {label: count / len(self.rows) for label, count in counts.most_common()}


def chosen_heads(model: AttachedModel, given: ItemSet | Mapping[str, Any], how: VHR | None = None) -> Chosen:
    """The heads that VHR chooses for prompts: items, or inputs of the model with their pictures.

    Raises:
        InputError: an alpha of 1, which chooses nothing; prompts without pictures.
        Refusal: as `VHR.edits`.
    """
    how = VHR() if how is None else how
    if how.alpha == 1:
        raise InputError(f"{how.id}: alpha=1 reinforces nothing, so no heads are chosen; give another alpha")
    noted: dict[str, Tensor] = {}
    edits = how._noting(model, noted)
    rows: list[HeadSet] = []
    if isinstance(given, ItemSet):
        for batch in given.batches(BATCH, answers=False):
            at = places(model, batch)
            with torch.no_grad(), model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length):
                observe(model, prompts_of(batch), wants={"logits"})
            rows += _by_row(model, noted)
    else:
        with torch.no_grad(), model.editing(*edits):
            model(**given)
        rows = _by_row(model, noted)
    return Chosen(tuple(rows))


def fixed_heads(model: AttachedModel, items: ItemSet, how: VHR | None = None) -> HeadScaling:
    """The control: the heads that VHR chooses for more than half of the items, reinforced in every prompt alike.

    Judge it on other items than these.

    Raises:
        Refusal: no head is chosen so often; and as `chosen_heads`.
    """
    how = VHR() if how is None else how
    often = [label for label, share in chosen_heads(model, items, how).shares.items() if share > 0.5]
    if not often:
        raise Refusal(f"no head of {model.name} is reinforced in more than half of these {len(items)} prompts")
    return HeadScaling(model.heads(often), how.alpha, scope=how.scope)


def _by_row(model: AttachedModel, noted: Mapping[str, Bool[Tensor, "batch head"]]) -> list[HeadSet]:
    n_rows = len(next(iter(noted.values())))
    labels = [
        [f"{site}H{head}" for site, chosen in noted.items() for head in chosen[row].nonzero()[:, 0].tolist()]
        for row in range(n_rows)
    ]
    return [model.heads(each) if each else HeadSet(()) for each in labels]


INTERVENTIONS = (
    InterventionEntry(
        id=VHR.id,
        title="Multiply what heads write that see the prompt's pictures",
        page="use/looking.md#vhr",
        paper="He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        year=2025,
        tier="B",
        status="reconstruction",
        cost="1 forward, and the prompt once without pictures",
        made=VHR,
    ),
)
