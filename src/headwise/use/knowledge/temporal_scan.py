"""Which KV group moves an answer to another year, and how often a random vector of the same length does.

    scan = temporal_scan(model, items)             # dated questions; each is to be answered for its twin's year
    scan.to_pandas()                               # one row per group and coefficient: edit against control

Park et al. (2025) try every head with three coefficients and keep those under which the first token changes and the
answer of the other year is in the 50 tokens that are written. Here the answer has to come at once: its first token is
the one written. Tried often enough something will do so by luck: a scan needs its control, the same scan with a random
vector in place of v-bar, of its length. It is ours, and always run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.probes.batch import Batch, pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.sweep.measuring import chunks_of
from headwise.sweep.memory import budget_of
from headwise.use.knowledge.temporal_edit import (
    COEFFICIENTS,
    TemporalEdit,
    _main_groups,
    at_last_of_span,
    groups_named,
    mean_values,
    values_by_item,
)

Hits = Bool[Tensor, "group coefficient item"]


@dataclass(frozen=True, eq=False)
class TemporalScan:
    """What each group does, item by item, with v-bar and with a random vector of its length.

    Attributes:
        groups, coefficients, item_ids: the axes.
        changed, control_changed: whether the first token is another one than without the edit.
        hit, control_hit: whether it is that of the other year's answer, and was not before.
    """

    groups: HeadSet
    coefficients: tuple[float, ...]
    item_ids: tuple[str, ...]
    changed: Hits
    hit: Hits
    control_changed: Hits
    control_hit: Hits

    @property
    def excess(self) -> Float[Tensor, "group coefficient"]:
        """Share of items that are hit, less that under the control."""
        return self.hit.double().mean(-1) - self.control_hit.double().mean(-1)

    @property
    def best(self) -> tuple[str, float]:
        """Label of the group and the coefficient with the largest excess; to be judged on other items."""
        place = int(self.excess.flatten().argmax())
        return self.groups.labels[place // len(self.coefficients)], self.coefficients[place % len(self.coefficients)]

    def edit(self, model: AttachedModel, sources: ItemSet, *, span: str = "year") -> TemporalEdit:
        """The edit of `best`, with v-bar of these source prompts. Raises as `mean_values`."""
        label, coefficient = self.best
        return TemporalEdit(mean_values(model, sources, [label]), coefficient, span)

    def to_pandas(self) -> pd.DataFrame:
        """One row per group and coefficient: both, and shares of items: changed, hit, and the control's."""
        names = ("changed", "hit", "control_changed", "control_hit")
        shares = {name: getattr(self, name).double().mean(-1).flatten().tolist() for name in names}
        cells = [(label, c) for label in self.groups.labels for c in self.coefficients]
        return pd.DataFrame({"group": [g for g, _ in cells], "coefficient": [c for _, c in cells], **shares})

    def __repr__(self) -> str:
        label, coefficient = self.best
        return (
            f"<temporal scan of {len(self.groups)} groups, {len(self.item_ids)} items: best {label} x {coefficient:g}, "
            f"excess {float(self.excess.max()):.3f}>"
        )


