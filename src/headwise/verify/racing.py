"""`race`: the k heads that cost most alone, at a stated error, from part of the exact map.

    found = race(model, items, k=3)             # items for finding; verdicts are made on others
    found.kept, found.forwards, print(found)
    verify(model, found.kept, probe, finding=items)

Every head is screened by its gate gradient; then heads are taken out one by one on a few items each, and on more only
while it is open whether they are among the k. Exact knock-outs alone decide: a gradient does not see a head that works
through saturated attention, or hides itself. `headwise.verify.elimination` has the bounds and the proof, and
`docs/racing.md` says what is promised and what is not.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from headwise import freed_memory
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.find.search import find
from headwise.heads import Head, HeadSet
from headwise.metrics import Metric, metric
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet
from headwise.scores import HeadScores
from headwise.sweep import KnockOut, measure_sets
from headwise.sweep.measuring import measure_at, nothing_in_scope
from headwise.verify.chance import chance_of
from headwise.verify.elimination import Standing, top_k
from headwise.verify.evidence import Family
from headwise.verify.gathering import N_CONTROLS, every_head

SCREEN = "gate-gradient"
SCREENED = 8
"""Items that heads are screened on; the screen decides only where the race begins."""

SCREEN_COST = 2
"""Forwards that a forward with its backward counts for, the weights at rest."""

WIDTH = 118
"""Characters of a printed line."""

Decision = Literal["kept", "tied", "eliminated"]


@dataclass(frozen=True, slots=True)
class RacedHead:
    """How one head came out of a race.

    Attributes:
        estimate: mean effect on the items spent on it, in units of the metric; positive where the head helps. NaN where
            the heads kept cost as much as an item may count for, so that no other needed any.
        interval: bounds of its mean effect on all items. Those of one head err with the probability that the race
            allows each kind of bound, far below its `error`.
        items: how many items were spent.
        decision: `kept`, one of the k; `tied`, left out with an estimate within epsilon of the weakest that is kept;
            `eliminated`, left out.
        beyond: effects that were beyond what an item may count for.
    """

    head: Head
    estimate: float
    interval: tuple[float, float]
    items: int
    decision: Decision
    beyond: int


@dataclass(frozen=True, eq=False)
class Race:
    """What a race came to.

    Attributes:
        heads: every head that took part, in canonical order.
        k, error: as asked for.
        reach: distance of the clean metric from chance on these items, in units of the metric.
        epsilon, largest: in units of the metric: how close counts as the same, and what an item may count for at most.
        finding: ids of the items, which may not test the heads again.
        forwards: one for a head on an item; clean runs and the screen included.
    """

    family: Family
    unit: str
    heads: tuple[RacedHead, ...]
    k: int
    error: float
    reach: float
    epsilon: float
    largest: float
    finding: tuple[str, ...]
    forwards: int

    @property
    def kept(self) -> HeadSet:
        return self._with("kept")

    @property
    def tied(self) -> HeadSet:
        return self._with("tied")

    @property
    def map_forwards(self) -> int:
        """What the exact map takes on these items: every head alone, and the clean run."""
        return (len(self.heads) + 1) * len(self.finding)

    def share(self, testing: int, controls: int = N_CONTROLS) -> float:
        """Cost of this race and verdicts on the heads kept, as a share of the exact map and verdicts on every head.

        A verdict is one head and its control sets, each on every one of `testing` items.
        """
        verdict = (1 + controls) * testing
        return (self.forwards + self.k * verdict) / (self.map_forwards + len(self.heads) * verdict)

    @property
    def guarantee(self) -> str:
        """What is promised of these items, in words, and under which condition."""
        beyond = sum(each.beyond for each in self.heads)
        seen = "none was seen beyond that" if not beyond else f"{beyond} of those measured went beyond it"
        return (
            f"With probability {1 - self.error:g} over the order of the items, each head kept has at least the mean "
            f"effect of rank {self.k} less {self.epsilon:.3g} {self.unit} on these {len(self.finding)} items, and each "
            f"other head at most that effect and {self.epsilon:.3g} {self.unit} more. No item counts for more than "
            f"{self.largest:.3g} {self.unit}, either way; {seen}."
        )

    def __str__(self) -> str:
        ranked = sorted((each for each in self.heads if each.decision != "eliminated"), key=lambda each: -each.estimate)
        out = [each.items for each in self.heads if each.decision == "eliminated"]
        lines = [f"top {self.k} of {len(self.heads)} heads on {self.family.key}, {len(self.finding)} items"]
        lines += [
            f"  {each.head} {each.estimate:.3g} [{each.interval[0]:.3g}, {each.interval[1]:.3g}] {self.unit}, "
            f"{each.items} items: {each.decision}"
            for each in ranked
        ]
        if out:
            lines.append(f"  {len(out)} others eliminated, after {min(out)} to {max(out)} items")
        share = self.forwards / self.map_forwards
        lines.append(f"  {self.forwards} forwards, {share:.1%} of the {self.map_forwards} of the exact map")
        lines += textwrap.wrap(self.guarantee, WIDTH, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)

    def _with(self, decision: Decision) -> HeadSet:
        return HeadSet(tuple(each.head for each in self.heads if each.decision == decision))


@freed_memory.kept()
def race(
    model: AttachedModel,
    items: ItemSet,
    *,
    k: int,
    error: float = 0.05,
    epsilon: float = 0.1,
    largest: float = 2.0,
    knock_out: KnockOut = KnockOut(),  # noqa: B008  frozen
    measured: str | Metric | None = None,
    screen: HeadScores | None = None,
    seed: int = 0,
) -> Race:
    """The `k` heads of the main stack that cost most when they are taken out alone; see the module.

    Args:
        items: items for finding, all of them. Those that test the heads must be others.
        error: probability that what is promised fails, over the order in which the items are used.
        epsilon: heads whose mean effects are closer than this count as the same; as a share of the distance between
            clean metric and chance. Small ones are dear: to rule out an effect of `epsilon` that may rest on a few
            items takes about `5 * largest / epsilon` of them, so a race for more heads than there are that matter comes
            to the exact map.
        largest: what an item may count for at most, as a share of the same distance: an effect beyond it counts as it.
        knock_out: how heads are taken out. `resample` is refused: what it draws depends on the order of the rows.
        measured: the metric; None is that of the items' probe.
        screen: scores by which heads are tried first; None makes them with `gate-gradient`. No bound depends on them.
        seed: of the order of the items.

    Raises:
        InputError: no items, or numbers out of range; an unknown metric; a screen that scores none of the heads.
        Refusal: `resample`; the clean metric is not better than chance; the model cannot give what the metric needs, or
            what the screen needs; the metric gives no number.
    """
    if not isinstance(knock_out, KnockOut):
        raise InputError(f"a race takes a KnockOut, not a {type(knock_out).__name__}; patches have measure_sets")
    heads = every_head(model)
    _check(items, k, len(heads), error, epsilon, largest)
    if knock_out.mode == "resample":
        raise Refusal(
            "a race cannot use mode 'resample': its draws depend on which items run together, so an effect would be "
            "another one in the exact map; use zero, mean or uniform"
        )
    chosen = measured if isinstance(measured, Metric) else metric(items.metric if measured is None else measured)
    clean = measure_sets(model, items, [HeadSet()], knock_out, chosen)[0].numpy()
    reach = _reach(model, items, chosen, clean, seed)
    scores, screened = (screen, 0) if screen is not None else _screened(model, items)
    alone = [HeadSet((head,)) for head in heads.heads]

    positions = 0

    def uncover(rows: Int[np.ndarray, " head"], columns: Int[np.ndarray, " item"]) -> Float[np.ndarray, "head item"]:
        part = replace(items, items=tuple(items.items[i] for i in columns))
        nonlocal positions
        found, met = measure_at(model, part, [alone[i] for i in rows], knock_out, chosen)
        values, positions = found.numpy(), positions + met
        silent = np.isnan(values).any(axis=1)
        if silent.any():
            raise Refusal(
                f"{chosen.id} gives no number with {heads.heads[rows[silent.argmax()]]} out, so its mean effect is not "
                "known; use a metric that always gives one"
            )
        effects: np.ndarray = (clean[columns] - values) * chosen.sign
        return effects

    standing = top_k(
        uncover,
        len(items),
        _order(scores, heads.heads),
        k=k,
        error=error,
        epsilon=epsilon * reach,
        largest=largest * reach,
        seed=seed,
    )
    if not positions:
        raise Refusal(nothing_in_scope(items, knock_out.scope))
    # Beside the knock-outs: the clean run, that of a chance level that is measured, and the screen.
    forwards = int(standing.spent.sum()) + 2 * len(items) + SCREEN_COST * screened
    return Race(
        family=Family(items.probe, chosen.id, knock_out.mode, knock_out.scope),
        unit=chosen.unit,
        heads=_raced(heads.heads, standing, epsilon * reach),
        k=k,
        error=error,
        reach=reach,
        epsilon=epsilon * reach,
        largest=largest * reach,
        finding=items.ids,
        forwards=forwards,
    )


def _check(items: ItemSet, k: int, n_heads: int, error: float, epsilon: float, largest: float) -> None:
    if not len(items):
        raise InputError(f"{items.probe}: a race needs items; encode at least one")
    repeated = next((id for id, times in Counter(items.ids).items() if times > 1), None)
    if repeated is not None:
        raise InputError(f"{items.probe}: item {repeated} is there twice; give every item once")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < n_heads:
        raise InputError(f"k={k!r} heads of {n_heads} cannot be raced for; give a whole number from 1 to {n_heads - 1}")
    if not 0 < error < 1:
        raise InputError(f"error={error!r} is a probability; give a number between 0 and 1, such as 0.05")
    if not 0 <= epsilon < largest < np.inf:
        raise InputError(
            f"epsilon={epsilon!r} and largest={largest!r} are shares of what there is to lose; give 0 <= epsilon < "
            "largest, such as 0.1 and 2"
        )


def _reach(model: AttachedModel, items: ItemSet, chosen: Metric, clean: Float[np.ndarray, " item"], seed: int) -> float:
    """Distance of the clean metric from chance."""
    if not np.isfinite(clean).all():
        silent = items.ids[int((~np.isfinite(clean)).argmax())]
        raise Refusal(f"{chosen.id} gives no number on item {silent} without a knock-out; leave such items out")
    chance = chance_of(model, items, chosen, seed)
    reach = float(clean.mean() - chance) * chosen.sign
    if reach <= 0:
        raise Refusal(
            f"the clean metric, {clean.mean():.3g} {chosen.unit}, is not better than chance, {chance:.3g}, so there is "
            "nothing that a head could cost; use items that the model solves (headwise.metrics.keep_right)"
        )
    return reach


def _screened(model: AttachedModel, items: ItemSet) -> tuple[HeadScores, int]:
    """Gate gradients, and on how many items."""
    few = replace(items, items=items.items[:SCREENED])
    try:
        return find(SCREEN, model, few), len(few)
    except HeadwiseError as error:
        raise Refusal(
            f"heads cannot be screened by {SCREEN} ({error}); give scores of another method: screen="
        ) from None


def _order(scores: HeadScores, heads: Sequence[Head]) -> Float[np.ndarray, " head"]:
    """The screen's score of each head; minus infinity where it has none."""
    known = {each.head: each.score for each in scores.ranked()}
    order = np.array([known.get(head, -np.inf) for head in heads])
    if not np.isfinite(order).any():
        raise InputError("the screen scores none of the heads of the main stack; give scores of this model's heads")
    return order


def _raced(heads: Sequence[Head], standing: Standing, epsilon: float) -> tuple[RacedHead, ...]:
    weakest = standing.estimate[standing.named].min()
    tied = ~standing.named & (standing.estimate >= weakest - epsilon)
    return tuple(
        RacedHead(
            head=head,
            estimate=float(standing.estimate[i]) if standing.spent[i] else float("nan"),
            interval=(float(standing.lower[i]), float(standing.upper[i])),
            items=int(standing.spent[i]),
            decision="kept" if standing.named[i] else "tied" if tied[i] else "eliminated",
            beyond=int(standing.beyond[i]),
        )
        for i, head in enumerate(heads)
    )
