"""Activation patching: one part of a run in place of the same part of the twin's run, and what it does to the metric.

    patched = patch_map(model, items)                                     # z of every head, noising
    patch_map(model, items, "residual_pre", at="positions", direction="denoising")
    patch_map(model, items, "z", at=["s1", "s2"])                         # a cell per head and span

Two directions, which ask two things (Heimersheim and Nanda 2024, "How to use and interpret activation patching"):

- `noising`: the clean run with the corrupted value put in. A large effect: what stands there is necessary.
- `denoising`: the corrupted run with the clean value put in. A large effect: what stands there suffices.

Both are normalised such that 0 is nothing and 1 is all that clean and corrupted run differ by (see `Patched`). Exact:
every cell is a run of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.circuits.patched import Cell, Direction, Patched
from headwise.circuits.twins import (
    Pairs,
    Ran,
    Repeated,
    Side,
    Where,
    block_of,
    corrupted,
    pairs_of,
    patchable_metric,
    require_attached,
    require_twins,
)
from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.metrics import Metric
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.read import Read
from headwise.model.running.resuming import Start
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import places
from headwise.sweep import Patch, measure_sets
from headwise.sweep.measuring import nothing_in_scope
from headwise.sweep.memory import halving

Variable = Literal["z", "q", "k", "v", "pattern", "mlp", "residual_pre", "residual_post"]
VARIABLES: tuple[Variable, ...] = get_args(Variable)
GROUPS, BLOCKS = ("k", "v"), ("mlp", "residual_pre", "residual_post")
BEHIND_ATTENTION = ("z", "mlp", "residual_post")
"""Variables whose patch leaves the attention of their own block as it was."""

Member = Head | KVGroup | SiteId


@halving
def patch_map(
    model: AttachedModel,
    items: ItemSet,
    variable: Variable = "z",
    heads: Any = None,
    *,
    at: Literal["positions"] | Sequence[str] | None = None,
    direction: Direction = "noising",
    metric: str | Metric | None = None,
    scope: str = "all",
    tokens: int | None = None,
) -> Patched:
    """The effect of patching every part by itself.

    The parts are heads (`z`, `q`, `pattern`), KV groups (`k`, `v`: one key or value serves all heads of its group, so
    that is what there is to patch), feed-forward parts (`mlp`) or the stream before or after a block (`residual_pre`,
    `residual_post`). Each is patched column by column, which twins of equal length allow.

    Args:
        heads: which heads, groups or blocks, in any form; None is all of them.
        at: None, one cell for each part, patched in the whole `scope`; `positions`, one for each part and token of the
            prompt, counted from 0 (all items need prompts of one length); names of spans, one for each part and span.
        direction: `noising` or `denoising`.
        metric: any metric of one run; None is that of the probe.
        scope: as of edits (of key columns for k and v). Together with `at` it is `all`.
        tokens: most tokens of one forward (default: `headwise.sweep.memory.tokens_of` the device).

    z of whole heads goes by `measure_sets(..., Patch())`. Everything else goes by batches of cells that begin at the
    same block, as many as `tokens` allows. Cost: two forwards per item, and one per item and cell from its block on;
    for patterns one forward more per layer, so that the rows of one layer alone are held.

    Raises:
        InputError: no twin, or one of another length; a metric of what is generated; parts, places or options that
            cannot be meant.
        Refusal: the model cannot be read or edited there; no item has a position in the scope.
    """
    require_attached(model)
    require_twins(items)
    _check(variable, direction, at, scope)
    chosen = patchable_metric(items, metric)
    members = _members(model, variable, heads)
    where = _where(items, at)
    cells = [(member, place) for member in members for place in where]
    if variable == "z" and at is None and "clean" not in chosen.needs:
        values, ends = _by_sets(model, items, members, direction, chosen, scope, tokens)  # type: ignore[arg-type]
    else:
        values, ends = _by_cells(_Task(model, items, variable, direction, scope), cells, chosen, tokens)
    return Patched(
        method="activation-patching",
        cells=tuple(Cell(_label(member, variable), place) for member, place in cells),
        values=values,
        clean=ends[0],
        corrupted=ends[1],
        direction=direction,
        item_ids=items.ids,
        metric=chosen.id,
        probe=items.probe,
        seed=items.seed if type(items.seed) is int else None,
        settings={"variable": variable, "scope": scope, "at": at if at is None or isinstance(at, str) else list(at)},
        of=weakref.ref(model),
    )


# -- what is asked for ------------------------------------------------------------------------------------------------


def _check(variable: str, direction: str, at: Any, scope: str) -> None:
    if variable not in VARIABLES:
        raise InputError(f"variable={variable!r} cannot be patched; choose one of {', '.join(VARIABLES)}")
    if direction not in ("noising", "denoising"):
        raise InputError(
            f"direction={direction!r} is neither 'noising' (corrupted values in the clean run) nor 'denoising' (clean "
            "values in the corrupted run)"
        )
    if isinstance(at, str) and at != "positions":
        raise InputError(f"at={at!r} is neither 'positions' nor a list of spans; write at=[{at!r}] for a span")
    if at is not None and not at:
        raise InputError("at= names no span; name some, or leave it out")
    if at is not None and scope != "all":
        raise InputError(f"at= says where each cell is patched, so scope={scope!r} beside it has no meaning; use one")


def _members(model: AttachedModel, variable: str, heads: Any) -> list[Member]:
    if variable in BLOCKS:
        return [SiteId.parse(block.label) for block in _blocks(model, variable, heads)]
    found = model.groups(heads) if variable in GROUPS else model.heads(heads)
    if heads is None:  # of other towers there is no twin
        reading = {model.table.stacks[0], "encoder", "cross"}
        found = found.filter(lambda each: each.stack in reading)
    return list(found)


def _blocks(model: AttachedModel, variable: str, labels: Any) -> list[Any]:
    found = list(model.table.blocks(labels))
    if labels is not None:
        return found
    stack = model.table.stacks[0]
    return [each for each in found if SiteId.parse(each.label).stack == stack]


def _where(items: ItemSet, at: Any) -> list[int | str | None]:
    if at is None:
        return [None]
    if at == "positions":
        lengths = sorted({len(each.prompt) for each in items})
        if len(lengths) > 1:
            raise InputError(
                f"prompts of {items.probe} have {lengths[0]} to {lengths[-1]} tokens, so a position is not one place "
                "in all of them; name spans, at=['...'], or take items of one length"
            )
        return list(range(lengths[0]))
    for name in at:
        lacking = next((each for each in items if name not in each.spans), None)
        if lacking is not None:
            known = ", ".join(lacking.spans) or "none"
            raise InputError(f"item {lacking.id} of {items.probe} has no span {name!r}; it has {known}")
    return list(at)


def _label(member: Member, variable: str) -> str:
    return f"mlp.{member.label}" if variable == "mlp" else member.label


# -- z of whole heads: the engine of knock-outs -----------------------------------------------------------------------


def _by_sets(
    model: AttachedModel,
    items: ItemSet,
    members: Sequence[Head],
    direction: Direction,
    metric: Metric,
    scope: str,
    tokens: int | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A corrupted run with clean values put in is a clean run of the items turned round with their twins."""
    turned = replace(items, items=tuple(corrupted(each) for each in items))
    there, back = (items, turned) if direction == "noising" else (turned, items)
    sets = [HeadSet(), *(HeadSet((head,)) for head in members)]
    begun, *patched = measure_sets(model, there, sets, Patch(scope), metric, tokens=tokens)
    (ended,) = measure_sets(model, back, [HeadSet()], Patch(scope), metric, tokens=tokens)
    return torch.stack(patched), (begun, ended) if direction == "noising" else (ended, begun)


