"""Items beside their corrupted twins: what is run of them, and how one run's values are put into another.

The clean run is that of the item. The corrupted run is that of the item with its twin's prompt in place; answer and
foils stay the item's, because they are what the metric looks at. Twins are of equal length, so a column of the one is
the same column of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.metrics import Metric
from headwise.metrics import metric as metric_named
from headwise.model.attached import AttachedModel
from headwise.model.capture import Captured
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.model.read import Read
from headwise.model.running.courses import course_of, occupied
from headwise.model.running.resuming import Course, Kept, Start, keeping, resumed
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, observe, places, refuse_spans_in_the_decoder, refuse_two_sided
from headwise.sweep.measuring import chunks_of
from headwise.sweep.memory import budget_of

Side = Literal["clean", "corrupted"]

WHOLE = Course((), reason="a plan is open, or hooks are on the blocks")


def corrupted(item: EncodedItem) -> EncodedItem:
    """The item with its twin's prompt in place, and the item's own prompt as the twin; places stay the item's."""
    assert item.twin is not None
    return replace(item, prompt=item.twin.prompt, twin=replace(item.twin, prompt=item.prompt))


def require_attached(model: AttachedModel) -> None:
    """Raises InputError for what is no attached model."""
    if not isinstance(model, AttachedModel):
        raise InputError(f"this takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")


def require_twins(items: ItemSet) -> None:
    """Raises InputError for an item without a twin, or with one of another length, and where there are no items."""
    if not isinstance(items, ItemSet):
        raise InputError(f"this takes encoded items (hw.encode), not a {type(items).__name__}")
    if not items.items:
        raise InputError(f"{items.probe}: there are no items to patch; encode at least one")
    for each in items:
        if each.twin is None:
            raise InputError(
                f"item {each.id} of {items.probe} has no corrupted twin, which a patch takes values from; use a probe "
                "that has twins, or knock-outs"
            )
        if len(each.twin.prompt) != len(each.prompt):
            raise InputError(
                f"item {each.id} of {items.probe} has {len(each.prompt)} tokens and its twin {len(each.twin.prompt)}, "
                "so their columns do not line up; give twins of equal length"
            )


def patchable_metric(items: ItemSet, chosen: str | Metric | None) -> Metric:
    """The metric, that of the probe for None. Raises InputError for one of what is generated."""
    found = chosen if isinstance(chosen, Metric) else metric_named(items.metric if chosen is None else chosen)
    if "generation" in found.needs or len(found.wants) > 1:
        raise InputError(
            f"{found.id} is not of one run over the prompt and its answer, where twins have the same columns; use a "
            "metric of the logits, such as logit-difference"
        )
    return found


@dataclass(frozen=True, eq=False)
class Ran:
    """What came of a run.

    Attributes:
        outcome: logits or embedding, for the metric.
        got: what was read, by the name of the read.
        kept: what later runs may begin from; None where they are whole.
        met: at how many positions it was edited.
    """

    outcome: Outcome
    got: Mapping[str, Captured]
    kept: Kept | None = None
    met: int = 0


