"""Runs without knock-outs, kept for the sweeps that begin in them.

Every sweep runs its items as they are before it takes heads out. An atlas sweeps over the same items dozens of times:

    with remembered():
        measure_sets(model, items, first, KnockOut())
        measure_sets(model, items, second, KnockOut())      # the items are not run as they are again

Inside the block the model has to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.model.running.resuming import Kept
from headwise.probes.encoded import EncodedItem
from headwise.probes.outcome import Outcome, Past

MOST = 256 * 2**20
"""Bytes of all that is kept."""


@dataclass(frozen=True, eq=False, slots=True)
class CleanRun:
    """What a run of items without knock-outs left.

    Attributes:
        outcome: None where no metric needs it.
        kept: what later runs can begin in; None where they have to be whole.
        past: keys and values of the columns that later runs leave out.
    """

    outcome: Outcome | None = None
    kept: Kept | None = None
    past: Past | None = None


_Found = dict[Hashable, tuple[tuple[EncodedItem, ...], CleanRun]]
"""Runs with their items, which live on with them, so that no others take their identity."""

_found: ContextVar[_Found | None] = ContextVar("_found", default=None)


@contextmanager
def remembered() -> Iterator[None]:
    """Inside the block (or a function that this decorates), clean runs are kept; a block within goes on with them."""
    token = None if _found.get() is not None else _found.set({})
    try:
        yield
    finally:
        if token is not None:
            _found.reset(token)


def remembering() -> bool:
    return _found.get() is not None


def forget() -> None:
    """Give what is kept back; memory has run out."""
    if (found := _found.get()) is not None:
        found.clear()


def clean_run(items: tuple[EncodedItem, ...], of: Hashable, run: Callable[[], CleanRun]) -> CleanRun:
    """`run()`, or what it gave for these very items before; `of` names the model, and all else that it hangs on.

    The oldest runs go where there is no room for new ones.
    """
    found = _found.get()
    if found is None:
        return run()
    key = (*map(id, items), of)
    if key not in found:
        fresh = run()
        size = _bytes(fresh)
        if size > MOST:
            return fresh
        while found and sum(_bytes(each) for _, each in found.values()) + size > MOST:
            del found[next(iter(found))]
        found[key] = items, fresh
    return found[key][1]


def _bytes(run: CleanRun) -> int:
    kept = [] if run.kept is None else [*run.kept.outputs.values(), *run.kept.entering.values()]
    logits = None if run.outcome is None else run.outcome.logits
    storages = {each.untyped_storage().data_ptr(): each for each in _tensors([*kept, logits])}
    return sum(each.untyped_storage().nbytes() for each in storages.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for each in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(each)
