"""The plainest interventions: heads made stronger or weaker, taken out, or moved by a fixed vector.

    z_h <- g_h * z_h        HeadScaling (g_h a number, or one per dimension as in LoFiT's first stage)
    z_h <- z_h + d_h        HeadOffset (as in inference-time intervention and LoFiT's second stage)
    z_h <- 0, mean, uniform HeadRemoval

transformers 5 has neither head masks nor head pruning; scaling by 0 and `hw.bake` are what they meant. Exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.use.intervention import Intervention, finite, named_heads

Vectors = Mapping[str, Tensor]
"""By head label, each `[head_dim]`."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadScaling(Intervention):
    """Multiply z of heads: `HeadScaling("L2H1, L3H4", 2.0)`, `HeadScaling({"L2H1": 0.5, "L3H4": 2.0})`.

    Attributes:
        heads: the heads; or a mapping from label to factor, and then `factor` is left out.
        factor: one number, or by label a number or a tensor `[head_dim]`. 1 changes nothing, 0 removes, below 0 turns
            the head's write around.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "head-scaling"
    heads: HeadSet
    factor: float | Mapping[str, float] | Vectors = 1.0
    scope: str = "all"

    def __post_init__(self) -> None:
        heads, factor = heads_and_numbers(self.heads, self.factor, f"{self.id}: factor")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "factor", by_head(factor, self.heads, f"{self.id}: factor"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        changed = self.heads.filter(lambda head: not _all(self._of(head.label), 1.0))
        if not changed:
            return ()
        factor = self.factor if not isinstance(self.factor, Mapping) else {h: self.factor[h] for h in changed.labels}
        return (edit.scale(changed, factor, scope=self.scope),)

    def _of(self, label: str) -> float | Tensor:
        return self.factor[label] if isinstance(self.factor, Mapping) else self.factor


@dataclass(frozen=True, eq=False, repr=False)
class HeadOffset(Intervention):
    """Add a fixed vector to z of each head.

    Attributes:
        offset: by head label, `[head_dim]`, in units of z.
        strength: what the vectors are multiplied by.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "head-offset"
    offset: Vectors
    strength: float = 1.0
    scope: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.offset, Mapping) or not self.offset:
            raise InputError(f"{self.id} takes a mapping from head label to a vector [head_dim]")
        if odd := [label for label, entry in self.offset.items() if not isinstance(entry, Tensor)]:
            raise InputError(f"{self.id}: the offset of {odd[0]} is no tensor; give a vector [head_dim]")
        object.__setattr__(self, "offset", by_head(self.offset, self.heads, f"{self.id}: offset"))
        object.__setattr__(self, "strength", finite(self.strength, f"{self.id}: strength"))
        parse_scope(self.scope)

    @property
    def heads(self) -> HeadSet:
        return named_heads([*self.offset], self.id)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        moved = self.heads.filter(lambda head: not _all(self.offset[head.label], 0.0))
        if not moved or self.strength == 0:
            return ()
        return (edit.add(moved, {h: self.strength * self.offset[h] for h in moved.labels}, scope=self.scope),)


