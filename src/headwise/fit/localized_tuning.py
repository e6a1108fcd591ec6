"""LoFiT: first which heads, then an offset for each of them.

Yin, Ye and Durrett 2024, LoFiT: Localized Fine-Tuning on LLM Representations.

    1  z_h <- (1 + A_h) * z_h   for all heads, A_h ~ N(0, 1e-3), loss + l1 * sum |A|; heads ranked by ||A_h||_2
    2  z_h <- z_h + v_h         for the k heads of the largest norm, v_h ~ N(0, 1e-3); A is thrown away

The loss is that of the answer alone, or preference over wrong answers (`Preference(0.5)`). Learning rates fall to zero
by a straight line and gradients are clipped at norm 1, as in the trainer that the released code uses. Exact; that code
(github.com/fc2869/lo-fit) takes the mean over all answer tokens of a batch, where here items count alike.

Its rates and penalties differ by model and task. The defaults are those of Llama-2-7B on MQuAKE: 5e-3 with l1 = 1e-3,
then 1e-2. (TruthfulQA 5e-3 with 5e-4, CLUTRR 5e-4 with 5e-3.) It took 32 of 1024 heads, so 3 percent is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from headwise.errors import InputError, Refusal
from headwise.fit.objective import AnswerLoss, Objective
from headwise.fit.per_head import by_label, fit_edits, fitted_scores, per_head
from headwise.fit.training import Moment, Order, Schedule, Trained, generator
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores
from headwise.sweep.matched import matched_sets
from headwise.use.scaling import HeadOffset, HeadScaling

Control = Literal["random-heads", "bottom-heads", "random-directions"]
Shown = Callable[[Moment], None]

SHARE = 32 / 1024
"""Of the heads, where no number is given."""
STD = 1e-3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one stage is trained; the released code's settings."""

    learning_rate: float
    l1: float = 0.0
    epochs: float = 5.0
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def schedule(self, n: int, seed: int) -> Schedule:
        """Steps for `n` items; validation after every pass."""
        order = Order(n, self.batch_size, seed)
        return Schedule(
            steps=order.steps(self.epochs),
            learning_rate=self.learning_rate,
            decay="linear",
            weight_decay=self.weight_decay,
            clip=self.clip,
            validate_every=order.steps(1),
        )


SELECTING = Recipe(learning_rate=5e-3, l1=1e-3)
TUNING = Recipe(learning_rate=1e-2)


@dataclass(frozen=True)
class RankedHeads:
    """The first stage.

    Attributes:
        scaling: the fitted factors, 1 + A_h.
        scores: ||A_h||_2 of each head.
        trained: the loss and validation curves, and the number of parameters.
    """

    scaling: HeadScaling
    scores: HeadScores
    trained: Trained

    def top(self, k: int) -> HeadSet:
        """The k heads of the largest norm. Raises InputError for a number that there is not."""
        return self.scores.top(k)

    def bottom(self, k: int) -> HeadSet:
        """The k heads of the smallest norm. Raises InputError for a number that there is not."""
        self.scores.top(k)
        return HeadSet(tuple(each.head for each in self.scores.ranked()[-k:]))


@dataclass(frozen=True)
class TunedOffsets:
    """The second stage: the offsets, as an intervention, and the curves and number of parameters."""

    offset: HeadOffset
    trained: Trained


@dataclass(frozen=True)
class LoFiT:
    """Both stages.

    Attributes:
        offset: the intervention: `with fitted.offset(model): ...`.
        ranked, tuned: the stages.
        control: which control this is, None for LoFiT itself.
    """

    offset: HeadOffset
    ranked: RankedHeads
    tuned: TunedOffsets
    control: Control | None

    @property
    def heads(self) -> HeadSet:
        return self.offset.heads

    @property
    def n_parameters(self) -> int:
        """Numbers in the offsets."""
        return sum(vector.numel() for vector in self.offset.offset.values())


