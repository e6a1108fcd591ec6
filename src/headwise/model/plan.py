"""A plan: reads and edits resolved against the sites of one model, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headwise.errors import InputError, NotFired, Refusal
from headwise.heads import SiteId
from headwise.model import edit as edits_module
from headwise.model import read as reads_module
from headwise.model.capture import Captured, Fired, Opened
from headwise.model.edit import Edit
from headwise.model.operations import Layout, check_value
from headwise.model.positions import Positions, SpanRows, checked_span
from headwise.model.read import Read
from headwise.model.site import Site
from headwise.model.sublayers import Block
from headwise.model.table import SiteTable, Want

if TYPE_CHECKING:
    from headwise.model.dual import Dual

FINAL = SiteId(layer=0)  # where the final norm's scale is filed


@dataclass(eq=False)
class Placed:
    """An edit or read at one site or block; counts how often it met it in a run."""

    request: Any
    site: SiteId
    heads: tuple[int, ...]
    names: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    count: int = 1
    captured: Captured | None = None
    calls: int = 0
    positions: list[int | Tensor] = field(default_factory=list)

    def met(self, positions: int | Tensor) -> None:
        self.calls += 1
        self.positions.append(positions)

    @property
    def key(self) -> tuple[int, SiteId]:
        """What stays the same when the plan is made anew around an inner block."""
        return id(self.request), self.site

    def reset(self) -> None:
        self.calls = 0
        self.positions.clear()

    @property
    def edit(self) -> Edit:
        assert isinstance(self.request, Edit)
        return self.request

    @property
    def read(self) -> Read:
        assert isinstance(self.request, Read)
        return self.request

    def fired(self) -> Fired:
        what = repr(self.request) if isinstance(self.request, Edit) else f"read.{self.request.name}"
        return Fired(what, self.site.label, self.calls, int(sum(int(count) for count in self.positions)))


@dataclass(eq=False)
class Operations:
    """What happens at one site or block: edits and reads by variable, in order."""

    edits: dict[str, list[Placed]] = field(default_factory=dict)
    reads: dict[str, list[Placed]] = field(default_factory=dict)

    def all(self) -> list[Placed]:
        return [placed for table in (self.edits, self.reads) for listed in table.values() for placed in listed]


@dataclass(eq=False)
class Layer:
    """What one `reading` or `editing` block asked for, and the handle it gave out."""

    reads: tuple[Read, ...]
    edits: tuple[Edit, ...]
    spans: Mapping[str, SpanRows]
    prompt_length: int | None
    strict: bool
    opened: Opened
    dual: Dual | None = None
    opened_at: int = 0  # how many runs the model had made when the block was entered
    settled: set[tuple[int, SiteId]] = field(default_factory=set)  # what fired in the block, or was reported


class Plan:
    """All open layers of one model, resolved.

    Edits of outer blocks come before those of inner ones. Raises InputError for heads, shapes and options that cannot
    be meant, Refusal for what a site cannot do, before anything is put in place.
    """

    def __init__(self, table: SiteTable, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.sites: dict[SiteId, Operations] = {}
        self.blocks: dict[SiteId, Operations] = {}
        self.final: Operations = Operations()
        self.spans: dict[str, SpanRows] = {
            name: checked_span(name, rows) for layer in layers for name, rows in layer.spans.items()
        }
        lengths = [layer.prompt_length for layer in layers if layer.prompt_length is not None]
        self.prompt_length = lengths[-1] if lengths else None
        self._table = table
        self._dual = any(layer.dual is not None for layer in layers)
        # Kept here and not in the layers: a plan that is refused must leave the open one, with the same layers, alone.
        self._placed: list[tuple[Layer, Placed]] = []
        for layer in self.layers:
            for edit in layer.edits:
                self._place_edit(edit, layer)
            for read in layer.reads:
                self._place_read(read, layer)

    def start_run(self) -> None:
        for _, placed in self._placed:
            placed.reset()
        for layer in self.layers:
            for captured in layer.opened.captures.values():
                captured.clear()

    def finish_run(self, reached: Callable[[SiteId], bool]) -> None:
        """Report what fired; `reached(site)` says whether the run was meant to come by a site.

        Raises:
            NotFired: something met nothing.
        """
        for layer in self.layers:
            layer.opened.fired = tuple(placed.fired() for owner, placed in self._placed if owner is layer)
        for layer, placed in self._placed:
            if placed.calls:
                layer.settled.add(placed.key)
        for layer, placed in self._placed:
            if not placed.calls and reached(placed.site):
                self.excuse()
                raise NotFired(_did_not_fire(placed, "run"))
            if layer.strict and placed.fired().positions == 0 and reached(placed.site):
                raise NotFired(f"{placed.fired().what} met no position at {placed.site.label} (strict=True)")

    def excuse(self) -> None:
        """A run ended in an error of its own: what it did not come to is not reported a second time."""
        for layer, placed in self._placed:
            layer.settled.add(placed.key)

    def finish_layer(self, layer: Layer) -> None:
        """A block ends: runs of parts of the model (an encoder, say) may each have been in order and left sites out.

        Raises:
            NotFired: a site that the block asked for ran in none of them.
        """
        for owner, placed in self._placed:
            if owner is layer and placed.key not in layer.settled:
                raise NotFired(_did_not_fire(placed, "block"))

    # -- edits ------------------------------------------------------------------------------------------------------

    def _place_edit(self, edit: Edit, layer: Layer) -> None:
        for name in (edit.scope, edit.queries, edit.keys, getattr(edit.operation, "to", None)):
            self._require_span(name)
        if edit.stream == "second" and not self._dual:
            raise InputError(f"{edit!r} is for the second stream; open one with model.dual(...)")
        if edit.reads_other and not self._dual:
            raise InputError(f"{edit!r}: OTHER is the second stream of a dual run; open one with model.dual(...) first")
        if edit.reads_other and edit.stream == "second":
            raise InputError(f"{edit!r}: OTHER is what the first stream reads of the second, not the other way round")
        if edit.variable in edits_module.BLOCK_VARIABLES:
            self._place_block_edit(edit, layer)
            return
        want: Want = "group" if edit.variable in edits_module.GROUP_VARIABLES else "head"
        chosen = self._table.select(edit.heads, want)
        layout: Layout = "rows" if edit.variable in edits_module.ROW_VARIABLES else "values"
        sites = [self._table.site(label) for label in chosen.sites]
        widths = {site.head_dim if edit.variable in ("z", "v") else site.qk_dim for site in sites}
        for value in (*edit.operation.values, edit.strength):
            check_value(value, chosen.labels, widths, layout, f"edit.{edit.name}")
            if (
                isinstance(value, Tensor)
                and value.dim()
                and len(chosen) > 1
                and not self._table.names_in_order(edit.heads)
            ):
                raise InputError(
                    f"edit.{edit.name}: a tensor goes by the order of the head set, {', '.join(chosen.labels[:4])}, "
                    "and the heads are named in another one; pass a mapping from label to value, or sort both"
                )
        places = {label: slot for slot, label in enumerate(chosen.labels)}
        for site in sites:
            self._require_edit(site, edit)
            heads = chosen.at(site.id)
            names = tuple(member.label for member in chosen if member.site == site.id)
            slots = tuple(places[name] for name in names)
            variable = "z_projection" if edit.variable == "z" and at_projection(site, edit.point) else edit.variable
            variable = "rows" if edit.variable in edits_module.ROW_VARIABLES else variable
            placed = Placed(edit, site.id, heads, names, slots, len(chosen))
            self._file(self.sites, site.id, "edits", variable, placed, layer)

    def _place_block_edit(self, edit: Edit, layer: Layer) -> None:
        blocks = self._table.blocks(edit.heads)
        names = tuple(block.label for block in blocks)
        labels = [SiteId.parse(name) for name in names]
        sites = [site for site in self._table.sites if site.id.stack in {label.stack for label in labels}]
        for value in (*edit.operation.values, edit.strength):
            check_value(value, names, {site.d_model for site in sites if site.d_model}, "values", f"edit.{edit.name}")
        for slot, (block, label) in enumerate(zip(blocks, labels, strict=True)):
            self._require_block(block, edit.variable)
            self._require_scope(next(site for site in sites if site.id.stack == label.stack), edit, block.label)
            placed = Placed(edit, label, (0,), (block.label,), (slot,), len(blocks))
            self._file(self.blocks, label, "edits", edit.variable, placed, layer)

    def _require_span(self, name: Positions) -> None:
        if isinstance(name, str) and name.startswith("span:") and name.removeprefix("span:") not in self.spans:
            known = ", ".join(sorted(self.spans)) or "none"
            raise InputError(
                f"{name!r}: no such span was given (spans given: {known}); pass spans={{...}} with the block"
            )

    def _require_edit(self, site: Site, edit: Edit) -> None:
        if edit.variable in edits_module.ROW_VARIABLES:
            _require(site, "rows", f"edit.{edit.name} on {edit.variable}", "z edits still work")
        if edit.variable == "z":
            _require(site, "separable", f"edit.{edit.name} on z", "reads and pattern edits still work")
            _require(site, "projection", f"edit.{edit.name} on z", "reads and pattern edits still work")
        self._require_scope(site, edit, site.label)

    def _require_scope(self, site: Site, edit: Edit, label: str) -> None:
        if edit.scope == "decode" and not site.capabilities["cache"]:
            raise InputError(
                f"scope='decode' has no meaning at {label}: {site.capabilities['cache'].reason}; use scope='all'"
            )

    # -- reads ------------------------------------------------------------------------------------------------------

    def _place_read(self, read: Read, layer: Layer) -> None:
        self._require_span(read.queries)
        captured = layer.opened.captures.get(read.name)
        if captured is not None and captured.read is not read:
            raise InputError(f"two reads are named {read.name!r}; give one of them name='...'")
        if read.variable == "final_scale":
            self._place_final(read, layer)
            return
        if read.variable in reads_module.BLOCK_VARIABLES:
            blocks = self._table.blocks(read.heads)
            heads = {SiteId.parse(block.label): (0,) for block in blocks}
            captured = self._capture(read, heads, layer)
            for block in blocks:
                self._require_block(block, read.variable)
                label = SiteId.parse(block.label)
                placed = Placed(read, label, (0,), captured=captured)
                self._file(self.blocks, label, "reads", read.variable, placed, layer)
            return
        want: Want = "group" if read.variable in reads_module.GROUP_VARIABLES else "head"
        chosen = self._table.select(read.heads, want)
        captured = self._capture(read, {site: chosen.at(site) for site in chosen.sites}, layer)
        for label in chosen.sites:
            site = self._table.site(label)
            self._require_read(site, read)
            placed = Placed(read, label, chosen.at(label), captured=captured)
            variable = read.variable
            if variable in ("z", "gate") and at_projection(site, read.point):
                variable += "_projection"
            self._file(self.sites, label, "reads", variable, placed, layer)

    def _capture(self, read: Read, heads: Mapping[SiteId, tuple[int, ...]], layer: Layer) -> Captured:
        """Where a read's values go; the same place when the plan is made anew around an inner block."""
        return layer.opened.captures.setdefault(read.name, Captured(read, heads))

    def _require_read(self, site: Site, read: Read) -> None:
        if read.variable in ("scores", "rows", "statistics"):
            _require(site, "rows", f"read.{read.variable}", "read.z still works")
        if read.variable == "write" or (read.variable in ("z", "gate") and read.point == "post_gate"):
            _require(site, "separable", f"read.{read.variable}", "read.z(point='pre_gate') still works")
        for name in read.spans:
            if name not in self.spans:
                raise InputError(f"read.statistics wants span {name!r}, and spans= does not give it")

    def _place_final(self, read: Read, layer: Layer) -> None:
        if "main" not in self._table.sublayers.final_norms:
            raise Refusal("read.final_scale: no final norm was found after the last block of the main stack")
        captured = self._capture(read, {FINAL: (0,)}, layer)
        placed = Placed(read, FINAL, (0,), captured=captured)
        self.final.reads.setdefault("final_scale", []).append(placed)
        self._placed.append((layer, placed))

    # -- both -------------------------------------------------------------------------------------------------------

    def _file(
        self,
        table: dict[SiteId, Operations],
        label: SiteId,
        kind: str,
        variable: str,
        placed: Placed,
        layer: Layer,
    ) -> None:
        getattr(table.setdefault(label, Operations()), kind).setdefault(variable, []).append(placed)
        self._placed.append((layer, placed))

    def _require_block(self, block: Block, variable: str) -> None:
        if block.calls > 1:
            raise Refusal(
                f"{block.label} runs {block.calls} times in one forward (layers that share their weights), so its "
                f"{variable} has no one value; reads and edits of heads tell the calls apart (L0, L0@1, ...)"
            )
        if variable == "mlp" and block.mlp is None:
            raise Refusal(
                f"{block.label} has no feed-forward write to act on: {block.reasons.get('mlp', 'none found')}"
            )
        if variable != "mlp" and not block.residual:
            raise Refusal(
                f"{block.label} has no residual stream to act on: {block.reasons.get('residual', 'none found')}"
            )


def at_projection(site: Site, point: str) -> bool:
    """Whether z is taken at the output projection's input rather than from the kernel's output."""
    return site.gated and point == "post_gate"


def _did_not_fire(placed: Placed, where: str) -> str:
    return (
        f"{placed.fired().what} did not fire: {placed.site.label} never ran in this {where} "
        "(did the input reach that part of the model?)"
    )


def _require(site: Site, capability: str, what: str, instead: str) -> None:
    found = site.capabilities[capability]
    if not found:
        raise Refusal(f"{what} cannot be served at {site.label}: {found.reason}; {instead}")