@dataclass(frozen=True, eq=False, repr=False)
class HeadRemoval(Intervention):
    """Take heads out: what papers call masking or pruning a head.

    Attributes:
        mode: `zero`, the head writes nothing; `uniform`, it attends equally to all that it sees; `mean`, it writes
            what `mean` says.
        mean: for the mode `mean`: by head label, the mean z `[head_dim]`, of which `reference.mean` has all heads.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "head-removal"
    heads: HeadSet
    mode: Literal["zero", "uniform", "mean"] = "zero"
    mean: Vectors = field(default_factory=dict)
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        if self.mode not in ("zero", "uniform", "mean"):
            raise InputError(f"{self.id}: mode={self.mode!r} is not one of zero, uniform, mean")
        if (self.mode == "mean") != bool(self.mean):
            raise InputError(f"{self.id}: mean= goes with mode='mean', a vector [head_dim] for each head")
        if self.mean:
            object.__setattr__(self, "mean", by_head(self.mean, self.heads, f"{self.id}: mean"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        match self.mode:
            case "zero":
                return (edit.zero(self.heads, scope=self.scope),)
            case "uniform":
                return (edit.uniform(self.heads, scope=self.scope),)
            case _:
                return (edit.set(self.heads, dict(self.mean), scope=self.scope),)


def heads_and_numbers(heads: Any, number: Any, what: str) -> tuple[HeadSet, Any]:
    """The set of heads, and the number or the mapping for them: heads may themselves be a mapping to the numbers.

    Raises InputError for no heads, and for numbers given both ways.
    """
    if not isinstance(heads, Mapping):
        return named_heads(heads, what), number
    if not isinstance(number, (int, float)) or number != 1:
        raise InputError(f"{what} is given beside heads that have one each; leave it out, or name the heads alone")
    return named_heads([*heads], what), heads


def by_head(value: Any, heads: HeadSet, what: str) -> Any:
    """A finite number, or such numbers or vectors by head label, with an entry for exactly the heads of the set.

    Raises:
        InputError: another head, a missing one, what is no number, or vectors that are not finite.
    """
    if not isinstance(value, Mapping):
        return finite(value, what)
    named = {named_heads(label, what).labels: entry for label, entry in value.items()}
    if len(named) != len(value) or any(len(labels) != 1 for labels in named):
        raise InputError(
            f"{what} has the entries {', '.join(map(str, value))}, not one for each head; give one for each"
        )
    entries = {label: entry for (label,), entry in named.items()}
    if entries.keys() != set(heads.labels):
        odd = sorted(entries.keys() ^ set(heads.labels))[0]
        raise InputError(f"{what} names {odd} without a head of its own; give one entry for each of {heads}")
    checked = {label: _entry(entries[label], f"{what} of {label}") for label in heads.labels}
    widths = {len(each) for each in checked.values() if isinstance(each, Tensor)}
    if len(widths) != 1 or all(isinstance(each, Tensor) for each in checked.values()):
        return checked
    (width,) = widths  # numbers beside vectors are vectors of that number
    return {h: each if isinstance(each, Tensor) else torch.full((width,), each) for h, each in checked.items()}


def _entry(value: Any, what: str) -> float | Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return finite(value, what)
    if value.dim() != 1 or not bool(torch.isfinite(value).all()):
        raise InputError(f"{what} has shape {list(value.shape)}; expected finite numbers [head_dim]")
    return value.detach()


def _all(value: float | Tensor, number: float) -> bool:
    return bool((value == number).all()) if isinstance(value, Tensor) else value == number


PAGE = "use/scaling.md"
INTERVENTIONS = (
    InterventionEntry(
        id=HeadScaling.id,
        title="Multiply what heads write, or each of its dimensions",
        page=f"{PAGE}#head-scaling",
        paper="Michel et al., Are Sixteen Heads Really Better than One?",
        year=2019,
        tier="B",
        status="exact",
        cost="1 forward",
        made=HeadScaling,
    ),
    InterventionEntry(
        id=HeadOffset.id,
        title="Add a fixed vector to what heads write",
        page=f"{PAGE}#head-offset",
        paper="Li et al., Inference-Time Intervention",
        year=2023,
        tier="B",
        status="exact",
        cost="1 forward",
        made=HeadOffset,
    ),
    InterventionEntry(
        id=HeadRemoval.id,
        title="Take heads out: zero, mean or uniform attention",
        page=f"{PAGE}#head-removal",
        paper="Michel et al., Are Sixteen Heads Really Better than One?",
        year=2019,
        tier="B",
        status="exact",
        cost="1 forward",
        made=HeadRemoval,
    ),
)

__all__ = ["INTERVENTIONS", "HeadOffset", "HeadRemoval", "HeadScaling", "Vectors", "by_head", "heads_and_numbers"]
