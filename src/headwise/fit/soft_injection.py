"""Soft Injection, fitted: what prompts with demonstrations leave in each head, and how much of it to mix in.

Park and Rhee 2025, Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning.

    e_h     = mean of z_h at the last token of 50 prompts of 10 demonstrations
    alpha_h = sigmoid(a_h), a_h from 0 by Adam, rate 0.2, 400 steps of one item, loss of the answer's first token

The intervention is `use.SoftInjection`. Exact, with one thing put right: the released code
(github.com/SNU-DRL/Soft_Injection) never notes the best validation loss, so its last validation wins; here the best one
does, and one before the first step is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.fit.objective import first_token
from headwise.fit.per_head import fit_edits, fitted_scores, head_dim
from headwise.fit.training import Moment, Schedule, Trained, generator
from headwise.heads import HeadSet
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.scores import HeadScores
from headwise.use.directions.soft_injection import SoftInjection

SCHEDULE = Schedule(steps=400, learning_rate=0.2, validate_every=50)


@dataclass(frozen=True)
class FittedInjection:
    """What was fitted.

    Attributes:
        injection: the intervention: `with fitted.injection(model): ...`.
        scores: alpha of each head, the paper's map of what the heads do in the task.
        trained: the loss and validation curves.
    """

    injection: SoftInjection
    scores: HeadScores
    trained: Trained


def task_embedding(
    model: AttachedModel, items: ItemSet, heads: HeadSet | None = None, *, batch_size: int = 16
) -> dict[str, Float[Tensor, " head_dim"]]:
    """Mean of z at the last token of the prompts, by head label (default: the heads of the main stack).

    The paper takes 50 prompts of 10 demonstrations of one function (`function_task(...).shown`).

    Raises:
        InputError: no items, or heads that the model does not have.
    """
    chosen = model.heads("main" if heads is None else heads)
    if not len(items):
        raise InputError("task_embedding was given no items; give prompts with demonstrations")
    total = dict.fromkeys(chosen.labels, torch.zeros((), dtype=torch.float64))
    for batch in first_token(items).batches(batch_size):
        at = places(model, batch)
        with model.reading(read.z(heads=chosen, queries=[-1]), prompt_length=at.prompt_length) as got:
            observe(model, batch, wants=frozenset({"logits"}))
        for head in chosen:
            place = [each.index for each in chosen if each.site == head.site].index(head.index)
            z = got.z[head.site][:, 0, place].double().cpu()
            total[head.label] = total[head.label] + z.sum(dim=0)
    wide = torch.promote_types(model.dtype, torch.float32)
    return {label: (summed / len(items)).to(wide) for label, summed in total.items()}


def permuted(embedding: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The control: every head gets the embedding of another one, none its own.

    Raises:
        InputError: fewer than two heads, or heads of different widths.
    """
    labels = sorted(embedding)
    if len(labels) < 2 or len({tuple(embedding[label].shape) for label in labels}) != 1:
        raise InputError(f"the embeddings of {len(labels)} heads cannot change places; give two or more of one width")
    order = torch.randperm(len(labels), generator=generator("permuted", seed)).tolist()
    return {labels[order[i]]: embedding[labels[order[i - 1]]] for i in range(len(order))}


def fit_injection(
    model: AttachedModel,
    items: ItemSet,
    embedding: Mapping[str, Tensor],
    *,
    validation: ItemSet | None = None,
    schedule: Schedule = SCHEDULE,
    batch_size: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Callable[[Moment], None] | None = None,
) -> FittedInjection:
    """Fit how much of a task's embedding each head takes at the last token of the prompt.

    As controls, fit again with `permuted(embedding)`, or with the embedding of another task.

    Args:
        items: prompts without demonstrations; the first token of each answer counts.
        embedding: from `task_embedding`; its heads are those that are fitted.
        validation: other items; the alphas that do best on them are kept. Test on neither.
        schedule: `schedule.patience` stops before the 400 steps are over.
        folder, shown: as in `fit.train`.

    Raises:
        InputError, Refusal: as `SoftInjection` and `fit_edits`.
    """
    heads = SoftInjection(embedding).heads
    width = head_dim(model, heads)
    given = torch.stack([embedding[label] for label in heads.labels]).detach().to(model.device)
    if given.shape != (len(heads), width):
        raise InputError(f"embeddings have {given.shape[1]} dimensions, and {heads} have {width}; measure them anew")
    logits = nn.Parameter(torch.zeros(len(heads), device=model.device))
    trained = fit_edits(
        model,
        first_token(items),
        {"logits": logits},
        lambda: [edit.mix(heads, given, torch.sigmoid(logits), scope="prompt", queries=[-1])],
        schedule,
        validation=None if validation is None else first_token(validation),
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        settings={"heads": heads.labels, "embedding": given.double().sum(dim=1).tolist()},
        shown=shown,
    )
    alpha = dict(zip(heads.labels, torch.sigmoid(logits.detach()).tolist(), strict=True))
    scores = fitted_scores(model, "soft-injection", alpha, items, seed, steps=schedule.steps, batch_size=batch_size)
    return FittedInjection(SoftInjection(dict(embedding), alpha), scores, trained)


__all__ = ["FittedInjection", "fit_injection", "permuted", "task_embedding"]
