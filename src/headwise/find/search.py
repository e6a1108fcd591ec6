"""`find`: run a method on a model and get a score per item and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise import catalogue, freed_memory
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.find.method import LibraryMethod, Method, Scored
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import probe as probe_named
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.stream import Probe
from headwise.scores import HeadScores

BATCH = 16
WEIGHTS = "weights"
"""Item id of a score that is of the weights alone."""

TOGETHER = "all-items"
"""Item id of a score that items have together and not each by itself."""


def method(id: str | Method) -> Method:
    """The method of an id. Raises `InputError`, with the nearest ids, for an unknown one, and `Refusal` for one that
    takes other things than items."""
    if isinstance(id, Method):
        return id
    found = catalogue.entry("methods", id)
    if isinstance(found, LibraryMethod):
        raise Refusal(f"method {id!r} takes no items of a probe, so find does not run it; in Python call {found.call}")
    if not isinstance(found, Method):
        raise InputError(f"method {id!r} is listed but cannot be run with find; see {found.page}")
    return found


@freed_memory.kept()
def find(
    name: str | Method,
    model: AttachedModel,
    probe: str | Probe | ItemSet | None = None,
    *,
    items: int = 64,
    seed: int = 0,
    **settings: Any,
) -> HeadScores:
    """Score every head of the main stack by a published method.

        scores = hw.find("retrieval", model, items=64, seed=0)
        scores.top(5)

    Args:
        name: id of the method (`headwise list methods`), or a method of your own.
        probe: what it is run on: a probe, its id, or items encoded for this model; the method's own if left out.
        items: how many items of a probe.
        settings: the method's own; its page names them, with the paper's values as defaults.

    Raises:
        InputError: no such method, probe or setting; too few items.
        Refusal: the model or the items lack what the method needs.
    """
    chosen = method(name)
    if not isinstance(model, AttachedModel):
        raise InputError(f"find takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    unknown = sorted(settings.keys() - chosen.settings.keys())
    if unknown:
        known = ", ".join(chosen.settings) or "none"
        raise InputError(f"method {chosen.id} has no setting {unknown[0]!r}; its settings: {known}")
    given = items_for(chosen, model, probe, n=items, seed=seed)
    if missing := chosen.missing(model, given, settings):
        raise Refusal(f"{chosen.id} cannot be run: {missing}")
    scored = chosen.score(model, given, **settings)
    return gathered(chosen, model, given, scored, {**chosen.settings, **settings})


def items_for(
    chosen: Method, model: AttachedModel, probe: str | Probe | ItemSet | None, *, n: int, seed: int
) -> ItemSet:
    """The items that a method is run on. Raises `InputError` as `encode` does."""
    if isinstance(probe, ItemSet):
        return probe
    asked = own_probe(chosen) if probe is None else probe
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, so no probe can be written for it; attach it with one, or pass encoded "
            "items"
        )
    return encode(probe_named(asked) if isinstance(asked, str) else asked, model, n=n, seed=seed)


def own_probe(chosen: Method) -> Probe:
    """The probe that a method is run on unless another is given, with the settings that its paper has."""
    return probe_named(chosen.probe).over(**chosen.over)


def gathered(
    chosen: Method, model: AttachedModel, items: ItemSet, scored: Scored, settings: Mapping[str, Any]
) -> HeadScores:
    """The scores of a method with the names of their axes and where they came from."""
    stacks: dict[str, list[SiteId]] = {}
    for site in sorted(scored):
        stacks.setdefault(site.stack, []).append(site)
    values = {}
    for stack, sites in stacks.items():
        widest = max(scored[site].shape[1] for site in sites)
        parts = [_padded(scored[site].detach().cpu().double(), widest) for site in sites]
        values[stack] = torch.stack(parts, dim=1).numpy()
    rows = len(next(iter(values.values())))
    pooled = (WEIGHTS if "weights" in chosen.needs else TOGETHER,)
    ids = items.ids if rows == len(items) and "weights" not in chosen.needs else pooled
    plain = {name: value for name, value in settings.items() if value is None or isinstance(value, str | int | float)}
    about = model.provenance(chosen.id, plain, probe=items.probe, seed=items.seed if type(items.seed) is int else None)
    return HeadScores(values, {stack: tuple(sites) for stack, sites in stacks.items()}, ids, about)


def over_batches(
    items: ItemSet,
    score: Callable[[Batch], Mapping[SiteId, Float[Tensor, "item head"]]],
    *,
    size: int = BATCH,
    answers: bool = True,
) -> dict[SiteId, Float[Tensor, "item head"]]:
    """`score`, which gives a row per item, on batches of items of like length; joined in the items' order."""
    order = sorted(range(len(items)), key=lambda place: len(items.items[place].prompt))
    parts: dict[SiteId, list[Tensor]] = {}
    for start in range(0, len(items), size):
        batch = items.batch([items.items[place] for place in order[start : start + size]], answers=answers)
        for site, values in score(batch).items():
            parts.setdefault(site, []).append(values.detach().cpu())
    joined = {site: torch.cat(values) for site, values in parts.items()}
    if any(len(values) != len(items) for values in joined.values()):
        raise HeadwiseError(f"a score gives no row per item of {items.probe}")
    back = torch.tensor(order).argsort()
    return {site: values[back] for site, values in joined.items()}


def _padded(values: Float[Tensor, "item head"], width: int) -> Float[Tensor, "item width"]:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=float(np.nan))
