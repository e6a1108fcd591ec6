"""What a report shows, as plain values: no model, no store, nothing left to compute but how it looks.

`headwise.atlas.report.reading` makes a `Report` of an atlas; everything else here draws it. Effects are in the metric's
unit unless a name says `share`: then they are shares of the behaviour's reach (clean metric less chance).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from headwise.verify.verdict import Ruling

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Shown:
    """A name and what stands behind it, such as `seed` and `0`: one line of a list."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Off:
    """What taking heads out costs elsewhere: the change of another probe's metric, positive where it is for the worse,
    with its 95 percent interval over items."""

    probe: str
    effect: float
    unit: str
    low: float
    high: float
    n_items: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Heads, alone or together, and what became of the claim that a behaviour hangs on them.

    Attributes:
        heads: their labels.
        method: what chose them, with commas between several; empty for a head of the exact map, which nothing chose.
        excess, low, high: effect less the controls' mean, with its 95 percent interval.
        ceiling: 95th percentile of the controls' effects.
        controls: effect of each control, where they are kept.
        match: where the controls are from.
        alone: how many of the heads are verified by themselves.
        named_by: methods that named a head of the exact map, on the same behaviour.
    """

    heads: tuple[str, ...]
    method: str
    effect: float
    excess: float
    low: float
    high: float
    ceiling: float
    n_controls: int
    match: str
    p: float
    p_floor: float
    p_kind: str
    q: float
    ruling: Ruling
    reason: str
    controls: tuple[float, ...] = ()
    alone: int = 0
    named_by: tuple[str, ...] = ()
    off: tuple[Off, ...] = ()

    @property
    def control_mean(self) -> float:
        return self.effect - self.excess

    @property
    def chosen_by(self) -> str:
        """`alone`, `top of induction`, `named by induction and copying`."""
        return naming(self.method) if self.method else "alone"


@dataclass(frozen=True, slots=True)
class Fresh:
    """The heads behind a behaviour out together on fresh items: share of reach lost, and the control sets' 95th
    percentile."""

    heads: tuple[str, ...]
    share: float
    low: float
    high: float
    ceiling: float
    n_items: int
    n_controls: int
    holds: bool


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One family of claims. `singles` are all heads of the exact map, in the order of their effects."""

    probe: str
    title: str
    metric: str
    unit: str
    mode: str
    scope: str
    n_items: int
    family_size: int
    clean: float
    chance: float
    solved: float
    smallest: float
    refusal: str
    joints: tuple[Claim, ...] = ()
    singles: tuple[Claim, ...] = ()
    fresh: Fresh | None = None

    @property
    def reach(self) -> float:
        """Distance of the clean metric from chance, always positive: what there is to lose."""
        return abs(self.clean - self.chance)

    def share(self, effect: float) -> float:
        """An effect as a share of what there is to lose."""
        return effect / self.reach if self.reach else NAN

    @property
    def claims(self) -> tuple[Claim, ...]:
        return (*self.joints, *self.singles)

    @property
    def verified(self) -> tuple[Claim, ...]:
        return tuple(each for each in self.claims if each.ruling == "verified")

    @property
    def verified_heads(self) -> tuple[str, ...]:
        """Heads that are verified alone."""
        return tuple(each.heads[0] for each in self.singles if each.ruling == "verified")

    @property
    def best_set(self) -> Claim | None:
        """What to take as the behaviour's heads: the verified set of the largest effect, unless verified heads among
        it do as much; None where no set is verified.

        As much: an effect inside the interval of the larger set's. Of these the smallest, which may be one head.
        """
        sets = [each for each in self.joints if each.ruling == "verified"]
        if not sets:
            return None
        best = max(sets, key=lambda each: (self.rank(each), -len(each.heads)))
        low, high = best.low + best.control_mean, best.high + best.control_mean
        within = [each for each in self.verified if set(each.heads) < set(best.heads) and low <= each.effect <= high]
        return min([*within, best], key=lambda each: (len(each.heads), -self.rank(each)))

    @staticmethod
    def rank(claim: Claim) -> float:
        """What claims are ordered by: their effect, those without one last."""
        return claim.effect if claim.effect == claim.effect else float("-inf")


