"""JUICE, "Just Run Twice": what chosen heads write in the clean run, added once more, or taken off.

After Li et al. (2025), "Taming Knowledge Conflicts in Language Models". Beside the run that answers goes a clean one.
With z' of the clean run, in the run that answers

    z_h <- z_h + alpha_l z'_h      h in the set that is made stronger
    z_h <- z_h - alpha_s z'_h      h in the set that is made weaker

which adds to the attention output what these heads wrote in the clean run, times alpha. In `generate` both runs
continue with the token that the first one chose. What a head writes at a position hangs on what is before it alone, so
each run with a cache of its own gives what running everything twice gives.

`JustRunOnce` is the paper's ablation: the same in one run, z_h <- (1 + alpha) z_h. What a layer's heads write does not
hang on edits of that layer or a later one: where all heads are of one layer the two are the same function. They differ
as soon as an edited head is in front of another.

Which heads, and alpha: `headwise.use.knowledge.juice_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.use.intervention import Beside, Intervention, finite, named_heads

Mode = Literal["batch", "caches"]


@dataclass(frozen=True, eq=False, repr=False)
class _Strengthened(Intervention):
    """Two sets of heads and how much of what they write is added and taken off.

    Attributes:
        enhance: heads that are made stronger.
        suppress: heads that are made weaker; none of the others.
        enhance_by: alpha_l, from 0 on. 0 changes nothing.
        suppress_by: alpha_s, from 0 on. 0 changes nothing; 1 takes off what the head wrote in the clean run.
    """

    enhance: HeadSet = field(default_factory=HeadSet)
    suppress: HeadSet = field(default_factory=HeadSet)
    enhance_by: float = 1.0
    suppress_by: float = 1.0

    def __post_init__(self) -> None:
        for name in ("enhance", "suppress"):
            object.__setattr__(self, name, _some(getattr(self, name), f"{self.id}: {name}"))
            by = f"{name}_by"
            object.__setattr__(self, by, finite(getattr(self, by), f"{self.id}: {by}", low=0.0))
        named_heads(self.heads, self.id)
        if self.enhance & self.suppress:
            raise InputError(f"{self.id}: {self.enhance & self.suppress} are in both sets; name each head in one")

    @property
    def heads(self) -> HeadSet:
        """Those of both sets."""
        return self.enhance | self.suppress

    def _signed(self, model: AttachedModel) -> list[tuple[HeadSet, float]]:
        """The sets that are changed, each with its alpha."""
        model.heads(self.heads)
        both = ((self.enhance, self.enhance_by), (self.suppress, -self.suppress_by))
        return [(heads, alpha) for heads, alpha in both if heads and alpha]


@dataclass(frozen=True, eq=False, repr=False)
class JUICE(_Strengthened):
    """Add what heads write in a clean run beside: `JUICE("L3H1, L4H2", suppress="L5H0", enhance_by=3)`.

    Attributes:
        enhance, suppress, enhance_by, suppress_by: the heads, none in both sets, and alpha of each set, from 0 on. 0
            changes nothing, and then no second run is made.
        mode: of the two runs: `batch`, one forward of twice the rows, or `caches`, a forward and a cache for each.
    """

    id: ClassVar[str] = "juice"
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise InputError(f"{self.id}: mode={self.mode!r} is neither 'batch' nor 'caches'")

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        return tuple(edit.add(heads, edit.OTHER, strength=alpha) for heads, alpha in self._signed(model))

    def beside(self, model: AttachedModel) -> Beside | None:
        return Beside(mode=self.mode) if self._signed(model) else None


@dataclass(frozen=True, eq=False, repr=False)
class JustRunOnce(_Strengthened):
    """JUICE in one run: z of the heads times 1 + alpha_l, or 1 - alpha_s.

    Attributes:
        enhance, suppress, enhance_by, suppress_by: as of `JUICE`.
    """

    id: ClassVar[str] = "just-run-once"

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        return tuple(edit.scale(heads, 1 + alpha) for heads, alpha in self._signed(model))


def _some(form: Any, what: str) -> HeadSet:
    """A set of heads that may be empty."""
    return form if isinstance(form, HeadSet) and not form and form.kind == "head" else named_heads(form, what)


PAGE = "use/knowledge.md"
PAPER = "Li et al., Taming Knowledge Conflicts in Language Models"
INTERVENTIONS = (
    InterventionEntry(
        id=JUICE.id,
        title="Add what heads write in a clean run beside, or take it off",
        page=f"{PAGE}#juice",
        paper=PAPER,
        year=2025,
        tier="B",
        status="exact",
        cost="2 forwards",
        made=JUICE,
    ),
    InterventionEntry(
        id=JustRunOnce.id,
        title="JUICE in one run: heads times 1 + alpha",
        page=f"{PAGE}#just-run-once",
        paper=PAPER,
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward",
        made=JustRunOnce,
    ),
)

__all__ = ["INTERVENTIONS", "JUICE", "JustRunOnce"]
