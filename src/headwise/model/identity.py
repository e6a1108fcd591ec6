"""What a result was measured on: a hash of the weights, and the provenance made with it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from headwise.errors import Refusal


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and persistent buffer: name, dtype, shape and bytes, in the order of names.

    Tied weights count under each of their names, so saving and loading a model leaves the hash as it was.

    Raises:
        Refusal: weights that are not in memory (offloaded to disk).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise Refusal(f"{name} is not in memory (offloaded), so the weights cannot be hashed")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole = tensor.detach().to("cpu").contiguous()
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
