"""What `evaluate` gives back: the numbers of every item, and what is computed of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from headwise.heads import HeadSet
from headwise.metrics import Better
from headwise.use.intervention import Intervention
from headwise.verify.judging import FEWEST_CONTROLS
from headwise.verify.statistics import excess_interval, mean_interval, studentised_p
from headwise.verify.verdict import plain

if TYPE_CHECKING:
    from rich.table import Table

Values = Float[np.ndarray, " item"]


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """A metric of the same items with an intervention, without it, and with each of its controls.

    Attributes:
        probe, metric, unit, better: what was measured.
        item_ids: the items, last axis of every value.
        clean, edited: without the intervention, and with it.
        controls: with each control; no rows where there are none.
        control_heads: the heads of each control.
        match: where random heads are from: `layers`, `neighbouring layers` or `model`; `given` for controls that were
            given; empty where there are none.
    """

    probe: str
    metric: str
    unit: str
    better: Better
    item_ids: tuple[str, ...]
    clean: Values
    edited: Values
    controls: Float[np.ndarray, "set item"]
    control_heads: tuple[HeadSet, ...]
    match: str

    @property
    def changes(self) -> Values:
        """Metric with the intervention minus without, of every item, in the metric's unit."""
        changes: np.ndarray = self.edited - self.clean
        return changes

    @property
    def change(self) -> float:
        """Mean of `changes`."""
        return float(self.changes.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 percent interval of `change` over items (Student's, of the paired differences)."""
        return mean_interval(self.changes)

    @property
    def control_changes(self) -> Float[np.ndarray, "set item"]:
        """The same of every control."""
        changes: np.ndarray = self.controls - self.clean
        return changes

    @property
    def excess(self) -> float:
        """`change` minus the mean change of the controls; NaN where there are none."""
        return self.change - float(self.control_changes.mean()) if len(self.controls) else float("nan")

    @property
    def excess_interval(self) -> tuple[float, float]:
        """95 percent interval of `excess`, over items and controls; NaN for fewer than two of either."""
        return excess_interval(self.changes, self.control_changes)

    @property
    def p(self) -> float:
        """Two-sided: that controls like these would change the metric so much, up or down.

        Twice the smaller of the one-sided studentised p of verdicts; NaN for fewer than 8 controls.
        """
        if len(self.controls) < FEWEST_CONTROLS or len(self.item_ids) < 2:
            return float("nan")
        sides = (studentised_p(sign * self.changes, sign * self.control_changes) for sign in (1, -1))
        return min(1.0, 2 * min(sides))

    def to_pandas(self) -> pd.DataFrame:
        """One row per item: item, clean, edited, change, random (the mean change of the controls)."""
        random = self.control_changes.mean(axis=0) if len(self.controls) else np.full(len(self.item_ids), np.nan)
        return pd.DataFrame(
            {
                "item": self.item_ids,
                "clean": self.clean,
                "edited": self.edited,
                "change": self.changes,
                "random": random,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those of the items; numbers that are none are None."""
        return plain(
            {
                "probe": self.probe,
                "metric": self.metric,
                "unit": self.unit,
                "better": self.better,
                "items": len(self.item_ids),
                "clean": float(self.clean.mean()),
                "edited": float(self.edited.mean()),
                "change": self.change,
                "interval": list(self.interval),
                "controls": len(self.controls),
                "match": self.match,
                "excess": self.excess,
                "excess_interval": list(self.excess_interval),
                "p": self.p,
            }
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One item's greedy continuation, without the intervention and with it."""

    item: str
    prompt: str
    answer: str
    without: str
    steered: str


@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """What an intervention does.

    Attributes:
        intervention: what was evaluated.
        target: the items that it is for.
        off_target: items on which it should change nothing, one comparison for each probe, with fewer controls.
        samples: text without it and with it.
        cost: time per generated token, as a ratio to that without it; NaN where the model does not generate.
        notes: what could not be measured, and why.
    """

    intervention: Intervention
    target: Comparison
    off_target: tuple[Comparison, ...]
    samples: tuple[Sample, ...]
    cost: float
    notes: tuple[str, ...]

    def to_pandas(self) -> pd.DataFrame:
        """The items of the target; see `Comparison.to_pandas`."""
        return self.target.to_pandas()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        samples = [
            {
                "item": each.item,
                "prompt": each.prompt,
                "answer": each.answer,
                "without": each.without,
                "with": each.steered,
            }
            for each in self.samples
        ]
        return plain(
            {
                "intervention": self.intervention.id,
                "heads": list(self.intervention.acts_on.labels),
                "target": self.target.to_dict(),
                "off_target": [each.to_dict() for each in self.off_target],
                "samples": samples,
                "cost": self.cost,
                "notes": list(self.notes),
            }
        )

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*_COLUMNS, title=Text(repr(self.intervention)), title_justify="left", caption_justify="left")
        for each in (self.target, *self.off_target):
            table.add_row(*map(Text, _cells(each)))
        table.caption = Text("\n".join(self._told()))
        return table

    def __str__(self) -> str:
        lines = [repr(self.intervention)]
        for each in (self.target, *self.off_target):
            named = zip(_COLUMNS[1:], _cells(each)[1:], strict=True)
            lines.append(f"  {_cells(each)[0]}: " + ", ".join(f"{name} {cell}" for name, cell in named if cell))
        return "\n".join([*lines, *(f"  {line}" for line in self._told())])

    __repr__ = __str__

    def _told(self) -> list[str]:
        """What stands under the table."""
        cost = [f"a generated token takes {self.cost:.2f} times as long"] if np.isfinite(self.cost) else []
        texts = [f"{each.item}: {each.without.strip()!r} -> {each.steered.strip()!r}" for each in self.samples]
        return [*cost, *texts, *self.notes]


_COLUMNS = ("on", "items", "without", "with", "change", "beyond random heads", "p")


def _cells(found: Comparison) -> tuple[str, ...]:
    excess = _with_interval(found.excess, found.excess_interval) if len(found.controls) else ""
    return (
        f"{found.probe}, {found.metric} ({found.unit}, {found.better} is better)",
        str(len(found.item_ids)),
        f"{found.clean.mean():.3g}",
        f"{found.edited.mean():.3g}",
        _with_interval(found.change, found.interval),
        excess,
        f"{found.p:.2g}" if np.isfinite(found.p) else "",
    )


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:+.3g} [{low:+.3g}, {high:+.3g}]"
