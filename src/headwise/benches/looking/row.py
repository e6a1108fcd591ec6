"""A row of `headwise bench looking`: one quantity without an edit, with it, and with the same edit on random heads.

Quantities are shares over items, such as right answers among all or absent shapes among those named. Intervals are of
the bootstrap: items are drawn again, the same ones without, with and on controls, and so are the control sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError
from headwise.heads import HeadSet

DRAWS = 2000
MOST_LOST = 0.05
"""What may be lost where a quantity is to be kept."""

Values = Float[np.ndarray, " item"]
Pair = tuple[float, float]

NONE: Pair = (math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Share:
    """The sum of `of` over the sum of `among`, one number of each per item."""

    of: Values
    among: Values

    @staticmethod
    def mean(values: Any) -> Share:
        """Of values that are there; a NaN counts for nothing."""
        given = np.asarray(values, dtype=np.float64)
        return Share(np.nan_to_num(given), np.isfinite(given).astype(np.float64))

    @property
    def value(self) -> float:
        return float(self.drawn(np.ones((1, len(self.of))))[0])

    def drawn(self, times: Float[np.ndarray, "draw item"]) -> Float[np.ndarray, " draw"]:
        """With every item as often as `times` says; NaN where nothing is among them."""
        among = times @ self.among
        shares: Float[np.ndarray, " draw"] = np.full(len(times), np.nan)
        np.divide(times @ self.of, among, out=shares, where=among != 0)
        return shares


@dataclass(frozen=True)
class Row:
    """One quantity under one edit; `refused` says why there is none, and the figures mean nothing then.

    Attributes:
        name: what it is, within its part of the table.
        heads: the heads that the edit names; none where it goes by the prompt, or takes all.
        items: how many judge.
        without, edited: the quantity.
        change, beyond: what the edit changes, and what of it is beyond its controls; with 95 percent intervals.
        controls: how many there are.
        wanted: 1 where it is to rise, -1 where it is to fall, 0 where it is to be kept.
        ruling: of a verdict; empty for other rows.
        note: what else is to be said.
    """

    name: str
    heads: tuple[str, ...] = ()
    items: int = 0
    without: float = math.nan
    edited: float = math.nan
    change: float = math.nan
    interval: Pair = NONE
    beyond: float = math.nan
    beyond_interval: Pair = NONE
    controls: int = 0
    wanted: int = 1
    ruling: str = ""
    note: str = ""
    refused: str = ""

    @staticmethod
    def of(
        name: str,
        without: Share,
        edited: Share,
        controls: Sequence[Share] = (),
        *,
        heads: HeadSet | None = None,
        wanted: int = 1,
        note: str = "",
        seed: int = 0,
    ) -> Row:
        """The row of shares over the same items."""
        change, interval, beyond, beyond_interval = compared(without, edited, controls, seed=seed)
        return Row(
            name=name,
            heads=() if heads is None else heads.labels,
            items=len(without.of),
            without=without.value,
            edited=edited.value,
            change=change,
            interval=interval,
            beyond=beyond,
            beyond_interval=beyond_interval,
            controls=len(controls),
            wanted=wanted,
            note=note,
        )

    @property
    def changes(self) -> bool:
        """Whether the whole interval of the change goes the wanted way; of what is to be kept, whether it is, and was
        there to be lost."""
        if self.wanted == 0:
            return not self.refused and self.without > MOST_LOST and self.interval[0] > -MOST_LOST
        return not self.refused and _goes(self.interval, self.wanted)

    @property
    def holds(self) -> bool:
        """Whether it changes so, and beyond its controls too; of a verdict, whether it is verified."""
        if self.ruling:
            return self.ruling == "verified"
        return self.changes and (self.wanted == 0 or _goes(self.beyond_interval, self.wanted))


def compared(
    without: Share, edited: Share, controls: Sequence[Share] = (), *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, Pair, float, Pair]:
    """Change and its interval; what of it is beyond the mean of the controls, and the interval of that.

    Intervals are the 2.5 and 97.5 percentiles over draws of items and, for the latter, of controls as well; NaN where
    there are none.

    Raises:
        InputError: shares over different numbers of items, or over none.
    """
    n = len(without.of)
    if not n or any(len(each.of) != n for each in (edited, *controls)):
        raise InputError(f"shares over the same items are compared, and there are {n} without an edit; give as many")
    random = np.random.default_rng(seed)
    times = random.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    with_it = edited.drawn(times)
    interval = _interval(with_it - without.drawn(times))
    change = edited.value - without.value
    if not controls:
        return change, interval, math.nan, NONE
    k = len(controls)
    of_sets = random.multinomial(k, np.full(k, 1 / k), size=draws) / k
    others = (of_sets * np.stack([each.drawn(times) for each in controls], axis=1)).sum(axis=1)
    beyond = edited.value - float(np.mean([each.value for each in controls]))
    return change, interval, beyond, _interval(with_it - others)


def _interval(drawn: Float[np.ndarray, " draw"]) -> Pair:
    if not np.isfinite(drawn).any():
        return NONE
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _goes(interval: Pair, wanted: int) -> bool:
    return all(wanted * bound > 0 for bound in interval)
