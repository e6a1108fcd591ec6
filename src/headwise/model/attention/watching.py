"""Attention that a model computes in code of its own, seen at the functions of torch that it is made of.

Where no registry stands between a model and its kernel there is no look-up to wrap. While a module is watched, a mode
of torch sees the functions that its forward calls: `F.scaled_dot_product_attention`; or a softmax over the last axis,
and the product that takes its result in. Both are handed to a handler as the seam hands a call over, so that whatever
serves a call of the registry serves these:

    handler(base, module, query, key, value, mask, **options) -> (z, ...)

    base      the model's own function: `base(module, query, key, value, mask, **options) -> (z,)`; it takes query, key
              and value from its arguments, and everything else from the call as the model made it
    module    the module that attends
    query     `[batch, head, query, qk_dim]`, and key `[batch, kv_head, key, qk_dim]`; of width 0 where the model made
              its scores itself: then they only say how many there are
    value     `[batch, kv_head, key, head_dim]`
    mask      what the fused function was given; None beside scores of the model's own
    options   of a fused call `is_causal`, `scaling` and `dropout`; of a product `own_scores`
              `[batch, head, query, key]`, what the model took its softmax of
    z         `[batch, query, head, head_dim]`

Watching costs a Python call for every function of torch, so a module is watched only while something is asked of it
that a hook on its output projection cannot serve.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from headwise.model.attention.layouts import LaidOut, Product, as_product, fused_call
from headwise.model.attention.multi_head import multi_head_call

Handler = Callable[..., tuple[Any, ...]]

FUSED = frozenset({functional.scaled_dot_product_attention, functional.multi_head_attention_forward})
SOFTMAXES = frozenset({functional.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})
WAITING = 4  # softmaxes remembered until their product comes by: modules may take a few before they multiply


class Watching:
    """Watches every forward of `modules` from now on until `remove()`; what runs outside of them is not seen.

    A module inside another one is watched on its own. Calls are seen in the thread that makes them, also when gradient
    checkpointing repeats a forward in backward; an exception or Ctrl-C in a forward leaves nothing behind. `on_lost` is
    given what led to no call.
    """

    def __init__(
        self, modules: Iterable[nn.Module], handler: Handler, on_lost: Callable[[Lost], object] = lambda lost: None
    ) -> None:
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []
        for module in dict.fromkeys(modules):
            self._replaced.append((module, module.__dict__.get("forward")))
            # Not hooks: Ctrl-C passes them by, and the mode would stay on.
            module.__dict__["forward"] = _under_watch(module, module.forward, handler, on_lost)
            # What torch computes in one fused step without gradients, it computes in the open where there are hooks.
            self._hooks.append(module.register_forward_pre_hook(_in_the_open))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, own in reversed(self._replaced):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
        self._replaced.clear()


def of_groups(
    base: Callable[..., Any], key: Tensor, value: Tensor, n_kv_heads: int
) -> tuple[Callable[..., Any], Tensor, Tensor]:
    """Keys and values by KV group where the model repeated them for their query heads, and a base that repeats them.

    Where nothing was repeated all three are returned as they are.
    """
    if key.shape[1] == n_kv_heads:
        return base, key, value
    size = key.shape[1] // n_kv_heads
    keys, values = key[:, ::size], value[:, ::size]

    def repeating(module: nn.Module, query: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        k = key if k is keys else k.repeat_interleave(size, dim=1)
        v = value if v is values else v.repeat_interleave(size, dim=1)
        return base(module, query, k, v, *args, **options)

    repeating.__name__ = base.__name__
    return repeating, keys, values


@contextmanager
def unheard() -> Iterator[None]:
    """Inside the block nothing is seen in this thread: what attends there is served in another way."""
    _of_thread.watches.append(None)
    try:
        yield
    finally:
        _of_thread.watches.pop()


@dataclass(frozen=True, eq=False)
class Running:
    """A module in the middle of its forward, and the tensors it was given."""

    module: nn.Module
    given: tuple[Tensor, ...]

    @staticmethod
    def of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Running:
        values = (*args, *kwargs.values())
        return Running(module, tuple(v for v in values if isinstance(v, Tensor) and v.is_floating_point()))

    def rows_among(self, folded: int, n_queries: int) -> int | None:
        """How many of `folded` = rows * heads are rows: what the module was given has both rows and positions."""
        for tensor in self.given:
            if tensor.dim() < 3:
                continue
            first, second = int(tensor.shape[0]), int(tensor.shape[1])
            positions_first = tensor.dim() == 3 and first == n_queries != second
            if not positions_first and tensor.dim() == 3 and second != n_queries:
                continue
            n_rows = second if positions_first else first
            if n_rows and folded % n_rows == 0:
                return n_rows
        return None


@dataclass(frozen=True, eq=False)
class Lost:
    """A softmax, or a fused call, that led to no attention call: where it ran, and why."""

    module: nn.Module
    reason: str
    n_axes: int


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax over the last axis: what went in and came out, and which modules were running, outermost first."""

    scores: Tensor
    pattern: Tensor
    running: tuple[Running, ...]


