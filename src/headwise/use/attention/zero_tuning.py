"""ZeroTuning: one number per head on the attention to the first token.

Han et al., 2025, "ZeroTuning" (code: FeijiangHan/ZeroTuning). With A a row of the pattern and 0 the first token,

    A'_0 = g A_0 / ((g - 1) A_0 + 1),    A'_i = A_i / ((g - 1) A_0 + 1)

for chosen heads, all rows and steps, which is s_0 <- s_0 + log g. The first token is the first attended one of each
row, so padding on the left does not move it (the released code takes column 0, which is padding then).

The procedure is the paper's: profile each unit with g = 2 and g = 1/2, keep the units that one direction helps, scale
the direction that more of them are of, and choose g on labelled items, or without labels by the lowest entropy of the
next token. What is tuned is judged on other items. Exact: the formula. Reconstruction: which unit counts as helped
(one direction is better than none and than the other), and the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet
from headwise.metrics import Metric, measure, metric, sign_of
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome
from headwise.sweep.edited import Edited
from headwise.sweep.measuring import measure_sets
from headwise.use.attention.temperature import other_than_one, positive
from headwise.use.intervention import Intervention
from headwise.use.scaling import heads_and_numbers

Unit = Literal["head", "index", "layer"]
By = Literal["labels", "entropy"]

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, eq=False, repr=False)
class ZeroTuning(Intervention):
    """Multiply the weight of the first token and renormalise: `ZeroTuning("L2H1", 2.0)`, `ZeroTuning({"L2H1": 0.5})`.

    Attributes:
        heads: the heads; or a mapping from label to factor, and then `gamma` is left out.
        gamma: one number above 0, or one by label; 1 changes nothing.
        scope: queries whose rows are changed, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "zero-tuning"
    heads: HeadSet
    gamma: float | Mapping[str, float] = 1.0
    scope: str = "all"

    def __post_init__(self) -> None:
        heads, gamma = heads_and_numbers(self.heads, self.gamma, f"{self.id}: gamma")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "gamma", positive(gamma, self.heads, f"{self.id}: gamma"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        changed = other_than_one(self.heads, self.gamma)
        if not changed:
            return ()
        amount = {label: math.log(number) for label, number in changed.items()}
        return (edit.bias([*amount], amount, keys="first", scope=self.scope),)


@dataclass(frozen=True, eq=False)
class Profile:
    """What scaling the first token does for each unit alone.

    Attributes:
        units: the heads of each unit.
        plain: mean of the metric with nothing changed, in the direction in which more is better.
        raised, lowered: the same with the unit's gamma up and down, by unit.
    """

    units: tuple[HeadSet, ...]
    plain: float
    raised: Float[Tensor, " unit"]
    lowered: Float[Tensor, " unit"]

    @property
    def up(self) -> HeadSet:
        """Heads of the up-effective units: raising helps, and more than lowering."""
        return self._of((self.raised > self.plain) & (self.raised > self.lowered))

    @property
    def down(self) -> HeadSet:
        """Heads of the down-effective units."""
        return self._of((self.lowered > self.plain) & (self.lowered > self.raised))

    @property
    def dominant(self) -> HeadSet:
        """The larger one of both; of two of one size, that whose units gain more."""
        up, down = self.up, self.down
        gains = [float((each - self.plain).clamp(min=0).sum()) for each in (self.raised, self.lowered)]
        return max((up, gains[0]), (down, gains[1]), key=lambda kind: (len(kind[0]), kind[1]))[0]

    def _of(self, chosen: Tensor) -> HeadSet:
        members = {m for unit, wanted in zip(self.units, chosen.tolist(), strict=True) if wanted for m in unit}
        return HeadSet(tuple(sorted(members)))


@dataclass(frozen=True, eq=False)
class ZeroTuned:
    """A ZeroTuning that was tuned on one part of the items and judged on the other.

    Attributes:
        intervention: what was found; its gamma is 1, and it does nothing, where nothing was better.
        by: by what gamma was chosen; `curve` has the mean of that for every gamma of the grid, on the tuning items.
        tuning, judging: the two parts; no prompt is in both.
        plain, tuned: the metric of every judging item without it and with it.
    """

    intervention: ZeroTuning
    by: By
    curve: Mapping[float, float]
    tuning: ItemSet
    judging: ItemSet
    plain: Float[Tensor, " item"]
    tuned: Float[Tensor, " item"]


def profile(
    model: AttachedModel,
    items: ItemSet,
    heads: HeadSet | str | None = None,
    *,
    unit: Unit = "head",
    measured: str | Metric = "exact-match",
    gammas: tuple[float, float] = (2.0, 0.5),
) -> Profile:
    """Scale the first token of each unit alone, up and down.

    Cost: two forwards per unit and item; they begin at the unit's first layer where the model allows it.

    Args:
        heads: which heads to try; None is all of them.
        unit: each head by itself, each head `index` over the layers, or each `layer` over its heads.
        gammas: the factor up and the factor down.

    Raises:
        InputError: a unit that is none, gammas that are not above 1 and between 0 and 1.
    """
    up, down = gammas
    if not 0 < down < 1 < up:
        raise InputError(f"gammas={gammas!r}: give one number above 1 and one between 0 and 1, such as (2.0, 0.5)")
    chosen = metric(measured) if not isinstance(measured, Metric) else measured
    units = units_of(model.heads(heads), unit)
    sign = sign_of(chosen.better)
    plain = sign * float(measure(model, items, chosen).double().mean())
    raised, lowered = (
        sign * measure_sets(model, items, units, _scaled(gamma), chosen).mean(dim=1) for gamma in (up, down)
    )
    return Profile(units, plain, raised, lowered)


def tune(
    model: AttachedModel,
    items: ItemSet,
    heads: HeadSet | str | None = None,
    *,
    by: By = "labels",
    measured: str | Metric = "exact-match",
    grid: Sequence[float] = GRID,
    unit: Unit = "head",
) -> ZeroTuned:
    """Find a ZeroTuning on one half of the items, and judge it on the other half.

    Args:
        heads: the heads to scale; None profiles the model on the tuning items, and takes the dominant kind.
        by: `labels` chooses the gamma with the best metric, `entropy` that with the lowest entropy of the next token,
            which needs no answers. The profile goes by the same.
        measured: the metric that the other half is judged by, and the labels are read by.

    Raises:
        InputError: an empty grid, fewer than two different prompts.
        Refusal: scaling the first token helps no unit.
    """
    if by not in ("labels", "entropy"):
        raise InputError(f"by={by!r} is neither 'labels' nor 'entropy'")
    grid = sorted({1.0, *grid}, key=lambda gamma: abs(math.log(gamma)) if gamma > 0 else math.inf)
    judged = metric(measured) if not isinstance(measured, Metric) else measured
    aim = judged if by == "labels" else NEXT_ENTROPY
    tuning, judging = parted(items)
    chosen = model.heads(heads) if heads is not None else profile(model, tuning, unit=unit, measured=aim).dominant
    if not chosen:
        raise Refusal(
            f"scaling the first token of no unit of {model.name} alone helps on {tuning.probe}; name heads, or take "
            "another metric or more items"
        )
    curve = {}
    for gamma in grid:
        edits = ZeroTuning(chosen, gamma).edits(model)
        curve[gamma] = float(measure(model, tuning, aim, edits=edits).double().mean())
    # The grid begins at 1: of gammas that are equally good, the one that changes least is taken.
    best = max(curve, key=lambda gamma: sign_of(aim.better) * curve[gamma])
    found = ZeroTuning(chosen, best)
    plain = measure(model, judging, judged)
    tuned = measure(model, judging, judged, edits=found.edits(model)) if best != 1 else plain
    return ZeroTuned(found, by, curve, tuning, judging, plain, tuned)


def parted(items: ItemSet) -> tuple[ItemSet, ItemSet]:
    """The items for tuning and those for judging: every other prompt, and no prompt in both.

    Raises InputError where there are fewer than two different prompts.
    """
    places: dict[object, int] = {}
    for each in items:
        places.setdefault((each.prompt, each.item.pictures), len(places))
    if len(places) < 2:
        raise InputError(f"{items.probe}: tuning and judging need two different prompts; encode more items")
    first = [places[each.prompt, each.item.pictures] % 2 == 0 for each in items]
    return items.only(first, "kept for judging"), items.only([not each for each in first], "used for tuning")


def units_of(heads: HeadSet, unit: Unit) -> tuple[HeadSet, ...]:
    """The heads one by one, by index over the layers, or by layer. Raises InputError for another word."""
    if unit not in ("head", "index", "layer"):
        raise InputError(f"unit={unit!r} is not one of head, index, layer")
    gathered: dict[object, list[Head]] = {}
    for head in heads.heads:
        key = {"head": head, "index": (head.stack, head.index), "layer": head.site}[unit]
        gathered.setdefault(key, []).append(head)
    return tuple(HeadSet(tuple(members)) for members in gathered.values())


def _scaled(gamma: float) -> Edited:
    return Edited(lambda heads, rows: edit.bias(heads, math.log(gamma), keys="first", rows=rows))


def next_entropy(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Entropy in nats of the token that follows the prompt, which is the same whatever the answer is."""
    assert outcome.logits is not None
    logs = outcome.logits[:, 0].log_softmax(dim=-1)
    entropy: Tensor = -(logs.exp() * logs).nan_to_num(nan=0.0).sum(dim=-1)  # ruled out tokens: 0 times -inf
    return entropy


NEXT_ENTROPY = Metric("next-entropy", "entropy of the next token", frozenset({"logits"}), "lower", "nats", next_entropy)

INTERVENTIONS = (
    InterventionEntry(
        id=ZeroTuning.id,
        title="Scale the attention of heads to the first token",
        page="use/attention.md#zero-tuning",
        paper="Han et al., ZeroTuning",
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward; rows of these heads recomputed (profile: 2 forwards per head and item)",
        made=ZeroTuning,
    ),
)
