"""Taking heads out: four modes, any scope, of one set of heads or of many in one batch.

What the papers call "masking a head" is one of four things, which give different answers:

- `zero`: z becomes 0;
- `mean`: z becomes its mean over a reference set;
- `resample`: z becomes that of a random token of the reference set;
- `uniform`: the head attends equally to every key it may see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError
from headwise.heads import HeadSet, SiteId
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.finding.example import can_generate
from headwise.model.operations import Here
from headwise.model.reference import Reference
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places

Mode = Literal["zero", "mean", "resample", "uniform"]
MODES: tuple[Mode, ...] = get_args(Mode)


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
        _require_share(self.strength)
        if self.needs_reference and not isinstance(self.reference, Reference):
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


@dataclass(frozen=True, slots=True)
class Patch:
    """Heads as they are on each item's corrupted twin, column by column, in place of a knock-out (activation patching).

    Against the clean run, this asks what the head carries of that in which the two texts differ.

    Attributes:
        scope, strength: as of `KnockOut`.
    """

    scope: str = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        _require_share(self.strength)


def _require_share(strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise InputError(f"strength={strength!r} is a share; give a number from 0 (nothing happens) to 1")


@dataclass(frozen=True, slots=True)
class TwinZ:
    """z of some heads of a site in a run on the twins."""

    heads: tuple[int, ...]
    z: Float[Tensor, "item column head dim"]


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


def edits_of(
    how: KnockOut | Patch,
    sets: Sequence[HeadSet],
    rows: int,
    device: torch.device,
    twins: Mapping[SiteId, TwinZ] | None = None,
) -> list[Edit]:
    """Edits of a batch in which set `i` belongs to rows `i * rows` to `(i + 1) * rows - 1`.

    What they need is put on `device` beforehand: on the way there a run would wait for it in every layer. `twins` is
    what a `Patch` puts in place.
    """
    if isinstance(how, Patch):
        assert twins is not None
        return _patches(how, sets, rows, device, twins)
    knock_out = how
    if len(sets) == 1 or knock_out.mode in ("uniform", "resample"):
        return [
            knock_out.edit(heads, None if len(sets) == 1 else range(i * rows, (i + 1) * rows))
            for i, heads in enumerate(sets)
            if heads
        ]
    union = HeadSet(tuple(member for heads in sets for member in heads))
    if not union:
        return []
    strength = _strength(sets, union, rows, device, knock_out.strength)
    if knock_out.mode == "zero":
        return [edit.scale(union, lambda current, here: 1 - strength(current, here), scope=knock_out.scope)]
    assert knock_out.reference is not None
    means = knock_out.reference

    def mean(current: Tensor, here: Here) -> Tensor:
        return means.mean(here.site)[list(here.heads)].to(current)

    return [edit.mix(union, mean, strength, scope=knock_out.scope)]


def _patches(
    patch: Patch, sets: Sequence[HeadSet], rows: int, device: torch.device, twins: Mapping[SiteId, TwinZ]
) -> list[Edit]:
    union = HeadSet(tuple(member for heads in sets for member in heads))
    if not union:
        return []

    def of_twin(current: Tensor, here: Here) -> Tensor:
        twin = twins[here.site]
        start = 0 if here.window is None else here.window.start
        z = twin.z[here.items % rows, start : start + current.shape[1]]
        return z[:, :, [twin.heads.index(head) for head in here.heads]].to(current)

    return [edit.mix(union, of_twin, _strength(sets, union, rows, device, patch.strength), scope=patch.scope)]


def _strength(sets: Sequence[HeadSet], union: HeadSet, rows: int, device: torch.device, full: float) -> _Strength:
    """One edit serves all sets: how much of each head is taken out in each row."""
    return _Strength({site: _taken(sets, union, site, rows).to(device) for site in union.sites}, full)


@dataclass(frozen=True, slots=True)
class _Strength:
    """As the value of an edit: the share of each head that is taken out, `[batch, 1, head, 1]`."""

    of_site: dict[SiteId, Float[Tensor, "row head"]]
    full: float

    def __call__(self, current: Tensor, here: Here) -> Tensor:
        rows = self.of_site[here.site].to(here.items.device)[here.items]
        return (self.full * rows)[:, None, :, None].to(current)


def _taken(sets: Sequence[HeadSet], union: HeadSet, site: SiteId, rows: int) -> Float[Tensor, "row head"]:
    columns = {index: column for column, index in enumerate(union.at(site))}
    taken = torch.zeros(len(sets), len(columns), dtype=torch.float64)
    for row, heads in enumerate(sets):
        for index in heads.at(site):
            taken[row, columns[index]] = 1
    return taken.repeat_interleave(rows, dim=0)
