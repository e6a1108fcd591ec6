"""Calls of torch's own functions, laid out as attention calls, and the way back to the layout the model has.

A fused call has `[batch, head, position, dim]`, or `[batch * head, position, dim]` with the heads of one row of the
batch side by side. A product of a pattern and values is a matmul or bmm in one of these two layouts, or an einsum with
the pattern first, in any order of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm})

Split = Callable[[int, int], int | None]
"""`split(rows * heads, queries)`: how many of a folded axis are rows of the batch; None where that cannot be told."""


@dataclass(frozen=True, eq=False)
class LaidOut:
    """One call as an attention call.

    `kernel` is the name rows go by. `run(query, key, value)` runs the model's own function on tensors in this layout
    and returns z and its output as the model has it; on the very same tensors that is bit for bit what the model's call
    returns. `z_back(z, output)` is the output with another z in it. `query` and `key` have width 0 where the model made
    its scores itself.
    """

    kernel: str
    query: Float[Tensor, "batch head query qk_dim"]
    key: Float[Tensor, "batch kv_head key qk_dim"]
    value: Float[Tensor, "batch kv_head key head_dim"]
    mask: Tensor | None
    options: Mapping[str, Any]
    run: Callable[[Tensor, Tensor, Tensor], tuple[Float[Tensor, "batch query head head_dim"], Any]]
    z_back: Callable[[Tensor, Any], Any]


# -- fused calls -----------------------------------------------------------------------------------------------


def fused_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], split: Split) -> Any:
    """A call of `F.scaled_dot_product_attention`, laid out; None where its rows and heads cannot be told apart."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = tuple(given.pop(name) for name in names[:3])
    mask, is_causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    options = {"is_causal": is_causal, "scaling": given.get("scale"), "dropout": given.get("dropout_p", 0.0)}
    folded = tensors[0].dim() == 3
    n_rows = split(len(tensors[0]), int(tensors[0].shape[1])) if folded else len(tensors[0])
    if tensors[0].dim() not in (3, 4) or n_rows is None:
        return None
    query, key, value = (_unfolded(tensor, n_rows) for tensor in tensors) if folded else tensors
    if folded and isinstance(mask, Tensor) and mask.dim() == 3 and len(mask) == len(tensors[0]):
        mask = _unfolded(mask, n_rows)
    if is_causal and query.shape[2] == 1:  # by torch's rule a lone query is the first one
        mask = torch.arange(key.shape[2], device=key.device)[None, None, None] < 1

    def run(*edited: Tensor) -> tuple[Tensor, Tensor]:
        own = [
            tensor if now is then else (now.flatten(0, 1) if folded else now)
            for tensor, now, then in zip(tensors, edited, (query, key, value), strict=True)
        ]
        output = func(*own, **given)
        return (_unfolded(output, n_rows) if folded else output).transpose(1, 2), output

    return LaidOut(
        kernel="sdpa",
        query=query,
        key=key,
        value=value,
        mask=mask,
        options=options,
        run=run,
        z_back=lambda z, output: z.transpose(1, 2).flatten(0, 1) if folded else z.transpose(1, 2),
    )


