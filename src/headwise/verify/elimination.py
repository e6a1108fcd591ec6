"""The k heads of largest mean effect, from part of the effects, at a stated error. Arrays in, numbers out.

There is a table of effects, head x item, and `mu_h` is the mean of a row. Cells are uncovered on demand, row by row in
one order of the items drawn at random. `top_k` uncovers until it can name k heads such that, with probability
`1 - error` over that order,

    every head named has        mu >= mu_(k) - epsilon,
    every other head has        mu <= mu_(k) + epsilon,         mu_(k): the k-th largest.

Nothing is assumed of how the effects are spread, but that none is further from 0 than `largest`: one that is counts as
`largest`, and `mu` is the mean of what counts.

**Bounds.** Items come without replacement, so if `mu_h = m` the next effect has the mean

    m_i = (n_items m - sum of the first i - 1) / (n_items - i + 1).

Money bet on effects below what `m` says grows by the factor `1 + d (m_i - x_i) / (largest - m_i)`, `0 < d < 1`, which
is never negative and has mean 1; so the chance that a stake of 1 ever reaches `1 / alpha` is at most `alpha` (Ville).
The stake is divided among a few `d` (`BETS`). What it comes to grows with `m`, so the `m` at which it once reached
`1 / alpha` are all those above a bound, the upper one. The lower one is the same of the effects with their sign turned.
This is betting as in Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting".

**Who pays for the error.** Stop when, for the k named heads J and the smallest of their lower bounds, `floor`, every
other head has an upper bound of at most `floor + epsilon`. Let T be the true k. If a head of T is left out, then
`mu_(k) <= floor + epsilon`, and a head of J that is not in T has at least `floor`: both statements follow. So what
must hold are upper bounds of heads in T and lower bounds of heads outside it: k and `n_heads - k` events, not
`2 n_heads`. Upper bounds decide how soon a head without an effect is left alone, and they get a k-th part each.

The bounds hold for all numbers of items at once. So it does not matter what decides which cell comes next: it may be
what other heads did on items that are still to come for this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

FIRST = 4
"""Items that every head gets at first, at least."""

ADVANCE = 1
"""What the heads that a screen puts first may spend before the others begin, in items per head of the model: a screen
may be wrong."""

FOR_LOWER = 0.2
"""Share of the error that lower bounds may use: they are few heads' and these can be measured on every item."""

BETS = ((0.95, 0.55), (0.6, 0.2), (0.3, 0.15), (0.12, 0.1))
"""What is bet, and the share of the stake on it. Heads with effects that hardly vary are told by the boldest bet."""

BISECTIONS = 30

Uncover = Callable[[Int[np.ndarray, " head"], Int[np.ndarray, " item"]], Float[np.ndarray, "head item"]]
"""Effects of some heads on some items, both by their numbers."""


@dataclass(frozen=True, eq=False, slots=True)
class Standing:
    """Where the heads stand at the end.

    Attributes:
        named: the k heads.
        spent: items uncovered of each head.
        estimate: mean effect on these; what is beyond `largest` counts as `largest`.
        lower, upper: bounds of the mean over all items, the two of one head with the errors of their kinds.
        beyond: effects uncovered that were beyond `largest`.
        floor: the smallest lower bound of the heads that are named.
    """

    named: Bool[np.ndarray, " head"]
    spent: Int[np.ndarray, " head"]
    estimate: Float[np.ndarray, " head"]
    lower: Float[np.ndarray, " head"]
    upper: Float[np.ndarray, " head"]
    beyond: Int[np.ndarray, " head"]
    floor: float


def top_k(
    uncover: Uncover,
    n_items: int,
    screen: Float[np.ndarray, " head"],
    *,
    k: int,
    error: float,
    epsilon: float,
    largest: float,
    seed: int,
) -> Standing:
    """The k heads of largest mean effect; see the module. Never uncovers a cell twice.

    Args:
        screen: a guess at the order of the heads, higher first. It decides what is uncovered first, and no bound.
        epsilon, largest: in the unit of the effects.
        seed: of the order of the items.
    """
    lanes = _Lanes(uncover, n_items, screen, k, error, largest, seed)
    while True:
        leaders = lanes.leading()
        floor = float(lanes.lower[leaders].min())
        chasing = lanes.upper > floor + epsilon
        chasing[leaders] = False
        rivals = np.flatnonzero(chasing & (lanes.spent < n_items))
        unfinished = leaders[lanes.spent[leaders] < n_items]
        # With every item uncovered there is nothing to chase but a difference in rounding.
        if not chasing.any() or not (len(rivals) or len(unfinished)):
            return lanes.standing(leaders, floor)
        room = lanes.room(leaders)
        if len(unfinished) and (room or not len(rivals)):
            lanes.advance(unfinished, lanes.spent[unfinished] + max(room, 1))
        else:
            lanes.advance(rivals, lanes.next_stop(rivals, floor + epsilon))


