r"""Gaze redirection: heads that look where the question points are made to look elsewhere in the picture.

Gaze heads (2026; code: rohitgandikota/gaze-heads). With I the tokens of all pictures, R those of the target region, and
b a bias, on the scores of chosen heads before softmax:

    boost-suppress       s_j <- s_j + b for j in R,   s_j <- s_j - b for j in I outside R
    suppress-image                                    s_j <- s_j - b for j in I outside R
    suppress-all                                      s_j <- s_j - b for j in the prompt outside R
    max-suppress-all                                  s_j <- s_j - b for all j outside R, what was written too

In all rows, those of the prompt included, or in those of decoding alone. The target may change on the way: with the
schedule (t_1, R_1), (t_2, R_2) ... the row that writes token n of the answer, counted from 0, has the target of the
latest t <= n - 1; the prompt's rows, the last of which writes token 0, have the first target.

With the paper's b = 10000 the softmax is saturated: the target has all of the mass in every row that sees it under
`boost-suppress`. Rows that see other tokens of pictures and not the target (those of earlier picture tokens) lose all
of these to the text, in the first two modes; the answer is seldom written from them.

Exact: the four modes, where they act, b, the counting of steps (the released code). Ours: several pictures, in which I
is the tokens of all of them, and a batch, in which every row has its own R. The released hook does nothing where a
kernel is given no mask; here the scores are edited themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.model.positions import Frame
from headwise.model.scopes import parse_scope
from headwise.probes.item import Item
from headwise.scores import HeadScores
from headwise.use.intervention import Intervention, finite, named_heads

Mode = Literal["boost-suppress", "suppress-image", "suppress-all", "max-suppress-all"]
MODES: tuple[Mode, ...] = get_args(Mode)

BIAS = 10_000.0
BOTTOM = 0.05
DRAWS = 10_000


@dataclass(frozen=True, eq=False, repr=False)
class GazeRedirection(Intervention):
    """Make heads look at a region of the picture: `with GazeRedirection(heads, "region:panel-2")(model, spans=...):`.

    Attributes:
        heads: the heads, of the text model.
        target: name of the span that they look at; its columns, row by row, are given with the block, or are those of
            the items that are measured.
        then: other targets, each with the decoding step from which on it holds.
        bias: b, added and taken away before softmax; 0 changes nothing.
        mode: `boost-suppress`, `suppress-image`, `suppress-all` or `max-suppress-all`, see the top of this file.
        scope: rows that are changed, in the words of `hw.edit`; `all` and `decode` are the paper's.
    """

    id: ClassVar[str] = "gaze-redirection"
    heads: HeadSet
    target: str = "region:target"
    then: tuple[tuple[int, str], ...] = ()
    bias: float = BIAS
    mode: Mode = "boost-suppress"
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "bias", finite(self.bias, f"{self.id}: bias", 0.0))
        object.__setattr__(self, "then", _schedule(self.then, self.id))
        for name in (self.target, *(name for _, name in self.then)):
            if not isinstance(name, str) or not name:
                raise InputError(
                    f"{self.id}: {name!r} names no region; give the name of a span, such as 'region:panel-2'"
                )
        if self.mode not in MODES:
            raise InputError(f"{self.id}: mode={self.mode!r} is none; use {', '.join(MODES)}")
        parse_scope(self.scope)

    @property
    def named_spans(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.target, *(name for _, name in self.then), *super().named_spans)))

    def at(self, step: int) -> str:
        """The target of a decoding step, counted from 0."""
        return next((name for first, name in reversed(self.then) if first <= step), self.target)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        if "image" not in model.table.met_spans:
            raise Refusal(f"{self.id}: {model.name} reads no pictures in its prompts; use a model that sees")
        heads = model.heads(self.heads)
        main = model.table.stacks[0]
        if elsewhere := [each for each in heads.labels if HeadSet.parse(each).sites[0].stack != main]:
            raise InputError(f"{self.id}: {elsewhere[0]} does not read text and pictures; name heads of the text model")
        if self.bias == 0:
            return ()
        return (edit.bias(heads, self._added, keys=self._keys, scope=self.scope),)

    @property
    def _keys(self) -> Any:
        """Where the bias is not 0, in words, so that a span that was not given is told before anything runs."""
        if self.mode == "max-suppress-all":
            return None
        return edit.inside(
            "prompt" if self.mode == "suppress-all" else "span:image", *map("span:{}".format, self.named_spans)
        )

    def _added(self, current: Float[Tensor, "batch head query key"], here: Here) -> Tensor:
        """What is added to the scores, `[batch, 1, query, key]`."""
        window = here.window
        if window is None:
            raise Refusal(f"{self.id}: columns cannot be told at {here.label}, so no region can be named there")
        queries = torch.arange(here.span) if here.queries is None else here.queries
        columns = window.start + queries.to(current.device)
        steps = (columns - window.frame.prompt).clamp(min=0).expand(here.batch, -1)
        added = torch.zeros(here.batch, here.span, current.shape[-1], dtype=current.dtype, device=current.device)
        starts = [(0, self.target), *self.then]
        for number, (first, name) in enumerate(starts):
            held = steps >= first
            if number + 1 < len(starts):
                held = held & (steps < starts[number + 1][0])
            if bool(held.any()):
                signs = window.keys(self._signs(window.key_frame, name))
                assert signs is not None
                added += held[:, :, None] * signs[:, None].to(added) * self.bias
        return added[:, None]

    def _signs(self, frame: Frame, name: str) -> Tensor:
        """1 where the bias is added, -1 where it is taken away, `[batch, column]`."""
        target = self._placed(frame, name)
        if self.mode in ("suppress-all", "max-suppress-all"):
            return -(~target).int()  # of the prompt, or of everything: `_keys`
        away = self._placed(frame, "image") & ~target
        return (target & (self.mode == "boost-suppress")).int() - away.int()

    def _placed(self, frame: Frame, name: str) -> Bool[Tensor, "batch column"]:
        marked = frame.span(name)
        empty = ~marked.any(dim=1)
        if frame.total >= frame.prompt and bool(empty.any()):
            row = int(empty.nonzero()[0, 0])
            raise InputError(f"{self.id}: row {row} of the batch has no token of {name!r}; leave that row out")
        return marked


def from_the_bottom(scores: HeadScores, n: int, *, share: float = BOTTOM, seed: int = 0) -> HeadSet:
    """`n` random heads with a score up to the `share` quantile of all: the paper's control. A looser cut lets heads in
    that look at the picture too.

    Raises:
        InputError: there are fewer such heads.
    """
    low = scores.quantile(share)
    candidates = [each.head for each in scores.ranked() if each.score <= low]
    if not 1 <= n <= len(candidates):
        raise InputError(
            f"the lowest {share:g} of the heads are {len(candidates)}, and n={n}; give another n or a larger share"
        )
    drawn = np.random.default_rng(seed).permutation(len(candidates))[:n]
    return HeadSet(tuple(sorted(candidates[int(each)] for each in drawn)))


def crossed(questions: Sequence[Item]) -> tuple[Item, ...]:
    """For every two questions about one picture an item that asks the one and counts the other's answer as right.

    The region `target` is that of the other, so that `hw.measure(model, items, under=GazeRedirection(heads))` says how
    often what is described is what the heads were turned to, and without the intervention how often that happens by
    itself. Pairs with equal answers say nothing and are left out.

    Args:
        questions: items with the same pictures, each with a region `target`.

    Raises:
        InputError: pictures that differ, no region `target`, or answers that are all equal.
    """
    if len({each.pictures for each in questions}) != 1 or not questions[0].pictures:
        raise InputError("crossed takes questions about the same pictures, two or more; some have others, or none")
    if any("target" not in each.regions for each in questions):
        raise InputError("crossed takes questions with a region 'target' each, the place that they ask about")
    items = tuple(
        replace(
            asked,
            id=f"{asked.id}>{other.id}",
            answer=other.answer,
            also=other.also,
            foils=(asked.answer,),
            regions={**asked.regions, "target": other.regions["target"]},
            twin=None,
        )
        for asked, other in permutations(questions, 2)
        if asked.answer != other.answer
    )
    if not items:
        raise InputError("all of these questions have one answer, so it does not tell what was described")
    return items


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something happened, with an interval of 95 percent over other items."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.3f} ({self.low:.3f} to {self.high:.3f})"


def success_rate(hits: Sequence[float] | Tensor, *, draws: int = DRAWS, seed: int = 0) -> Rate:
    """Share of hits (1 or 0 an item) with a bootstrap interval, the 2.5 and 97.5 percentiles of resampled items.

    Raises:
        InputError: no items.
    """
    values = np.asarray(hits, dtype=np.float64)
    if not values.size:
        raise InputError("a rate of no items is none; give at least one")
    drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return Rate(float(values.mean()), float(low), float(high))


def followed(scheduled: Sequence[int], described: Sequence[int]) -> float:
    """Spearman correlation of the regions that a schedule had, by their numbers, and those that were described; NaN
    where either is the same throughout.

    Raises:
        InputError: not as many of the one as of the other, or fewer than two.
    """
    if len(scheduled) != len(described) or len(scheduled) < 2:
        raise InputError(
            f"{len(scheduled)} regions were scheduled and {len(described)} described; give two or more of each"
        )
    if len(set(scheduled)) == 1 or len(set(described)) == 1:
        return float("nan")
    return float(stats.spearmanr(scheduled, described).statistic)


def _schedule(then: Any, what: str) -> tuple[tuple[int, str], ...]:
    try:
        listed = tuple((step, name) for step, name in then)
    except (TypeError, ValueError):
        raise InputError(f"{what}: then={then!r} is no schedule; give ((50, 'region:panel-3'), ...)") from None
    steps = [step for step, _ in listed]
    if any(isinstance(step, bool) or not isinstance(step, int) or step < 1 for step in steps) or steps != sorted(
        set(steps)
    ):
        raise InputError(f"{what}: then={then!r} must have whole steps from 1 on, each later than the one before it")
    return listed


INTERVENTIONS = (
    InterventionEntry(
        id=GazeRedirection.id,
        title="Make heads look at another place of the picture, also in the middle of an answer",
        page="use/looking.md#gaze-redirection",
        paper="Gaze heads",
        year=2026,
        tier="B",
        status="exact",
        cost="1 forward; rows of these heads recomputed",
        made=GazeRedirection,
    ),
)

__all__ = ["INTERVENTIONS", "GazeRedirection", "Rate", "crossed", "followed", "from_the_bottom", "success_rate"]
