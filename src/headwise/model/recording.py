"""One recorded forward of a model: its attention calls, and which module takes each one's z in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.model import seam
from headwise.model.calls import AttentionCall, kernel_name
from headwise.model.rows import mix_values, pattern_rows, score_rows, visible
from headwise.model.site import Capability, Kind

# Largest difference, relative to the largest value, at which rows times values count as the kernel's z. Eager kernels
# take softmax in fp32 in an fp64 model, too.
ROW_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(eq=False)
class Seen:
    """One attention call of the probe forward. `geometry` is what all later calls of the site share."""

    module: nn.Module
    z: Tensor
    n_heads: int
    n_kv_heads: int
    qk_dim: int
    head_dim: int
    n_queries: int
    n_keys: int
    kernel: str
    kind: Kind
    rows: Capability
    causal: bool
    projection: nn.Module | None = None
    width: int = 0
    taken_with: int | None = None  # which call of the projection took it in, together with other pieces


class Recorder:
    """Notes every attention call, and which module first takes its z in unchanged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[Seen] = []
        self._waiting: list[Seen] = []
        self._meetings = 0

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
    ) -> Any:
        output = base(module, query, key, value, attention_mask, *args, **options)
        z = output[0]
        call = AttentionCall(module, query, key, value, attention_mask, options, kernel_name(base))
        rows, causal = _check_rows(call, z)
        seen = Seen(
            module=module,
            z=z,
            n_heads=int(query.shape[1]),
            n_kv_heads=int(key.shape[1]),
            qk_dim=int(query.shape[-1]),
            head_dim=int(value.shape[-1]),
            n_queries=int(query.shape[2]),
            n_keys=int(key.shape[2]),
            kernel=call.kernel,
            kind="self" if query.shape[2] == key.shape[2] else "cross",
            rows=rows,
            causal=causal,
        )
        self.seen.append(seen)
        self._waiting.append(seen)
        return output

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._meet, with_kwargs=True) for m in matrices(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _meet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = entering(args, kwargs)
        if x is None:
            return
        for start in range(len(self._waiting)):
            pieces = [seen for seen in self._waiting[start:] if seen.module is self._waiting[start].module]
            for taken in (pieces[:1], pieces):
                joined = torch.cat([seen.z for seen in taken], dim=1) if len(taken) > 1 else taken[0].z
                if joined.numel() == x.numel() and torch.equal(joined.reshape(-1), x.reshape(-1)):
                    self._meetings += 1
                    for seen in taken:
                        seen.projection, seen.width = module, x.shape[-1]
                        seen.taken_with = self._meetings if len(taken) > 1 else None
                        self._waiting.remove(seen)
                    return


def _check_rows(call: AttentionCall, z: Tensor) -> tuple[Capability, bool]:
    """Whether rows times values give the kernel's z, and whether every query sees only keys up to itself."""
    try:
        scored = score_rows(call, None, torch.arange(call.query.shape[2]))
        rebuilt = mix_values(pattern_rows(scored).weights, call, None)
    except Refusal as refusal:
        return Capability(False, str(refusal)), False
    except (RuntimeError, InputError) as error:
        return Capability(False, f"its scores have a form that is not known ({one_line(error)})"), False
    seen = visible(scored)
    alive = seen.any(-1).transpose(1, 2)[..., None]  # a padding query that sees nothing says nothing
    difference = torch.where(alive, rebuilt - z, torch.zeros_like(rebuilt)).abs().max() if z.numel() else 0.0
    size = torch.where(alive, z, torch.zeros_like(z)).abs().max().clamp(min=1e-12) if z.numel() else 1.0
    off = float(difference / size)
    future = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).triu(1)
    causal = seen.shape[-2] > 1 and seen.shape[-2] == seen.shape[-1] and not bool((seen & future).any())
    if off <= ROW_TOLERANCE.get(z.dtype, 1e-3):
        return Capability(True), causal
    return Capability(False, f"rows times values differ from the kernel's z by {off:.1e} of its size"), causal


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and the random state as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    devices = list({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def listening(model: nn.Module, handler: Callable[..., Any]) -> Iterator[None]:
    switch = seam.Switch()
    switch.handler = handler
    keys = seam.connect(model.modules(), switch)
    try:
        yield
    finally:
        seam.disconnect(keys)


def matrices(model: nn.Module) -> list[nn.Module]:
    """Modules with a 2-D weight: linear maps, also packed and wrapped ones."""
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found.append(module)
    return found


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    return values[0] if values and values[0].dim() > 1 else None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