class Watch(TorchFunctionMode):
    """The mode itself: sees torch's functions in one thread while it is on, and hands attention over.

    `running`, the modules that are running, outermost first, is read at every softmax and product, so that it may grow
    and shrink meanwhile: what attends is the innermost module that ran around both. `lost` gathers what
    led to no call.
    """

    def __init__(self, running: list[Running], handler: Handler) -> None:
        super().__init__()
        self.running = running
        self.lost: list[Lost] = []
        self._handler = handler
        self._waiting: list[Softmax] = []

    def __enter__(self) -> Watch:
        super().__enter__()  # type: ignore[no-untyped-call]
        _of_thread.watches.append(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        _of_thread.watches.pop()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._forget(len(self._waiting))

    @property
    def hears(self) -> bool:
        """Whether what is called now is its to see: a mode further out sees what goes on inside one further in, too."""
        return _of_thread.watches[-1] is self and bool(self.running)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.hears:
            return func(*args, **kwargs)
        if func in SOFTMAXES:
            return self._after_softmax(func, args, kwargs)
        if func in FUSED:
            attending = self.running[-1]
            if func is functional.multi_head_attention_forward:
                call = multi_head_call(func, args, kwargs)
            else:
                call = fused_call(func, args, kwargs, attending.rows_among)
            if call is not None:
                return self._handed_over(call, attending.module)
            self.lost.append(Lost(attending.module, "the layout of its fused call is not known", 4))
        elif self._waiting and (product := as_product(func, args, kwargs)) is not None:
            for softmax in reversed(self._waiting):
                if product.takes(softmax.pattern):
                    return self._multiplied(product, softmax)
        return func(*args, **kwargs)

    def _after_softmax(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        pattern: Tensor = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if scores.dim() > 2 and dim in (-1, scores.dim() - 1):
            self._forget(len(self._waiting) + 1 - WAITING)
            self._waiting.append(Softmax(scores, pattern, tuple(self.running)))
        return pattern

    def _multiplied(self, product: Product, softmax: Softmax) -> Any:
        self._waiting.remove(softmax)
        around = [now for now, then in zip(self.running, softmax.running, strict=False) if now is then]
        attending = (around or self.running)[-1]
        call = product.laid_out(softmax.scores, attending.rows_among)
        if call is None:
            reason = "the layout of its product of pattern and values is not known"
            self.lost.append(Lost(attending.module, reason, softmax.pattern.dim()))
            return product.carry_out(product.right)
        return self._handed_over(call, attending.module)

    def _handed_over(self, call: LaidOut, module: nn.Module) -> Any:
        made: list[tuple[Tensor, Any]] = []

        def base(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
            made.append(call.run(query, key, value))
            return (made[-1][0],)

        base.__name__ = call.kernel
        z = self._handler(base, module, call.query, call.key, call.value, call.mask, **call.options)[0]
        own, output = made[-1]
        return output if own is z else call.z_back(z, output)  # untouched: the very output of the model's function

    def _forget(self, count: int) -> None:
        for softmax in self._waiting[: max(count, 0)]:
            module, n_axes = softmax.running[-1].module, softmax.pattern.dim()
            self.lost.append(Lost(module, "it takes a softmax, and no product of it with values was seen", n_axes))
        del self._waiting[: max(count, 0)]


def _under_watch(
    module: nn.Module, forward: Callable[..., Any], handler: Handler, on_lost: Callable[[Lost], object]
) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        with Watch([Running.of(module, args, kwargs)], handler) as watch:
            output = forward(*args, **kwargs)
        for lost in watch.lost:
            on_lost(lost)
        return output

    return watched


def _in_the_open(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


class _OfThread(threading.local):
    """The watches that are on in a thread, innermost last; None for a stretch in which nothing is heard."""

    def __init__(self) -> None:
        self.watches: list[Watch | None] = []


_of_thread = _OfThread()
