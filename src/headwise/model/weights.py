"""Weights of a model, by name: which are plain enough to be trained in part, and others put in their place for a while.

    with replaced(model, {"model.layers.4.self_attn.q_proj.weight": weight + delta}):
        loss = ...                                    # its graph reaches `delta`

The model's own parameters are not written to; what is put in place may be part of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.finding.recording import ROW_TOLERANCE


def plain_layer(model: AttachedModel, module: str) -> nn.Module:
    """The layer of that name, whose weight is an ordinary matrix in memory, is nobody else's, and serves one site.

    Raises:
        Refusal: it is wrapped, packed or offloaded, tied to another weight, or shared between sites.
    """
    layer = model.model.get_submodule(module)
    weight = layer._parameters.get("weight")
    if weight is not None and weight.is_meta:
        raise Refusal(f"the weight of {module} is not in memory (offloaded); load the model whole to train it")
    if type(weight) is not nn.Parameter or not multiplies(layer):
        raise Refusal(
            f"{module} ({type(layer).__name__}) does not multiply by a plain matrix, so no part of it can be trained; "
            "merge its adapter, or load the model without quantisation"
        )
    names = [name for name, each in model.model.named_parameters(remove_duplicate=False) if each is weight]
    if len(names) > 1:
        raise Refusal(f"{names[0]} is {names[1]} as well, so no part of it belongs to one head; it cannot be trained")
    return layer


@contextmanager
def replaced(model: AttachedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model runs with these tensors in the place of its parameters of those names.

    Backward belongs inside the block, too, where gradient checkpointing repeats a forward in it.

    Raises:
        InputError: a name that is no parameter, or a tensor of another shape.
    """
    own: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        module = model.model.get_submodule(path) if _has(model.model, path) else None
        before = None if module is None else module._parameters.get(leaf)
        if module is None or before is None:
            raise InputError(f"{model.name} has no parameter {name!r}; name one of its named_parameters()")
        if before.shape != tensor.shape:
            raise InputError(f"{name} has shape {[*before.shape]}, and what is to replace it {[*tensor.shape]}")
        own.append((module, leaf, before))
    try:
        for (module, leaf, _), tensor in zip(own, weights.values(), strict=True):
            # Not by setattr: that refuses what is no leaf, and taking the old one out would change the order.
            module._parameters[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, leaf, before in own:
            module._parameters[leaf] = before


def multiplies(layer: nn.Module) -> bool:
    """Whether a layer returns `x W^T + b`, or `x W + b` if it is a Conv1D; measured, whatever its class is called."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
        return False
    matrix = weight if isinstance(layer, Conv1D) else weight.T
    x = torch.randn(2, matrix.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            bias = getattr(layer, "bias", None)
            expected = x @ matrix + (bias if isinstance(bias, Tensor) else 0)
            got = layer.forward(x)
    except Exception:  # packed layers take what they are made for
        return False
    same_form = isinstance(got, Tensor) and got.shape == expected.shape
    return same_form and float((got - expected).abs().max() / expected.abs().max()) <= ROW_TOLERANCE.get(x.dtype, 1e-2)


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


__all__ = ["multiplies", "plain_layer", "replaced"]
