"""Which entries of which weights make a head's queries, keys or values, and which bias reaches the stream: measured.

No name is looked up. The gradient of one head's query by the weights of its attention module shows which rows make it,
in fused projections and transposed ones, too. Whether a change of these rows does in a run what an edit does is tried
out: a norm behind the rows, a bias on the scores, a soft cap or a learned sink show themselves there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from headwise.heads import HeadSet, SiteId
from headwise.model import edit as edits
from headwise.model import read
from headwise.model.at_rest import weights_at_rest
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.finding.recording import ROW_TOLERANCE
from headwise.model.proving.patient import distance
from headwise.model.site import Site

Variable = Literal["q", "k", "v"]
TRIED = 3.0
"""The factor that is tried in place of the one asked for: what breaks it shows itself with a strong one."""


@dataclass(frozen=True)
class Entries:
    """Entries `indices` along axis `dim` of the weight called `name`."""

    name: str
    dim: int
    indices: Int[Tensor, " entry"]

    def times(self, weight: Tensor, factor: float) -> Tensor:
        """The weight with these entries multiplied."""
        changed = weight.detach().clone()
        where = (slice(None),) * self.dim + (self.indices.to(weight.device),)
        changed[where] = changed[where] * factor if factor else torch.zeros_like(changed[where])
        return changed


@dataclass(frozen=True)
class Made:
    """What makes one head's queries (keys, values): entries of its own, and one-dimensional weights of all heads."""

    own: tuple[Entries, ...]
    shared: tuple[Entries, ...]


