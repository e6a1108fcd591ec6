"""How much of what heads attend to is said by a predicate on positions: the same token, the next one, the same row.

After Li et al. (2022), "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic
Segmentation". With x the items, |x| their tokens, and P(i, j) whether key j is what a predicate names for query i,

    GR(P, h) = mean_x 1/|x| sum_i sum_j A_ij [P(i, j)]           0 to 1

A head is of the pattern where this is far above that of the mean head. Every token counts in |x|, also one that has no
such key: a head that always looks at the next token has (T - 1) / T. In a picture tokens are patches, read row by row;
CLS and registers are left out.

    matching        the same token id elsewhere; the token itself left out
    previous        one position before
    next            one position behind
    same-row        in the same row of a picture, itself included
    same-column     in the same column, itself included
    same-cell       the token itself
    neighbour       one hop away in a picture, eight cells at most

A reconstruction: the score is written from memory of the paper, and what a picture's predicates are is ours. `matching`
has keys only where there are token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.find.method import LibraryMethod
from headwise.find.towers.tower import BATCH, Given, Grid, Inputs, Rows, over_rows, scores_of, sites_of
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of some items, as a predicate sees them.

    Attributes:
        grid: where they stand; text is a grid of one row.
        attended: False on padding.
        ids: token ids, where there are any.
    """

    grid: Grid
    attended: Bool[Tensor, "item token"]
    ids: Int[Tensor, "item token"] | None


Predicate = Callable[[Places], Bool[Tensor, "item query key"] | Bool[Tensor, "query key"]]


def predicate_relevance(
    model: AttachedModel,
    inputs: Given,
    predicate: str | Predicate,
    *,
    stack: str | None = None,
    grid: tuple[int, int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    batch: int = BATCH,
) -> HeadScores:
    """Global relevance of a predicate for every head of a stack: a share from 0 to 1.

    Args:
        inputs: pictures, as in `spatial_profile`, or `{"input_ids": ..., "attention_mask": ...}`.
        predicate: the name of one, or a function from `Places` to a mask of queries and keys.
        stack, grid, beside: as in `spatial_profile`.

    Raises:
        InputError: no such predicate; `matching` without token ids; and as `spatial_profile`.
        Refusal: as `spatial_profile`.
    """
    if isinstance(predicate, str):
        if predicate not in PREDICATES:
            raise InputError(f"no predicate {predicate!r}; choose one of: {', '.join(PREDICATES)}, or give a function")
        named, holds = predicate, PREDICATES[predicate]
    else:
        named, holds = getattr(predicate, "__name__", "predicate"), predicate
    ready = Inputs.of(model, inputs, beside)
    sites = sites_of(model, stack)

    def relevance(rows: Rows, on: Grid, items: slice) -> Mapping[str, Tensor]:
        places = places_of(rows.shape[-1], on, ready.rows(items), len(rows))
        chosen = holds(places).to(rows.device).expand(len(rows), len(on), len(on))
        queries = places.attended.to(rows.device)
        # The rows of padding may be no numbers.
        counted = on.within(rows).masked_fill(~(chosen & queries[:, :, None])[:, None], 0.0)
        return {"relevance": counted.sum((-1, -2)) / queries.sum(1)[:, None]}

    found = over_rows(model, ready, sites, relevance, shape=grid, batch=batch)
    about = model.provenance("predicate-relevance", {"predicate": named, "stack": sites[0].id.stack})
    return scores_of(ready.ids, found.of("relevance"), about)


def places_of(length: int, grid: Grid, given: Mapping[str, Tensor], items: int) -> Places:
    """The cells of a grid as places. Masks and ids of another length than the tower's are of something else."""
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    fits = grid.before == 0 and grid.rows == 1
    if mask is None or not fits or mask.shape != (items, length):
        mask = torch.ones(items, len(grid))
    if ids is not None and (not fits or ids.shape != (items, length)):
        ids = None
    return Places(grid, mask.bool(), ids)


def _matching(places: Places) -> Bool[Tensor, "item query key"]:
    if places.ids is None:
        raise InputError("the predicate matching compares token ids, and patches have none; use one of positions")
    itself = torch.eye(places.ids.shape[1], dtype=torch.bool, device=places.ids.device)
    return (places.ids[:, :, None] == places.ids[:, None, :]) & ~itself


def _behind(places: Places, steps: int) -> Bool[Tensor, "query key"]:
    number = torch.arange(len(places.grid))
    return number[None] - number[:, None] == steps


PREDICATES: Mapping[str, Predicate] = {
    "matching": _matching,
    "previous": lambda places: _behind(places, -1),
    "next": lambda places: _behind(places, 1),
    "same-row": lambda places: places.grid.offsets[..., 0] == 0,
    "same-column": lambda places: places.grid.offsets[..., 1] == 0,
    "same-cell": lambda places: places.grid.hops == 0,
    "neighbour": lambda places: places.grid.hops == 1,
}

METHODS = (
    LibraryMethod(
        id="predicate-relevance",
        title="Share of attention on the keys that a predicate on positions names",
        page="towers.md#predicate-relevance",
        paper="Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
        year=2022,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward per item",
        call="headwise.find.towers.predicate_relevance(model, inputs, predicate)",
    ),
)
