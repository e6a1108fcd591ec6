"""The output projection seen head by head: its input as z, and what each head writes through it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwise.errors import InputError
from headwise.model.site import Site


def heads_of(entering: Tensor, site: Site, rows: int, positions: int) -> Float[Tensor, "batch position head head_dim"]:
    """The projection's input, however its rows are laid out, as one slice per head."""
    flat = entering.reshape(-1, entering.shape[-1])
    if flat.shape[0] != rows * positions:
        raise InputError(
            f"{site.label}: its projection was given {flat.shape[0]} positions, its attention {rows} x {positions}"
        )
    if site.columns is not None:
        flat = flat[:, site.columns.to(flat.device)].flatten(1)
    if site.entering == "positions":
        return flat.reshape(positions, rows, site.n_heads, site.head_dim).transpose(0, 1)
    return flat.reshape(rows, positions, site.n_heads, site.head_dim)


def join_heads(z: Float[Tensor, "batch position head head_dim"], like: Tensor, site: Site) -> Tensor:
    """Inverse of `heads_of`: the projection's input in the layout it came in."""
    if site.entering == "positions":
        z = z.transpose(0, 1).contiguous()  # as it came: a matrix product of other strides rounds otherwise
    if site.columns is None:
        return z.reshape(like.shape)
    columns = site.columns.reshape(-1).to(z.device)
    flat = like.reshape(-1, like.shape[-1]).index_copy(1, columns, z.reshape(-1, columns.numel()))
    return flat.reshape(like.shape)


def head_weights(projection: nn.Module, site: Site) -> Float[Tensor, "head head_dim d_model"]:
    """W_O of every head: `write_h = z_h @ W_O[h]`.

    Taken from the weight where it is an ordinary matrix that is in memory, else measured by passing unit vectors
    through the module (quantised, wrapped or offloaded projections).
    """
    width = site.n_heads * site.head_dim
    weight = getattr(projection, "weight", None)
    # By identity: a LoRA layer is called Linear, too, and its weight is only the frozen part of what it does.
    ordinary = type(projection) in (nn.Linear, Conv1D) and isinstance(weight, nn.Parameter)
    matrix: Tensor
    # Packed numbers can come as a kind of tensor of their own inside a Linear.
    if (
        ordinary
        and isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and weight.dim() == 2
        and weight.is_floating_point()
        and not weight.is_meta
    ):
        matrix = weight if type(projection) is Conv1D else weight.T
    else:
        matrix = _measured(projection, width)
    # Where heads lie side by side this is a view: a copy of every projection is felt beside one forward.
    matrix = matrix[:width] if site.columns is None else matrix[site.columns.reshape(-1).to(matrix.device)]
    return matrix.reshape(site.n_heads, site.head_dim, -1)


def write_of(
    z: Float[Tensor, "batch position head head_dim"], projection: nn.Module, site: Site, heads: tuple[int, ...]
) -> Float[Tensor, "batch position head d_model"]:
    """z_h W_O^h of the chosen heads (z holds just those)."""
    weights = head_weights(projection, site)[list(heads)]
    return torch.einsum("bphd,hdo->bpho", z, weights.to(z))


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[return-value]


def _measured(projection: nn.Module, width: int) -> Tensor:
    parameter = next((p for p in projection.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    device = next((p.device for p in projection.parameters() if not p.is_meta), None)
    if device is None:  # offloaded between calls: its forward, called below, fetches the weight to where it runs
        device = getattr(getattr(projection, "_hf_hook", None), "execution_device", None)
    with torch.no_grad():
        units = torch.eye(width, dtype=dtype, device="cpu" if device is None else device)
        return first(projection.forward(units)) - first(projection.forward(torch.zeros_like(units[:1])))
