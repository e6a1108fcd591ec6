"""Parameters of heads, put into a run by edits, and fitted there.

    offset = per_head(model, heads, std=1e-3, seed=0)                        # [head, head_dim], of these heads alone
    trained = fit_edits(
        model, items, {"offset": offset}, lambda: [hw.edit.add(heads, offset)], Schedule(steps=100)
    )

Other heads and the weights have no parameter here, so nothing can move them: no gradient is zeroed. Parameters are in
fp32 (fp64 for a model in it), and take the model's dtype where they meet z. What is small beside z is rounded away
there: in bf16 a factor within 0.002 of 1, or an offset of less than 0.002 of z.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.fit.objective import AnswerLoss, Objective, mean_loss
from headwise.fit.training import Moment, Order, Schedule, Trained, generator, train
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.identity import weights_hash
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores


def per_head(model: AttachedModel, heads: HeadSet, *, std: float, seed: int | str) -> Float[nn.Parameter, "head dim"]:
    """A vector for each head, in the order of the set, drawn from N(0, std^2).

    Raises:
        InputError: heads that the model does not have.
        Refusal: heads of different widths.
    """
    width = head_dim(model, heads)
    drawn = torch.randn(len(heads), width, generator=generator("per head", seed, heads.labels))
    wide = torch.promote_types(model.dtype, torch.float32)
    return nn.Parameter((std * drawn).to(model.device, wide))


def head_dim(model: AttachedModel, heads: HeadSet) -> int:
    """Width of z of these heads. Raises as `per_head`."""
    widths = {model.site(site.label).head_dim for site in model.heads(heads).sites}
    if len(widths) != 1:
        raise Refusal(f"{heads} are heads of {sorted(widths)} dimensions; fit those of one width at a time")
    return widths.pop()


def by_label(heads: HeadSet, values: Float[Tensor, "head ..."]) -> dict[str, Tensor]:
    """A copy of each head's part, by its label, as interventions hold it."""
    return {label: value.detach().clone() for label, value in zip(heads.labels, values, strict=True)}


def fit_edits(
    model: AttachedModel,
    items: ItemSet,
    parameters: Mapping[str, nn.Parameter],
    edits: Callable[[], Sequence[Edit]],
    schedule: Schedule,
    *,
    objective: Objective | None = None,
    penalty: Callable[[], Tensor] | None = None,
    validation: ItemSet | None = None,
    batch_size: int = 8,
    seed: int | str = 0,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    shown: Callable[[Moment], None] | None = None,
) -> Trained:
    """Fit the parameters of edits on items; the model's weights stay, bit for bit.

    Args:
        parameters: what is learned, by name; changed in place.
        edits: makes the edits of the parameters as they are now.
        objective: what is made small (default: `AnswerLoss`).
        penalty: is added to the loss while training, and is no part of the validation.
        validation: other items; the parameters that do best on them are kept.
        seed: of the order of the items.
        folder, settings, shown: as in `train`; the model, the items, the objective and the seed are among the settings.

    Raises:
        InputError: no items, or validation on items that are trained on.
        As `train` and the objective do.
    """
    if not len(items) or (validation is not None and not len(validation)):
        raise InputError("there are no items to fit on; encode at least one")
    shared = set(items.ids) & set(() if validation is None else validation.ids)
    if shared:
        raise InputError(f"item {min(shared)} is in the validation and trained on; validate on other items")
    objective = objective or AnswerLoss()
    order = Order(len(items), batch_size, seed)
    with torch.no_grad():
        loss = objective.on(model, items)
        held = None if validation is None else objective.on(model, validation)

    def training_loss(step: int) -> Tensor:
        value = loss(order.rows(step), edits())
        return value if penalty is None else value + penalty()

    about: dict[str, Any] = {} if folder is None else _identity(model, items, validation, objective, seed, batch_size)
    return train(
        parameters,
        training_loss,
        schedule,
        at_rest=model.model,
        validate=None if validation is None or held is None else lambda: mean_loss(held, len(validation), edits()),
        folder=folder,
        settings={**about, **(settings or {})},
        shown=shown,
    )


def fitted_scores(
    model: AttachedModel, method: str, values: Mapping[str, float], items: ItemSet, seed: int | str, **settings: Any
) -> HeadScores:
    """One fitted number a head as scores, with their ranking and heat map; the fit is their only item."""
    heads = HeadSet.parse([*values], "head")
    sites = {stack: tuple(s for s in heads.sites if s.stack == stack) for stack in {s.stack for s in heads.sites}}
    arrays = {
        stack: np.full((1, len(listed), max(h.index for h in heads if h.stack == stack) + 1), np.nan)
        for stack, listed in sites.items()
    }
    for head in heads:
        arrays[head.stack][0, sites[head.stack].index(head.site), head.index] = values[head.label]
    told = {**settings, "items": len(items), "seed": seed}
    return HeadScores(arrays, sites, ("fit",), model.provenance(method, told, probe=items.probe))


def _identity(
    model: AttachedModel, items: ItemSet, validation: ItemSet | None, objective: Objective, seed: int | str, size: int
) -> dict[str, Any]:
    return {
        "weights": weights_hash(model.model),
        "items": _digest(items),
        "validation": None if validation is None else _digest(validation),
        "objective": repr(objective),
        "seed": seed,
        "batch size": size,
    }


def _digest(items: ItemSet) -> str:
    text = repr([(each.id, each.prompt, each.answer, each.foils) for each in items])
    return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


__all__ = ["by_label", "fit_edits", "fitted_scores", "head_dim", "per_head"]
