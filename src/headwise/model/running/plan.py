"""A plan: reads and edits resolved against the sites of one model, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headwise.errors import InputError, NotFired, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.model import edit as edits_module
from headwise.model import read as reads_module
from headwise.model.capture import Captured, Fired, Opened
from headwise.model.edit import Edit
from headwise.model.operations import Decided, Layout, Received, check_value
from headwise.model.positions import SpanRows, checked_span
from headwise.model.read import Read
from headwise.model.running.compiled import hint
from headwise.model.running.denoising import Denoising, require_loop
from headwise.model.running.requirements import require_block, require_edit, require_read, require_scope, require_span
from headwise.model.scopes import Scope
from headwise.model.site import Site
from headwise.model.table import SiteTable, Want

if TYPE_CHECKING:
    from headwise.model.running.dual import Dual
    from headwise.model.running.rescoring import Rescoring

AT_PROJECTION = frozenset({"z_projection", "gate_projection", "write"})
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
    came: bool = False  # whether its steps and its branch have come
    positions: list[int | Tensor] = field(default_factory=list)
    affine: tuple[Any, Any] | None = None  # kept by `affine.affinely`

    def met(self, positions: int | Tensor) -> None:
        self.calls += 1
        self.positions.append(positions)

    @property
    def key(self) -> tuple[int, SiteId]:
        """What stays the same when the plan is made anew around an inner block."""
        return id(self.request), self.site

    @property
    def when(self) -> Scope:
        when: Scope = self.request.when
        return when

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

    @property
    def at_kernel(self) -> bool:
        """Whether anything is to be done at the attention call itself, and not only where z enters its projection."""
        return bool({*self.edits, *self.reads} - AT_PROJECTION)

    def now(self, denoising: Denoising | None, variables: Callable[[str], bool]) -> Operations:
        """What is to be done in this step and branch of a loop; what else there is of `variables` met no position."""
        if denoising is None or not any(
            p.when.timed for ps in (*self.edits.values(), *self.reads.values()) for p in ps
        ):
            return self

        def chosen(listed: Mapping[str, list[Placed]]) -> dict[str, list[Placed]]:
            kept: dict[str, list[Placed]] = {}
            for variable, all_placed in listed.items():
                for placed in all_placed:
                    if denoising.holds(placed.when):
                        placed.came = True
                        kept.setdefault(variable, []).append(placed)
                    elif variables(variable):
                        placed.met(0)
            return kept

        return Operations(chosen(self.edits), chosen(self.reads))


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
    denoising: Denoising | None = None
    rescoring: Rescoring | None = None
    opened_at: int = 0  # how many runs the model had made when the block was entered
    settled: set[tuple[int, SiteId]] = field(default_factory=set)  # what fired in the block, or was reported
    came: set[tuple[int, SiteId]] = field(default_factory=set)  # whose steps and branch came
    broken_off: bool = False  # whether a run ended in an error of its own, so that a loop did not come to its end
    tallies: dict[tuple[int, SiteId], tuple[int, list[int | Tensor]]] = field(
        default_factory=dict
    )  # of the loop so far


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
        own_spans = {kind for site in table.sites for kind in (*site.kinds, *site.key_spans)}
        if taken := sorted(own_spans & self.spans.keys()):
            raise InputError(
                f"a span cannot be named {taken[0]!r}, which this model's own tokens are called; rename it"
            )
        self._known_spans = own_spans | table.met_spans | self.spans.keys()
        self._dual = any(layer.dual is not None for layer in layers)
        self.denoising = next((layer.denoising for layer in layers if layer.denoising is not None), None)
        # Kept here and not in the layers: a plan that is refused must leave the open one, with the same layers, alone.
        self._placed: list[tuple[Layer, Placed]] = []
        self.decided: dict[
            tuple[str, tuple[int, ...]], tuple[Decided, HeadSet]
        ] = {}  # by run, with the heads it is for
        self.lost: dict[SiteId, str] = {}  # what ran at a watched site without becoming a call, and why
        for layer in self.layers:
            for edit in layer.edits:
                self._place_edit(edit, layer)
            for read in layer.reads:
                self._place_read(read, layer)

    def start_run(self) -> None:
        for _, placed in self._placed:
            placed.reset()
        for layer in self.layers:
            layer.tallies.clear()
            for captured in layer.opened.captures.values():
                captured.clear()
                captured.looped = self.denoising is not None

    def go_on(self) -> None:
        """The next call of a denoising loop: counts and values are the loop's, also if blocks were opened since."""
        for layer, placed in self._placed:
            calls, positions = layer.tallies.get(placed.key, (0, []))
            placed.calls, placed.positions = calls, list(positions)

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
            if placed.came:
                layer.came.add(placed.key)
            layer.tallies[placed.key] = (placed.calls, list(placed.positions))
        for layer, placed in self._placed:
            if not placed.calls and reached(placed.site):
                self.excuse()
                raise NotFired(self._did_not_fire(placed, "run"))
            if self.denoising is None and layer.strict and not placed.fired().positions and reached(placed.site):
                raise NotFired(f"{placed.fired().what} met no position at {placed.site.label} (strict=True)")

    def excuse(self) -> None:
        """A run ended in an error of its own: what it did not come to is not reported a second time."""
        for layer, placed in self._placed:
            layer.settled.add(placed.key)
            layer.broken_off = True

    def finish_layer(self, layer: Layer) -> None:
        """A block ends: runs of parts of the model (an encoder, say) may each have been in order and left sites out.

        Raises:
            NotFired: a site that the block asked for ran in none of them; or steps or a branch of a loop never came.
        """
        for owner, placed in self._placed:
            if owner is not layer:
                continue
            if placed.key not in layer.settled:
                raise NotFired(self._did_not_fire(placed, "block"))
            if self.denoising is None or layer.broken_off:
                continue
            if placed.when.timed and placed.key not in layer.came:
                raise NotFired(f"{placed.fired().what} did not fire: {self.denoising.why_never(placed.when)}")
            if layer.strict and not sum(map(int, layer.tallies[placed.key][1])):
                raise NotFired(f"{placed.fired().what} met no position at {placed.site.label} (strict=True)")

    def _did_not_fire(self, placed: Placed, where: str) -> str:
        what, label = placed.fired().what, placed.site.label
        if placed.site in self.lost:
            return (
                f"{what} did not fire: {label} ran in this {where}, and not as in the probe forward "
                f"({self.lost[placed.site]}); attach with an example= like these inputs, to see what can be served"
            )
        return (
            f"{what} did not fire: {label} never ran in this {where} "
            f"(did the input reach that part of the model?){hint()}"
        )

    # -- edits ------------------------------------------------------------------------------------------------------

    def _place_edit(self, edit: Edit, layer: Layer) -> None:
        for name in (edit.when.place, edit.queries, edit.keys, getattr(edit.operation, "to", None)):
            if not isinstance(name, Received):
                require_span(name, self._known_spans)
        require_loop(self.denoising, edit.when, repr(edit))
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
        for decision in edit.decisions:
            require_span(f"span:{decision.without}", self._known_spans)
            _, others = self.decided.get(decision.run, (decision, chosen))
            self.decided[decision.run] = decision, others | chosen
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
            require_edit(site, edit)
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
            require_block(block, edit.variable)
            require_scope(next(site for site in sites if site.id.stack == label.stack), edit, block.label)
            placed = Placed(edit, label, (0,), (block.label,), (slot,), len(blocks))
            self._file(self.blocks, label, "edits", edit.variable, placed, layer)

    # -- reads ------------------------------------------------------------------------------------------------------

    def _place_read(self, read: Read, layer: Layer) -> None:
        require_span(read.queries, self._known_spans)
        require_loop(self.denoising, read.when, f"read.{read.name}")
        if read.when.branch is not None and self.denoising is not None and self.denoising.guidance == "batch":
            raise Refusal(
                f"read.{read.name}: with guidance='batch' the branches are rows of one call, and reads keep all rows; "
                f"leave {read.scope!r} out and take the branch's rows of what was read"
            )
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
                require_block(block, read.variable)
                label = SiteId.parse(block.label)
                placed = Placed(read, label, (0,), captured=captured)
                self._file(self.blocks, label, "reads", read.variable, placed, layer)
            return
        want: Want = "group" if read.variable in reads_module.GROUP_VARIABLES else "head"
        chosen = self._table.select(read.heads, want)
        captured = self._capture(read, {site: chosen.at(site) for site in chosen.sites}, layer)
        for label in chosen.sites:
            site = self._table.site(label)
            require_read(site, read, self._known_spans)
            placed = Placed(read, label, chosen.at(label), captured=captured)
            variable = read.variable
            if variable in ("z", "gate") and at_projection(site, read.point):
                variable += "_projection"
            if variable == "write" and site.by_span:
                variable = "write_by_span"
            self._file(self.sites, label, "reads", variable, placed, layer)

    def _capture(self, read: Read, heads: Mapping[SiteId, tuple[int, ...]], layer: Layer) -> Captured:
        """Where a read's values go; the same place when the plan is made anew around an inner block."""
        return layer.opened.captures.setdefault(read.name, Captured(read, heads))

    def _place_final(self, read: Read, layer: Layer) -> None:
        if "main" not in self._table.sublayers.final_norms:
            raise Refusal(
                "read.final_scale: no final norm was found after the last block of the main stack (one that is "
                "offloaded is not measured: keep it in memory, by device_map)"
            )
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


def at_projection(site: Site, point: str) -> bool:
    """Whether z is taken at the output projection's input rather than from the kernel's output.

    Where both hold the same values, the projection's hook is what a watched site is served by at full speed.
    """
    if site.gated:
        return point == "post_gate"
    return site.route == "watched" and site.projection is not None
