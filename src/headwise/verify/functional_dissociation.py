"""The dissociation score of "Interpreting and Exploiting Functional Specialization in Multi-Head Attention under
Multi-task Learning" (Li et al. 2023): do the most important heads of a behaviour serve it alone?

    (at_20, at_30, at_40) = functional_dissociation(model, importance, items)

With `P[t, j]` the performance on behaviour j while the top alpha of heads by their importance for t are out:

    D_t = 100 (mean_{j != t} P[t, j] - P[t, t]) / base_t

The released code is followed: shares of 20, 30 and 40 percent, rounded down; heads of all layers ranked together; three
random masks that leave every layer a head. Reconstruction: the paper trains classifiers on pairs of tasks and measures
accuracy on their test sets; here behaviours are probes, and accuracy is `exact-match`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet, SiteId
from headwise.metrics import metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores
from headwise.sweep import KnockOut, measure_sets

ALPHAS = (0.2, 0.3, 0.4)
DRAWS = 3


@dataclass(frozen=True, eq=False)
class FunctionalDissociation:
    """D at one share of heads taken out.

    Attributes:
        alpha: share of all heads; `n_heads` their number, rounded down as in the released code.
        base: performance on each behaviour with nothing taken out.
        performance: `[t, j]`, on behaviour j with the most important heads of t out; NaN where it was not measured.
        original, scale_free: D of each behaviour; the paper's D is the mean.
        random_performance: `[draw, j]`, with as many random heads out; `random_original`, `random_scale_free` their D.
    """

    behaviours: tuple[str, ...]
    alpha: float
    n_heads: int
    base: Float[np.ndarray, " task"]
    performance: Float[np.ndarray, "task task"]
    original: Float[np.ndarray, " task"]
    scale_free: Float[np.ndarray, " task"]
    random_performance: Float[np.ndarray, "draw task"]
    random_original: Float[np.ndarray, "draw task"]
    random_scale_free: Float[np.ndarray, "draw task"]


def dissociation_scores(
    performance: Float[np.ndarray, "task task"], base: Float[np.ndarray, " task"]
) -> Float[np.ndarray, " task"]:
    """`D_t = 100 (mean_{j != t} P[t, j] - P[t, t]) / base_t`, in percent, as published.

    The performance on other behaviours is put over `base_t`, too, so it means little where behaviours are measured on
    different scales or differ in how well they are solved.

    Raises `InputError` for fewer than two behaviours, and for a base that is not positive.
    """
    _require_tasks(performance, base)
    scores: Float[np.ndarray, " task"] = 100 * (_of_others(performance) - np.diag(performance)) / base
    return scores


def scale_free_dissociation_scores(
    performance: Float[np.ndarray, "task task"], base: Float[np.ndarray, " task"]
) -> Float[np.ndarray, " task"]:
    """`D_t = 100 (mean_{j != t} P[t, j] / base_j - P[t, t] / base_t)`: each performance over its own base.

    Raises as `dissociation_scores`.
    """
    _require_tasks(performance, base)
    return 100 * (_of_others(performance / base) - np.diag(performance / base))


def functional_dissociation(
    model: AttachedModel,
    importance: Mapping[str, HeadScores],
    items: Mapping[str, ItemSet],
    *,
    alphas: Sequence[float] = ALPHAS,
    draws: int = DRAWS,
    measured: str = "exact-match",
    knock_out: KnockOut | None = None,
    seed: int = 0,
) -> tuple[FunctionalDissociation, ...]:
    """Take out the most important heads of each behaviour, and see which behaviours suffer.

    The paper ranks by the gate gradient per token on training data, over all layers together, takes out 20, 30 and 40
    percent of all heads (`z` to 0), and measures accuracy; three random draws that leave each layer a head are the
    control. One draw serves all behaviours, as in the released code.

    Args:
        importance: by behaviour: scores of its heads on items that are not among `items`.
        items: by behaviour: where performance is measured.

    Raises:
        InputError: fewer than two behaviours, other ones in `importance` than in `items`, items that also ranked the
            heads, a share of heads that is no share, or a metric of which less is better.
        Refusal: the model does not solve one of them at all.
    """
    names = tuple(items)
    if len(names) < 2 or importance.keys() != items.keys():
        raise InputError(
            f"give scores and items of the same two or more behaviours; got {list(importance)}, {list(names)}"
        )
    for name in names:
        if set(importance[name].item_ids) & set(items[name].ids):
            raise InputError(f"items of {name} that ranked its heads cannot measure them; give others")
    if metric(measured).better == "lower":
        raise InputError(f"D compares performance, and of {measured} less is better; use exact-match")
    heads = model.heads("main").heads
    out = knock_out or KnockOut()
    found = []
    for alpha in alphas:
        n = share_of(alpha, heads)
        sets = [
            HeadSet(),
            *(importance[name].top(n, stack="main") for name in names),
            *draws_of(heads, alpha, draws, seed),
        ]
        table = np.stack(
            [measure_sets(model, items[name], sets, out, measured).mean(dim=1).numpy() for name in names], 1
        )
        base, own, drawn = table[0], table[1 : 1 + len(names)], table[1 + len(names) :]
        if not (base > 0).all():
            raise Refusal(f"{model.name} does not solve {names[int(base.argmin())]} at all ({measured} is 0)")
        found.append(scored(names, alpha, n, base, own, drawn))
    return tuple(found)


def scored(
    behaviours: tuple[str, ...],
    alpha: float,
    n_heads: int,
    base: Float[np.ndarray, " task"],
    performance: Float[np.ndarray, "task task"],
    random_performance: Float[np.ndarray, "draw task"],
) -> FunctionalDissociation:
    """D of what was measured, and of the random draws. Raises as `dissociation_scores`."""
    drawn = [np.tile(row, (len(behaviours), 1)) for row in random_performance]
    return FunctionalDissociation(
        behaviours,
        alpha,
        n_heads,
        base=base,
        performance=performance,
        original=dissociation_scores(performance, base),
        scale_free=scale_free_dissociation_scores(performance, base),
        random_performance=random_performance,
        random_original=np.stack([dissociation_scores(each, base) for each in drawn]),
        random_scale_free=np.stack([scale_free_dissociation_scores(each, base) for each in drawn]),
    )


def share_of(alpha: float, heads: Sequence[Head]) -> int:
    """How many heads a share of them is. Raises `InputError` for none, or so many that a layer would lose all."""
    n = int(alpha * len(heads))
    if not 0 < n <= len(heads) - len({head.site for head in heads}):
        raise InputError(
            f"a share of {alpha:g} is {n} of {len(heads)} heads; one at least must go, and each layer keep one"
        )
    return n


def draws_of(heads: Sequence[Head], alpha: float, draws: int, seed: int) -> list[HeadSet]:
    """Random heads, as many as this share of them, `draws` times."""
    return [random_heads(heads, share_of(alpha, heads), seed=f"{seed}/{alpha}/{draw}") for draw in range(draws)]


def random_heads(heads: Sequence[Head], n: int, seed: int | str) -> HeadSet:
    """`n` heads drawn at random, of each site all but one at most; the same for the same arguments."""
    left: dict[SiteId, int] = {}
    for head in heads:
        left[head.site] = left.get(head.site, 0) + 1
    order = list(heads)
    random.Random(f"dissociation/{seed}").shuffle(order)
    drawn: list[Head] = []
    for head in order:
        if len(drawn) < n and left[head.site] > 1:
            left[head.site] -= 1
            drawn.append(head)
    return HeadSet(tuple(drawn))


def _of_others(performance: Float[np.ndarray, "task task"]) -> Float[np.ndarray, " task"]:
    """Mean over the other behaviours, those left out that were not measured (NaN)."""
    others = np.isfinite(performance) & ~np.eye(len(performance), dtype=bool)
    n = others.sum(axis=1)
    sums = np.where(others, performance, 0).sum(axis=1)
    means: Float[np.ndarray, " task"] = np.where(n > 0, sums / np.maximum(n, 1), np.nan)
    return means


def _require_tasks(performance: Float[np.ndarray, "task task"], base: Float[np.ndarray, " task"]) -> None:
    if len(base) < 2 or performance.shape != (len(base), len(base)):
        raise InputError(f"D needs two behaviours or more, each against each; got {performance.shape} for {len(base)}")
    if not (base > 0).all():
        raise InputError(
            f"D is a share of the performance without knock-outs, which must be above 0; got {base.tolist()}"
        )
