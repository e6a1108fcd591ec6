"""Temporal-knowledge edit: what a head's values are in texts of one year, added where another text names a year.

After Park et al. (2025), "Does Time Have Its Place? Temporal Heads: Where Language Models Recall Time-specific
Information". With v-bar the mean of a head's values over the positions of a source text, and t the last token of the
phrase that names the year

    v_t <- v_t + c * v-bar,      c in 1, 3, 6

at that one position of the prompt. Keys and values stand in the cache, so that every later token reads the edited one.

Under grouped queries the query heads of a KV group have one value, so the edit is of the group and reaches all of its
heads. Here v is that of the model as it is; the paper's code works on a model with folded norms and centred weights,
and its v differs from this one by that.

    sources = items.twins()                                         # the same questions, of another year
    values = mean_values(model, sources, ["L3G1"])                  # or one year's own texts
    with TemporalEdit(values, 3.0)(model, spans={"year": columns}): model.generate(...)

Which group, and how often it would work by chance: `headwise.use.knowledge.temporal_scan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.use.intervention import Intervention, finite

COEFFICIENTS = (1.0, 3.0, 6.0)


@dataclass(frozen=True, eq=False, repr=False)
class TemporalEdit(Intervention):
    """Add a vector to the values of KV groups, at the last token of a span.

    Attributes:
        values: v-bar by label of the KV group, such as `L3G1`, `[head_dim]`.
        coefficient: c; 0 changes nothing.
        span: the span whose last token is edited. Its columns come with the run, as `spans=`.
    """

    id: ClassVar[str] = "temporal-edit"
    values: Mapping[str, Float[Tensor, " head_dim"]]
    coefficient: float = 1.0
    span: str = "year"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping) or not self.values:
            raise InputError(f"{self.id} takes a mapping from KV group, such as 'L3G1', to a vector [head_dim]")
        for label, value in self.values.items():
            if not isinstance(value, Tensor) or value.dim() != 1 or not bool(torch.isfinite(value).all()):
                raise InputError(f"{self.id}: the value of {label} is no finite vector [head_dim]; see mean_values")
        named = {groups_named(label).labels: value.detach() for label, value in self.values.items()}
        if len(named) != len(self.values) or any(len(labels) != 1 for labels in named):
            raise InputError(
                f"{self.id}: entries {', '.join(self.values)} are not one for each group; give one for each"
            )
        object.__setattr__(self, "values", {label: value for (label,), value in named.items()})
        object.__setattr__(self, "coefficient", finite(self.coefficient, f"{self.id}: coefficient"))
        if not isinstance(self.span, str) or not self.span:
            raise InputError(f"{self.id}: span={self.span!r} is not the name of a span")

    @property
    def named_spans(self) -> tuple[str, ...]:
        return (self.span,)

    @property
    def groups(self) -> HeadSet:
        return groups_named([*self.values])

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        groups = model.groups(self.groups)
        for site in groups.sites:
            wide = model.table.site(site).head_dim
            odd = next((g.label for g in groups if g.site == site and len(self.values[g.label]) != wide), None)
            if odd is not None:
                raise InputError(f"{self.id}: {odd} has values of {wide} numbers, not {len(self.values[odd])}")
        if self.coefficient == 0 or not any(bool(value.any()) for value in self.values.values()):
            return ()

        def added(current: Tensor, here: Here) -> Tensor:
            vectors = torch.stack([self.values[name] for name in here.names]).to(current)
            return self.coefficient * at_last_of_span(here, self.span)[:, :, None, None] * vectors

        return (edit.add(groups, added, variable="v", scope=f"span:{self.span}"),)


def groups_named(form: Any) -> HeadSet:
    """KV groups in any form that `HeadSet.parse` reads. Raises InputError for none, and for heads."""
    groups = HeadSet.parse(form, "group" if not isinstance(form, HeadSet) else None)
    if not groups:
        raise InputError(f"{TemporalEdit.id} was given no KV groups; name at least one, such as 'L4G0'")
    if groups.kind != "group":
        raise InputError(f"{TemporalEdit.id} acts on values, which a KV group has; use {groups!r}.to_groups")
    return groups


def at_last_of_span(here: Here, span: str) -> Bool[Tensor, "batch position"]:
    """Where, among the key columns of a call, the last token of each row's span stands. For values of `v` edits.

    A prompt that comes in pieces may show the beginning of a span alone: its last token is told from the span itself.
    """
    assert here.window is not None
    assert here.chosen is not None
    frame = here.window.key_frame
    rows = frame.spans[span]
    listed = [rows] if isinstance(rows, slice) or not len(rows) or isinstance(rows[0], int) else list(rows)
    last = frame.spread(torch.tensor([_last(row, span) for row in listed]), f"span {span!r}")
    columns = here.window.offset + torch.arange(here.span, device=here.chosen.device)
    return here.chosen & (columns == last.to(columns.device)[:, None])


def mean_values(
    model: AttachedModel, sources: ItemSet, groups: Any = None, *, batch_size: int = 16
) -> dict[str, Float[Tensor, " head_dim"]]:
    """v-bar: the mean of the values over the positions of each source prompt, and over the prompts.

    Args:
        sources: prompts that name the year which is to be answered for.
        groups: KV groups in any form; None is all of the main stack.

    Raises:
        InputError: no sources, heads in place of groups, or groups that the model does not have.
    """
    labels = _main_groups(model) if groups is None else model.groups(groups_named(groups))
    rows = values_by_item(model, sources, labels, batch_size=batch_size)
    return {label: value.mean(0) for label, value in rows.items()}


def values_by_item(
    model: AttachedModel, sources: ItemSet, groups: HeadSet, *, batch_size: int = 16
) -> dict[str, Float[Tensor, "item head_dim"]]:
    """v-bar of every source prompt by itself, by label of the group. Raises as `mean_values`."""
    if not sources.items:
        raise InputError(f"{sources.probe}: there are no source prompts; encode at least one")
    found: dict[str, list[Tensor]] = {label: [] for label in groups.labels}
    for batch in sources.batches(batch_size):
        at = places(model, batch)
        if at.prompt_length is None:
            raise Refusal(f"{model.name} does not continue text, so its prompts have no values to add to others")
        with torch.no_grad(), model.reading(read.v(groups)) as got:
            observe(model, batch, wants={"logits"})
        kept = batch.attention_mask[:, : at.prompt_length].bool().to(model.device)
        for label, parts in found.items():
            v = got.v[label][:, : at.prompt_length].float().masked_fill(~kept[:, :, None], 0)
            parts.append((v.sum(1) / kept.sum(1, keepdim=True)).cpu())
    return {label: torch.cat(parts) for label, parts in found.items()}


def _main_groups(model: AttachedModel) -> HeadSet:
    return model.groups(model.table.stacks[0])


def _last(row: Any, span: str) -> int:
    if isinstance(row, slice):
        if row.stop is None:
            raise InputError(f"span {span!r} has no end, so it has no last token; give its columns")
        row = range(row.start or 0, row.stop, row.step or 1)
    return max(row, default=-1)


INTERVENTIONS = (
    InterventionEntry(
        id=TemporalEdit.id,
        title="Add the values of one year's texts where another text names its year",
        page="use/knowledge.md#temporal-edit",
        paper="Park et al., Does Time Have Its Place? Temporal Heads",
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward",
        made=TemporalEdit,
    ),
)

__all__ = ["COEFFICIENTS", "INTERVENTIONS", "TemporalEdit", "mean_values", "values_by_item"]