# -- everything else: cells that begin at the same block, in batches --------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What is patched, from which run into which."""

    model: AttachedModel
    items: ItemSet
    variable: Variable
    direction: Direction
    scope: str

    @property
    def base(self) -> Side:
        """The run that is patched."""
        return "clean" if self.direction == "noising" else "corrupted"

    @property
    def donor(self) -> Side:
        """The run that the values are of."""
        return "corrupted" if self.direction == "noising" else "clean"

    def read(self, members: Sequence[Member]) -> Read:
        """What the donor run is asked for."""
        heads = _named(members)
        if self.variable == "pattern":
            return read.rows(heads, name="donor")
        if self.variable == "residual_pre":
            return read.residual(heads, where="pre", name="donor")
        if self.variable == "residual_post":
            return read.residual(heads, where="post", name="donor")
        return {"z": read.z, "q": read.q, "k": read.k, "v": read.v, "mlp": read.mlp}[self.variable](heads, name="donor")


_Spot = tuple[Member, int | str | None]


def _by_cells(
    task: _Task, spots: Sequence[_Spot], metric: Metric, tokens: int | None
) -> tuple[Float[Tensor, "cell item"], tuple[Tensor, Tensor]]:
    """The metric of every cell and item, and that of the clean and the corrupted run."""
    n_items = len(task.items)
    values = torch.full((len(spots), n_items), torch.nan, dtype=torch.float64)
    ends = {side: torch.full((n_items,), torch.nan, dtype=torch.float64) for side in ("clean", "corrupted")}
    met = 0
    for found_at, pairs, together in pairs_of(task.model, task.items, metric, tokens):
        sites = tuple(dict.fromkeys(_site(member) for member, _ in spots))
        base = pairs.run(task.base, begun_in=True, sites=sites)
        for part in _donated_together(spots, task.variable):
            donor = pairs.run(task.donor, task.read([spots[i][0] for i in part]))
            clean = base.outcome if task.base == "clean" else donor.outcome
            for cells in _parts(pairs, spots, part, together):
                ran = _under(task, pairs, [spots[i] for i in cells], base, donor)
                found = pairs.values(ran.outcome, clean, len(cells))
                for row, cell in enumerate(cells):
                    values[cell, found_at] = found[row]
                met += ran.met
        for side, ran in ((task.base, base), (task.donor, donor)):
            ends[side][found_at] = pairs.values(ran.outcome, clean)[0]
    if not met:
        raise Refusal(nothing_in_scope(task.items, task.scope))
    return values, (ends["clean"], ends["corrupted"])


