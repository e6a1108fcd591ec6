"""A loss whose gradient is taken where it was made, for plans and weights that are open only there.

`train` calls backward behind the loss. Gradient checkpointing repeats the layers' forwards in backward, and would then
find the model without the edits and the weights that the loss was made under.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def taken_back(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The same value with the same gradient by `parameters`, which is taken now: backward runs no layer any more."""
    reached = list(parameters)
    gradients = torch.autograd.grad(loss, reached, allow_unused=True)
    taken: Tensor = _Taken.apply(loss.detach(), gradients, *reached)  # type: ignore[no-untyped-call]
    return taken


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *(None if each is None else factor.to(each.dtype) * each for each in ctx.gradients)


__all__ = ["taken_back"]
