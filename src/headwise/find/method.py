"""What a head-finding method is: a published score, what it needs, and the function that computes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import MethodEntry
from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.stream import Setting

Scored = Mapping[SiteId, Float[Tensor, "item head"]]
"""Score of every head on every item, by site; NaN where a head has no score on an item."""

NEEDS = ("rows", "z", "projection", "gradients", "logits", "generation", "weights", "answer", "foils", "twin")
"""What a method may need, besides spans: `span:NAME`, or `span:{SETTING}` for the one that a setting names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(MethodEntry):
    """A published method.

    Attributes:
        probe: id of the probe that it is run on unless another is given.
        over: settings of that probe where the paper has others than the probe, such as its corrupted twins.
        probes: ids of all probes that it means something on; `("*",)` is every probe that has what it needs.
        score: takes an attached model and items, and settings of its own as keyword arguments, each with the paper's
            value as its default.

    Raises `InputError` for a need that is none, and for a setting without a default.
    """

    probe: str
    over: Mapping[str, Setting] = field(default_factory=dict)
    probes: tuple[str, ...] = ("*",)
    score: Callable[..., Scored]

    def __post_init__(self) -> None:
        MethodEntry.__post_init__(self)  # not super(): slots make the class anew, and super() would not find it
        unknown = [need for need in self.needs if need not in NEEDS and not need.startswith("span:")]
        if unknown:
            raise InputError(f"method {self.id!r} needs {unknown[0]!r}; use span:NAME or one of {', '.join(NEEDS)}")
        bare = [name for name, default in self.settings.items() if default is inspect.Parameter.empty]
        if bare:
            raise InputError(f"method {self.id!r}: its setting {bare[0]!r} needs a default, the paper's own")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `score` and their defaults."""
        parameters = list(inspect.signature(self.score).parameters.values())[2:]
        return {each.name: each.default for each in parameters}

    def spans(self, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Names of the spans that every item must have, with these settings of `score`, or with its defaults."""
        named = [need.removeprefix("span:") for need in self.needs if need.startswith("span:")]
        return tuple(name.format(**{**self.settings, **(settings or {})}) for name in named)

    def missing(self, model: AttachedModel, items: ItemSet, settings: Mapping[str, Any] | None = None) -> str:
        """What stands in the way of running it on these with these settings, in words; empty where nothing does."""
        for name in self.spans(settings):
            lacking = next((each for each in items if name not in each.spans), None)
            if lacking is not None:
                known = ", ".join(lacking.spans) or "none"
                return f"item {lacking.id} of {items.probe} has no span {name!r}; it has {known}"
        for need in self.needs:
            if need == "answer" and (silent := next((each.id for each in items if not each.answer), None)):
                return f"item {silent} of {items.probe} has no answer"
            if need == "foils" and (bare := next((each.id for each in items if not each.foils), None)):
                return f"item {bare} of {items.probe} has no wrong answers (foils)"
            if need == "twin" and (single := next((each.id for each in items if each.twin is None), None)):
                return f"item {single} of {items.probe} has no corrupted twin"
            if need in ("rows", "z", "projection") and (reason := _lacks(model, need)):
                return reason
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryMethod(MethodEntry):
    """A published method that takes other things than a model and items, so that `find` does not run it.

    `call` is how it is called in Python: `headwise.find.towers.spatial_profile(model, pixel_values)`.
    """

    call: str


def scored_sites(model: AttachedModel) -> tuple[SiteId, ...]:
    """The sites that methods score: those of the main stack."""
    return tuple(site.id for site in model.sites if site.id.stack == model.table.stacks[0])


def _lacks(model: AttachedModel, capability: str) -> str:
    for id in scored_sites(model):
        found = model.table.site(id).capabilities[capability]
        if not found:
            return f"{id.label} of {model.name} has no {capability}: {found.reason}"
    return ""


__all__ = ["NEEDS", "LibraryMethod", "Method", "Scored", "scored_sites"]
