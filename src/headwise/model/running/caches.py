"""Caches in a dual run: what is done to the first stream's between forwards is done to the second stream's too."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache

from headwise.errors import Refusal

SELECTING = ("reorder_cache", "batch_select_indices")
FOLLOWED = (*SELECTING, "batch_repeat_interleave", "crop", "reset", "activate_past_recording")


class Caches:
    """The first stream's caches of one dual run, and where the second stream's states of each are.

    Beam search, assisted decoding and a caller's own loop change a cache through its methods. While a cache is followed
    it is of a subclass of its class, in which these methods (and `copy.deepcopy`) act on both streams. Nothing is
    stored in the cache, so that it is freed when its last user lets go of it, and `close` gives it its class back.
    """

    def __init__(self) -> None:
        self._others: weakref.WeakKeyDictionary[Cache, BothHalves | Companion] = weakref.WeakKeyDictionary()
        self._kinds: dict[type[Cache], type[Cache]] = {}

    def widen(self, cache: Cache | None, n_rows: int) -> None:
        """Let a cache of `n_rows` rows hold them twice, for a shared batch."""
        if cache is None or cache in self._others:
            return
        cache.reorder_cache(torch.arange(n_rows).repeat(2))
        self._follow(cache, BothHalves(n_rows))

    def adopt(self, cache: Cache | None, n_rows: int) -> None:
        """Follow a cache that the model made in a shared batch."""
        if cache is not None and cache not in self._others:
            self._follow(cache, BothHalves(n_rows))

    def companion(self, cache: Cache) -> Cache:
        """The second stream's cache beside `cache`; a copy of it if it is new here.

        Raises:
            Refusal: it cannot be copied.
        """
        if cache not in self._others:
            try:
                self._follow(cache, Companion(copy.deepcopy(cache)))
            except RuntimeError:  # deepcopy of a tensor with a graph
                raise Refusal(
                    "past_key_values carries gradients and cannot be copied for the second stream; fill it under "
                    "torch.no_grad(), or use model.dual(mode='batch')"
                ) from None
        found = self._others[cache]
        assert isinstance(found, Companion)
        return found.cache

    def couple(self, cache: Cache | None, second: Cache | None) -> None:
        """Follow a pair of caches that the model made, one in each stream's forward."""
        if cache is not None and second is not None and cache not in self._others:
            self._follow(cache, Companion(second))

    def close(self) -> None:
        """Leave every cache as the first stream's, of the class it had."""
        for cache, other in list(self._others.items()):
            cache.__class__ = type(cache).__base__
            if isinstance(other, BothHalves):
                cache.reorder_cache(torch.arange(other.rows))
        self._others.clear()

    def _follow(self, cache: Cache, other: BothHalves | Companion) -> None:
        self._others[cache] = other
        kind = type(cache)
        if kind not in self._kinds:
            members: dict[str, Any] = {name: self._following(kind, name) for name in FOLLOWED}
            members |= {"__deepcopy__": self._copying(kind), "__module__": kind.__module__, "__doc__": kind.__doc__}
            self._kinds[kind] = type(kind.__name__, (kind,), members)
        cache.__class__ = self._kinds[kind]

    def _following(self, kind: type[Cache], name: str) -> Callable[..., Any]:
        def method(cache: Cache, *args: Any, **kwargs: Any) -> Any:
            plain, other = partial(getattr(kind, name), cache), self._others.get(cache)
            return plain(*args, **kwargs) if other is None else other.act(name, plain, *args, **kwargs)

        return method

    def _copying(self, kind: type[Cache]) -> Callable[..., Cache]:
        def copied(cache: Cache, memo: dict[int, Any]) -> Cache:
            twin: Cache = object.__new__(kind)
            memo[id(cache)] = twin
            twin.__dict__.update(copy.deepcopy(cache.__dict__, memo))
            if cache in self._others:
                self._follow(twin, self._others[cache].copied())
            return twin

        return copied


@dataclass(eq=False)
class BothHalves:
    """One cache holds `rows` rows of the first stream, then as many of the second."""

    rows: int

    def act(self, name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name in SELECTING:
            (indices,) = (*args, *kwargs.values())
            indices = torch.arange(self.rows, device=indices.device)[indices]
            halves = torch.cat([indices, indices + self.rows])
            self.rows = len(indices)
            return plain(halves)
        if name == "batch_repeat_interleave":
            (repeats,) = (*args, *kwargs.values())
            self.rows *= repeats
        return plain(*args, **kwargs)

    def copied(self) -> BothHalves:
        return replace(self)


@dataclass(eq=False)
class Companion:
    """The second stream has a cache of its own."""

    cache: Cache

    def act(self, name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        getattr(self.cache, name)(*args, **kwargs)
        return plain(*args, **kwargs)

    def copied(self) -> Companion:
        return Companion(copy.deepcopy(self.cache))
