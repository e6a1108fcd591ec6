"""Lowered edits: gains and offsets on the output projections' inputs, for models that run compiled.

A plan of edits is Python that runs in every attention call; a compiled graph has no room for it. What multiplies z,
adds to it or puts fixed values in its place, at all positions alike, comes down to two numbers for every column of the
projection's input. They are kept in buffers that the graph reads, so that other values need no other graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError, PlanConflict, Refusal
from headwise.heads import SiteId
from headwise.model import operations as op
from headwise.model.capture import Opened
from headwise.model.edit import Edit
from headwise.model.finding.recording import quietly
from headwise.model.proving.patient import columns_of
from headwise.model.running.affine import NO_OFFSET, affine_map, fixed, parts_of
from headwise.model.running.compiled import forget_graphs
from headwise.model.running.in_place import require_in_place
from headwise.model.running.plan import Layer, Placed, Plan
from headwise.model.site import Site
from headwise.model.table import SiteTable

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel

GAIN, OFFSET = "headwise_gain", "headwise_offset"


class Lowered:
    """Edits of z that a compiled model carries out; made by `model.lowered(...)`.

    Attributes:
        sites: labels of the sites whose projections have the buffers.
    """

    def __init__(self, root: nn.Module, table: SiteTable, lanes: dict[SiteId, Lane]) -> None:
        self._root = root
        self._table = table
        self._lanes = lanes

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(label.label for label in self._lanes)

    def set(self, *edits: Edit) -> None:
        """Carry out these edits, and no others, from the next run on; nothing is compiled anew.

        They mean what they mean in `model.editing(*edits)` and compose in the order given. A zero, scale, add, set or
        mean at full strength gives the bits of `editing`. A mix, a strength between 0 and 1 and composed edits are
        one multiplication and one addition here, so they can differ from `editing` in rounding.

        Raises:
            Refusal: an edit that is not one map for all positions; nothing has changed.
            InputError: heads or values that cannot be meant, or heads of a site that is not lowered; likewise.
            PlanConflict: the block has ended, or a projection was replaced or wrapped inside it.
        """
        self._require_open()
        if not edits or not all(isinstance(edit, Edit) for edit in edits):
            raise InputError("set() takes edits such as hw.edit.zero('L1H2'), one argument each; clear() takes none")
        for edit in edits:
            _require_lowerable(edit)
        plan = Plan(self._table, [Layer((), edits, {}, None, False, Opened())])
        for label in plan.sites:
            self._require_lane(label, edits)
        for lane in self._lanes.values():
            lane.follow_conversion()
        made = {label: lane.values(_placed(plan, label)) for label, lane in self._lanes.items()}
        for label, (gain, offset) in made.items():
            self._lanes[label].write(gain, offset)

    def clear(self) -> None:
        """Carry out no edit: the model is itself again, bit for bit. Raises PlanConflict as `set` does."""
        self._require_open()
        for lane in self._lanes.values():
            lane.follow_conversion()
            lane.write(*lane.values([]))

    def require_in_place(self) -> None:
        """Raises PlanConflict if the model no longer runs a projection that has the buffers, or wraps it."""
        for lane in self._lanes.values():
            lane.require_in_place(self._root)

    def close(self) -> None:
        """Take buffers and hooks off."""
        for lane in self._lanes.values():
            lane.remove()
        self._lanes = {}

    def _require_open(self) -> None:
        if not self._lanes:
            raise PlanConflict("this lowered block has ended; open another with model.lowered(...)")
        self.require_in_place()

    def _require_lane(self, label: SiteId, edits: tuple[Edit, ...]) -> None:
        if label not in self._lanes:
            site = self._table.site(label)
            why = why_no_lane(site, self._table) or "model.lowered(...) was not asked for it"
            raise InputError(f"{label.label} is not lowered here ({why}); lowered are {', '.join(self.sites)}")
        site = self._table.site(label)
        if site.gated and any(edit.point == "pre_gate" for edit in edits):
            raise Refusal(
                f"{site.label} has a gate between z and its projection, so an edit with point='pre_gate' cannot be "
                "lowered; leave point= out, or use model.editing() on the uncompiled model"
            )

    def __repr__(self) -> str:
        return f"<Lowered at {', '.join(self.sites) or 'no site: the block has ended'}>"


@dataclass(eq=False)
class Lane:
    """The buffers of one site's projection; `dtype` and `device` are those of what enters it."""

    site: Site
    projection: nn.Module
    width: int
    dtype: torch.dtype
    device: torch.device
    _hook: Any = None
    _weights: torch.dtype | None = None

    def put_on(self) -> None:
        gain, offset = self.values([])
        self.projection.register_buffer(GAIN, gain.to(self.device, self.wide), persistent=False)
        self.projection.register_buffer(OFFSET, offset.to(self.device, self.wide), persistent=False)
        self._weights = _floating(self.projection)
        self._hook = self.projection.register_forward_pre_hook(Entering())

    def remove(self) -> None:
        self._hook.remove()
        for name in (GAIN, OFFSET):
            self.projection._buffers.pop(name, None)
            self.projection._non_persistent_buffers_set.discard(name)

    @property
    def wide(self) -> torch.dtype:
        """Half precision is multiplied and added in fp32 by the kernels of edits, too, and rounded once."""
        return torch.promote_types(self.dtype, torch.float32)

    def require_in_place(self, root: nn.Module) -> None:
        require_in_place(root, str(self.site.projection), self.projection, f"the lowered edits of {self.site.label}")
        if not {GAIN, OFFSET} <= self.projection._buffers.keys():
            raise PlanConflict(f"the lowered edits of {self.site.label} were taken off; leave the block, open another")

    def follow_conversion(self) -> None:
        """`model.half()` and the like take the buffers along: give them their own precision back."""
        weights = _floating(self.projection)
        if weights is not None and weights != self._weights:
            self._weights = self.dtype = weights
        for name in (GAIN, OFFSET):
            buffer = self.projection.get_buffer(name)
            if buffer.dtype != self.wide:
                self.projection._buffers[name] = buffer.to(self.wide)

    def values(self, listed: list[Placed]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
        """Gain and offset, in fp64 on the CPU, of edits one after the other."""
        gain = torch.ones(self.width, dtype=torch.float64)
        offset = torch.full((self.width,), NO_OFFSET, dtype=torch.float64)
        for placed in listed:
            columns = columns_of(self.site)[list(placed.heads)].cpu()
            factor, term = affine_map(placed, torch.zeros(1, 1, *columns.shape, dtype=self.dtype))
            gain[columns] = factor * gain[columns]
            offset[columns] = torch.where(factor == 0, term, factor * offset[columns] + term)
        return gain, offset

    @torch.no_grad()
    def write(self, gain: Tensor, offset: Tensor) -> None:
        self.projection.get_buffer(GAIN).copy_(gain)
        self.projection.get_buffer(OFFSET).copy_(offset)


@contextmanager
def open_lowered(attached: AttachedModel, heads: Any) -> Iterator[Lowered]:
    """What `AttachedModel.lowered` does, as described there."""
    lowered = Lowered(attached.model, attached.table, _lanes(attached, heads))
    forget_graphs()
    with ExitStack() as undo:
        undo.callback(lowered.close)
        for lane in lowered._lanes.values():
            lane.put_on()
        undo.callback(attached.model.register_forward_pre_hook(BeforeRun(lowered)).remove)
        yield lowered
        lowered.require_in_place()


def through(projection: nn.Module, entering: Tensor) -> Tensor:
    """What a projection works on when `entering` is handed to it: the same, or with lowered edits carried out."""
    return entering if GAIN not in projection._buffers else _enter(projection, (entering,))[0]


# -- the hooks ---------------------------------------------------------------------------------------------------


class Uncopied:
    """A hook that a copy of the model would keep, and no block would take off there: it refuses to be copied."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce__()

    def __reduce__(self) -> NoReturn:
        raise Refusal(
            "the model has lowered edits, which a copy would keep for ever; leave the lowered block before copying or "
            "saving the whole model (state_dict() is untouched by them and can be saved any time)"
        )


class Entering(Uncopied):
    """On a projection: what enters it, with the edits carried out."""

    def __call__(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _enter(projection, args)


class BeforeRun(Uncopied):
    """On the model: looks whether its projections are still there. Not in a graph, which notices such a change."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._lowered.require_in_place()


def _enter(projection: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, gain, offset = args[0], projection.headwise_gain, projection.headwise_offset
    # NaN, which padding can hold, times 0 is not 0: a gain of 0 puts the offset in place whatever was there.
    return (torch.where(gain == 0, offset, x * gain + offset).to(x.dtype), *args[1:])


def _floating(projection: nn.Module) -> torch.dtype | None:
    """The type of a projection's weights, if they are floating point numbers."""
    return next((p.dtype for p in projection.parameters() if p.is_floating_point()), None)


# -- which sites -------------------------------------------------------------------------------------------------


def _lanes(attached: AttachedModel, heads: Any) -> dict[SiteId, Lane]:
    """One lane per site, with the width, type and place of what enters its projection in a run of the example.

    Raises:
        Refusal: a site that was asked for cannot be lowered, or none can.
        PlanConflict: a site is lowered already.
    """
    table = attached.table
    sites = [table.site(label) for label in attached.heads(heads).sites]
    reasons = {site.label: why for site in sites if (why := why_no_lane(site, table))}
    if reasons and (heads is not None or len(reasons) == len(sites)):
        refused, why = next(iter(reasons.items()))
        raise Refusal(f"{refused} cannot be lowered: {why}; use model.editing() on the uncompiled model")
    chosen = {site.id: site for site in sites if site.label not in reasons}
    projections = {label: attached.model.get_submodule(str(site.projection)) for label, site in chosen.items()}
    for label, projection in projections.items():
        if GAIN in projection._buffers:
            raise PlanConflict(f"{label.label} is lowered already; use the handle of that block, or leave it first")
    entering: dict[SiteId, Tensor] = {}
    with attached.aside(), quietly(attached.model), ExitStack() as undo:
        for label, projection in projections.items():

            def note(module: nn.Module, args: tuple[Any, ...], label: SiteId = label) -> None:
                entering[label] = args[0]

            undo.callback(projection.register_forward_pre_hook(note).remove)
        attached.model(**attached.example)
    return {
        label: Lane(site, projections[label], entering[label].shape[-1], entering[label].dtype, entering[label].device)
        for label, site in chosen.items()
    }


def why_no_lane(site: Site, table: SiteTable) -> str:
    """Why a site cannot be lowered; empty if it can."""
    if not site.capabilities["separable"]:
        return site.capabilities["separable"].reason
    if site.projection is None:
        return (
            "its kinds of tokens go to projections of their own" if site.by_span else "no output projection was found"
        )
    sharing = [other.label for other in table.sites if site.projection in other.takers]
    if len(sharing) > 1:
        return f"{', '.join(sharing[:4])} run through one projection, whose buffers cannot tell the calls apart"
    return ""


# -- which edits -------------------------------------------------------------------------------------------------


def _require_lowerable(edit: Edit) -> None:
    values = [*edit.operation.values, edit.strength]
    if edit.variable != "z":
        why = f"it is on {edit.variable}, not on z"
    elif edit.scope != "all" or edit.queries is not None or edit.rows is not None:
        why = "it is for some positions or rows only"
    elif edit.stream != "first":
        why = "it is for the second stream of a dual run"
    elif not isinstance(edit.operation, (op.Set, op.Scale, op.Add, op.Mix, op.Mean)) or not all(map(fixed, values)):
        why = "its values change with the run or the position"
    elif any(isinstance(part, Tensor) and part.requires_grad for value in values for part in parts_of(value)):
        why = "a value asks for a gradient, which does not pass through a buffer (pass value.detach() if none is meant)"
    else:
        return
    raise Refusal(
        f"{edit!r} cannot be lowered: {why}; what can be is zero, scale, add, set, mix and mean of z with fixed "
        "values at all positions, and model.editing() on the uncompiled model serves the rest"
    )


def _placed(plan: Plan, label: SiteId) -> list[Placed]:
    """The z edits of one site, in order; they are all of one point, or of two that are the same there."""
    operations = plan.sites.get(label)
    return [] if operations is None else [placed for listed in operations.edits.values() for placed in listed]
