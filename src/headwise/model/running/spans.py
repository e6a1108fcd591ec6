"""Kinds of tokens in a denoiser's attention as named spans of columns: `image`, `text`, and spans within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.model.positions import Columns, Positions, SpanRows, Window
from headwise.model.site import Site

IMAGE, TEXT = "image", "text"


def own_spans(names: Sequence[str], lengths: Mapping[str, int], given: Mapping[str, SpanRows]) -> dict[str, SpanRows]:
    """The columns of a call's kinds of tokens, and of the spans given with the run.

    A given span such as `text.cat` counts within the text; where the call has no text it is left out.

    Raises:
        InputError: it names a position that the text does not have.
    """
    spans: dict[str, SpanRows] = {}
    start = 0
    for name in names:
        spans[name] = slice(start, start + lengths[name])
        start += lengths[name]
    for label, rows in given.items():
        kind, dot, _ = label.partition(".")
        if not dot or kind not in (IMAGE, TEXT):
            spans[label] = rows
        elif kind in names:
            within = spans[kind]
            assert isinstance(within, slice)
            spans[label] = _moved(label, rows, within)
    return spans


def _moved(label: str, rows: SpanRows, within: slice) -> SpanRows:
    """Columns counted within a stretch, as columns of the whole."""
    if isinstance(rows, slice):
        stop = within.stop if rows.stop is None else min(within.start + rows.stop, within.stop)
        return slice(min(within.start + (rows.start or 0), within.stop), stop, rows.step)
    moved: list[Any] = []
    for row in rows:
        if not isinstance(row, int):
            moved.append(_moved(label, row, within))
        elif row + within.start < within.stop:
            moved.append(row + within.start)
        else:
            raise InputError(
                f"span {label!r} names position {row}, and the {label.partition('.')[0]} has "
                f"{within.stop - within.start} tokens, counted from 0"
            )
    return moved


def kinds_of_queries(window: Window | None, names: Sequence[str], n_rows: int) -> Int[Tensor, "batch query"]:
    """Which of the kinds each query of a call is of, by its number among `names`.

    Raises:
        Refusal: the module was not given its kinds of tokens apart, so they cannot be told.
    """
    if window is None:
        raise Refusal(
            "what is image and what is text cannot be told in this run: it came in another form than the example"
        )
    kinds = torch.zeros(n_rows, window.length, dtype=torch.long, device=window.frame.device)
    for number, name in enumerate(names):
        kinds[:, window.frame.span(name)[0]] = number
    return kinds


def refuse_other_kinds(site: Site, what: str, selector: Positions, kinds: tuple[str, ...] | None = None) -> None:
    """Raise InputError for a span of tokens that a site's queries (or its keys, of these `kinds`) are not of."""
    if isinstance(selector, Columns):
        for each in selector.named:
            refuse_other_kinds(site, what, each, kinds)
        return
    if not isinstance(selector, str) or not selector.startswith("span:"):
        return
    kind = selector.removeprefix("span:").partition(".")[0]
    has = site.kinds if kinds is None else kinds
    if site.spans and kind in (IMAGE, TEXT) and kind not in has:
        which = "queries" if kinds is None else "keys"
        raise InputError(f"{what}: the {which} of {site.label} are of {' and '.join(has)}, not of {kind}")