class Origins:
    """The weights behind the heads of one model, measured when they are asked for; the model stays as it is."""

    def __init__(self, model: AttachedModel) -> None:
        self.model = model
        self._weights = dict(model.model.named_parameters())
        self._made: dict[tuple[SiteId, Variable, int], Made] = {}
        self._tried: dict[tuple[SiteId, str], str] = {}

    def made(self, site: Site, variable: Variable, index: int) -> Made:
        """The weights that make q of a head, or k or v of a KV group."""
        key = (site.id, variable, index)
        if key not in self._made:
            for each, found in enumerate(self._traced(site, variable)):
                self._made[site.id, variable, each] = found
        return self._made[key]

    def times(self, site: Site, factors: Mapping[int, float]) -> tuple[tuple[Entries, float], ...] | str:
        """The entries to multiply so that the scores of these heads are multiplied; or why there are none."""
        factors = {head: factor for head, factor in factors.items() if factor != 1}
        if len({*factors.values()}) == 1 and len(factors) == site.n_heads:
            factor = next(iter(factors.values()))
            whole = self.made(site, "q", 0)
            # All heads alike: the gain of a norm behind the projection, shared by them, does it as well.
            at_once = [[(entries, factor) for entries in whole.shared if self._weights[entries.name].dim() == 1]]
        else:
            at_once = []
        own = [(entries, factor) for head, factor in factors.items() for entries in self.made(site, "q", head).own]
        why = ""
        for changes in [own, *at_once]:
            tried = [(entries, TRIED if factor else 0.0) for entries, factor in changes]
            why_not = self._try(site, {h: TRIED if f else 0.0 for h, f in factors.items()}, tried)
            if not why_not:
                return tuple(changes)
            why = why or why_not
        return why

    def weighs_to_one(self, site: Site) -> str:
        """Why what is added to v does not arrive as it is in z; empty if it does."""
        return self._once(site, "one", lambda: self._all_ones(site))

    def carries(self, site: Site, variable: str) -> str:
        """Why a factor on `v` or `pattern` is not the same factor on z; empty if it is."""
        heads = site.groups if variable == "v" else site.heads
        there = edits.scale(heads, TRIED, variable)  # type: ignore[arg-type]
        return self._once(site, variable, lambda: self._same_z(site, there, edits.scale(site.heads, TRIED)))

    def value_biases(self, site: Site, group: int) -> Entries | str:
        """The entries of a bias that is added to v of a group; or why there are none."""
        found = [each for each in self.made(site, "v", group).own if self._weights[each.name].dim() == 1]
        if len(found) != 1 or len(found[0].indices) != site.head_dim:
            return f"nothing of that length is added to v of {site.groups.groups[group].label} alone"
        (entries,) = found
        step = torch.linspace(1, 2, site.head_dim, device=self.model.device)
        moved = self._weights[entries.name].detach().clone()
        moved[entries.indices] += step.to(moved)
        plain, changed = self._values(site, {}), self._values(site, {entries.name: moved})
        wanted = plain.clone()
        wanted[:, :, group] += step.to(plain)
        near = distance(changed, wanted) <= self._tolerance
        return entries if near else f"{entries.name} does not reach v of {site.label} as it is"

    def stream_bias(self, variable: str, label: str) -> tuple[str, float] | str:
        """The bias that is added, times a factor, where a constant is to be added; or why there is none."""
        block = self.model.table.block(label)
        module = block.mlp if variable == "mlp" else block.module
        if module is None:
            return block.reasons["mlp"]
        if block.calls > 1:
            return f"{label} runs {block.calls} times with the same weights"
        reading = read.mlp(label) if variable == "mlp" else read.residual(label)
        names = [name for name, weight in self._weights.items() if name.startswith(f"{module}.") and weight.dim() == 1]
        with self._asking(names) as weights:
            with self.model.reading(reading) as got:
                self.model.model(**self.model.example)
            written = (got.mlp if variable == "mlp" else got.residual_post)[label]
            direction = torch.randn(written.shape, generator=torch.Generator().manual_seed(0)).to(written)
            gradients = _gradients((written * direction).sum(), weights)
        wanted = direction.sum(tuple(range(direction.dim() - 1)))
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and gradient.shape == wanted.shape:
                factor = float((gradient * wanted).sum() / wanted.square().sum())
                if factor and distance(gradient, factor * wanted) <= self._tolerance:
                    return name, factor
        what = "what its feed-forward part writes" if variable == "mlp" else "the stream behind it"
        return f"{label}: no bias is added to {what}"

    # -- gradients ------------------------------------------------------------------------------------------------

    def _traced(self, site: Site, variable: Variable) -> list[Made]:
        """For every head (group) of a site."""
        names = [name for name in self._weights if name.startswith(f"{site.module}.")]
        reading = {"q": read.q, "k": read.k, "v": read.v}[variable]
        supports: list[dict[str, tuple[int, Tensor]]] = []
        with self._asking(names) as weights:
            with self.model.reading(reading(site.label)) as got:
                self.model.model(**self.model.example)
            made = getattr(got, variable)[site.label]
            made = made * torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made)
            for index in range(made.shape[2]):
                found = zip(names, _gradients(made[:, :, index].sum(), weights, keep=True), strict=True)
                supports.append({name: self._support(name, slope) for name, slope in found if slope is not None})
        return [_apart(supports, index) for index in range(len(supports))]

    def _support(self, name: str, gradient: Tensor) -> tuple[int, Bool[Tensor, " entry"]]:
        """The axis along which a weight makes what comes out, and which entries of it have a gradient."""
        owner = self.model.model.get_submodule(name.rpartition(".")[0])
        dim = 1 if type(owner) is Conv1D and gradient.dim() == 2 else 0
        others = [axis for axis in range(gradient.dim()) if axis != dim]
        return dim, (gradient != 0).any(dim=others[0]) if others else gradient != 0

    @contextmanager
    def _asking(self, names: Collection[str]) -> Iterator[list[nn.Parameter]]:
        """Inside, these weights and no others ask for a gradient."""
        weights = [self._weights[name] for name in names]
        with weights_at_rest(self.model.model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            try:
                yield weights
            finally:
                for weight in weights:
                    weight.requires_grad_(False)

    # -- trials -----------------------------------------------------------------------------------------------------

    def _try(self, site: Site, factors: Mapping[int, float], changes: list[tuple[Entries, float]]) -> str:
        """Why these changes of weights are not these factors on scores; empty if they are."""
        if not changes:
            return f"no weights make the queries of {site.label} that are not those of other heads, too"
        weights: dict[str, Tensor] = {}
        for entries, factor in changes:
            weights[entries.name] = entries.times(weights.get(entries.name, self._weights[entries.name]), factor)
        heads = list(factors)
        plain, changed = self._queries(site, {}), self._queries(site, weights)
        wanted = plain.clone()
        for head, factor in factors.items():
            wanted[:, :, head] *= factor
        if distance(self._seen(changed), self._seen(wanted)) > self._tolerance:
            return f"{site.label}: a norm or a bias stands between the weights and the queries"
        labels = {head: site.heads.heads[head] for head in heads}
        uniform = HeadSet(tuple(labels[head] for head in heads if factors[head] == 0))
        scaled = HeadSet(tuple(labels[head] for head in heads if factors[head] != 0))
        asked = [
            *([edits.uniform(uniform)] if uniform else []),
            *([edits.scale(scaled, TRIED, "score")] if scaled else []),
        ]
        there, here = self._z(site, {}, asked), self._z(site, weights, [])
        if distance(self._seen(here), self._seen(there)) > self._tolerance:
            return (
                f"{site.label}: its scores are more than products of queries and keys (a position bias, a soft cap, a "
                "learned sink), so other queries do not do the same"
            )
        return ""

    def _all_ones(self, site: Site) -> str:
        z = self._z(site, {}, [edits.set(site.groups, 1.0, "v")])
        near = distance(self._seen(z), torch.ones_like(self._seen(z))) <= self._tolerance
        return "" if near else f"{site.label}: the rows of its patterns do not sum to 1 (a learned sink, or a gate)"

    def _same_z(self, site: Site, there: Edit, here: Edit) -> str:
        one, other = self._seen(self._z(site, {}, [there])), self._seen(self._z(site, {}, [here]))
        same = distance(one, other) <= self._tolerance
        return "" if same else f"{site.label}: what is multiplied there does not arrive so in z"

    def _once(self, site: Site, what: str, tried: Callable[[], str]) -> str:
        if (site.id, what) not in self._tried:
            self._tried[site.id, what] = tried()
        return self._tried[site.id, what]

    def _z(self, site: Site, weights: Mapping[str, Tensor], asked: list[Edit]) -> Tensor:
        with self.model.reading(read.z(site.label)) as got:
            self._run(weights, asked)
        found: Tensor = got.z[site.label]
        return found

    def _queries(self, site: Site, weights: Mapping[str, Tensor]) -> Tensor:
        with self.model.reading(read.q(site.label)) as got:
            self._run(weights, [])
        found: Tensor = got.q[site.label]
        return found

    def _values(self, site: Site, weights: Mapping[str, Tensor]) -> Tensor:
        with self.model.reading(read.v(site.label)) as got:
            self._run(weights, [])
        found: Tensor = got.v[site.label]
        return found

    @torch.no_grad()
    def _run(self, weights: Mapping[str, Tensor], asked: list[Edit]) -> None:
        inputs = dict(self.model.example)
        if asked:
            with self.model.editing(*asked):
                functional_call(self.model.model, dict(weights), (), inputs)
        else:
            functional_call(self.model.model, dict(weights), (), inputs)

    def _seen(self, x: Float[Tensor, "batch position head dim"]) -> Tensor:
        """Without the padding, whose queries see what their kernel likes."""
        return attended(x, self.model.example)

    @property
    def _tolerance(self) -> float:
        return ROW_TOLERANCE[self.model.dtype]


def attended(x: Float[Tensor, "batch position *others"], inputs: Mapping[str, Any]) -> Tensor:
    """The rows of attended positions, where the inputs say which those are."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
            return x[mask.to(x.device).bool()]
    return x.flatten(0, 1)


def _gradients(total: Tensor, weights: list[nn.Parameter], *, keep: bool = False) -> tuple[Tensor | None, ...]:
    if not weights or not total.requires_grad:
        return (None,) * len(weights)
    return torch.autograd.grad(total, weights, retain_graph=keep, allow_unused=True)


def _apart(supports: list[dict[str, tuple[int, Tensor]]], index: int) -> Made:
    """What is one head's own among the weights that have a gradient, and what all heads share."""
    own: list[Entries] = []
    shared: list[Entries] = []
    for name, (dim, support) in supports[index].items():
        others = [each[name][1] for at, each in enumerate(supports) if at != index and name in each]
        entries = Entries(name, dim, support.nonzero().flatten())
        if not len(entries.indices):
            continue
        (shared if any(bool((support & other).any()) for other in others) else own).append(entries)
    return Made(tuple(own), tuple(shared))


__all__ = ["Entries", "Made", "Origins", "attended"]
