"""What is kept of one block while it runs with gradients on: tensors as they passed by, and calls of its modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as it passed by: the object in the graph, and its values then."""

    tensor: Tensor
    value: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        return cls(tensor, tensor.detach().clone())


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a submodule of a block; `only` is its input if it was given that tensor and nothing else."""

    name: str
    module: nn.Module
    inputs: tuple[Seen, ...]
    only: Seen | None
    output: Seen | None

    def on_stream(self, x: Tensor) -> Call:
        """The call with only those of its tensors that could be a state of the stream x or a write to it."""
        inputs = tuple(seen for seen in self.inputs if is_stream_like(seen.value, x))
        only = self.only if self.only is not None and is_stream_like(self.only.value, x) else None
        output = self.output if self.output is not None and is_stream_like(self.output.value, x) else None
        return replace(self, inputs=inputs, only=only, output=output)


@dataclass(slots=True)
class BlockRun:
    """What is kept of a block while it runs: leaves stand for its arguments, and calls are in order of their return."""

    block: nn.Module
    leaves: dict[int | str, Tensor]
    grad_was_on: bool
    open: list[tuple[tuple[Seen, ...], bool]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def keeps(self, value: object) -> bool:
        return isinstance(value, Tensor) and any(is_stream_like(value, leaf) for leaf in self.leaves.values())


def is_stream_like(tensor: Tensor, stream: Tensor) -> bool:
    """As the stream, or as its rows flattened to [batch * position, d_model]."""
    return tensor.numel() == stream.numel() and tensor.shape[-1:] == stream.shape[-1:]


def same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.dtype == b.dtype and torch.equal(a.flatten(), b.flatten())
