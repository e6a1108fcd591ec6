"""A second stream that lacks a span of the prompt: what the model says where it was never told something.

The tokens of the span stay in their columns, and no query sees them: they are masked like padding, and the positions
behind them are counted on as if they were not there. Where a model takes positions from what it is told, and not from
columns, this is the same as a prompt without these tokens; `require_gaps` tries it on the model at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.model.positions import Frame
from headwise.model.running.run import parameter_names

_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_GAP, _LENGTH = slice(3, 8), 12
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far logits may be apart by rounding, as a share of the largest; 1e-4 in wider types."""


def gapped(network: Any, kwargs: Mapping[str, Any], frame: Frame | None, span: str, *, beside: bool) -> dict[str, Any]:
    """Arguments of a forward whose second stream lacks a span.

    Args:
        kwargs: of the first stream; with `beside`, of both, one half of the rows each.
        frame: where the first stream's tokens stand.
        beside: whether both streams share the batch; without, what is given back is for the second alone.

    Raises:
        InputError: no such span, nothing left of a prompt, or its last token gone.
        Refusal: masks or positions in a form that has no room for a gap.
    """
    if frame is None:
        raise Refusal(f"where the tokens of this run stand is not known, so span {span!r} cannot be left out of it")
    seen = _seen(frame, span)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise Refusal(
            f"attention_mask is no mask of columns (a cache of fixed size makes such), so span {span!r} cannot be left "
            "out; use a dynamic cache"
        )
    _refuse_window(network, frame.total)
    dtype = torch.long if mask is None else mask.dtype
    found = dict(kwargs)
    found["attention_mask"] = _joined(frame.mask, seen, beside).to(dtype)
    if "position_ids" in parameter_names(type(_inner(network)).forward):
        if positions is not None and positions.dim() != 2:
            raise Refusal(f"position_ids has {positions.dim()} axes, so span {span!r} cannot be left out of it")
        counted = (seen.long().cumsum(1) - 1).clamp(min=0)[:, frame.past :]
        found["position_ids"] = _joined(_first(positions, frame), counted, True) if beside else counted
    return found


def require_gaps(network: Any) -> None:
    """Raises Refusal unless this model, run on tokens with a gap, says what it says without the tokens in the gap.

    Tried once, on twelve tokens.
    """
    inner = _inner(network)
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False) or "input_ids" not in parameter_names(type(inner).forward):
        raise Refusal(f"{name} does not continue a text, so no span can be left out of a second stream of it")
    if inner not in _TRIED:
        _TRIED[inner] = _gap_is_nothing(inner)
    if not _TRIED[inner]:
        raise Refusal(
            f"{name} says something else with a masked gap than without its tokens (its positions are those of "
            "columns, or not all in it is attention), so no span can be left out of a second stream of it"
        )


def _gap_is_nothing(inner: Any) -> bool:
    device = next((p.device for p in inner.parameters() if not p.is_meta), torch.device("cpu"))
    ids = 5 + torch.arange(_LENGTH, device=device)[None] % max(inner.config.get_text_config().vocab_size - 5, 1)
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[:, _GAP] = False
    placed: dict[str, Tensor] = {}
    if "position_ids" in parameter_names(type(inner).forward):
        placed = {"position_ids": (seen.long().cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        gap = inner(input_ids=ids, attention_mask=seen.long(), **placed).logits[:, -1].float()
        short = ids[seen][None]
        cut = inner(input_ids=short, attention_mask=torch.ones_like(short)).logits[:, -1].float()
    share = TOLERANCE.get(next(inner.parameters()).dtype, 1e-4)
    return bool((gap - cut).abs().max() <= share * cut.abs().max())


def _seen(frame: Frame, span: str) -> Bool[Tensor, "batch column"]:
    prompt = frame.columns < max(frame.prompt, 1)
    left_out = frame.span(span) & prompt  # a slice without an end would grow with what is written
    seen = frame.mask & ~left_out
    if isinstance(rows := frame.spans[span], slice):
        listed = []
    else:
        listed = [column for row in rows for column in ([row] if isinstance(row, int) else row)]
    if max(listed, default=0) >= max(frame.prompt, 1):
        raise InputError(
            f"span {span!r} reaches to column {max(listed)} and the prompt has {frame.prompt}; give columns of it"
        )
    if frame.total < frame.prompt:  # the prompt comes in pieces; what is asked of its end is asked of the last one
        return seen
    if not bool((seen & prompt).any(1).all()):
        raise InputError(f"span {span!r} is all of a row's prompt; something must be left for the second stream")
    if bool(left_out.gather(1, frame.prompt_end[:, None]).any()):
        raise InputError(
            f"span {span!r} holds a prompt's last token, which is what the next one is told from; let the span end "
            "before it"
        )
    return seen


def _first(positions: Int[Tensor, "row position"] | None, frame: Frame) -> Int[Tensor, "row position"]:
    """The first stream's positions, as given or as the model would count them."""
    if positions is not None:
        return positions[: frame.batch]
    if not bool(frame.mask.all()):
        raise Refusal(
            "a padded batch with a span left out needs position_ids=, which `generate` makes; give them, or use "
            "mode='caches'"
        )
    return frame.columns[None, frame.past :].expand(frame.batch, -1)


def _joined(first: Tensor, second: Tensor, beside: bool) -> Tensor:
    return torch.cat([first.expand_as(second), second]) if beside else second


def _refuse_window(network: Any, columns: int) -> None:
    config = _inner(network).config.get_text_config()
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and columns > window:
            raise Refusal(
                f"{type(network).__name__} sees {window} columns at a time ({name}), and a gap takes room in them; "
                f"a span can be left out of runs of up to {window} columns, and this one has {columns}"
            )


def _inner(network: Any) -> Any:
    base = getattr(network, "get_base_model", None)
    return base() if callable(base) else network
