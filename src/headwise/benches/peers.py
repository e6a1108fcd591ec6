"""How a head is knocked out, and how gradients at all heads are taken, by what else there is.

Each way does what the package's own documentation does, on a model of its own, and gives the same numbers; benches
check that before they time it. `logits_to_keep=1` may be given to each, which none of their documentations mentions.

    Hooks           plain forward hooks on the model of transformers, what a user writes without any package
    Lens            TransformerLens: a bridge built around the model, `run_with_hooks`
    Traces          nnsight: `trace`, assigning to a module's input
    Interventions   pyvene: a `ZeroIntervention` on one head, which has to be built anew for every head

The packages come with the extra `peers`.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.benches.shapes import Shape
from headwise.errors import Refusal
from headwise.heads import Head, HeadSet
from headwise.probes.encoding import ItemSet

PACKAGES = {"transformer_lens": "transformer_lens", "nnsight": "nnsight", "pyvene": "pyvene"}
"""Peer -> the module that has to be there for it."""

Given = Mapping[str, int]
"""Arguments of a forward besides the ids; `ALL_LOGITS` or `LAST_LOGIT`."""

ALL_LOGITS: Given = {}
LAST_LOGIT: Given = {"logits_to_keep": 1}


@dataclass(frozen=True)
class Work:
    """A model's shape and items of one length, each with an answer of one token and a foil."""

    shape: Shape
    items: ItemSet
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def model(self) -> Any:
        """A model of its own for every caller, always with the same weights."""
        return self.shape.build(seed=self.seed, dtype=self.dtype)

    @cached_property
    def ids(self) -> Int[Tensor, "item token"]:
        return torch.tensor([each.prompt for each in self.items])

    def score(self, logits: Float[Tensor, "item token vocab"]) -> Float[Tensor, " item"]:
        """Logit of the answer less that of the foil, at the last token."""
        rows = torch.arange(len(self.items))
        answers = torch.tensor([each.answer[0] for each in self.items])
        foils = torch.tensor([each.foils[0][0] for each in self.items])
        return logits[rows, -1, answers] - logits[rows, -1, foils]

    def gates(self, z: Tensor, gradient: Tensor) -> Float[Tensor, "item head"]:
        """| sum_t < z_h[t], dM/dz_h[t] > | of each head; z and its gradient with the heads side by side or apart."""
        products = (z * gradient).detach().reshape(len(self.items), -1, self.shape.heads, self.head_dim)
        return products.sum((1, 3)).abs()

    @property
    def head_dim(self) -> int:
        return self.shape.width // self.shape.heads

    def projection(self, model: Any, layer: int) -> Any:
        """The output projection of a layer, of a model or of what a peer puts in its place."""
        if self.shape.family == "gpt2":
            return model.transformer.h[layer].attn.c_proj
        return model.model.layers[layer].self_attn.o_proj

    def columns(self, head: int) -> slice:
        """Of one head, in the projection's input."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


class Peer(Protocol):
    """One way to do it. `given` is passed on to the model's forward."""

    def __init__(self, work: Work) -> None: ...

    def knock_out(self, head: Head, given: Given) -> Float[Tensor, " item"]:
        """The score of every item with z of the head at 0, at all positions."""


class GradientPeer(Peer, Protocol):
    """One that also takes gradients."""

    def importance(self, given: Given) -> Float[Tensor, "item layer head"]:
        """The gate gradient of all heads, as `gate_gradient` with `loss="logit-difference"`."""


def installed() -> dict[str, type[Peer]]:
    """The peers that are there, by name, plain hooks not among them."""
    known: dict[str, type[Peer]] = {"transformer_lens": Lens, "nnsight": Traces, "pyvene": Interventions}
    return {name: known[name] for name, package in PACKAGES.items() if find_spec(package) is not None}


def require(name: str) -> Any:
    """The module of a peer. Raises `Refusal` if it is not installed."""
    if find_spec(PACKAGES[name]) is None:
        raise Refusal(f"{name} is not installed, so nothing can be compared with it; pip install 'headwise[peers]'")
    with redirect_stdout(sys.stderr):  # some greet on stdout, where figures are printed
        return import_module(PACKAGES[name])


