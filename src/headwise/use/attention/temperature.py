"""Attention temperature: the scores of heads divided by a number before softmax.

    A_h = softmax(s_h / T_h)

Below 1 a head attends to less, above 1 to more; towards infinity it becomes the mean over what it sees. Where nothing
is added to q.k, this is a factor 1 / T_h on q, which can be baked into q_proj. Exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.use.intervention import Intervention
from headwise.use.scaling import by_head, heads_and_numbers


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTemperature(Intervention):
    """Divide scores: `AttentionTemperature("L2H1", 0.5)`, `AttentionTemperature({"L2H1": 0.5, "L3H4": 2.0})`.

    Attributes:
        heads: the heads; or a mapping from label to temperature, and then `temperature` is left out.
        temperature: one number above 0, or one by label; 1 changes nothing.
        scope: queries whose rows are changed, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "attention-temperature"
    heads: HeadSet
    temperature: float | Mapping[str, float] = 1.0
    scope: str = "all"

    def __post_init__(self) -> None:
        heads, given = heads_and_numbers(self.heads, self.temperature, f"{self.id}: temperature")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "temperature", positive(given, self.heads, f"{self.id}: temperature"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        model.heads(self.heads)
        changed = other_than_one(self.heads, self.temperature)
        if not changed:
            return ()
        factors = {label: 1 / number for label, number in changed.items()}
        return (edit.scale([*factors], factors, variable="score", scope=self.scope),)


def positive(value: Any, heads: HeadSet, what: str) -> float | dict[str, float]:
    """A number above 0, or one by head label for exactly these heads. Raises InputError for anything else."""
    numbers = by_head(value, heads, what)
    for label, number in numbers.items() if isinstance(numbers, Mapping) else [("", numbers)]:
        if not isinstance(number, float) or number <= 0:
            of = f" of {label}" if label else ""
            raise InputError(f"{what}{of} is {number!r}; give a number above 0 (1 changes nothing)")
    return numbers  # type: ignore[no-any-return]


def other_than_one(heads: HeadSet, numbers: float | Mapping[str, float]) -> dict[str, float]:
    """By label, the numbers that are not 1."""
    by_label = numbers if isinstance(numbers, Mapping) else dict.fromkeys(heads.labels, numbers)
    return {label: number for label, number in by_label.items() if number != 1}


INTERVENTIONS = (
    InterventionEntry(
        id=AttentionTemperature.id,
        title="Divide the scores of heads before softmax",
        page="use/attention.md#attention-temperature",
        paper="Vaswani et al., Attention Is All You Need (the scale of scores)",
        year=2017,
        tier="B",
        status="exact",
        cost="1 forward; rows of these heads recomputed",
        made=AttentionTemperature,
    ),
)