def temporal_scan(
    model: AttachedModel,
    items: ItemSet,
    sources: ItemSet | None = None,
    groups: HeadSet | Sequence[str] | str | None = None,
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    span: str = "year",
    seed: int = 0,
    tokens: int | None = None,
) -> TemporalScan:
    """Try every KV group and coefficient on every item, with its source's v-bar and with a random vector.

    Args:
        items: questions with the span, and twins, whose answer is the one that is wanted.
        sources: for each item a prompt of the wanted year; None is its twin.
        groups: None is all of the main stack; temporal heads go in as `heads.to_groups(model.table.group_sizes)`.
        coefficients: c, none of them 0.
        seed: of the random vectors, one for each group and item.
        tokens: most tokens of one forward.

    Cost: two forwards per item, group and coefficient.

    Raises:
        InputError: an item without the span, or a twin with an answer; another number of sources; a coefficient of 0.
        Refusal: a model that does not continue text.
    """
    sources = _checked(items, sources, coefficients, span)
    chosen = _main_groups(model) if groups is None else model.groups(groups_named(groups))
    vectors = values_by_item(model, sources, chosen)
    random = _random_like(vectors, seed)
    cells = [(label, c) for label in chosen.labels for c in coefficients]
    found = torch.zeros(4, len(cells), len(items), dtype=torch.bool)
    budget = budget_of(items, tokens, model.device)
    for of_items, batch_items in chunks_of(items, budget, model.device):
        clean = _first_tokens(model, pad(batch_items, items.pad, items.suffix, answers=False))
        wanted = torch.tensor([each.twin.answer[0] for each in batch_items if each.twin is not None])
        together = max(1, budget // (len(batch_items) * max(len(each.prompt) for each in batch_items)))
        for start in range(0, len(cells), together):
            part = cells[start : start + together]
            rows = pad(batch_items * len(part), items.pad, items.suffix, answers=False)
            for place, values in enumerate((vectors, random)):
                own = {label: value[of_items] for label, value in values.items()}
                first = _first_tokens(model, rows, (_by_rows(part, own, span),)).view(len(part), -1)
                cell = slice(start, start + len(part))
                found[2 * place, cell, of_items] = first != clean
                found[2 * place + 1, cell, of_items] = (first == wanted) & (clean != wanted)
    shaped = found.view(4, len(chosen), len(coefficients), len(items))
    return TemporalScan(chosen, tuple(map(float, coefficients)), items.ids, *shaped)


def _by_rows(
    cells: Sequence[tuple[str, float]], values: Mapping[str, Float[Tensor, "item head_dim"]], span: str
) -> Edit:
    """One edit of a batch that holds all items once per cell: each row gets its own cell's vector."""
    groups = groups_named([label for label, _ in cells])

    def added(current: Tensor, here: Here) -> Tensor:
        of_cell = [
            torch.stack([(c if label == name else 0.0) * values[name] for name in here.names], dim=1)
            for label, c in cells
        ]
        rows = torch.cat(of_cell)[here.items.cpu()].to(current)
        return at_last_of_span(here, span)[:, :, None, None] * rows[:, None]

    return edit.add(groups, added, variable="v", scope=f"span:{span}")


def _first_tokens(model: AttachedModel, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
    """The most probable token behind each prompt."""
    at = places(model, batch)
    if at.prompt_length is None:
        raise Refusal(f"{model.name} does not continue text, so it has no answer to move to another year")
    alone = replace(batch, answers=batch.answers[:, :1])
    if not edits:
        outcome = observe(model, alone, wants={"logits"})
    else:
        with model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length):
            outcome = observe(model, alone, wants={"logits"})
    assert outcome.logits is not None
    return outcome.logits[:, 0].argmax(-1).cpu()


def _random_like(
    vectors: Mapping[str, Float[Tensor, "item head_dim"]], seed: int
) -> dict[str, Float[Tensor, "item head_dim"]]:
    """Random directions, each of the length of its vector."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {label: torch.randn(value.shape, generator=generator) for label, value in vectors.items()}
    return {
        label: drawn[label] / drawn[label].norm(dim=-1, keepdim=True) * value.norm(dim=-1, keepdim=True)
        for label, value in vectors.items()
    }


def _checked(items: ItemSet, sources: ItemSet | None, coefficients: Sequence[float], span: str) -> ItemSet:
    """The source prompts. Raises InputError."""
    if not items.items or not coefficients or not all(coefficients):
        raise InputError(f"a scan needs items and coefficients other than 0; got {len(items)} and {coefficients!r}")
    lacking: EncodedItem | None = next((each for each in items if not each.spans.get(span)), None)
    if lacking is not None:
        raise InputError(f"item {lacking.id} has no span {span!r}; it has {', '.join(lacking.spans) or 'none'}")
    silent = next((each.id for each in items if each.twin is None or not each.twin.answer), None)
    if silent is not None:
        raise InputError(f"item {silent} has no twin with an answer, which the edit is to bring about; use `dated`")
    found = items.twins() if sources is None else sources
    if len(found) != len(items):
        raise InputError(f"there are {len(found)} sources for {len(items)} items; give one for each")
    return found


__all__ = ["TemporalScan", "temporal_scan"]