class _Lanes:
    """What is uncovered so far: of every head its effects on the first items of the order."""

    def __init__(
        self,
        uncover: Uncover,
        n_items: int,
        screen: Float[np.ndarray, " head"],
        k: int,
        error: float,
        largest: float,
        seed: int,
    ) -> None:
        n_heads = len(screen)
        self.uncover, self.n_items, self.screen, self.k, self.largest = uncover, n_items, screen, k, largest
        self.alpha_upper = (1 - FOR_LOWER) * error / k
        self.alpha_lower = FOR_LOWER * error / (n_heads - k)
        self.order = np.random.default_rng(seed).permutation(n_items)
        self.effects = np.zeros((n_heads, n_items))
        self.spent = np.zeros(n_heads, dtype=np.int64)
        self.beyond = np.zeros(n_heads, dtype=np.int64)
        self.lower, self.upper = np.full(n_heads, -largest), np.full(n_heads, largest)

    @property
    def estimate(self) -> Float[np.ndarray, " head"]:
        """Minus infinity where nothing is uncovered."""
        sums = self.effects.sum(axis=1)
        return np.where(self.spent > 0, sums / np.maximum(self.spent, 1), -np.inf)

    def leading(self) -> Int[np.ndarray, " head"]:
        """The k heads that would be named now: by their estimates, ties by the screen."""
        return np.lexsort((-self.screen, -self.estimate))[: self.k]

    def room(self, leaders: Int[np.ndarray, " head"]) -> int:
        """Items that every leader may have now: leaders spend as much as all others, and `ADVANCE` beyond it.

        How far they are ahead decides how soon the others can be left alone, and halves are within a factor of two
        of the best division.
        """
        ahead = int(self.spent[leaders].sum())
        others = int(self.spent.sum()) - ahead
        return max(0, ADVANCE * len(self.spent) + others - ahead) // self.k

    def next_stop(self, rivals: Int[np.ndarray, " head"], bound: float) -> Int[np.ndarray, " head"]:
        """How far rivals go next: where a head without any effect would be left alone; if beyond that, a quarter more.

        At most twice as far as now, since the bound may rise.
        """
        now = self.spent[rivals]
        quiet = self._needed_by_the_quiet(bound)
        goal = np.where(now < quiet, quiet, now + np.maximum(1, now // 4))
        stop: np.ndarray = np.minimum(goal, np.maximum(FIRST, 2 * now))
        return stop

    def advance(self, heads: Int[np.ndarray, " head"], until: Int[np.ndarray, " head"]) -> None:
        """Uncover the next items of these heads, all that are at the same place in one call."""
        until = np.minimum(until, self.n_items)
        for start, stop in sorted(set(zip(self.spent[heads].tolist(), until.tolist(), strict=True))):
            together = heads[(self.spent[heads] == start) & (until == stop)]
            found = self.uncover(together, self.order[start:stop])
            self.beyond[together] += (np.abs(found) > self.largest).sum(axis=1)
            self.effects[together, start:stop] = found.clip(-self.largest, self.largest)
            self.spent[together] = stop
            seen = self.effects[together, :stop]
            self.upper[together] = upper_bounds(seen, self.n_items, self.largest, self.alpha_upper)
            self.lower[together] = -upper_bounds(-seen, self.n_items, self.largest, self.alpha_lower)

    def standing(self, leaders: Int[np.ndarray, " head"], floor: float) -> Standing:
        named = np.zeros(len(self.spent), dtype=bool)
        named[leaders] = True
        return Standing(named, self.spent, self.estimate, self.lower, self.upper, self.beyond, floor)

    def _needed_by_the_quiet(self, bound: float) -> int:
        """Items after which a head whose effects are all 0 has an upper bound of at most `bound`."""
        if bound <= 0:
            return self.n_items
        grown = _log_wealth(np.zeros((1, self.n_items)), self.n_items, self.largest, np.array([bound]))[0]
        reached = np.flatnonzero(grown >= -np.log(self.alpha_upper))
        return int(reached[0]) + 1 if len(reached) else self.n_items


def upper_bounds(
    effects: Float[np.ndarray, "head drawn"], n_items: int, largest: float, alpha: float
) -> Float[np.ndarray, " head"]:
    """Upper bounds of the means over all `n_items`, from the effects on those drawn so far, in the order drawn.

    For each head, over the order: the chance that its bound is ever below its mean, for any number drawn, is at most
    `alpha`.
    """
    drawn = effects.shape[1]
    total, left = effects.sum(axis=1), n_items - drawn
    # What no effects to come can exceed, or fall below.
    high, low = (total + left * largest) / n_items, (total - left * largest) / n_items
    for _ in range(BISECTIONS if left else 0):
        middle = (high + low) / 2
        refuted = _log_wealth(effects, n_items, largest, middle).max(axis=1) >= -np.log(alpha)
        high, low = np.where(refuted, middle, high), np.where(refuted, low, middle)
    bounds: np.ndarray = high
    return bounds


def _log_wealth(
    effects: Float[np.ndarray, "head drawn"], n_items: int, largest: float, means: Float[np.ndarray, " head"]
) -> Float[np.ndarray, "head drawn"]:
    """Logarithm of what a stake of 1, bet against these means, has become after each item."""
    earlier = np.cumsum(effects, axis=1) - effects
    expected = (n_items * means[:, None] - earlier) / (n_items - np.arange(effects.shape[1]))
    # All that is to come would have to be `largest`: any less wins everything.
    gap = np.maximum(largest - expected, 1e-12 * largest)
    gain = (expected - effects) / gap
    pots = [np.log(share) + np.cumsum(np.log1p(bet * gain), axis=1) for bet, share in BETS]
    most: Float[np.ndarray, "head drawn"] = np.logaddexp.reduce(pots, axis=0)
    return most
