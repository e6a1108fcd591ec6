"""The part of a model's weights that belongs to some heads: rows that make q, k, v, columns that take z in.

    head h of a site:  W_q[rows of h, :]   W_k, W_v[rows of g(h), :]   W_O[:, columns of h]

Keys and values belong to the KV group g(h); under grouped queries other heads read them, too, and "qo" leaves them as
they are. The bias of q, k and v goes with the rows; the bias of the output belongs to no head, and so do the rows of a
gate. What is whose was measured (`model.input_projections`, `Site.columns`), also in fused and transposed layers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.model.input_projections import input_projections
from headwise.model.proving.patient import columns_of
from headwise.model.site import Site
from headwise.model.weights import plain_layer

VARIABLES = "qkvo"


@dataclass(frozen=True, eq=False, slots=True)
class Slice:
    """Some heads' part of one layer.

    Attributes:
        site: label of the site; `module`: qualified name of the layer.
        variables: what of the heads it makes: letters of `qkv` together where they are fused, or `o`.
        indices: the rows of the layer's output (q, k, v) or the columns of its input (o), ascending.
        transposed: whether the weight is stored `[in, out]`.
        biased: whether the layer has a bias that goes with the rows.
    """

    site: str
    module: str
    variables: str
    indices: Int[Tensor, " n"]
    transposed: bool
    biased: bool

    @property
    def axis(self) -> int:
        """The axis of the weight, as it is stored, along which `indices` count."""
        return int((self.variables == "o") != self.transposed)

    @property
    def parameters(self) -> dict[str, int]:
        """Qualified names of the parameters, with the axis along which `indices` count."""
        weight = {f"{self.module}.weight": self.axis}
        return weight | ({f"{self.module}.bias": 0} if self.biased else {})


def head_slices(model: AttachedModel, heads: HeadSet, variables: str = VARIABLES) -> tuple[Slice, ...]:
    """The slices of `heads`, one for each layer that has a part of them, in the order of the sites.

    Raises:
        InputError: no heads, heads that the model does not have, or letters that are not of `qkvo`.
        Refusal: no rows or columns are a head's own, or the layer is not plain or serves several sites.
    """
    if not variables or set(variables) - set(VARIABLES) or len(set(variables)) < len(variables):
        raise InputError(f"variables={variables!r} does not name weights of a head; give letters of {VARIABLES!r}")
    chosen = model.heads(heads)
    found: list[Slice] = []
    for id in chosen.sites:
        site = model.table.site(id)
        members = [head.index for head in chosen if head.site == id]
        indices: dict[str, list[Tensor]] = defaultdict(list)
        letters: dict[str, str] = defaultdict(str)
        for variable in variables.replace("o", ""):
            made = input_projections(model, site).require(variable)
            own = members if variable == "q" else sorted({member // site.group_size for member in members})
            indices[made.module].append(made.rows[own].flatten())
            letters[made.module] += variable
        if "o" in variables:
            path = _projection(site)
            indices[path].append(columns_of(site)[members].flatten())
            letters[path] += "o"
        for module, parts in indices.items():
            layer = plain_layer(model, module)
            _require_one_site(model, site, module)
            transposed = type(layer) is Conv1D
            biased = letters[module] != "o" and layer.bias is not None
            found.append(Slice(site.label, module, letters[module], torch.cat(parts).sort().values, transposed, biased))
    return tuple(found)


def _projection(site: Site) -> str:
    if site.projection is None or not site.capabilities["projection"]:
        reason = site.capabilities["projection"].reason or "its kinds of tokens go to projections of their own"
        raise Refusal(f"{site.label} has no columns of an output projection for each head: {reason}")
    return site.projection


def _require_one_site(model: AttachedModel, site: Site, module: str) -> None:
    for other in model.sites:
        if other.id != site.id and module in (*other.takers, *_makers(model, other)):
            raise Refusal(f"{module} serves {site.label} and {other.label}, so no part of it belongs to one head")


def _makers(model: AttachedModel, site: Site) -> list[str]:
    made = input_projections(model, site)
    return [each.module for each in (made.q, made.k, made.v) if each is not None]


__all__ = ["Slice", "head_slices"]
