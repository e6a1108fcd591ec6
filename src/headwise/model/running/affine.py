"""Edits that are one affine map of a value, the same at every position of every run: `x <- factor * x + term`.

They are most of what is used in `generate`, where a step is short and what is done anew at each call is felt: so the
map is made once for each site and type, and carried out as one product or sum over all heads, with 1 and -0 for the
others, which leave every bit of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.model import operations as op
from headwise.model.running.plan import Placed

NO_OFFSET = -0.0  # x + 0.0 would turn -0.0 into 0.0; x - 0.0 keeps every bit of x

Values = Float[Tensor, "batch position head dim"]
Map = Callable[[Values], Values]


def affinely(placed: Placed, x: Values) -> Map | None:
    """What an edit does to `x` and all that are like it, if that is one map at full strength; else None."""
    versions = _versions(placed)
    if versions is None:
        return None
    key = (x.dtype, x.device, x.shape[2:], versions)
    if placed.affine is None or placed.affine[0] != key:
        placed.affine = (key, _made(placed, x))
    found: Map = placed.affine[1]
    return found


def affine_map(placed: Placed, like: Float[Tensor, "1 1 head dim"]) -> tuple[Tensor, Tensor]:
    """The factor and the term, each `[head, dim]` in fp64, that an edit comes down to on z of the type of `like`."""
    here = op.Here(
        placed.site,
        placed.site.label,
        placed.heads,
        placed.names,
        placed.slots,
        placed.count,
        layout="values",
        window=None,
        items=torch.zeros(1, dtype=torch.long),
        batch=1,
        span=1,
    )

    def picked(value: op.Value) -> Tensor:
        """The number that an edit would use: a tensor is taken to the type of z first, a number is not."""
        return torch.as_tensor(here.pick(value, like), dtype=torch.float64).expand_as(like)[0, 0]

    operation, one, none = placed.edit.operation, torch.tensor(1.0), torch.tensor(NO_OFFSET)
    factor: Tensor
    term: Tensor
    match operation:
        case op.Scale(value):
            factor, term = picked(value), none
        case op.Add(value):
            factor, term = one, picked(value)
        case op.Mix(value, weight):
            factor, term = 1 - picked(weight), picked(weight) * picked(value)
        case op.Set(value):
            factor, term = 0 * one, picked(value)
        case _:
            factor, term = 0 * one, operation(like, here).double()  # type: ignore[union-attr]
    strength = picked(placed.edit.strength)
    kept = torch.where(strength == 1, factor, strength * (factor - 1) + 1)
    shape = like.shape[2:]
    return kept.double().expand(shape), (strength * term).double().expand(shape)


def fixed(value: op.Value) -> bool:
    """Whether a value is numbers, and not a function or another run's."""
    return all(isinstance(part, (Real, Tensor)) for part in parts_of(value))


def parts_of(value: op.Value) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _versions(placed: Placed) -> tuple[Any, ...] | None:
    """What its numbers are now, so that a tensor that is written to is seen; None where it is no such map."""
    edit = placed.edit
    everywhere = edit.when.place == "all" and not edit.when.timed and edit.queries is None and edit.rows is None
    whole = isinstance(edit.strength, Real) and edit.strength == 1
    if not everywhere or not whole or type(edit.operation) not in (op.Scale, op.Add, op.Set):
        return None
    found: list[Any] = []
    for part in (part for value in edit.operation.values for part in parts_of(value)):
        if isinstance(part, Real):
            found.append(part)
        elif isinstance(part, Tensor) and not part.requires_grad and not part.is_inference():
            found.append((id(part), part._version))
        else:
            return None
    return tuple(found)


def _made(placed: Placed, x: Values) -> Map:
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision is multiplied in fp32 and rounded once
    like = torch.zeros(1, 1, len(placed.heads), x.shape[3], dtype=x.dtype, device=x.device)
    factor, term = affine_map(placed, like)
    heads = list(placed.heads)

    def of_all(values: Tensor, otherwise: float) -> Tensor:
        whole = torch.full(x.shape[2:], otherwise, dtype=torch.float64, device=values.device)
        whole[heads] = values
        return whole.to(device=x.device, dtype=wide)

    match placed.edit.operation:
        case op.Scale():
            gain = of_all(factor, 1.0)
            return lambda x: (x * gain).to(x.dtype)
        case op.Add():
            offset = of_all(term, NO_OFFSET)
            return lambda x: (x + offset).to(x.dtype)
    inside = torch.zeros(x.shape[2], 1, dtype=torch.bool, device=x.device)
    inside[heads] = True
    instead = of_all(term, 0.0).to(x.dtype)
    return lambda x: torch.where(inside, instead, x)


__all__ = ["NO_OFFSET", "affine_map", "affinely", "fixed", "parts_of"]
