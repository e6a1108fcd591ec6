"""A probe: an endless stream of items with known answers, the same for every tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product

from headwise.catalogue import Entry
from headwise.errors import InputError
from headwise.probes.item import Item

Setting = str | int | float

REPEATS = 2_000
"""So many draws in a row without a new item are taken as the end of a finite stream."""


MANY = 1_000_000
"""More than any setting that counts something can be."""


def require(setting: str, value: Setting, allowed: Collection[Setting]) -> None:
    """What a probe's `make` asks of a setting. Raises `InputError` unless `value` is among `allowed`."""
    if isinstance(allowed, range):
        form = f"a whole number from {allowed.start}" + (f" to {allowed.stop - 1}" if allowed.stop < MANY else "")
        fits = type(value) is int and value in allowed
    else:
        form, fits = " or ".join(repr(each) for each in allowed), value in allowed
    if not fits:
        raise InputError(f"setting {setting!r} must be {form}; it is {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Entry):
    """A behaviour, as questions.

    Attributes:
        make: draws one item; takes the random state and one value of each setting in `grid`.
        metric: id of the default metric.
        chance: the default metric's value for a model that knows nothing of the behaviour, where that is a fixed
            number; None where it is measured (see `metrics`).
        spans: names of the places that every item has.
        in_prompt: whether the answer stands in the prompt.
        grid: settings and the values they go through in turn, such as lengths and depths.
        one_token: whether the metric compares answers of a single token.
    """

    kind: str = "probes"  # type: ignore[assignment]
    make: Callable[..., Item]
    metric: str
    chance: float | None
    spans: tuple[str, ...] = ()
    in_prompt: bool = True
    grid: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)
    one_token: bool = False

    def over(self, **grid: Sequence[Setting] | Setting) -> Probe:
        """This probe with other values for some settings: `probe("needle").over(words=[100], depth=[0.0, 0.5, 1.0])`.

        Raises `InputError` for a setting it does not have, or one without values.
        """
        unknown = grid.keys() - self.grid.keys()
        if unknown:
            has = ", ".join(self.grid) or "none"
            raise InputError(f"probe {self.id} has no setting {sorted(unknown)[0]!r}; its settings: {has}")
        for name, value in grid.items():
            if not isinstance(value, (str, int, float, Sequence)):
                raise InputError(f"setting {name!r} of probe {self.id} takes a value or a list of them, not {value!r}")
        values = {name: (v,) if isinstance(v, (str, int, float)) else tuple(v) for name, v in grid.items()}
        empty = [name for name, v in values.items() if not v]
        if empty:
            raise InputError(f"setting {empty[0]!r} of probe {self.id} needs at least one value")
        return replace(self, grid={**self.grid, **values})

    def items(self, seed: int | str = 0) -> Iterator[Item]:
        """The stream: new items without end, or until nothing new is found; the same for the same seed.

        The settings in `grid` take turns, so any first N items hold every combination about equally often.
        """
        cells = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        seen: set[str] = set()
        stale = 0
        for index in count():
            # One random state an item: the stream can be begun anywhere and gives the same.
            item = self.make(random.Random(f"{self.id}/{seed}/{index}"), **cells[index % len(cells)]).named(self.id)
            if item.id in seen:
                stale += 1
                if stale >= REPEATS:
                    return
                continue
            stale = 0
            seen.add(item.id)
            yield item