@dataclass(frozen=True, eq=False, slots=True)
class HeadMap:
    """A value for every head of one stack.

    Attributes:
        title, note: what the value is (the method, for scores); `note` names paper or unit.
        values: NaN where a site has no such head, or the head no value.
        rows: labels of the sites.
        descriptive: whether it is a list without a verdict.
        marked: verified heads, by place.
    """

    title: str
    note: str
    probe: str
    n_items: int
    rows: tuple[str, ...]
    values: Float[np.ndarray, "site head"]
    descriptive: bool
    marked: tuple[tuple[int, int], ...] = ()
    stack: str = "main"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two behaviours, each with its own heads out and the other's: shares of reach lost. `low` and `high` are the
    interval of own minus other, less the same of random heads."""

    heads_of: str
    other: str
    own: float
    cross: float
    low: float
    high: float
    double: bool


@dataclass(frozen=True, slots=True)
class Alike:
    """How much two behaviours share: of their columns, and verified heads against chance."""

    first: str
    second: str
    spearman: float
    shared: int
    by_chance: float
    p: float


@dataclass(frozen=True, slots=True)
class Masked:
    """The dissociation score of Li et al. 2023 with a share of the heads out, mean over behaviours, in percent."""

    share: float
    n_heads: int
    original: float
    scale_free: float
    random_original: float
    random_scale_free: float


@dataclass(frozen=True, slots=True)
class Kinds:
    """Heads that are verified for behaviours of text, of pictures, and of both; `by_chance` as many of both in two such
    sets drawn at random, and `p` the probability of so many. `double` of `pairs` pairs of one text and one picture
    behaviour dissociate doubly."""

    text: int
    pictures: int
    both: int
    by_chance: float
    p: float
    double: int
    pairs: int


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """Heads by behaviours. `shares`: effect of each head alone, as a share of each behaviour's reach.

    Where there are behaviours of both kinds, those of text come first, the last `n_pictures` are of pictures, and
    `kinds` tells them apart.
    """

    behaviours: tuple[str, ...]
    heads: tuple[str, ...]
    shares: Float[np.ndarray, "head behaviour"]
    verified: Bool[np.ndarray, "head behaviour"]
    selectivity: Float[np.ndarray, " head"]
    index: str
    pairs: tuple[Pair, ...] = ()
    alike: tuple[Alike, ...] = ()
    masked: tuple[Masked, ...] = ()
    n_pictures: int = 0
    kinds: Kinds | None = None

    @property
    def dissociated(self) -> tuple[tuple[str, str], ...]:
        """The pairs of behaviours that dissociate doubly; `pairs` has two rows of each."""
        return tuple((each.heads_of, each.other) for each in self.pairs[::2] if each.double)


@dataclass(frozen=True, eq=False, slots=True)
class Shot:
    """A picture of an example.

    Attributes:
        size: width and height that `boxes` are measured in; `pixels` may be fewer.
        boxes: left, top, right and bottom of its cells, which its tokens stand for; none where `unknown` says why.
    """

    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "row column 3"]
    boxes: Float[np.ndarray, "cell 4"]
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One head's attention, from the position that predicts the answer, to every token before it.

    `cells` has its weights on the cells of the example's pictures, one row for each picture.
    """

    head: str
    weights: tuple[float, ...]
    verified: bool
    cells: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One item. All tokens of a picture are one of `tokens`, whose weight is their sum."""

    probe: str
    item: str
    tokens: tuple[str, ...]
    answer: str
    patterns: tuple[Pattern, ...]
    pictures: tuple[Shot, ...] = ()


@dataclass(frozen=True, slots=True)
class Dose:
    """Effect against how much was taken out, with its interval; `control_high` is the control sets' upper bound there.

    `x` is the strength of the knock-out, 0 to 1, or the number of heads; `x_name` says which.
    """

    probe: str
    title: str
    x_name: str
    unit: str
    n_items: int
    x: tuple[float, ...]
    effect: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    control_high: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit of work that gave no result, and why."""

    what: str
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class Report:
    """All of it.

    Attributes:
        asked: what the command asked for, `origin` what the result hangs on (versions, seed, hashes), line by line.
        command: repeats the run.
        refused: cells that could not be run, and probes that were left out.
        complete: whether every planned cell is there.
    """

    model: str
    n_heads: int
    asked: tuple[Shown, ...]
    origin: tuple[Shown, ...]
    command: str
    behaviours: tuple[Behaviour, ...]
    maps: tuple[HeadMap, ...] = ()
    matrix: Matrix | None = None
    examples: tuple[Example, ...] = ()
    doses: tuple[Dose, ...] = ()
    refused: tuple[Failure, ...] = ()
    complete: bool = True
    files: tuple[Shown, ...] = ()

    @property
    def verified_heads(self) -> tuple[str, ...]:
        """Heads verified alone for some behaviour, each once."""
        return tuple(dict.fromkeys(head for each in self.behaviours for head in each.verified_heads))


def naming(methods: str) -> str:
    """Who a set is from, of ids with commas between them: `top of A`, `named by A and B`, `named by A, B and C`."""
    *before, last = methods.split(", ")
    return f"named by {', '.join(before)} and {last}" if before else f"top of {last}"
