"""The weights of a model with edits put into them, in a state of their own: the model keeps what it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwise.errors import Refusal
from headwise.model.capture import Opened
from headwise.model.edit import Edit
from headwise.model.proving.patient import columns_of
from headwise.model.running.lowering import Lane
from headwise.model.running.plan import Layer, Plan
from headwise.model.site import Site
from headwise.model.table import SiteTable
from headwise.model.weights import multiplies
from headwise.use.baking.origins import Entries, Origins


@dataclass(frozen=True, eq=False)
class OnZ:
    """What all edits of z at one site come to: `z <- gain * z + offset`, in fp64, by column of what is projected."""

    site: Site
    gain: Float[Tensor, " width"]
    offset: Float[Tensor, " width"]

    @property
    def scales(self) -> bool:
        return bool((self.gain != 1).any())

    @property
    def moves(self) -> bool:
        return bool((self.offset != 0).any())

    @property
    def silent(self) -> Bool[Tensor, " group"]:
        """KV groups of whose z nothing is left."""
        by_head = (self.gain[columns_of(self.site)] == 0).all(-1)
        return by_head.reshape(self.site.n_kv_heads, -1).all(-1)

    def of_values(self) -> Float[Tensor, "group head_dim"] | str:
        """What added to v gives the offset; or why nothing does: heads of one group have one v."""
        columns = columns_of(self.site)
        gain, offset = self.gain[columns], self.offset[columns]
        if bool(((gain == 0) & (offset != 0)).any()):
            return f"{self.site.label}: what stands in place of z is no sum with v"
        before = torch.where(offset == 0, 0.0, offset / gain).reshape(self.site.n_kv_heads, -1, self.site.head_dim)
        if not torch.allclose(before, before[:, :1].expand_as(before), rtol=1e-6, atol=0):
            return f"{self.site.label}: the heads of a KV group are not all given the same offset"
        return before[:, 0]


def on_z(table: SiteTable, model: nn.Module, edits: Iterable[Edit]) -> dict[str, OnZ]:
    """Edits of z one after the other, by the label of their site."""
    asked = tuple(edits)
    if not asked:
        return {}
    plan = Plan(table, [Layer((), asked, {}, None, False, Opened())])
    found: dict[str, OnZ] = {}
    for label, operations in plan.sites.items():
        site = table.site(label)
        projection = model.get_submodule(str(site.projection))
        weight: Tensor = projection.weight  # type: ignore[assignment]
        lane = Lane(site, projection, weight.shape[_entering(projection)], weight.dtype, torch.device("cpu"))
        placed = [one for many in operations.edits.values() for one in many]
        found[site.label] = OnZ(site, *lane.values(placed))
    return found


def why_no_columns(model: nn.Module, site: Site) -> str:
    """Why the columns of a site's output projection cannot be changed; empty if they can."""
    projection = model.get_submodule(str(site.projection))
    if multiplies(projection):
        return ""
    return f"{site.label}: its output projection is a {type(projection).__name__}, not a plain matrix"


@dataclass(eq=False)
class Weights:
    """A state dict in the making.

    Attributes:
        model: where it comes from; `tensors` starts with what that holds, and a change is made on a copy.
        changed: names of the tensors that are other ones now.
    """

    model: nn.Module
    tensors: dict[str, Tensor] = field(init=False)
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        self._names: dict[tuple[int, torch.Size], list[str]] = {}
        for name, tensor in self.tensors.items():
            self._names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Raises Refusal for a tensor that other modules have as well: their change was not asked for."""
        old = self.tensors.get(name, tensor)
        tied = [other for other in self._names.get((old.data_ptr(), old.shape), ()) if other != name]
        if tied and old.numel() and name not in self.changed:
            raise Refusal(f"{name} is one tensor with {tied[0]}, so baking into it changes both; untie them first")
        made = tensor.to(old).contiguous()
        if not bool(made.isfinite().all()) and bool(old.isfinite().all()):
            kind = str(made.dtype).removeprefix("torch.")
            raise Refusal(f"{name} would hold numbers that {kind} has not; give finite and smaller factors and offsets")
        self.tensors[name] = made
        self.changed.add(name)

    def create(self, names: Iterable[str], like: str) -> None:
        """Biases of zero where a class wants them; each as long as its matrix has outputs."""
        for name in names:
            matrix = self.tensors[f"{name.removesuffix('.bias')}.weight"]
            self.put(name, torch.zeros(matrix.shape[0], dtype=self.tensors[like].dtype, device=matrix.device))

    def scale_columns(self, found: OnZ) -> None:
        name, dim = self._projection(found.site)
        gain = found.gain if dim == 1 else found.gain[:, None]
        self.put(name, _wide(self.tensors[name]) * gain)

    def project_offset(self, found: OnZ) -> None:
        """W_O times the offset, into the bias; before the columns are scaled."""
        name, dim = self._projection(found.site)
        weight = _wide(self.tensors[name])
        moved = (weight if dim == 1 else weight.T) @ found.offset
        bias = f"{found.site.projection}.bias"
        self.put(bias, _wide(self.tensors[bias]) + moved)

    def add(self, name: str, constant: Tensor, indices: Tensor | None = None) -> None:
        moved = _wide(self.tensors[name]).clone()
        moved[slice(None) if indices is None else indices.cpu()] += constant.cpu()
        self.put(name, moved)

    def multiply(self, entries: Entries, factor: float) -> None:
        self.put(entries.name, entries.times(self.tensors[entries.name], factor))

    def without(self, origins: Origins, groups: Mapping[str, list[int]]) -> dict[str, Tensor] | str:
        """The tensors without the rows and columns of these KV groups, by label of their site; or why not."""
        lost: dict[tuple[str, int], list[Tensor]] = {}
        for label, listed in groups.items():
            site = origins.model.site(label)
            for group in listed:
                heads = range(group * site.group_size, (group + 1) * site.group_size)
                makers = [origins.made(site, "q", h) for h in heads]
                makers += [origins.made(site, "k", group), origins.made(site, "v", group)]
                for made in makers:
                    if not any(self.tensors[each.name].dim() == 2 for each in made.own):
                        return f"{label}: no rows of weights are those of one head alone"
                    for each in made.own:
                        lost.setdefault((each.name, each.dim), []).append(each.indices)
                name, dim = self._projection(site)
                lost.setdefault((name, dim), []).append(columns_of(site)[list(heads)].flatten())
        smaller = dict(self.tensors)
        for (name, dim), indices in lost.items():
            kept = torch.ones(smaller[name].shape[dim], dtype=torch.bool)
            kept[torch.cat([each.cpu() for each in indices])] = False
            left = kept.nonzero().flatten().to(smaller[name].device)
            smaller[name] = smaller[name].index_select(dim, left)
        return smaller

    def _projection(self, site: Site) -> tuple[str, int]:
        """The name of its weight, and the axis of what enters."""
        return f"{site.projection}.weight", _entering(self.model.get_submodule(str(site.projection)))


def _wide(tensor: Tensor) -> Tensor:
    """In fp64, in the main memory: some accelerators have none."""
    return tensor.cpu().double()


def _entering(projection: nn.Module) -> int:
    return 0 if isinstance(projection, Conv1D) else 1


def counted(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Parameters and bytes, tied ones once."""
    once = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors.values() if tensor.numel()}
    return sum(each.numel() for each in once.values()), sum(
        each.numel() * each.element_size() for each in once.values()
    )


__all__ = ["OnZ", "Weights", "counted", "on_z", "why_no_columns"]
