"""The engine: carries a plan out, at the seam and at the few module hooks that a plan needs.

At the seam, in this order: edit k and v, edit q, call the kernel, replace the edited heads' z by recomputed rows times
values where scores or patterns are edited, edit z, read. A site the plan does not name gets the kernel's own result.
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
from headwise.model import rowwork, valuework
from headwise.model.calls import AttentionCall, kernel_name
from headwise.model.plan import FINAL, Operations, Placed, Plan
from headwise.model.projection import heads_of, join_heads, write_of
from headwise.model.run import PROJECTION, Run
from headwise.model.site import Site
from headwise.model.sublayers import Block, first_tensor, with_first_tensor
from headwise.model.table import SiteTable
from headwise.model.valuework import Stage


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

    # -- the seam ---------------------------------------------------------------------------------------------------

    def attend(
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
        """Stand in for the kernel: same arguments, same return."""
        sites = self._sites.get(id(module))
        if sites is None:
            return base(module, query, key, value, attention_mask, *args, **options)  # type: ignore[no-any-return]
        run = self._current()
        count = run.count(sites[0].tower, module, replay=in_backward())
        site, chunk = sites[count % len(sites)], count // len(sites)
        operations = self.plan.sites.get(site.id)
        if operations is None:
            return base(module, query, key, value, attention_mask, *args, **options)  # type: ignore[no-any-return]
        if options.get("dropout"):
            raise Refusal(f"{site.label} applies attention dropout {options['dropout']}: call model.eval() first")
        window = run.window(site, len(query), query.shape[2], key.shape[2])
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
        z = valuework.read(z, reads.get("z", []), stage)
        z = valuework.read_gate(z, reads.get("gate", []), stage)
        return (z, *rest)

    # -- module hooks -----------------------------------------------------------------------------------------------

    def hook(self) -> None:
        """Put on the module hooks that this plan needs."""
        for name, sites in self._sites_by_projection().items():
            projection = self.root.get_submodule(name)
            self._hooks.append(projection.register_forward_pre_hook(self._at_projection(sites)))
            if any(placed.read.grad for site in sites for placed in self._reads(site, "write")):
                self._hooks.append(projection.register_forward_hook(self._after_projection(sites)))
        for label, operations in self.plan.blocks.items():
            self._hook_block(self.table.block(label.label), operations)
        if self.plan.final.reads:
            norm = self.table.sublayers.final_norms["main"]
            module = self.root.get_submodule(norm.module)
            self._hooks.append(module.register_forward_pre_hook(self._at_final_norm(norm)))

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

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
        return Stage(site, run, run.window(site, rows, positions, positions), rows, device, label)

    def _at_projection(self, sites: tuple[Site, ...]) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            run = self._current()
            count = run.count(sites[0].tower + PROJECTION, module, replay=in_backward())
            site = sites[count % len(sites)]
            operations = self.plan.sites.get(site.id)
            if operations is None or site.id not in run.shapes:
                return None
            stage = self._stage(site, *run.shapes[site.id], args[0].device)
            z = before = heads_of(args[0], site, *run.shapes[site.id])
            z = valuework.edited(z, operations.edits.get("z_projection", []), stage)
            z = valuework.read(z, operations.reads.get("z_projection", []), stage)
            z = valuework.read_gate(z, operations.reads.get("gate_projection", []), stage)
            for placed in operations.reads.get("write", []):
                valuework.keep(placed, partial(write_of, projection=module, site=site, heads=placed.heads), z, stage)
            return None if z is before else (join_heads(z, args[0], site), *args[1:])

        return pre_hook

    def _after_projection(self, sites: tuple[Site, ...]) -> Callable[..., Any]:
        def post_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            run = self._current()
            site = sites[(run.calls[sites[0].tower + PROJECTION][id(module)] - 1) % len(sites)]
            rows, positions = run.shapes[site.id]
            stage = self._stage(site, rows, positions, output.device)

            def tap(tapped: Tensor, stage: Stage) -> Tensor:
                for placed in self._reads(site, "write"):
                    pick = valuework.pick_of(placed, stage)
                    if placed.read.grad and pick is not None:
                        tapped = valuework.tap(tapped, placed, stage, pick.at_positions)
                return tapped

            flat = output.reshape(rows, positions, 1, -1)
            tapped = valuework.on_first(flat, stage, tap)
            return output if tapped is flat else tapped.reshape(output.shape)

        return post_hook

    def _hook_block(self, block: Block, operations: Operations) -> None:
        module = self.root.get_submodule(block.module)
        if "residual_pre" in operations.edits or "residual_pre" in operations.reads:
            self._hooks.append(
                module.register_forward_pre_hook(self._before_block(block, operations), with_kwargs=True)
            )
        if "residual_post" in operations.edits or "residual_post" in operations.reads:
            self._hooks.append(module.register_forward_hook(self._after(block, operations, "residual_post", 1.0)))
        if "mlp" in operations.edits or "mlp" in operations.reads:
            assert block.mlp is not None
            mlp = self.root.get_submodule(block.mlp)
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
        site = self._site_of_block(block, label)
        frame = run.frames.get(site.tower)
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
            return tensor
        return (changed if scale == 1.0 else changed / scale).reshape(tensor.shape)

    def _site_of_block(self, block: Block, label: SiteId) -> Site:
        """Any site of the block's stack knows the tower whose frame places the block's tokens."""
        stack = [site for site in self.table.sites if site.id.stack == label.stack and site.kind == "self"]
        inside = [site for site in stack if site.module.startswith(block.module + ".")]
        return replace((inside or stack)[0], id=label, chunked=False)

    def _at_final_norm(self, norm: Any) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            main = next(site for site in self.table.sites if site.id.stack == MAIN)
            stage = self._stage(main, int(args[0].shape[0]), int(args[0].shape[1]), args[0].device, FINAL)
            for placed in self.plan.final.reads["final_scale"]:
                valuework.keep(placed, lambda stream: norm.scale(stream[:, :, 0]), args[0][:, :, None], stage)

        return pre_hook


def in_backward() -> bool:
    """Whether autograd is running in this thread: an attention call then is a recomputed one (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


@lru_cache(maxsize=64)
def _positional_names(base: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(base).parameters)[5:]


def _positional_options(base: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_positional_names(base), args, strict=False)) if args else {}