@dataclass(frozen=True, eq=False)
class Pairs:
    """Items that share forwards, with their twins."""

    model: AttachedModel
    of: ItemSet
    items: tuple[EncodedItem, ...]
    metric: Metric
    course: Course

    def batch(self, side: Side, copies: int = 1) -> Batch:
        """The items, or their twins, as often as asked for, one copy behind the other."""
        rows = self.items if side == "clean" else tuple(corrupted(each) for each in self.items)
        return self.of.batch(rows * copies)

    def run(self, side: Side, *reads: Read, begun_in: bool = False, sites: Sequence[SiteId] = ()) -> Ran:
        """A run without edits. `begun_in`: later runs may begin in it, and leave z of `sites` out of what they run."""
        if "logits" in self.metric.needs:
            refuse_two_sided(self.model, self.batch(side))
        begin = begun_in and bool(self.course.blocks)
        with ExitStack() as opened:
            kept = opened.enter_context(keeping(self.model, self.course, tuple(sites))) if begin else None
            got = opened.enter_context(self.model.reading(*reads)).captures if reads else {}
            outcome = observe(self.model, self.batch(side), wants=self.metric.wants)
        return Ran(outcome, got, kept)

    def edited(
        self,
        side: Side,
        copies: int,
        edits: Sequence[Edit],
        *reads: Read,
        begun: Ran,
        start: Start | None,
        held: Sequence[Edit] = (),
    ) -> Ran:
        """A run of several copies under edits, from the block of `start` on where `begun` is a run to begin in. `held`
        are edits that come first, and do not count as met."""
        batch = self.batch(side, copies)
        at = places(self.model, batch)
        refuse_spans_in_the_decoder(self.model, edits)
        with ExitStack() as opened:
            if held:
                opened.enter_context(self.model.editing(*held))
            run = opened.enter_context(self.model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length))
            got = opened.enter_context(self.model.reading(*reads)).captures if reads else {}
            if start is not None and begun.kept is not None:
                opened.enter_context(resumed(self.model, self.course, begun.kept, replace(start, copies=copies)))
            outcome = observe(self.model, batch, wants=self.metric.wants)
        return Ran(outcome, got, met=sum(each.positions for each in run.fired))

    def values(self, outcome: Outcome, clean: Outcome, copies: int = 1) -> Float[Tensor, "copy item"]:
        """The metric of every copy, on the CPU in fp64; `clean` stands beside it where the metric compares."""
        rows = len(self.items)
        parts = [_copy(outcome, clean, slice(i * rows, (i + 1) * rows)) for i in range(copies)]
        return torch.stack([self.metric(part, clean).detach().cpu().double() for part in parts])


def pairs_of(
    model: AttachedModel, items: ItemSet, metric: Metric, tokens: int | None
) -> Iterator[tuple[list[int], Pairs, int]]:
    """The items in forwards of like length: their places in the set, the pairs, and how many copies one forward takes.

    Raises:
        InputError: `tokens` that do not hold the longest item.
    """
    budget = budget_of(items, tokens, model.device)
    course = _course(model)
    for found_at, part in chunks_of(items, budget, model.device):
        width = max(len(each.prompt) for each in part) + max(max(len(each.answer) for each in part) - 1, 0)
        yield found_at, Pairs(model, items, part, metric, course), max(1, budget // (len(part) * width))


def block_of(pairs: Pairs, place: SiteId) -> int | None:
    """The number of the block that a site, or a block's label, belongs to; None where runs cannot begin there."""
    course = pairs.course
    if place in course.place:
        return course.place[place]
    block = pairs.model.table.sublayers.blocks.get(place.label)
    return course.blocks.index(block.module) if block is not None and block.module in course.blocks else None


def _course(model: AttachedModel) -> Course:
    """Where runs may begin: nowhere but at the start while a plan of the user's own is open."""
    if model.planned:
        return WHOLE
    course = course_of(model)
    return WHOLE if occupied(model, course) else course


def _copy(outcome: Outcome, of: Outcome, rows: slice) -> Outcome:
    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    return replace(outcome, batch=of.batch, logits=part(outcome.logits), embedding=part(outcome.embedding))


# -- values of edits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Repeated:
    """What a run of some items gave, for a batch that holds them several times, one copy behind the other."""

    captured: Captured
    rows: int

    def donate(self, here: Here) -> Tensor:
        """As `Captured.donate`."""
        return self.captured.donate(replace(here, items=here.items % self.rows))


@dataclass(frozen=True, eq=False)
class Where:
    """As the value of an edit: another run's value in some rows, columns and heads, and what is there in the others.

    Attributes:
        source: the other run.
        taken: by site or block, where; one column stands for all of them. The head axis has all heads of the site.
    """

    source: Repeated
    taken: Mapping[SiteId, Bool[Tensor, "row column head"]]

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        rows = self.taken[here.site].to(current.device)[here.items.to(current.device)][:, :, list(here.heads)]
        given = self.source.donate(here).to(current)
        if here.layout == "values":
            return torch.where(rows[:, : current.shape[1], :, None], given, current)
        if rows.shape[1] > 1:
            assert here.queries is not None
            rows = rows[:, here.queries.to(current.device)]
        return torch.where(rows.transpose(1, 2)[..., None], given, current)