# -- products --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Product:
    """A product that may be one of a pattern (`left`) and values (`right`)."""

    left: Tensor
    right: Tensor
    carry_out: Callable[[Tensor], Tensor]
    equation: str

    def takes(self, pattern: Tensor) -> bool:
        """Whether the left factor is this pattern: the same tensor, another view of it, or a copy of its values."""
        return holds_values_of(self.left, pattern)

    def laid_out(self, scores: Tensor, split: Split) -> LaidOut | None:
        """The product with the scores its pattern was made of; None where its axes cannot be told."""
        axes = _named_axes(self.equation)
        left, right, fold = self.left, self.right, self.left.dim() == 3
        if axes is None or left.dim() != right.dim() or left.dim() not in (3, 4):
            return None
        if fold:
            unfolded = scores.dim() == 4 and scores.shape[0] * scores.shape[1] == len(left)
            n_rows = int(scores.shape[0]) if unfolded else split(len(left), int(left.shape[1]))
            if n_rows is None or len(right) != len(left):
                return None
            left, right = _unfolded(left, n_rows), _unfolded(right, n_rows)
        scores = axes.taken("bhqk", axes.left, scores.reshape(left.shape))
        value = axes.taken("bhkd", axes.right, right)
        n_rows, n_heads, n_queries, n_keys = scores.shape
        if value.shape[0] not in (1, n_rows) or value.shape[1] not in (1, n_heads):
            return None
        value = value.expand(n_rows, -1, -1, -1)

        def run(query: Tensor, key: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
            own = self.right if edited is value else put_back("bhkd", axes.right, edited)
            output = self.carry_out(own)
            return axes.taken("bqhd", axes.out, _unfolded(output, n_rows) if fold else output), output

        def put_back(had: str, own: str, tensor: Tensor) -> Tensor:
            tensor = axes.put(had, own, tensor)
            return tensor.flatten(0, 1) if fold else tensor

        return LaidOut(
            kernel="softmax",
            query=value.new_empty(n_rows, n_heads, n_queries, 0),
            key=value.new_empty(n_rows, value.shape[1], n_keys, 0),
            value=value,
            mask=None,
            options={"own_scores": scores},
            run=run,
            z_back=lambda z, output: put_back("bqhd", axes.out, z),
        )


def holds_values_of(tensor: Tensor, pattern: Tensor) -> bool:
    """Whether a tensor is a pattern: the same one, another view of it, or a copy of its values."""
    if tensor is pattern:
        return True
    if tensor.numel() != pattern.numel() or tensor.shape[-2:] != pattern.shape[-2:] or tensor.device != pattern.device:
        return False
    if tensor.data_ptr() == pattern.data_ptr() and tensor.is_contiguous() and pattern.is_contiguous():
        return True
    return torch.equal(tensor.detach().reshape(-1), pattern.detach().to(tensor.dtype).reshape(-1))


def as_product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """A call of a function of torch as a product; None if it is another function, or has another form."""
    if func in PRODUCTS:
        given = [*args, *kwargs.values()]
        if len(given) != 2 or not all(isinstance(tensor, Tensor) and tensor.dim() > 2 for tensor in given):
            return None
        left, right = given
        return Product(left, right, lambda value: func(left, value), "bhqk,bhkd->bhqd")
    if func is torch.einsum and len(args) == 3 and all(isinstance(tensor, Tensor) for tensor in args[1:]):
        equation, left, right = args
        return Product(left, right, lambda value: func(equation, left, value), equation.replace(" ", ""))
    return None


@dataclass(frozen=True)
class _Axes:
    """Letters of an equation, renamed to batch, head, query, key and dim."""

    left: str
    right: str
    out: str

    @staticmethod
    def taken(wanted: str, own: str, tensor: Tensor) -> Tensor:
        """The model's tensor with its axes in the order wanted."""
        return tensor.permute(*(own.index(axis) for axis in wanted))

    @staticmethod
    def put(had: str, own: str, tensor: Tensor) -> Tensor:
        """The inverse of `taken`."""
        return tensor.permute(*(had.index(axis) for axis in own))


def _named_axes(equation: str) -> _Axes | None:
    inputs, arrow, out = equation.partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "." in equation or any(len(set(axes)) != 4 for axes in (left, right, out)):
        return None
    shared = [axis for axis in left if axis in right and axis in out]
    queries = [axis for axis in left if axis in out and axis not in right]
    keys = [axis for axis in left if axis in right and axis not in out]
    dims = [axis for axis in right if axis in out and axis not in left]
    found = "".join((*shared, *queries, *keys, *dims))
    if [len(shared), len(queries), len(keys), len(dims)] != [2, 1, 1, 1] or left[-1] != keys[0]:
        return None
    renamed = str.maketrans(found, "bhqkd")
    return _Axes(left.translate(renamed), right.translate(renamed), out.translate(renamed))


def _unfolded(tensor: Tensor, n_rows: int) -> Tensor:
    return tensor.reshape(n_rows, -1, *tensor.shape[1:])
