"""The metric of every item under the knock-out of every one of many sets of heads.

    values = measure_sets(model, items, [HeadSet.parse("L1H2"), HeadSet.parse("L1H2, L3H4")], KnockOut())

Items and sets share forwards. A batch holds sets whose first edited block is the same: what lies in front of it is that
of the clean run, which is kept (see `headwise/model/running/resuming.py`). Edits in a scope (`last`, `decode`, a span)
leave the columns in front of it as they are: they stand in a cache that all sets share. Where a model cannot be run
from a block or a column in the middle, its runs are whole; that is said once.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from headwise import freed_memory
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.metrics import Metric, metric
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.running.courses import course_of, occupied, same_logits
from headwise.model.running.resuming import Course, Kept, Start, keeping, resumed
from headwise.model.running.shared_cache import can_be_shared, shared_cache
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, Past, observe, places, refuse_spans_in_the_decoder, refuse_two_sided
from headwise.sweep.clean_runs import MOST, CleanRun, clean_run, forget, remembering
from headwise.sweep.knockout import KnockOut, Patch, TwinZ, edits_of
from headwise.sweep.memory import budget_of, out_of_memory

Placed = tuple[list[int], tuple[EncodedItem, ...]]
"""Items, and their places in the set."""

FORWARD = {"cpu": 100}
"""What a forward costs beside its tokens, in tokens, for a small model; elsewhere as much as a full one."""
SHARING = 12
"""Sets that are taken to share forwards where there are as many or more: about those of one first block. One number for
all, or the clean runs of one sweep would serve no other."""
WHOLE = Course((), reason="whole runs were asked for")

_SAID: WeakKeyDictionary[AttachedModel, set[str]] = WeakKeyDictionary()
_log = logging.getLogger("headwise")


def measure_sets(
    model: AttachedModel,
    items: ItemSet,
    sets: Sequence[HeadSet],
    knock_out: KnockOut | Patch,
    measured: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> Float[Tensor, "set item"]:
    """The metric of every item under the knock-out (or patch) of every set, on the CPU; an empty set is none.

    How items and sets are laid out in forwards depends on them, on `tokens` and on the kind of device alone, so the
    same call gives the same numbers. They agree with knock-outs one by one to rounding; `resample` draws by row, and
    runs each set by itself.

    Args:
        tokens: most tokens of one forward (default: `tokens_of` the device, or those of the longest item). Where memory
            does not hold them, batches are halved, and that is said.

    Raises:
        InputError: no items or sets; heads that the model does not have; `tokens` that do not hold the longest item; a
            patch on items without twins.
        Refusal: the model cannot give what the metric needs, a site cannot be edited this way, no item has a
            position in the scope (nothing would be taken out, and every effect would be 0), or an item does not fit
            into memory by itself.
    """
    values, positions = measure_at(model, items, sets, knock_out, measured, tokens=tokens)
    if not positions and any(sets):
        raise Refusal(nothing_in_scope(items, knock_out.scope))
    return values


@freed_memory.kept()
def measure_at(
    model: AttachedModel,
    items: ItemSet,
    sets: Sequence[HeadSet],
    knock_out: KnockOut | Patch,
    measured: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> tuple[Float[Tensor, "set item"], int]:
    """As `measure_sets`, with the number of positions at which heads were edited, which may be 0.

    For a part of items that are judged together, of which some have no position in the scope.
    """
    if isinstance(sets, str) or not all(isinstance(each, HeadSet) for each in sets):
        raise InputError("measure_sets takes a list of head sets; write [HeadSet.parse('L0H1'), ...]")
    if not items.items or not sets:
        raise InputError(f"measure_sets needs items and sets of heads; got {len(items)} items and {len(sets)} sets")
    chosen = measured if isinstance(measured, Metric) else metric(items.metric if measured is None else measured)
    checked = [model.heads(each) if each else HeadSet() for each in sets]
    if isinstance(knock_out, Patch):
        _require_twins(items)
        if "generation" in chosen.needs:
            raise Refusal(
                f"{chosen.id} is of what is generated, where a twin has no columns; use a metric of the logits"
            )
    budget = budget_of(items, tokens, model.device)
    course = _course(model, chosen, checked, knock_out.scope)
    values = torch.full((len(sets), len(items)), torch.nan, dtype=torch.float64)
    positions = 0
    # Rows that are drawn for hang on the layout, and must not on other sets; in a scope few columns are run for a set.
    whole = knock_out.scope in ("all", "prompt") and not _is_drawn(knock_out)
    sharing = SHARING if whole and len(sets) >= SHARING else 0
    for of_items, batch_items in chunks_of(items, budget, model.device, sets=sharing):
        chunk = _Chunk(model, items, batch_items, knock_out, chosen, course, budget)
        found, met = chunk.measured(checked)
        values[:, of_items] = found
        positions += met
    return values, positions


def _require_twins(items: ItemSet) -> None:
    alone = next((each.id for each in items if each.twin is None), None)
    if alone is not None:
        raise InputError(
            f"item {alone} of {items.probe} has no corrupted twin, which a patch takes z from; use a probe that has "
            "twins, or KnockOut"
        )


def _course(model: AttachedModel, chosen: Metric, sets: Sequence[HeadSet], scope: str) -> Course:
    """Where runs may begin; `WHOLE` where they have to be whole (a plan of the user's own is open, or a metric wants
    several runs or a generation), or where the clean run to begin in would cost more than it saves."""
    if model.planned or len(chosen.wants) > 1 or "generation" in chosen.wants or not any(sets):
        return WHOLE
    course = course_of(model)
    edited = [heads for heads in sets if heads]
    astray = sorted({site for heads in edited for site in heads.sites} - course.place.keys())
    why = course.reason or occupied(model, course)
    if not why and astray:
        why = f"{astray[0].label} lies in none of its blocks"
    if why:
        _say_once(model, f"knock-outs take whole forwards, because {why}")
        return WHOLE
    # In the block where a run begins its attention is saved, and in the last one most columns: together about a block.
    besides = 1 if course.tail is not None and chosen.wants == {"logits"} else 0
    saved = sum(first_block(course, heads) + besides for heads in edited) / len(course.blocks)
    if scope not in ("all", "prompt"):
        saved += len(edited) / 2
    return course if "clean" in chosen.needs or len(edited) < len(sets) or saved > 1 else WHOLE


def _is_drawn(knock_out: KnockOut | Patch) -> bool:
    return isinstance(knock_out, KnockOut) and knock_out.mode == "resample"


def _say_once(model: AttachedModel, what: str) -> None:
    said = _SAID.setdefault(model, set())
    if what not in said:
        said.add(what)
        _log.warning("%s: %s", model.name or "the model", what)


def first_block(course: Course, heads: HeadSet) -> int:
    """The first block that a knock-out of `heads` changes."""
    return min(course.place[site] for site in heads.sites)


def chunks_of(items: ItemSet, budget: int, device: torch.device, *, sets: int = 0) -> Iterator[Placed]:
    """Items of like length together, as many as one forward takes; with their places in the set.

    Ordered by length, they are cut where the length changes or a forward is full, in the way that costs least if each
    chunk is run once as it is, and for `sets` sets of heads that fill up its forwards: the more sets, the less its rows
    are padded. `budget` is the most tokens of a forward, but for an item that is longer.
    """
    forward = FORWARD.get(device.type, budget)
    lengths = [(len(each.prompt), len(each.answer)) for each in items]
    order = sorted(range(len(items)), key=lambda place: lengths[place])
    ends = [end for end in range(1, len(order)) if lengths[order[end]] > lengths[order[end - 1]]] + [len(order)]
    least: dict[int, tuple[int, int]] = {0: (0, 0)}
    """Of the first so many items: what they cost, and where their last chunk begins."""
    for begin in range(len(order)):
        if begin not in least:
            continue
        before, answer = begin, 1
        for to_here in ends[bisect(ends, begin) :]:
            prompt, last = lengths[order[to_here - 1]]
            answer = max(answer, last)
            width = prompt + answer - 1
            fit = begin + max(1, budget // width)
            end = min(to_here, fit)
            if end > before:
                tokens = (end - begin) * width
                forwards = 1 + -(-sets // max(1, budget // tokens))
                cost = least[begin][0] + forward * forwards + tokens * (1 + sets)
                least[end] = min(least.get(end, (cost, begin)), (cost, begin))
            if fit < to_here:
                break
            before = end
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(least[cuts[-1]][1])
    for begin, end in pairwise(reversed(cuts)):
        yield order[begin:end], tuple(items.items[i] for i in order[begin:end])


@dataclass(frozen=True)
class _Chunk:
    """Items that share forwards."""

    model: AttachedModel
    of: ItemSet
    items: tuple[EncodedItem, ...]
    knock_out: KnockOut | Patch
    metric: Metric
    course: Course
    budget: int

    def measured(self, sets: Sequence[HeadSet]) -> tuple[Float[Tensor, "set item"], int]:
        """The metric under every set, and at how many positions heads were taken out."""
        try:
            return self._measured(sets)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        forget()
        if len(self.items) == 1:
            raise Refusal(
                f"an item of {len(self.items[0].prompt)} tokens of {self.of.probe} does not fit into memory by itself; "
                "use shorter settings of the probe, a smaller model or dtype, or another device"
            )
        half = len(self.items) // 2
        _log.warning("out of memory: %d items of %s go on in two halves", len(self.items), self.of.probe)
        parts = [replace(self, items=part).measured(sets) for part in (self.items[:half], self.items[half:])]
        return torch.cat([values for values, _ in parts], dim=1), sum(met for _, met in parts)

    def _measured(self, sets: Sequence[HeadSet]) -> tuple[Float[Tensor, "set item"], int]:
        single = self.of.batch(self.items)
        if "logits" in self.metric.needs:
            refuse_two_sided(self.model, single)
        values = torch.full((len(sets), len(self.items)), torch.nan, dtype=torch.float64)
        run = self._clean(single, sets)
        twins = self._of_twins(sets) if isinstance(self.knock_out, Patch) else None
        if run.outcome is not None:
            own = _repeated(run.outcome, run.outcome.batch, 1)  # a metric may write into it
            values[[place for place, heads in enumerate(sets) if not heads]] = self._values(own, own)
        positions = 0
        width = single.input_ids.shape[1]
        # A layer's keys of columns in the cache are there once per set while it runs, at a part of a column's cost.
        wide = width if run.past is None else max(width - run.past.column, -(-width // 4))
        together = 1 if _is_drawn(self.knock_out) else max(1, self.budget // (len(self.items) * wide))
        waiting = list(_parts(sets, self.course, together, empty=run.outcome is None))
        while waiting:
            part = waiting.pop(0)
            try:
                found, met = self._under([sets[place] for place in part], run, twins)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(part) == 1:
                    raise
                forget()
                _log.warning("out of memory: %d sets of heads go on in two halves", len(part))
                half = len(part) // 2
                waiting[:0] = [part[:half], part[half:]]
                continue
            values[part] = found
            positions += met
        return values, positions

    def _clean(self, single: Batch, sets: Sequence[HeadSet]) -> CleanRun:
        """The run without knock-outs, where it is needed or later runs begin in it, and what it left for these."""
        wants = self.metric.wants
        if not self.course.blocks:
            return CleanRun(observe(self.model, single, wants=wants)) if "clean" in self.metric.needs else CleanRun()
        column = self._first_column(single)
        if column or not remembering() or self._bytes_kept(single) > MOST:
            return self._run_clean(single, {site for heads in sets for site in heads.sites}, column)
        of = (self.model, self.course.blocks, wants, self.of.pad, self.of.suffix)
        return clean_run(self.items, of, lambda: self._run_clean(single, self.course.answered.keys()))

    def _bytes_kept(self, single: Batch) -> int:
        """About what a clean run leaves: z of every site that may be left out, and as much of every block."""
        widths = [site.n_heads * site.head_dim for site in self.model.sites if site.id in self.course.answered]
        return 2 * single.input_ids.numel() * sum(widths) * self.model.dtype.itemsize

    def _run_clean(self, single: Batch, sites: Collection[SiteId], column: int = 0) -> CleanRun:
        with keeping(self.model, self.course, tuple(sites)) as kept:
            clean = observe(self.model, single, wants=self.metric.wants, cached=column > 0)
        self._require_numbers(clean)
        if not self._same_at_the_end(kept, clean):
            _say_once(
                self.model, "knock-outs take whole forwards, because its last block does not run as it was measured"
            )
            return CleanRun(clean)
        past = Past(clean.cache, column) if column and can_be_shared(clean.cache) else None
        if past is not None and not self._same_behind(past, clean):
            past = None
            _say_once(self.model, "knock-outs run all columns, because a run behind a cache gives other logits")
        return CleanRun(clean, kept, past)

    def _of_twins(self, sets: Sequence[HeadSet]) -> dict[SiteId, TwinZ]:
        """z of all heads in question where the twins stand in place of the prompts; their answers are the items'."""
        union = HeadSet(tuple(dict.fromkeys(member for heads in sets for member in heads)))
        if not union:
            return {}
        twins = [(each, each.twin) for each in self.items if each.twin is not None]
        there = tuple(replace(each, prompt=twin.prompt, pixels=twin.pixels) for each, twin in twins)
        batch = self.of.batch(there)
        with self.model.reading(read.z(heads=union)) as got:
            observe(self.model, batch, wants=self.metric.wants)
        return {site: TwinZ(union.at(site), got.z[site.label].detach()) for site in union.sites}

    def _first_column(self, batch: Batch) -> int:
        """The first column at which something is edited, or a logit is wanted; 0 where that cannot be told."""
        at = places(self.model, batch)
        # The cells of a picture come with all its tokens, and some models count their places with it.
        if self.metric.wants != {"logits"} or at.prompt_length is None or batch.pixels:
            return 0
        wanted = at.prompt_length - 1
        scope = self.knock_out.scope
        if scope.startswith("span:"):
            columns = [column for row in at.spans.get(scope.removeprefix("span:"), [[0]]) for column in row]
            return min([wanted, *columns])
        return wanted if scope in ("last", "decode") else 0

    def _require_numbers(self, clean: Outcome) -> None:
        if clean.logits is not None and bool(clean.logits[clean.predicting].isnan().any()):
            raise Refusal(
                f"the logits of {self.model.name} are not numbers (NaN) without a knock-out; check its weights, or "
                "load it with dtype='float32'"
            )

    def _same_at_the_end(self, kept: Kept, clean: Outcome) -> bool:
        """Whether the last block alone, run as it will be, gives the clean logits: something may have been put on it,
        or behind it, since the model was measured."""
        if clean.logits is None:
            return True
        start = Start(len(self.course.blocks) - 1, 1, last=clean.logits.shape[1])
        with resumed(self.model, self.course, kept, start):
            again = observe(self.model, clean.batch, wants=self.metric.wants)
        assert again.logits is not None
        seen = clean.predicting
        return same_logits(again.logits[seen], clean.logits[seen], self.model.dtype)

    def _same_behind(self, past: Past, clean: Outcome) -> bool:
        """Whether a run behind the cache gives what the whole one gave."""
        begun = Past(shared_cache(past.cache, past.column), past.column)
        again = observe(self.model, clean.batch, wants=self.metric.wants, past=begun)
        assert again.logits is not None
        assert clean.logits is not None
        seen = clean.predicting
        return same_logits(again.logits[seen], clean.logits[seen], self.model.dtype)

    def _under(
        self, sets: Sequence[HeadSet], run: CleanRun, twins: dict[SiteId, TwinZ] | None
    ) -> tuple[Float[Tensor, "set item"], int]:
        """The metric under sets whose first block is the same, in one run, and at how many positions it edited."""
        rows = len(self.items)
        batch = self.of.batch(self.items * len(sets))
        edits = edits_of(self.knock_out, sets, rows, self.model.device, twins)
        refuse_spans_in_the_decoder(self.model, edits)
        kept, past = run.kept, run.past
        beginning = (
            nullcontext() if kept is None else resumed(self.model, self.course, kept, self._start(sets, batch, past))
        )
        begun = None if past is None else Past(shared_cache(past.cache, past.column), past.column)
        met = 0
        if not edits:
            outcome = observe(self.model, batch, wants=self.metric.wants)
        else:
            at = places(self.model, batch)
            with self.model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length) as edited, beginning:
                outcome = observe(self.model, batch, wants=self.metric.wants, past=begun)
            # Of several runs it is known of the last alone what fired.
            met = 1 if len(self.metric.wants) > 1 else sum(each.positions for each in edited.fired)
        return self._values(outcome, run.outcome, len(sets)), met

    def _start(self, sets: Sequence[HeadSet], batch: Batch, past: Past | None) -> Start:
        block = first_block(self.course, sets[0]) if sets[0] else 0
        last = max(batch.answers.shape[1], 1) if self.metric.wants == {"logits"} else None
        column = 0 if past is None else past.column
        at_z = isinstance(self.knock_out, Patch) or self.knock_out.mode != "uniform"
        return Start(block, len(sets), at_z=at_z, column=column, last=last)

    def _values(self, outcome: Outcome, clean: Outcome | None, times: int = 1) -> Float[Tensor, "set item"]:
        beside = clean
        if clean is not None and outcome is not clean and "clean" in self.metric.needs:
            beside = _repeated(clean, outcome.batch, times)
        return self.metric(outcome, beside).detach().cpu().double().reshape(times, len(self.items))