class Hooks:
    """Plain hooks on the output projections."""

    def __init__(self, work: Work) -> None:
        self.work, self.model = work, work.model()

    def knock_out(self, head: Head, given: Given = LAST_LOGIT) -> Float[Tensor, " item"]:
        return self.knock_out_set(HeadSet((head,)), given)

    def knock_out_set(
        self, heads: HeadSet, given: Given = LAST_LOGIT, positions: slice = slice(None)
    ) -> Float[Tensor, " item"]:
        by_layer: dict[int, list[int]] = defaultdict(list)
        for head in heads:
            by_layer[head.site.layer].append(head.index)
        with ExitStack() as hooks, torch.no_grad():
            for layer, indices in by_layer.items():
                handle = self.work.projection(self.model, layer).register_forward_pre_hook(
                    lambda _, args, indices=tuple(indices): (self._without(args[0], indices, positions),)
                )
                hooks.callback(handle.remove)
            return self.work.score(self.model(input_ids=self.work.ids, **given).logits)

    def _without(self, z: Tensor, heads: tuple[int, ...], positions: slice) -> Tensor:
        z = z.clone()
        for head in heads:
            z[:, positions, self.work.columns(head)] = 0
        return z

    def importance(self, given: Given) -> Float[Tensor, "item layer head"]:
        kept: list[Tensor] = []

        def keep(_: object, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept.append(args[0])

        with ExitStack() as hooks:
            for layer in range(self.work.shape.layers):
                hooks.callback(self.work.projection(self.model, layer).register_forward_pre_hook(keep).remove)
            score = self.work.score(self.model(input_ids=self.work.ids, **given).logits).sum()
            score.backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad()
        return torch.stack([self.work.gates(z, _present(z.grad)) for z in kept], dim=1)


class Lens:
    """TransformerLens: `run_with_hooks` on a bridge around the model."""

    def __init__(self, work: Work) -> None:
        require("transformer_lens")
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        self.work, model = work, work.model()
        self.bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def knock_out(self, head: Head, given: Given) -> Float[Tensor, " item"]:
        def zero(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head.index] = 0
            return z

        hooks = [(f"blocks.{head.site.layer}.attn.hook_z", zero)]
        with torch.no_grad():
            return self.work.score(self.bridge.run_with_hooks(self.work.ids, fwd_hooks=hooks, **given))

    def importance(self, given: Given) -> Float[Tensor, "item layer head"]:
        kept: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}

        def forward(z: Tensor, hook: Any) -> None:
            kept[hook.name] = z.detach()

        def backward(gradient: Any, hook: Any) -> None:
            own = gradient[0] if isinstance(gradient, tuple) else gradient
            found[hook.name] = self.work.gates(kept[hook.name], own)

        names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.work.shape.layers)]
        at = [(name, forward) for name in names], [(name, backward) for name in names]
        with self.bridge.hooks(fwd_hooks=at[0], bwd_hooks=at[1]):
            score = self.work.score(self.bridge(self.work.ids, **given)).sum()
            score.backward()  # type: ignore[no-untyped-call]
        self.bridge.zero_grad()
        return torch.stack([found[name] for name in kept], dim=1)  # in the order of the forward


class Traces:
    """nnsight: a trace of the model."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.package: Any = require("nnsight")
        self.model: Any = self.package.NNsight(work.model())

    def knock_out(self, head: Head, given: Given) -> Float[Tensor, " item"]:
        projection = self.work.projection(self.model, head.site.layer)
        columns = self.work.columns(head.index)
        with torch.no_grad(), self.model.trace(self.work.ids, **given):
            projection.input[:, :, columns] = 0
            logits = self.model.output.logits.save()
        return self.work.score(logits)

    def importance(self, given: Given) -> Float[Tensor, "item layer head"]:
        work, save = self.work, self.package.save
        projections = [work.projection(self.model, layer) for layer in range(work.shape.layers)]
        with self.model.trace(work.ids, **given):
            kept = save([])
            for projection in projections:
                kept.append(projection.input)
            gradients = save([])
            with work.score(self.model.output.logits).sum().backward():  # type: ignore[no-untyped-call]
                for z in reversed(kept):
                    gradients.append(z.grad)
        self.model._module.zero_grad()
        return torch.stack([work.gates(z, g) for z, g in zip(kept, reversed(gradients), strict=True)], dim=1)


class Interventions:
    """pyvene: an intervenable model for each head. It takes no gradients at what it intervenes on."""

    def __init__(self, work: Work) -> None:
        self.work, self.model = work, work.model()
        self.package: Any = require("pyvene")

    def knock_out(self, head: Head, given: Given) -> Float[Tensor, " item"]:
        where = {
            "layer": head.site.layer,
            "component": "head_attention_value_output",
            "unit": "h",
            "intervention_type": self.package.ZeroIntervention,
        }
        with torch.no_grad(), _quiet():
            changed = self.package.IntervenableModel(where, model=self.model)
            _, output = changed({"input_ids": self.work.ids, **given}, unit_locations={"base": head.index})
        return self.work.score(output.logits)


@contextmanager
def _quiet() -> Iterator[None]:
    """pyvene warns about each model that it builds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
