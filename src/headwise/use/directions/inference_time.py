"""Inference-time intervention (ITI): what tells true from false in a head, added to what the head writes.

After Li et al. (2023), "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model". With theta_h a
direction of unit length in the z of head h, and sigma_h the standard deviation of z along it

    z_h <- z_h + alpha * sigma_h * theta_h

at the last position of each forward: the end of the prompt, and every token written after it. 48 heads and alpha = 15
are the paper's. Its released checkpoint has the offset at every position, which is another method (`HeadOffset`, which
can be baked).

    probed = head_probes(model, *statements(items))     # which heads, and directions: directions/linear_probes.py
    with probed.iti()(model): model.generate(...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.use.intervention import Intervention, finite, named_heads
from headwise.use.scaling import by_head

UNIT = 1e-3
"""How far from 1 the length of a direction may be."""


@dataclass(frozen=True, eq=False, repr=False)
class ITI(Intervention):
    """Move z of heads along a direction each, in units of how much it varies there.

    Attributes:
        directions: theta by head label, `[head_dim]`, of length 1.
        sigma: by head label, the standard deviation of z along it.
        alpha: how far; 0 changes nothing, below 0 it goes the other way.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "iti"
    directions: Mapping[str, Float[Tensor, " head_dim"]]
    sigma: Mapping[str, float]
    alpha: float = 15.0
    scope: str = "last"

    def __post_init__(self) -> None:
        for name in ("directions", "sigma"):
            if not isinstance(getattr(self, name), Mapping) or not getattr(self, name):
                raise InputError(f"{self.id}: {name} is a mapping from head label; make it with head_probes")
        heads = named_heads([*self.directions], self.id)
        object.__setattr__(self, "directions", by_head(self.directions, heads, f"{self.id}: directions"))
        object.__setattr__(self, "sigma", by_head(self.sigma, heads, f"{self.id}: sigma"))
        for label in heads.labels:
            theta, sigma = self.directions[label], self.sigma[label]
            if not isinstance(theta, Tensor) or abs(float(theta.double().norm()) - 1) > UNIT:
                raise InputError(f"{self.id}: the direction of {label} is no vector of length 1; divide by its norm")
            if isinstance(sigma, Tensor) or sigma < 0:
                raise InputError(f"{self.id}: sigma of {label} is {sigma!r}; give a standard deviation, from 0 on")
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha"))
        parse_scope(self.scope)

    @property
    def heads(self) -> HeadSet:
        return named_heads([*self.directions], self.id)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = model.heads(self.heads)
        for site in heads.sites:
            wide = model.table.site(site).head_dim
            odd = next((each.label for each in heads if each.site == site and len(self._of(each.label)) != wide), None)
            if odd is not None:
                raise InputError(f"{self.id}: z of {odd} has {wide} numbers, its direction {len(self._of(odd))}")
        moved = heads.filter(lambda head: self.alpha * self.sigma[head.label] != 0)
        if not moved:
            return ()
        offset = {label: self.alpha * self.sigma[label] * self._of(label) for label in moved.labels}
        return (edit.add(moved, offset, scope=self.scope),)

    def _of(self, label: str) -> Tensor:
        return torch.as_tensor(self.directions[label])


INTERVENTIONS = (
    InterventionEntry(
        id=ITI.id,
        title="Add to heads the direction that tells true from false in them, at the last position",
        page="use/directions.md#iti",
        paper="Li et al., Inference-Time Intervention",
        year=2023,
        tier="B",
        status="exact",
        cost="1 forward",
        made=ITI,
    ),
)

__all__ = ["INTERVENTIONS", "ITI"]
