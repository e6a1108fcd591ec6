r"""Gaze heads: asked about one place of a picture, the last token looks at that place.

"Gaze heads", 2026 (code: rohitgandikota/gaze-heads). A question names a region k of the picture; T is the last token of
the prompt, A the head's pattern, and the tokens of a region are those whose cell has its middle in the region's box:

    G[k, r]     = sum of A[T, j] over the picture's tokens j in region r, as it is, not normalised over regions
    mass          G[k, k]
    contrast      G[k, k] - mean of G[k, r] over r != k
    correlation   Pearson correlation of G[k, r] with 1 at r = k and 0 elsewhere

The abstract speaks of a correlation score; the released code takes `mass`, averages it over pictures and then over
regions, and its comment says why: a head that hardly looks at the picture can have a perfect diagonal. `mass` is the
default. `contrast` and `correlation` are variants that a head which looks at the whole picture does not score on.

Per item a head has the score of the question asked. `gaze_matrix` gives G itself, averaged over the items that ask for
each region, and the three scores of the matrix: the mean of its diagonal, that minus the mean of the rest, and the
correlation of its entries with the unit matrix.

A small model may look where the place is named, not where it writes from: with `rows="question"` T is every token of
the question, and the masses are means over them.

Exact: G and `mass`. Where every region is asked for as often as every other, the mean over items is that of the paper.
Ours: `contrast`, `correlation` and other rows; other regions are those of the item that share no token with the one
asked for; a head that gives every region the same has the correlation 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.last_row import last_row_masses
from headwise.find.method import Method, Scored
from headwise.find.multimodal_retrieval import question_masses
from headwise.find.patterns import require_choice
from headwise.find.search import BATCH, over_batches
from headwise.heads import Head, SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet

Score = Literal["mass", "contrast", "correlation"]
SCORES: tuple[Score, ...] = get_args(Score)

ROUNDING = 1e-6
"""Masses that differ by less than this part of the largest are the same: patterns are fp32."""

_REGION = "region:"


@dataclass(frozen=True, eq=False)
class GazeMatrix:
    """Where the last token looks, by the region that was asked for.

    Attributes:
        regions: names of the regions, in the order of both axes.
        masses: G of every head by site, mean over items, `[head, asked, region]`; NaN where no item asks.
        n_items: how many items ask for each region.
    """

    regions: tuple[str, ...]
    masses: Mapping[SiteId, Float[Tensor, "head asked region"]]
    n_items: tuple[int, ...]

    def of(self, head: Head | str) -> Float[Tensor, "asked region"]:
        """The matrix of one head. Raises InputError if it has none."""
        head = Head.parse(head)
        if head.site not in self.masses or head.index >= len(self.masses[head.site]):
            raise InputError(f"{head.label} has no gaze matrix; there are those of {', '.join(map(str, self.masses))}")
        return self.masses[head.site][head.index]

    def score(self, score: Score = "mass") -> dict[SiteId, Float[Tensor, " head"]]:
        """One of the scores of the whole matrix, over the regions that some item asks for.

        Raises InputError for a score that is none.
        """
        require_choice("score", score, SCORES)
        asked = torch.tensor(self.n_items) > 0
        unit = torch.eye(len(self.regions), dtype=torch.float64)[asked]
        return {
            site: _score(masses[:, asked].flatten(1), unit.flatten(), score) for site, masses in self.masses.items()
        }


def gaze(
    model: AttachedModel, items: ItemSet, *, score: Score = "mass", target: str = "target", rows: str = "last"
) -> Scored:
    """The gaze score of every head on every item.

    Args:
        score: `mass`, `contrast` or `correlation`, see the top of this file.
        target: name of the region that the item asks about.
        rows: `last`, the prompt's last token, or the name of a span, such as `question`, for the mean of its tokens.

    Raises:
        InputError: a score that is none.
        Refusal: an item has no such region or span, or no other region to compare with; the model does not continue a
            prompt.
    """
    require_choice("score", score, SCORES)

    def scored(batch: Batch) -> Scored:
        regions = [_regions(each, target) for each in batch.items]
        if score != "mass" and (
            bare := next((b for b, r in zip(batch.items, regions, strict=True) if len(r) < 2), None)
        ):
            raise Refusal(
                f"item {bare.id} has one region, and {score} compares with others; name more, or use score='mass'"
            )
        found = _masses(model, batch, regions, rows)
        return {
            site: torch.stack([_of_item(score, *each) for each in zip(masses, regions, strict=True)])
            for site, masses in found.items()
        }

    return over_batches(items, scored, answers=False)


def gaze_matrix(model: AttachedModel, items: ItemSet, *, target: str = "target", rows: str = "last") -> GazeMatrix:
    """G of every head, averaged over the items that ask for each region.

    Args:
        target: name of the region that the item asks about; one of the other regions holds the same tokens.
        rows: as of `gaze`.

    Raises:
        InputError: items whose regions have other names, or a target that is none of them.
        Refusal: an item has no such region; the model does not continue a prompt.
    """
    named = [_named(each, target) for each in items]
    names = tuple(named[0])
    other = next((each.id for each, own in zip(items, named, strict=True) if tuple(own) != names), None)
    if other is not None:
        raise InputError(
            f"item {other} has other regions than the first, and a matrix has one list; give items of one kind"
        )
    asked = torch.tensor([_asked(each, own, target) for each, own in zip(items, named, strict=True)])
    sums: dict[SiteId, Tensor] = {}
    counts = torch.bincount(asked, minlength=len(names))
    start = 0
    for batch in items.batches(BATCH, answers=False):
        stop = start + len(batch.items)
        for site, masses in _masses(model, batch, named[start:stop], rows).items():
            total = sums.setdefault(site, torch.zeros(masses.shape[1], len(names), len(names), dtype=torch.float64))
            total.index_add_(1, asked[start:stop], masses.transpose(0, 1))
        start = stop
    means = {site: total / counts[:, None] for site, total in sums.items()}
    return GazeMatrix(names, means, tuple(counts.tolist()))


def _score(
    masses: Float[Tensor, "head region"], asked: Float[Tensor, " region"], score: Score
) -> Float[Tensor, " head"]:
    """A score of masses of which some (`asked`, 1 and not 0) are where they should be."""
    here = asked == 1
    on, off = masses[:, here].mean(1), masses[:, ~here].mean(1)
    if score == "mass":
        return on
    if score == "contrast":
        return on - off
    centred, wanted = masses - masses.mean(1, keepdim=True), asked - asked.mean()
    spread = centred.norm(dim=1) * wanted.norm()
    flat = centred.abs().amax(1) <= ROUNDING * masses.abs().amax(1)
    return torch.where(flat, 0.0, (centred @ wanted) / spread.clamp(min=1e-300))


def _of_item(
    score: Score, masses: Float[Tensor, "head region"], regions: Mapping[str, list[int]]
) -> Float[Tensor, " head"]:
    """Of one item, whose target comes first."""
    asked = torch.zeros(len(regions), dtype=masses.dtype)
    asked[0] = 1.0
    return _score(masses[:, : len(regions)], asked, score)


def _masses(
    model: AttachedModel, batch: Batch, regions: list[dict[str, list[int]]], rows: str
) -> dict[SiteId, Float[Tensor, "item head region"]]:
    """Mass of the rows on each region; past the regions of an item no number holds a meaning."""
    most = max(map(len, regions))
    if rows != "last":
        names = [[f"{_REGION}{name}" for name in own] for own in regions]
        spans = {f"region {n}": [own[n] if n < len(own) else None for own in names] for n in range(most)}
        return question_masses(model, batch, spans, question=rows, counting="sum")
    listed = zip(batch.items, regions, strict=True)
    groups = {each.id: [*own.values(), *[[]] * (most - len(own))] for each, own in listed}
    prompts = replace(batch, answers=batch.answers[:, :0])  # the last column's logits are all that the model must give
    return last_row_masses(model, prompts, lambda each: groups[each.id])


def _regions(item: EncodedItem, target: str) -> dict[str, list[int]]:
    """The tokens of the target, and then of each region that shares none with it."""
    wanted = _target(item, target)
    others = {name: own for name, own in _named(item, target).items() if not set(own) & set(wanted)}
    return {target: wanted} | others


def _named(item: EncodedItem, target: str) -> dict[str, list[int]]:
    """The tokens of every region but the one that says which is asked for."""
    named = {name.removeprefix(_REGION): places for name, places in item.spans.items() if name.startswith(_REGION)}
    return {name: [at for place in places for at in place] for name, places in named.items() if name != target}


def _target(item: EncodedItem, target: str) -> list[int]:
    places = item.spans.get(_REGION + target)
    if places is None:
        raise Refusal(f"item {item.id} has no region {target!r}, the place that it asks about; name it with target=")
    return [at for place in places for at in place]


def _asked(item: EncodedItem, named: Mapping[str, list[int]], target: str) -> int:
    wanted = _target(item, target)
    found = next((number for number, own in enumerate(named.values()) if own == wanted), None)
    if found is None:
        raise InputError(
            f"the region {target!r} of item {item.id} is none of its others; give every place asked for a name"
        )
    return found


METHODS = (
    Method(
        id="gaze",
        title="gaze score: the last token looks at the region that the question asks about",
        page="methods/gaze.md",
        paper="Gaze heads",
        year=2026,
        tier="B",
        status="exact",
        needs=("rows", "span:region:{target}"),
        cost="one forward per item, one row per head",
        probe="panel",
        probes=("panel", "place"),
        score=gaze,
    ),
)
