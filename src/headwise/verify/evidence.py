"""What a verdict is made from: the metric of every item, clean and under every knock-out, nothing averaged yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.metrics import Better, sign_of
from headwise.sweep import Controls, Mode

Values = Float[np.ndarray, " item"]


@dataclass(frozen=True, slots=True, order=True)
class Family:
    """The claims that are corrected for together: one behaviour, measured and knocked out in one way."""

    probe: str
    metric: str
    mode: Mode = "zero"
    scope: str = "all"

    @property
    def key(self) -> str:
        """`ioi/logit-difference/zero/all`."""
        return "/".join((self.probe, self.metric, self.mode, self.scope))


@dataclass(frozen=True, eq=False)
class Joint:
    """A set of heads knocked out together, and its control sets.

    Attributes:
        name: where the set comes from: id of a method, or `given`.
        heads: the set.
        values: the metric of every item with all of them out.
        controls: the control sets, `control_values` the metric with each of them out.
    """

    name: str
    heads: HeadSet
    values: Values
    controls: Controls
    control_values: Float[np.ndarray, "set item"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that was measured for one family, on items that selected nothing.

    Attributes:
        better: whether a model that does well has a higher or a lower value of the metric.
        unit: of the metric.
        item_ids: the held-out items; first axis of nothing, last axis of every value.
        clean: the metric without any knock-out.
        chance: the metric of a model that knows nothing of the behaviour.
        solved: share of the items drawn that the model answers rightly without a knock-out; NaN where a model gives no
            answers (embeddings). Items that it gets wrong are not among `item_ids`.
        heads: the heads of the exact map, each knocked out alone; `values` the metric with each of them out.
        joints: sets knocked out together.
        finding_ids: the items that chose heads to be tested here, which may not test them again.

    Raises `InputError` for arrays that do not fit.
    """

    family: Family
    better: Better
    unit: str
    item_ids: tuple[str, ...]
    clean: Values
    chance: float
    solved: float
    heads: HeadSet
    values: Float[np.ndarray, "head item"]
    joints: tuple[Joint, ...] = ()
    finding_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.item_ids)
        shapes = {"clean": (self.clean.shape, (n,)), "values": (self.values.shape, (len(self.heads), n))}
        for joint in self.joints:
            shapes[joint.name] = (joint.values.shape, (n,))
            shapes[f"controls of {joint.name}"] = (joint.control_values.shape, (len(joint.controls.sets), n))
        wrong = next((f"{name} has shape {a}, expected {b}" for name, (a, b) in shapes.items() if a != b), None)
        if wrong is not None:
            raise InputError(f"evidence for {self.family.key} does not fit its {n} items: {wrong}")

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return sign_of(self.better)

    def drops(self, values: Float[np.ndarray, "*set item"]) -> Float[np.ndarray, "*set item"]:
        """What a knock-out cost on each item: positive where the heads help."""
        cost: np.ndarray = (self.clean - values) * self.sign
        return cost

    @property
    def reach(self) -> float:
        """Distance of the clean metric from chance: what there is to lose, on the mean of the items."""
        return float(self.clean.mean() - self.chance) * self.sign
