"""The runs that a verdict is made from, in pieces that can be run apart.

    found = ground(model, items, KnockOut())                      # clean, chance, the items that are answered rightly
    values = map_of(model, found, model.heads("L1"))              # every head alone
    joint = joint_of(model, found, "given", heads, n_controls=100)    # a set, and its control sets
    evidence = found.evidence(model.heads("L1"), values, (joint,))

`gather` runs them all. The items must not be those that chose the heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headwise.heads import HeadSet
from headwise.metrics import EXACT_MATCH, Metric, metric
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet
from headwise.sweep import Controls, KnockOut, matched_sets, measure_sets
from headwise.verify.chance import chance_of
from headwise.verify.evidence import Evidence, Family, Joint, Values
from headwise.verify.judging import why_refused

N_CONTROLS = 100

WITHOUT_RIGHT_ANSWERS = frozenset({"cosine-to-clean", "cross-entropy"})
"""Metrics of texts, where no item is answered rightly or wrongly: all of them are kept."""


@dataclass(frozen=True, eq=False)
class Ground:
    """What all knock-outs of a family are held against.

    Attributes:
        items: those that count: the ones answered rightly, or all where none is.
        metric, knock_out: how it is measured, and how heads are taken out.
        clean: the metric without a knock-out.
        chance: see `headwise.verify.chance`.
        solved: share of the items given that are answered rightly; NaN where the metric knows no right answer.
    """

    family: Family
    items: ItemSet
    metric: Metric
    knock_out: KnockOut
    clean: Values
    chance: float
    solved: float

    @property
    def refusal(self) -> str:
        """Why there is nothing to judge on these items; empty where there is."""
        return why_refused(self.clean, self.chance, self.metric.sign, self.solved)

    def evidence(
        self,
        heads: HeadSet,
        values: Float[np.ndarray, "head item"],
        joints: tuple[Joint, ...],
        finding: Iterable[str] = (),
    ) -> Evidence:
        """All pieces together; `finding` are the ids of the items that chose the heads of `joints`.

        Raises `InputError` if they do not fit.
        """
        return Evidence(
            family=self.family,
            better=self.metric.better,
            unit=self.metric.unit,
            item_ids=self.items.ids,
            clean=self.clean,
            chance=self.chance,
            solved=self.solved,
            heads=heads,
            values=values,
            joints=joints,
            finding_ids=tuple(finding),
        )


def ground(
    model: AttachedModel,
    items: ItemSet,
    knock_out: KnockOut,
    *,
    measured: str | Metric | None = None,
    seed: int = 0,
) -> Ground:
    """Run the items without a knock-out; keep those that the model answers rightly.

    Args:
        measured: the metric; None is that of the items' probe.
        seed: of a chance level that is measured.

    Raises:
        InputError: no items; an unknown metric.
        Refusal: the model cannot give what the metric needs; the metric has no chance level.
    """
    chosen = measured if isinstance(measured, Metric) else metric(items.metric if measured is None else measured)
    chance = chance_of(model, items, chosen, seed)
    kept, solved = _answered_rightly(model, items, chosen)
    clean = measure_sets(model, kept, [HeadSet()], knock_out, chosen)[0].numpy()
    family = Family(items.probe, chosen.id, knock_out.mode, knock_out.scope)
    return Ground(family, kept, chosen, knock_out, clean, chance, solved)


def map_of(model: AttachedModel, found: Ground, heads: HeadSet) -> Float[np.ndarray, "head item"]:
    """The metric with each of these heads out alone; NaN where there is nothing to judge."""
    if found.refusal or not heads:
        return np.full((len(heads), len(found.items)), np.nan)
    alone = [HeadSet((head,)) for head in heads.heads]
    return measure_sets(model, found.items, alone, found.knock_out, found.metric).numpy()


def joint_of(
    model: AttachedModel,
    found: Ground,
    name: str,
    heads: HeadSet,
    *,
    available: HeadSet | None = None,
    n_controls: int = N_CONTROLS,
    seed: int = 0,
) -> Joint:
    """The metric with all of `heads` out, and with each of its control sets out.

    Args:
        available: what control sets are drawn from (less `heads`); None is every head of the stacks of `heads`.

    Raises:
        InputError: no heads, or no number of control sets.
    """
    among = every_head(model, heads.stacks) if available is None else available
    controls = matched_sets(heads, among, n_controls, seed)
    if found.refusal:
        nothing = np.full((1, len(found.items)), np.nan)
        return Joint(name, heads, nothing[0], Controls((), controls.match, controls.exhausted), nothing[:0])
    values = measure_sets(model, found.items, [heads, *controls.sets], found.knock_out, found.metric).numpy()
    return Joint(name, heads, values[0], controls, values[1:])


def gather(
    model: AttachedModel,
    items: ItemSet,
    knock_out: KnockOut,
    *,
    joints: Mapping[str, HeadSet],
    measured: str | Metric | None = None,
    heads: HeadSet | None = None,
    n_controls: int = N_CONTROLS,
    finding: Iterable[str] = (),
    seed: int = 0,
) -> Evidence:
    """All of it: clean run, exact map of `heads` (None: every head of the main stack), sets with their controls.

    Arguments and errors are those of `ground` and `joint_of`; `joints` are sets by name, and `finding` the ids of the
    items that chose them (`scores.item_ids`).
    """
    found = ground(model, items, knock_out, measured=measured, seed=seed)
    mapped = every_head(model) if heads is None else heads
    values = map_of(model, found, mapped)
    sets = tuple(joint_of(model, found, name, each, n_controls=n_controls, seed=seed) for name, each in joints.items())
    return found.evidence(mapped, values, sets, finding)


def every_head(model: AttachedModel, stacks: tuple[str, ...] = ()) -> HeadSet:
    """Every head of these stacks; of the main one where none is named."""
    wanted = stacks or model.table.stacks[:1]
    return model.heads(None).filter(lambda each: each.stack in wanted)


def accuracy(chosen: Metric) -> Metric:
    """What says whether an item is answered rightly, beside this metric: from 0 to 1."""
    # What is told from generated text lies between 0 and 1 itself.
    return chosen if chosen.wants == {"generation"} else EXACT_MATCH


def _answered_rightly(model: AttachedModel, items: ItemSet, chosen: Metric) -> tuple[ItemSet, float]:
    if chosen.id in WITHOUT_RIGHT_ANSWERS or chosen.wants == {"embedding"}:
        return items, float("nan")
    right = measure_sets(model, items, [HeadSet()], KnockOut(), accuracy(chosen))[0] >= 0.5
    solved = float(right.double().mean())
    return (items.only(right.tolist(), "the model gets it wrong") if bool(right.any()) else items), solved