def _donated_together(spots: Sequence[_Spot], variable: str) -> list[list[int]]:
    """Cells whose values one run of the donor holds: patterns, an n x n each, of one site at a time."""
    if variable != "pattern":
        return [list(range(len(spots)))]
    by_site: dict[SiteId, list[int]] = {}
    for cell, (member, _) in enumerate(spots):
        by_site.setdefault(_site(member), []).append(cell)
    return list(by_site.values())


def _parts(pairs: Pairs, spots: Sequence[_Spot], cells: Sequence[int], together: int) -> Iterator[list[int]]:
    """Cells that run together: of one block, where runs begin; as many as one forward takes."""
    by_block: dict[int | None, list[int]] = {}
    for cell in cells:
        by_block.setdefault(block_of(pairs, _site(spots[cell][0])), []).append(cell)
    for listed in by_block.values():
        yield from (listed[start : start + together] for start in range(0, len(listed), together))


def _under(task: _Task, pairs: Pairs, spots: Sequence[_Spot], base: Ran, donor: Ran) -> Ran:
    """The base run once for every cell, each with the donor's value in its own place."""
    rows = len(pairs.items)
    taken: dict[SiteId, Tensor] = {}
    for copy, (member, place) in enumerate(spots):
        site, index = _site(member), 0 if isinstance(member, SiteId) else member.index
        columns = _columns(pairs, place)
        if site not in taken:
            taken[site] = torch.zeros(len(spots) * rows, columns.shape[1], _width(task, member), dtype=torch.bool)
        taken[site][copy * rows : (copy + 1) * rows, :, index] = columns
    value = Where(
        Repeated(donor.got["donor"], rows), {site: mask.to(task.model.device) for site, mask in taken.items()}
    )
    change = edit.set(_named([member for member, _ in spots]), value, task.variable, scope=task.scope)
    block = block_of(pairs, next(iter(taken)))
    start = None if block is None else Start(block, len(spots), at_z=task.variable in BEHIND_ATTENTION)
    return pairs.edited(task.base, len(spots), [change], begun=base, start=start)


def _columns(pairs: Pairs, place: int | str | None) -> Bool[Tensor, "row column"]:
    """Where a cell is patched in the rows of one copy; one column stands for all."""
    rows = len(pairs.items)
    if place is None:
        return torch.ones(rows, 1, dtype=torch.bool)
    batch = pairs.batch("clean")
    at = places(pairs.model, batch)
    if at.prompt_length is None:
        raise Refusal(
            f"{pairs.model.name} does not read prompt and answer in one row, so its positions are not those of the "
            "prompt; leave at= out"
        )
    columns = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    if isinstance(place, int):
        columns[:, at.prompt_length - len(pairs.items[0].prompt) + place] = True
        return columns
    for row, listed in enumerate(at.spans[place]):
        columns[row, listed] = True
    return columns


def _site(member: Member) -> SiteId:
    return member if isinstance(member, SiteId) else member.site


def _named(members: Sequence[Member]) -> Any:
    """In the form that reads and edits take."""
    alone = list(dict.fromkeys(members))
    if isinstance(alone[0], SiteId):
        return [each.label for each in alone]
    return HeadSet(tuple(alone), "group" if isinstance(alone[0], KVGroup) else "head")  # type: ignore[arg-type]


def _width(task: _Task, member: Member) -> int:
    """Members that the site has beside this one, and it."""
    if isinstance(member, SiteId):
        return 1
    site = task.model.table.site(member.site)
    return site.n_kv_heads if isinstance(member, KVGroup) else site.n_heads
