"""The seam: where transformers looks its attention function up, and where headwise steps in.

Every file of transformers that uses the attention registry gets its function from `AttentionInterface.get_interface`
or from `ALL_ATTENTION_FUNCTIONS[name]`. While at least one model is attached, both hand out the very function they
would have handed out, wrapped: a module that belongs to no attached model, or to one without an open plan, reaches
the kernel with its arguments untouched. Masks, configuration and kernel choice never notice.

Nothing is patched by importing; the last detach takes the patch off.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.modeling_utils import AttentionInterface

from headwise.errors import PlanConflict

AttentionFunction = Callable[..., tuple[Any, ...]]
Handler = Callable[..., tuple[Any, ...]]


class Switch:
    """What the seam finds for a module of an attached model: a handler while a plan is open, None otherwise.

    The seam holds switches, never models, so that a model dropped without `detach()` is freed all the same.
    """

    __slots__ = ("handler",)

    def __init__(self) -> None:
        self.handler: Handler | None = None


_lock = threading.RLock()
_switches: dict[int, Switch] = {}
_wrappers: dict[AttentionFunction, AttentionFunction] = {}
_originals: dict[str, Callable[..., Any]] = {}


def connect(modules: Iterable[nn.Module], switch: Switch) -> tuple[int, ...]:
    """Route the attention calls of `modules` through `switch`; returns the keys that `disconnect` takes back.

    Raises:
        PlanConflict: one of the modules belongs to a model that is attached already.
    """
    keys = tuple(id(module) for module in modules)
    with _lock:
        if any(key in _switches for key in keys):
            raise PlanConflict("this model (or a part of it) is attached already; detach it first, or use that handle")
        _switches.update(dict.fromkeys(keys, switch))
        _put_on()
    return keys


def disconnect(keys: Iterable[int]) -> None:
    """Take modules out of the seam; with the last one the patch itself comes off."""
    with _lock:
        for key in keys:
            _switches.pop(key, None)
        if not _switches:
            _take_off()


def is_on() -> bool:
    """Whether transformers' look-up is wrapped at this moment."""
    return bool(_originals)


def _wrap(base: AttentionFunction) -> AttentionFunction:
    if hasattr(base, "__headwise_base__"):  # get_interface looks up through __getitem__: wrapped once already
        return base
    wrapper = _wrappers.get(base)
    if wrapper is None:

        @functools.wraps(base)
        def seam(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            switch = _switches.get(id(module))
            if switch is None or switch.handler is None:
                return base(module, *args, **kwargs)
            return switch.handler(base, module, *args, **kwargs)

        seam.__headwise_base__ = base  # type: ignore[attr-defined]
        wrapper = _wrappers[base] = seam
    return wrapper


def _put_on() -> None:
    if _originals:
        return
    get_interface = AttentionInterface.get_interface
    get_item = AttentionInterface.__getitem__

    @functools.wraps(get_interface)
    def wrapped_get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> AttentionFunction:
        return _wrap(get_interface(self, *args, **kwargs))

    @functools.wraps(get_item)
    def wrapped_get_item(self: AttentionInterface, key: str) -> AttentionFunction:
        return _wrap(get_item(self, key))

    _originals["get_interface"] = get_interface
    AttentionInterface.get_interface = wrapped_get_interface
    # The class inherits __getitem__ from a base it shares with the mask registry, so only its own attribute is set.
    AttentionInterface.__getitem__ = wrapped_get_item


def _take_off() -> None:
    if not _originals:
        return
    # The wrappers are kept: a graph compiled while one is first made would be compiled a second time.
    AttentionInterface.get_interface = _originals.pop("get_interface")
    del AttentionInterface.__getitem__
