"""What a result was measured on: a hash of the weights, and the provenance made with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import Refusal


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and persistent buffer: name, dtype, shape and bytes, in the order of names.

    Tied weights count under each of their names, so saving and loading a model leaves the hash as it was. What
    accelerate has offloaded is fetched tensor by tensor, so that a model has one hash wherever it lies; packed
    weights count by the tensors that they are made of.

    Raises:
        Refusal: weights that are nowhere: on the meta device, and not offloaded by accelerate either.
    """
    digest = hashlib.sha256()
    for name, value in sorted(_entries(model).items()):
        for part, tensor in _tensors(name, value):
            if tensor.is_meta:
                tensor = fetched(model, part)
            whole = tensor.detach().to("cpu").contiguous()
            whole = whole.int_repr() if whole.is_quantized else whole
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fetched(model: nn.Module, name: str) -> Tensor:
    """The tensor that stands in the state dict as `name` and is on the meta device, from where accelerate keeps it.

    Raises:
        Refusal: accelerate does not have it.
    """
    path, found = name, None
    while path and found is None:
        path = path.rpartition(".")[0]
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        local = name[len(path) + 1 :] if path else name
        maps = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,)))
        found = next((kept[local] for kept in maps if kept is not None and local in kept), None)
    if found is None:
        raise Refusal(
            f"{name} is on the meta device and accelerate has not offloaded it, so there is nothing to hash; load its "
            "weights first (reads and edits need none of this)"
        )
    return torch.as_tensor(found)


def _entries(model: nn.Module) -> dict[str, Any]:
    """What the state dict holds; gathered by hand where making one would change the model.

    bitsandbytes unpacks its 4-bit weights to save them and packs them again at the next run, and on the CPU the scales
    come back rounded: a hash must not do that.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    scales = {name: state for name, p in named.items() if (state := getattr(p, "quant_state", None)) is not None}
    if not scales:
        return model.state_dict()
    entries: dict[str, Any] = dict(named)
    for path, module in model.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        entries |= {f"{path}.{name}" if path else name: module._buffers[name] for name in kept}
    for name, state in scales.items():
        for each in (state, getattr(state, "state2", None)):
            listed = {} if each is None else vars(each)
            prefix = f"{name}.quant_state" if each is state else f"{name}.quant_state.state2"
            entries |= {f"{prefix}.{part}": value for part, value in listed.items() if isinstance(value, Tensor)}
    return entries


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that an entry of a state dict is made of, with their names."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _tensors(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        yield name, value
        if value.is_quantized:
            scales = value.q_per_channel_scales() if value.qscheme() == torch.per_channel_affine else value.q_scale()
            yield f"{name}.scale", torch.as_tensor(scales)
    elif isinstance(value, (tuple, list)):  # torch's packed weights: the matrix and the bias, or None
        for index, part in enumerate(value):
            yield from _tensors(f"{name}.{index}", part)
