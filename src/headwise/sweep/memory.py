"""What is done when memory runs out: the same again, with fewer tokens in a forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch

from headwise import freed_memory
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.sweep.clean_runs import forget

P = ParamSpec("P")
R = TypeVar("R")

TOKENS = {"cpu": 1024}
"""Most tokens of one forward: items and sets are batched up to it. What a layer works on should stay in the caches of a
processor; on other devices it should keep them busy."""
TOKENS_ELSEWHERE = 8192

_log = logging.getLogger(__name__)


def tokens_of(device: torch.device | str) -> int:
    """Most tokens of one forward on a device."""
    return TOKENS.get(torch.device(device).type, TOKENS_ELSEWHERE)


def longest_of(items: ItemSet) -> int:
    """Tokens of the longest item, with its answer."""
    return max(len(each.prompt) + len(each.answer) for each in items)


def budget_of(items: ItemSet, tokens: int | None, device: torch.device) -> int:
    """Most tokens of one forward: as asked for, else as the device takes, and no less than the longest item.

    Raises InputError for `tokens` that do not hold it.
    """
    longest = longest_of(items)
    if tokens is not None and not tokens >= longest:
        raise InputError(
            f"tokens={tokens} does not hold the longest item of {items.probe}, which has {longest} tokens; "
            "give at least as many, or shorter settings of the probe"
        )
    return max(tokens_of(device), longest) if tokens is None else tokens


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; on the CPU torch has no kind of error for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halving(run: Callable[P, R]) -> Callable[P, R]:
    """A function of a model and items that takes `tokens=`, begun anew with half as many where memory runs out.

    Raises:
        Refusal: one item by itself does not fit.
    """

    @wraps(run)
    def halved(*args: P.args, **kwargs: P.kwargs) -> R:
        while True:
            try:
                with freed_memory.kept():
                    return run(*args, **kwargs)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error):
                    raise
            forget()
            given = (*args, *kwargs.values())
            model = next(each for each in given if isinstance(each, AttachedModel))
            items = next(each for each in given if isinstance(each, ItemSet))
            longest = longest_of(items)
            before = budget_of(items, cast("int | None", kwargs.get("tokens")), model.device)
            if before == longest:
                raise Refusal(
                    f"an item of {longest} tokens of {items.probe} does not fit into memory by itself; use shorter "
                    "settings of the probe, a smaller model or dtype, or another device"
                )
            kwargs["tokens"] = max(before // 2, longest)
            _log.warning("out of memory: begun anew with %d tokens in a forward", kwargs["tokens"])

    return halved