def lofit(
    model: AttachedModel,
    items: ItemSet,
    k: int | None = None,
    *,
    control: Control | None = None,
    objective: Objective | None = None,
    validation: ItemSet | None = None,
    heads: HeadSet | None = None,
    ranked: RankedHeads | None = None,
    selecting: Recipe = SELECTING,
    tuning: Recipe = TUNING,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Shown | None = None,
) -> LoFiT:
    """Fit offsets in the k heads that scaling finds most useful.

    Nothing here is judged: measure the result on items that are neither in `items` nor in `validation`.

    Args:
        items: what is trained on, in both stages.
        k: how many heads (default: 3 percent of them, at least one).
        control: what to do in place of LoFiT, with as many parameters. `random-heads`: tune other heads, as many in
            each layer, drawn by `seed`. `bottom-heads`: the k that scaling found least useful. `random-directions`: the
            tuned heads, each offset turned into a random direction of its length.
        objective: `AnswerLoss()` (the default) or `Preference(0.5)`.
        validation: other items; each stage keeps the parameters that do best on them, after whole passes.
        heads: the candidates (default: those of the main stack).
        ranked: a first stage that was run before, which is not run again.
        folder: keeps checkpoints of the two stages, and goes on from them.

    Raises:
        InputError, Refusal: as `rank_heads` and `tune_offsets`; no matched heads to draw.
    """
    if control is not None and control not in get_args(Control):
        raise InputError(f"control={control!r} is not one of {', '.join(get_args(Control))}, or None")
    first, second = (None, None) if folder is None else (Path(folder) / "heads", Path(folder) / "offsets")
    if ranked is None:
        ranked = rank_heads(
            model,
            items,
            selecting,
            objective=objective,
            validation=validation,
            heads=heads,
            seed=seed,
            folder=first,
            shown=shown,
        )
    n = len(ranked.scores.heads)
    k = max(1, round(SHARE * n)) if k is None else k
    chosen = ranked.bottom(k) if control == "bottom-heads" else ranked.top(k)
    if control == "random-heads":
        chosen = _matched(chosen, ranked.scores.heads, seed)
    tuned = tune_offsets(
        model,
        items,
        chosen,
        tuning,
        objective=objective,
        validation=validation,
        seed=seed,
        folder=second,
        shown=shown,
    )
    offset = _turned(tuned.offset, seed) if control == "random-directions" else tuned.offset
    return LoFiT(offset, ranked, tuned, control)


def rank_heads(
    model: AttachedModel,
    items: ItemSet,
    recipe: Recipe = SELECTING,
    *,
    objective: Objective | None = None,
    validation: ItemSet | None = None,
    heads: HeadSet | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Shown | None = None,
) -> RankedHeads:
    """LoFiT's first stage: scale every dimension of every head, and see which heads were changed. Arguments as `lofit`.

    Raises:
        InputError, Refusal: as `fit_edits` and `per_head`.
    """
    candidates = model.heads("main" if heads is None else heads)
    scales = per_head(model, candidates, std=STD, seed=f"lofit heads {seed}")
    trained = fit_edits(
        model,
        items,
        {"scales": scales},
        lambda: [edit.scale(candidates, 1 + scales)],
        recipe.schedule(len(items), seed),
        objective=objective or AnswerLoss(),
        penalty=(lambda: recipe.l1 * scales.abs().sum()) if recipe.l1 else None,
        validation=validation,
        batch_size=recipe.batch_size,
        seed=seed,
        folder=folder,
        settings={"heads": candidates.labels, "l1": recipe.l1},
        shown=shown,
    )
    norms = dict(zip(candidates.labels, scales.detach().norm(dim=1).tolist(), strict=True))
    scores = fitted_scores(model, "lofit", norms, items, seed, **vars(recipe))
    return RankedHeads(HeadScaling(candidates, by_label(candidates, 1 + scales)), scores, trained)


def tune_offsets(
    model: AttachedModel,
    items: ItemSet,
    heads: HeadSet,
    recipe: Recipe = TUNING,
    *,
    objective: Objective | None = None,
    validation: ItemSet | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Shown | None = None,
) -> TunedOffsets:
    """LoFiT's second stage: an offset for each of `heads`. Those of another task are the paper's own control.

    Raises:
        InputError, Refusal: as `fit_edits` and `per_head`.
    """
    heads = model.heads(heads)
    offsets = per_head(model, heads, std=STD, seed=f"lofit offsets {seed}")
    trained = fit_edits(
        model,
        items,
        {"offsets": offsets},
        lambda: [edit.add(heads, offsets)],
        recipe.schedule(len(items), seed),
        objective=objective or AnswerLoss(),
        penalty=(lambda: recipe.l1 * offsets.abs().sum()) if recipe.l1 else None,
        validation=validation,
        batch_size=recipe.batch_size,
        seed=seed,
        folder=folder,
        settings={"heads": heads.labels, "l1": recipe.l1},
        shown=shown,
    )
    return TunedOffsets(HeadOffset(by_label(heads, offsets)), trained)


def _matched(heads: HeadSet, available: HeadSet, seed: int) -> HeadSet:
    drawn = matched_sets(heads, available, 1, seed).sets
    if not drawn:
        raise Refusal(f"there are no other heads to draw {len(heads)} from; choose a smaller k")
    return drawn[0]


def _turned(offset: HeadOffset, seed: int) -> HeadOffset:
    """Each vector in a random direction, as long as it was."""
    turned = {}
    for label, vector in offset.offset.items():
        drawn = torch.randn(len(vector), generator=generator("direction", seed, label)).to(vector)
        turned[label] = drawn * (vector.norm() / drawn.norm())
    return offset.but(offset=turned)


__all__ = ["LoFiT", "RankedHeads", "Recipe", "TunedOffsets", "lofit", "rank_heads", "tune_offsets"]
