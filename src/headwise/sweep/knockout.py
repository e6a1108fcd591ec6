"""Taking heads out: four modes, any scope, and the metric of every item under every one of many sets of heads.

    values = measure_sets(model, items, [HeadSet.parse("L1H2"), HeadSet.parse("L1H2, L3H4")], KnockOut())

What the papers call "masking a head" is one of four things, which give different answers:

- `zero`: z becomes 0;
- `mean`: z becomes its mean over a reference set;
- `resample`: z becomes that of a random token of the reference set;
- `uniform`: the head attends equally to every key it may see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.metrics import Metric, metric
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.finding.example import can_generate
from headwise.model.operations import Here
from headwise.model.reference import Reference
from headwise.probes.batch import Batch, pad
from headwise.probes.encoding import EncodedItem, ItemSet
from headwise.probes.outcome import Outcome, observe, places, refuse_spans_in_the_decoder, refuse_two_sided

Mode = Literal["zero", "mean", "resample", "uniform"]
MODES: tuple[Mode, ...] = get_args(Mode)

TOKENS = 8192
"""Most tokens of one forward: items and sets are batched up to it."""


@dataclass(frozen=True, slots=True)
class KnockOut:
    """How heads are taken out.

    Attributes:
        mode: see the module.
        scope: at which positions, as for edits (`all`, `prompt`, `decode`, `last`, `span:NAME`).
        reference: what `mean` and `resample` put in place (`hw.reference`, or `reference_of`).
        seed: of the draws of `resample`.
        strength: 0 leaves the head as it is, 1 takes it out; between them by straight line.

    Raises `InputError` for an unknown mode, and for a mode without its reference set.
    """

    mode: Mode = "zero"
    scope: str = "all"
    reference: Reference | None = None
    seed: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"no knock-out mode {self.mode!r}; choose from {', '.join(MODES)}")
        if self.needs_reference and self.reference is None:
            raise InputError(f"mode {self.mode!r} needs a reference set; make one with headwise.sweep.reference_of")

    @property
    def needs_reference(self) -> bool:
        return self.mode in ("mean", "resample")

    def edit(self, heads: HeadSet, rows: Sequence[int] | None = None) -> Edit:
        """The edit that takes `heads` out, in all rows of a batch or in some."""
        options: dict[str, Any] = {"scope": self.scope, "strength": self.strength, "rows": rows}
        if self.mode == "uniform":
            return edit.uniform(heads, **options)
        if self.mode == "zero":
            return edit.zero(heads, **options)
        assert self.reference is not None
        if self.mode == "mean":
            return edit.mean(heads, self.reference, **options)
        return edit.resample(heads, self.reference, self.seed, **options)


def reference_of(model: AttachedModel, items: ItemSet) -> Reference:
    """z at every attended position of the items' prompts and answers, for `mean` and `resample`; of all stacks that
    read text. A model that does not continue text reads the prompts alone.

    Raises:
        InputError: no items.
    """
    if not items.items:
        raise InputError(f"{items.probe}: a reference set needs items; encode at least one")
    pooled: dict[SiteId, list[Tensor]] = {}
    reading = {model.table.stacks[0], "encoder", "cross"}
    heads = model.heads().filter(lambda each: each.stack in reading)
    for batch in items.batches(16):
        with torch.no_grad(), model.reading(read.z(heads=heads)) as got:
            observe(model, batch, wants={"logits"} if continues(model) else {"embedding"})
        for label, z in got.z.items():
            site = SiteId.parse(label)
            pooled.setdefault(site, []).append(z[_attended(model, batch, site, z.shape[1])])
    return Reference({site: torch.cat(parts) for site, parts in pooled.items()})


def continues(model: AttachedModel) -> bool:
    """Whether the model continues text; of one that does not, only embeddings can be told."""
    inner = getattr(model.model, "get_base_model", None)
    return can_generate(inner() if callable(inner) else model.model)


def _attended(model: AttachedModel, batch: Batch, site: SiteId, width: int) -> Bool[Tensor, "item column"]:
    """Which columns of a site hold tokens of the items, in the rows that `observe` runs."""
    if places(model, batch).prompt_length is not None:
        return batch.attention_mask.bool()
    encodes = site.stack == "encoder" or "encoder" not in model.table.stacks
    # A decoder's rows begin with its start tokens, as many as are left beside the longest answer.
    longest = max(len(each.answer) for each in batch.items) - 1 if continues(model) else 0
    lengths = [
        len(each.prompt) + len(batch.suffix) if encodes else width - longest + min(longest, len(each.answer) - 1)
        for each in batch.items
    ]
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def measure_sets(
    model: AttachedModel,
    items: ItemSet,
    sets: Sequence[HeadSet],
    knock_out: KnockOut,
    measured: str | Metric | None = None,
) -> Float[Tensor, "set item"]:
    """The metric of every item under the knock-out of every set, on the CPU; an empty set is no knock-out.

    Items and sets share forwards, up to `TOKENS` tokens; how they are laid out depends on the items and `TOKENS` alone,
    so the same call gives the same numbers. They agree with knock-outs one by one to rounding; `resample` draws by row,
    and runs each set by itself.

    Raises:
        InputError: no items or sets; heads that the model does not have.
        Refusal: the model cannot give what the metric needs, a site cannot be edited this way, or no item has a
            position in the scope: nothing would be taken out, and every effect would be 0.
    """
    if not items.items or not sets:
        raise InputError(f"measure_sets needs items and sets of heads; got {len(items)} items and {len(sets)} sets")
    chosen = measured if isinstance(measured, Metric) else metric(items.metric if measured is None else measured)
    checked = [model.heads(each) if each else HeadSet() for each in sets]
    values = torch.full((len(sets), len(items)), torch.nan, dtype=torch.float64)
    positions = 0
    for places_of_items, batch_items in _chunks(items):
        single = pad(batch_items, items.pad, items.suffix, answers=True)
        if "logits" in chosen.needs:
            refuse_two_sided(model, single)
        clean = observe(model, single, wants=chosen.wants) if "clean" in chosen.needs else None
        rows = len(batch_items)
        width = single.input_ids.shape[1]
        together = 1 if knock_out.mode == "resample" else max(1, TOKENS // (rows * width))
        for start in range(0, len(sets), together):
            part = checked[start : start + together]
            batch = pad(batch_items * len(part), items.pad, items.suffix, answers=True)
            edits = _edits(knock_out, part, rows)
            refuse_spans_in_the_decoder(model, edits)
            outcome, met = _observed(model, batch, edits, chosen)
            positions += met
            reference = None if clean is None else _repeated(clean, batch, len(part))
            found = chosen(outcome, reference).detach().cpu().double()
            values[start : start + len(part), places_of_items] = found.reshape(len(part), rows)
    if any(checked) and not positions:
        raise Refusal(_nothing_in_scope(items, knock_out.scope))
    return values


def _chunks(items: ItemSet) -> Iterator[tuple[list[int], tuple[EncodedItem, ...]]]:
    """Items of like length together, as many as one forward takes; with their places in the set."""
    order = sorted(range(len(items)), key=lambda i: (len(items.items[i].prompt), i))
    chunk: list[int] = []
    for place in order:
        width = max(len(items.items[i].prompt) + len(items.items[i].answer) for i in [*chunk, place])
        if chunk and (len(chunk) + 1) * width > TOKENS:
            yield chunk, tuple(items.items[i] for i in chunk)
            chunk = []
        chunk.append(place)
    yield chunk, tuple(items.items[i] for i in chunk)


def _observed(model: AttachedModel, batch: Batch, edits: Sequence[Edit], chosen: Metric) -> tuple[Outcome, int]:
    """What came of a run with these edits, and at how many positions they acted."""
    if not edits:
        return observe(model, batch, wants=chosen.wants), 0
    at = places(model, batch)
    with model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length) as run:
        outcome = observe(model, batch, wants=chosen.wants)
    if len(chosen.wants) > 1:
        return outcome, 1  # several runs, and what fired is known of the last alone
    return outcome, sum(each.positions for each in run.fired)


def _nothing_in_scope(items: ItemSet, scope: str) -> str:
    why = ""
    if scope == "decode" and all(len(each.answer) <= 1 for each in items):
        why = "; an answer of one token is predicted from the prompt alone"
    return (
        f"scope {scope!r} has no position in any of the {len(items)} items of {items.probe}, so nothing would be taken "
        f"out{why}; use scope='all' or 'last', or a probe that has such positions"
    )


def _edits(knock_out: KnockOut, sets: Sequence[HeadSet], rows: int) -> list[Edit]:
    """Edits of a batch in which set `i` belongs to rows `i * rows` to `(i + 1) * rows - 1`."""
    if len(sets) == 1 or knock_out.mode in ("uniform", "resample"):
        return [
            knock_out.edit(heads, None if len(sets) == 1 else range(i * rows, (i + 1) * rows))
            for i, heads in enumerate(sets)
            if heads
        ]
    union = HeadSet(tuple(member for heads in sets for member in heads))
    if not union:
        return []
    # One edit for all sets: how much of each head is taken out in each row.
    strength = _Strength({site: _taken(sets, union, site, rows) for site in union.sites}, knock_out.strength)
    if knock_out.mode == "zero":
        return [edit.scale(union, lambda current, here: 1 - strength(current, here), scope=knock_out.scope)]
    assert knock_out.reference is not None
    means = knock_out.reference

    def mean(current: Tensor, here: Here) -> Tensor:
        return means.mean(here.site)[list(here.heads)].to(current)

    return [edit.mix(union, mean, strength, scope=knock_out.scope)]


@dataclass(frozen=True, slots=True)
class _Strength:
    """As the value of an edit: the share of each head that is taken out, `[batch, 1, head, 1]`."""

    of_site: dict[SiteId, Float[Tensor, "row head"]]
    full: float

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        rows = self.of_site[here.site][here.items.cpu()]
        return (self.full * rows)[:, None, :, None].to(current)


def _taken(sets: Sequence[HeadSet], union: HeadSet, site: SiteId, rows: int) -> Float[Tensor, "row head"]:
    columns = {index: column for column, index in enumerate(union.at(site))}
    taken = torch.zeros(len(sets), len(columns))
    for row, heads in enumerate(sets):
        for index in heads.at(site):
            taken[row, columns[index]] = 1
    return taken.repeat_interleave(rows, dim=0)


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
