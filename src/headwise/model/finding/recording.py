"""One recorded forward of a model: its attention calls, and which module takes each one's z in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.model.attention import seam
from headwise.model.attention.calls import AttentionCall, kernel_name
from headwise.model.attention.pattern_uses import PatternUses
from headwise.model.attention.rows import mix_values, pattern_rows, score_rows, visible
from headwise.model.attention.watching import Lost, Running, Watching, of_groups, unheard
from headwise.model.running.compiled import uncompiled
from headwise.model.site import Capability, Entering, Kind, Route

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
    values: Capability
    causal: bool
    route: Route = "registry"
    entering: Entering = "rows"
    projection: nn.Module | None = None
    also: nn.Module | None = None  # another module with a matrix that takes its z in
    width: int = 0
    taken_with: int | None = None  # which call of the projection took it in, together with other pieces


class Recorder:
    """Notes every attention call, and which module first takes its z in unchanged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[Seen] = []
        self.lost: list[Lost] = []
        self.entries: Counter[nn.Module] = Counter()  # how often each matrix was called
        self._waiting: list[Seen] = []
        self._heard: list[Seen] = []
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
        """Note a call that came by the registry."""
        output = base(module, query, key, value, attention_mask, *args, **options)
        self._note(base, module, query, key, value, attention_mask, options, output[0], "registry")
        return output

    def hear(
        self,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """Note a call that was seen at torch's functions."""
        base, key, value = of_groups(base, key, value, _distinct_heads(key, value))
        output = base(module, query, key, value, attention_mask, **options)
        z = output[0].clone()  # code of a model's own may go on to write into it
        self._note(base, module, query, key, value, attention_mask, options, z, "watched")
        self._heard.append(self.seen[-1])
        return output

    def _note(
        self,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        options: dict[str, Any],
        z: Tensor,
        route: Route,
    ) -> None:
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
            values=_values(key, value),
            route=route,
        )
        self.seen.append(seen)
        self._waiting.append(seen)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block every attention call of the model is noted, and what enters its matrices."""
        running: list[Running] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(Running.of(module, args, kwargs))

        def leave(*_: Any) -> None:
            running.pop()

        watch = PatternUses(running, self.hear)
        with ExitStack() as undo:
            for module in self.model.modules():
                undo.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
            for module in matrices(self.model):
                undo.callback(module.register_forward_pre_hook(self._meet, with_kwargs=True).remove)
            with listening(self.model, self.attend), watch:
                yield
        self.lost += watch.lost
        for number, function in watch.elsewhere.items():
            self._heard[number].rows = Capability(
                False, f"its pattern is used twice: beside its product with values, {function} takes it in as well"
            )

    def _meet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entries[module] += 1
        x = entering(args, kwargs)
        if x is None:
            return
        for seen in self.seen:
            # What a wrapped projection is made of takes z in inside of it.
            if seen.projection not in (None, module) and _entering_as(seen.z, x, seen.route) is not None:
                seen.also = seen.also or (None if module in _parts(seen.projection) else module)
        for start in range(len(self._waiting)):
            pieces = [seen for seen in self._waiting[start:] if seen.module is self._waiting[start].module]
            alike = len({(len(seen.z), *seen.z.shape[2:]) for seen in pieces}) == 1
            for taken in (pieces[:1], pieces) if alike else (pieces[:1],):
                joined = torch.cat([seen.z for seen in taken], dim=1) if len(taken) > 1 else taken[0].z
                form = _entering_as(joined, x, taken[0].route)
                if form is not None:
                    self._meetings += 1
                    for seen in taken:
                        seen.projection, seen.width, seen.entering = module, x.shape[-1], form
                        seen.taken_with = self._meetings if len(taken) > 1 else None
                        self._waiting.remove(seen)
                    return


def _parts(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else list(module.modules())


def _entering_as(z: Tensor, x: Tensor, route: Route) -> Entering | None:
    """How z enters a module, if its values are what x holds: row by row of the batch, or position by position."""
    if z.numel() != x.numel():
        return None
    shape, n_rows, n_positions = tuple(x.shape[:-1]), int(z.shape[0]), int(z.shape[1])
    by_rows = torch.equal(z.reshape(-1), x.reshape(-1))
    # With one row, or one position, both orders hold the same values; then the shape tells.
    if shape == (n_positions, n_rows) and torch.equal(z.transpose(0, 1).reshape(-1), x.reshape(-1)):
        return "rows" if by_rows and n_rows == n_positions else "positions"
    if by_rows:
        return "rows" if route == "registry" or shape == (n_rows, n_positions) else "other"
    return None


def _values(key: Tensor, value: Tensor) -> Capability:
    """Whether values go by the same groups as keys, so that a KV group names both."""
    if value.shape[1] == key.shape[1]:
        return Capability(True)
    return Capability(False, f"its values have {value.shape[1]} heads and its keys {key.shape[1]}")


def _distinct_heads(key: Tensor, value: Tensor) -> int:
    """How many heads of keys and values differ: where they were repeated before the call, neighbours are equal."""
    n_heads = int(key.shape[1])
    for n_distinct in range(1, n_heads):
        if n_heads % n_distinct == 0 and value.shape[1] == n_heads:
            size = n_heads // n_distinct
            if all(torch.equal(t, t[:, ::size].repeat_interleave(size, dim=1)) for t in (key, value)):
                return n_distinct
    return n_heads


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
    """Eval mode, no gradients, the random state as it was, and compiled models as if they were not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    devices = list({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), uncompiled():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def listening(model: nn.Module, handler: Callable[..., Any], watched: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Inside the block the registry's attention calls, and those of the modules watched, go to `handler`."""

    def attend(*args: Any, **options: Any) -> Any:
        with unheard():  # what a kernel of the registry is made of
            return handler(*args, **options)

    switch = seam.Switch()
    switch.handler = attend
    keys = seam.connect(model.modules(), switch)
    watching = Watching(watched, handler)
    try:
        yield
    finally:
        watching.remove()
        seam.disconnect(keys)


def matrices(model: nn.Module) -> list[nn.Module]:
    """Modules with a 2-D weight: linear maps, also packed ones (torch's give it by a method) and wrapped ones."""
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        packed = callable(weight) and not isinstance(weight, Tensor) and hasattr(module, "in_features")
        if packed or (isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)):
            found.append(module)
    return found


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    return values[0] if values and values[0].dim() > 1 else None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