def _parts(sets: Sequence[HeadSet], course: Course, together: int, *, empty: bool) -> Iterator[list[int]]:
    """Places of sets that run together: of one first block, in parts of like size."""
    by_block: dict[int, list[int]] = {}
    for place, heads in enumerate(sets):
        if heads or empty:
            block = first_block(course, heads) if course.blocks else 0
            by_block.setdefault(block, []).append(place)
    for block in sorted(by_block):
        listed = by_block[block]
        n_parts = -(-len(listed) // together)
        size = -(-len(listed) // n_parts)
        yield from (listed[start : start + size] for start in range(0, len(listed), size))


def nothing_in_scope(items: ItemSet, scope: str) -> str:
    why = ""
    if scope == "decode" and all(len(each.answer) <= 1 for each in items):
        why = "; an answer of one token is predicted from the prompt alone"
    return (
        f"scope {scope!r} has no position in any of the {len(items)} items of {items.probe}, so nothing would be taken "
        f"out{why}; use scope='all' or 'last', or a probe that has such positions"
    )


def _repeated(clean: Outcome, batch: Batch, times: int) -> Outcome:
    def again(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.repeat(times, *[1] * (value.dim() - 1))

    return replace(
        clean,
        batch=batch,
        logits=again(clean.logits),
        generated=again(clean.generated),
        text=None if clean.text is None else clean.text * times,
        embedding=again(clean.embedding),
    )
