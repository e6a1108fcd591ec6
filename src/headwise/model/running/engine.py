"""The engine: carries a plan out, at attention calls and at the few module hooks that a plan needs.

Calls come by the seam, or from watched modules (see `watching`), and are served alike, in this order: edit k and v,
edit q, call the kernel, replace the edited heads' z by recomputed rows times values where scores or patterns are
edited, edit z, read. A site the plan does not name gets the kernel's own result. What a plan asks of the z of a watched
site, and no more, is done by the hook on its projection, and nothing is watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.heads import MAIN, SiteId
from headwise.model.attention.calls import AttentionCall, kernel_name
from headwise.model.attention.watching import Lost, Watching, of_groups, unheard
from headwise.model.finding.sublayers import Block, first_tensor, with_first_tensor
from headwise.model.finding.token_spans import lengths_given
from headwise.model.running import rowwork, valuework
from headwise.model.running.compiled import leave_graph
from headwise.model.running.decided import factors_now, settled_factors
from headwise.model.running.in_place import require_in_place
from headwise.model.running.lowering import through
from headwise.model.running.plan import AT_PROJECTION, FINAL, Operations, Placed, Plan
from headwise.model.running.projection import heads_of, join_heads, write_of
from headwise.model.running.run import PROJECTION, Run
from headwise.model.running.spans import kinds_of_queries
from headwise.model.running.valuework import Stage
from headwise.model.site import Site
from headwise.model.table import SiteTable


class Engine:
    """Carries one plan out on one model; the attached model makes a new one whenever its open layers change."""

    def __init__(
        self,
        root: nn.Module,
        table: SiteTable,
        sites: Mapping[int, tuple[Site, ...]],
        plan: Plan,
        current: Callable[[], Run],
    ) -> None:
        self.root = root
        self.table = table
        self.plan = plan
        self._sites = sites
        self._current = current
        self._hooks: list[Any] = []
        self._hooked: dict[str, nn.Module] = {}

    # -- attention calls --------------------------------------------------------------------------------------------

    def attend(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """Stand in for the kernel at the seam: same arguments, same return."""
        leave_graph()
        with unheard():  # what a kernel is made of is no call of a watched module around it
            return self.serve(*args, **options)

    def serve(
        self,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Serve one attention call, of either route."""
        sites = self._sites.get(id(module))
        if sites is None:
            return base(module, query, key, value, attention_mask, *args, **options)  # type: ignore[no-any-return]
        run = self._current()
        count = run.count(sites[0].tower, module, replay=in_backward())
        site, chunk = sites[count % len(sites)], count // len(sites)
        operations = self.plan.sites.get(site.id)
        if operations is None:
            return base(module, query, key, value, attention_mask, *args, **options)  # type: ignore[no-any-return]
        if run.settled and (factors := factors_now(run, site, query, chunk)) is not None:
            z, *rest = base(module, query, key, value, attention_mask, *args, **options)
            run.shapes[site.id] = (len(query), query.shape[2])
            operations.edits["z"][0].met(len(query) * query.shape[2])
            return (z * factors, *rest)
        operations = operations.now(self.plan.denoising, lambda variable: variable not in AT_PROJECTION)
        if options.get("dropout"):
            raise Refusal(f"{site.label} applies attention dropout {options['dropout']}: call model.eval() first")
        if site.route == "watched":
            base, key, value = of_groups(base, key, value, site.n_kv_heads)
        window = run.window(site, len(query), query.shape[2], key.shape[2], query.device)
        stage = Stage(site, run, window, len(query), query.device, chunk=chunk)
        previous = run.shapes.get(site.id, (0, 0))[1] if site.chunked and chunk else 0
        run.shapes[site.id] = (len(query), previous + query.shape[2])

        edits, reads = operations.edits, operations.reads
        key = valuework.across(key, edits.get("k", []), stage, keys=True)
        value = valuework.across(value, edits.get("v", []), stage, keys=True)
        query = valuework.across(query, edits.get("q", []), stage)
        query = valuework.read_across(query, reads.get("q", []), stage)
        key = valuework.read_new_keys(key, reads.get("k", []), stage)
        value = valuework.read_new_keys(value, reads.get("v", []), stage)

        z, *rest = base(module, query, key, value, attention_mask, *args, **options)
        if any(name in operations.reads or name in operations.edits for name in rowwork.VARIABLES):
            named = {**_positional_options(base, args), **options}
            call = AttentionCall(module, query, key, value, attention_mask, named, kernel_name(base))
            z = rowwork.serve(call, z, operations, stage)
        z = valuework.edited(z, edits.get("z", []), stage)
        if (factors := settled_factors(operations, z, stage)) is not None:
            run.settled[site.id] = factors
        z = valuework.read(z, reads.get("z", []), stage)
        z = valuework.read_gate(z, reads.get("gate", []), stage)
        for placed in reads.get("write_by_span", []):
            valuework.keep(placed, partial(self._writes_by_span, site, placed, stage), z, stage)
        return (z, *rest)

    def answering(self, site: Site, entering: Tensor) -> Tensor:
        """What enters the projection of `site` after the plan's edits of z, where no attention ran in front of it."""
        shape = (int(entering.shape[0]), int(entering.shape[1]))
        self._current().shapes[site.id] = shape
        edits = self.plan.sites[site.id].edits.get("z", []) if site.id in self.plan.sites else []
        if not edits:
            return entering
        z = heads_of(entering, site, *shape)
        return join_heads(valuework.edited(z, edits, self._stage(site, *shape, entering.device)), entering, site)

    def _writes_by_span(self, site: Site, placed: Placed, stage: Stage, z: Tensor) -> Tensor:
        """What the heads write where each kind of tokens has a projection of its own, and 0 where it has none."""
        pick = valuework.pick_of(placed, stage)
        assert pick is not None
        kinds = kinds_of_queries(stage.window, site.kinds, len(z))
        kinds = pick.at_positions(kinds[:, :, None])[..., None]
        written = z.new_zeros(*z.shape[:3], site.d_model)
        for number, span in enumerate(site.spans):
            if span.projection is not None:
                own = write_of(z, self.root.get_submodule(span.projection), site, placed.heads)
                written = torch.where(kinds == number, own, written)
        return written

    # -- module hooks -----------------------------------------------------------------------------------------------

    def hook(self) -> None:
        """Put on the module hooks that this plan needs, and watch what has to be watched."""
        self._hooks.append(Watching(map(self._module_at, self._to_be_watched()), self.serve, self._note_lost))
        for site in map(self.table.site, self.plan.sites):
            if site.joined_in is not None:
                joined_in = self._module_at(site.joined_in)
                self._hooks.append(joined_in.register_forward_pre_hook(self._note_lengths(site), with_kwargs=True))
        for name, sites in self._sites_by_projection().items():
            projection = self._module_at(name)
            # Before hooks that are there already: lowered edits come after those of plans, at every kind of site.
            self._hooks.append(projection.register_forward_pre_hook(self._at_projection(sites), prepend=True))
            if any(placed.read.grad for site in sites for placed in self._reads(site, "write")):
                self._hooks.append(projection.register_forward_hook(self._after_projection(sites)))
        for label, operations in self.plan.blocks.items():
            self._hook_block(self.table.block(label.label), operations)
        if self.plan.final.reads:
            norm = self.table.sublayers.final_norms["main"]
            module = self._module_at(norm.module)
            self._hooks.append(module.register_forward_pre_hook(self._at_final_norm(norm)))

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._hooked.clear()

    def require_in_place(self) -> None:
        """Raises PlanConflict if a module that has hooks of this plan was replaced or wrapped since."""
        for path, module in self._hooked.items():
            require_in_place(self.root, path, module, "hooks of the open plan")

    def _module_at(self, path: str) -> nn.Module:
        self._hooked[path] = self.root.get_submodule(path)
        return self._hooked[path]

    def _note_lost(self, lost: Lost) -> None:
        for site in self._sites.get(id(lost.module), ()):
            self.plan.lost[site.id] = lost.reason

    def _to_be_watched(self) -> list[str]:
        """Paths of modules of watched sites where this plan does what their projection's hook cannot.

        Those inside another one of them are watched as well, so that their calls are not taken for the outer one's.
        """
        watched = [site for site in self.table.sites if site.route == "watched"]
        asked = {site.module for site in watched if self._asks_for_calls(site)}
        around = tuple(f"{path}." if path else "" for path in asked)
        return [
            path for path in dict.fromkeys(site.module for site in watched) if path in asked or path.startswith(around)
        ]

    def _asks_for_calls(self, site: Site) -> bool:
        operations = self.plan.sites.get(site.id)
        return operations is not None and (operations.at_kernel or site.entering == "other")

    def _sites_by_projection(self) -> dict[str, tuple[Site, ...]]:
        """Projections at which this plan has something to do, with all the sites that they serve in order of calls."""
        wanted = {"z_projection", "gate_projection", "write"}
        named = [self.table.site(label) for label, ops in self.plan.sites.items() if wanted & {*ops.edits, *ops.reads}]
        names = dict.fromkeys(site.projection for site in named if site.projection is not None)
        return {name: tuple(site for site in self.table.sites if site.projection == name) for name in names}

    def _reads(self, site: Site, variable: str) -> list[Placed]:
        operations = self.plan.sites.get(site.id)
        return [] if operations is None else operations.reads.get(variable, [])

    def _stage(self, site: Site, rows: int, positions: int, device: torch.device, label: SiteId | None = None) -> Stage:
        run = self._current()
        return Stage(site, run, run.window(site, rows, positions, positions, device), rows, device, label)

    def _at_projection(self, sites: tuple[Site, ...]) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            leave_graph()
            run = self._current()
            count = run.count(sites[0].tower + PROJECTION, module, replay=in_backward())
            site = sites[count % len(sites)]
            operations = self.plan.sites.get(site.id)
            if site.route == "watched" and site.entering != "other":
                shape = args[0].shape
                run.shapes[site.id] = (shape[1], shape[0]) if site.entering == "positions" else (shape[0], shape[1])
            if operations is None or site.id not in run.shapes:
                return None
            operations = operations.now(self.plan.denoising, lambda variable: variable in AT_PROJECTION)
            stage = self._stage(site, *run.shapes[site.id], args[0].device)
            z = before = heads_of(args[0], site, *run.shapes[site.id])
            z = valuework.edited(z, operations.edits.get("z_projection", []), stage)
            z = valuework.read(z, operations.reads.get("z_projection", []), stage)
            z = valuework.read_gate(z, operations.reads.get("gate_projection", []), stage)
            joined = args[0] if z is before else join_heads(z, args[0], site)
            writes = operations.reads.get("write", [])
            written = heads_of(through(module, joined), site, *run.shapes[site.id]) if writes else z
            for placed in writes:
                make = partial(write_of, projection=module, site=site, heads=placed.heads)
                valuework.keep(placed, make, written, stage)
            return None if z is before else (joined, *args[1:])

        return pre_hook

    def _after_projection(self, sites: tuple[Site, ...]) -> Callable[..., Any]:
        def post_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            run = self._current()
            site = sites[(run.calls[sites[0].tower + PROJECTION][id(module)] - 1) % len(sites)]
            rows, positions = run.shapes[site.id]
            stage = self._stage(site, rows, positions, output.device)

            def tap(tapped: Tensor, stage: Stage) -> Tensor:
                operations = self.plan.sites[site.id].now(self.plan.denoising, lambda variable: False)
                for placed in operations.reads.get("write", []):
                    pick = valuework.pick_of(placed, stage)
                    if placed.read.grad and pick is not None:
                        tapped = valuework.tap(tapped, placed, stage, pick.at_positions)
                return tapped

            turned = site.entering == "positions"
            flat = output.transpose(0, 1)[:, :, None] if turned else output.reshape(rows, positions, 1, -1)
            tapped = valuework.on_first(flat, stage, tap)
            if tapped is flat:
                return output
            return (tapped.transpose(0, 1) if turned else tapped).reshape(output.shape)

        return post_hook

    def _note_lengths(self, site: Site) -> Callable[..., None]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            lengths = lengths_given(module, args, kwargs)
            if lengths is not None:
                self._current().lengths[site.id] = lengths

        return pre_hook

    def _hook_block(self, block: Block, operations: Operations) -> None:
        module = self._module_at(block.module)
        if "residual_pre" in operations.edits or "residual_pre" in operations.reads:
            self._hooks.append(
                module.register_forward_pre_hook(self._before_block(block, operations), with_kwargs=True)
            )
        if "residual_post" in operations.edits or "residual_post" in operations.reads:
            self._hooks.append(module.register_forward_hook(self._after(block, operations, "residual_post", 1.0)))
        if "mlp" in operations.edits or "mlp" in operations.reads:
            assert block.mlp is not None
            mlp = self._module_at(block.mlp)
            self._hooks.append(mlp.register_forward_hook(self._after(block, operations, "mlp", block.mlp_scale)))

    def _before_block(self, block: Block, operations: Operations) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = block.input_key
            stream = args[key] if isinstance(key, int) else kwargs[str(key)]
            changed = self._through(stream, block, operations, "residual_pre")
            if changed is stream:
                return None
            if isinstance(key, int):
                return (*args[:key], changed, *args[key + 1 :]), kwargs
            return args, {**kwargs, str(key): changed}

        return pre_hook

    def _after(self, block: Block, operations: Operations, variable: str, scale: float) -> Callable[..., Any]:
        def post_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                raise InputError(f"{block.label} returned no tensor where its {variable} is")
            changed = self._through(tensor, block, operations, variable, scale)
            return output if changed is tensor else with_first_tensor(output, changed)

        return post_hook

    def _through(
        self, tensor: Tensor, block: Block, operations: Operations, variable: str, scale: float = 1.0
    ) -> Tensor:
        """Edit and read one block's tensor, seen as `[batch, position, 1, d_model]` in units of the stream."""
        label, run = SiteId.parse(block.label), self._current()
        operations = operations.now(self.plan.denoising, lambda at: at == variable)
        site = self._site_of_block(block, label)
        frame = run.frames.get(site.tower)
        turned = self._positions_first(tensor, site)
        given, tensor = tensor, tensor.transpose(0, 1) if turned else tensor
        if tensor.dim() == 2 and frame is not None and len(tensor) == frame.batch * run.streams * frame.length:
            rows, positions = frame.batch * run.streams, frame.length
        elif tensor.dim() == 3:
            rows, positions = int(tensor.shape[0]), int(tensor.shape[1])
        else:
            rows, positions = 1, int(tensor.reshape(-1, tensor.shape[-1]).shape[0])
        plain = tensor.reshape(rows, positions, 1, -1)
        stream = plain if scale == 1.0 else plain * scale
        stage = self._stage(site, rows, positions, tensor.device, label)
        changed = valuework.edited(stream, operations.edits.get(variable, []), stage)
        changed = valuework.read(changed, operations.reads.get(variable, []), stage, squeeze=True)
        if changed is stream:
            return given
        changed = (changed if scale == 1.0 else changed / scale).reshape(tensor.shape)
        return changed.transpose(0, 1) if turned else changed

    def _positions_first(self, tensor: Tensor, site: Site) -> bool:
        """Whether a stream is laid out `[position, batch, ...]`, as what enters its site's projection is."""
        if site.entering != "positions" or tensor.dim() != 3:
            return False
        run = self._current()
        frame = run.frames.get(site.tower)
        rows = None if frame is None else (frame.batch * run.streams, frame.length)
        return rows is None or rows[0] == rows[1] or tuple(tensor.shape[:2]) != rows

    def _site_of_block(self, block: Block, label: SiteId) -> Site:
        """Any site of the block's stack knows the tower whose frame places the block's tokens."""
        stack = [site for site in self.table.sites if site.id.stack == label.stack and site.kind == "self"]
        inside = [site for site in stack if site.module.startswith(block.module + ".")]
        return replace((inside or stack)[0], id=label, chunked=False)

    def _at_final_norm(self, norm: Any) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            main = next(site for site in self.table.sites if site.id.stack == MAIN)
            stream = args[0].transpose(0, 1) if self._positions_first(args[0], main) else args[0]
            stage = self._stage(main, int(stream.shape[0]), int(stream.shape[1]), stream.device, FINAL)
            final = self.plan.final.now(self.plan.denoising, lambda variable: True)
            for placed in final.reads.get("final_scale", []):
                valuework.keep(placed, lambda stream: norm.scale(stream[:, :, 0]), stream[:, :, None], stage)

        return pre_hook


def in_backward() -> bool:
    """Whether autograd is running in this thread: an attention call then is a recomputed one (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


@lru_cache(maxsize=64)
def _positional_names(base: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(base).parameters)[5:]


def _positional_options(base: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_positional_names(base), args, strict=False)) if args else {}
