"""How far the heads of a tower look: attention strength by distance on the grid of patches, and its mean distance.

After Li et al. (2023), "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt". With queries i and
keys j the patches, and hop(i, j) the larger of their distances in rows and in columns,

    P_h(d) = mean_i sum_{j: hop(i, j) = d} A_ij                  0 to 1; all d together: the mass on patches
    p_h(d) = mean_i mean_{j: hop(i, j) = d} A_ij                 over the queries that have such keys

P is the strength, p the strength per cell: rings grow with d, and are cut off at the borders of the picture. What goes
to tokens that are no patch (CLS, registers) is told apart. The score is the mean attention distance (Dosovitskiy et
al., 2021), in patches between centres; of sound and of text, on a grid of one row, in positions:

    s_h = mean_i sum_j A_ij |x_i - x_j| / sum_j A_ij

A reconstruction: the paper says what is shown and not by which formula; hops, rings and their sizes are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.find.method import LibraryMethod
from headwise.find.towers.tower import BATCH, Given, Grid, Inputs, Rows, over_rows, scores_of, sites_of, stacked
from headwise.heads import Head, SiteId
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores


@dataclass(frozen=True, eq=False)
class SpatialProfile:
    """Attention strength by distance, for every item, site and head (NaN for heads that a site does not have).

    Attributes:
        strength: P of the file's docstring, by hop: `[item, site, head, distance]`.
        per_cell: p, the same by size of ring.
        special: mass on each token that is no cell, CLS first, then registers: `[item, site, head, token]`.
        distance: the mean attention distance as scores, in cells; high means far.
        sites: names of the second axis.
        grid: the grid of the tower's tokens.
    """

    strength: Float[np.ndarray, "item site head distance"]
    per_cell: Float[np.ndarray, "item site head distance"]
    special: Float[np.ndarray, "item site head token"]
    distance: HeadScores
    sites: tuple[SiteId, ...]
    grid: Grid

    def of(self, head: Head | str) -> Float[np.ndarray, " distance"]:
        """Mean strength of one head by hop. Raises `InputError` for a head that is not here."""
        found = Head.parse(head)
        if found.site in self.sites and found.index < self.strength.shape[2]:
            profiles = self.strength[:, self.sites.index(found.site), found.index]
            if np.isfinite(profiles).all():
                mean: Float[np.ndarray, " distance"] = profiles.mean(axis=0)
                return mean
        raise InputError(f"{found} has no profile here; the profiles are of {', '.join(map(str, self.sites))}")

    def within(self, reach: int) -> HeadScores:
        """Mass on patches up to `reach` hops away, as scores: high means near. Raises `InputError` below 0."""
        if reach < 0:
            raise InputError(f"reach={reach!r} is no distance; give 0 or more hops")
        near = self.strength[..., : reach + 1].sum(axis=-1)
        stack = self.sites[0].stack
        made = self.distance.provenance
        about = replace(made, settings={**made.settings, "measure": "within", "reach": reach})
        return HeadScores({stack: near}, {stack: self.sites}, self.distance.item_ids, about)


def spatial_profile(
    model: AttachedModel,
    pictures: Given,
    *,
    stack: str | None = None,
    grid: tuple[int, int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    batch: int = BATCH,
) -> SpatialProfile:
    """Attention strength by distance of every head of a tower, in one forward per batch.

    Args:
        pictures: `pixel_values` `[item, 3, row, column]` (or the sound of a speech model), or a mapping of all inputs.
        stack: the tower; `vision`, `audio`, `encoder` or the main stack if left out.
        grid: rows and columns of the patches, where they cannot be told from the pictures.
        beside: inputs that all batches share, such as the texts of CLIP.

    Raises:
        InputError: no such stack; inputs without items; a grid that the tokens do not fill.
        Refusal: a tower that cuts its pictures into windows or packs them, or patterns out of reach.
    """
    inputs = Inputs.of(model, pictures, beside)
    sites = sites_of(model, stack)
    found = over_rows(model, inputs, sites, _profile, shape=grid, batch=batch)
    about = model.provenance("spatial-profile", {"stack": sites[0].id.stack, "measure": "distance"})
    return SpatialProfile(
        strength=stacked(found.of("strength")).numpy(),
        per_cell=stacked(found.of("per_cell")).numpy(),
        special=stacked(found.of("special")).numpy(),
        distance=scores_of(inputs.ids, found.of("distance"), about),
        sites=tuple(sorted(found.values)),
        grid=found.grid,
    )


def by_hop(
    pattern: Float[Tensor, "*head query key"], hops: Int[Tensor, "query key"]
) -> Float[Tensor, "*head query distance"]:
    """Sum of every row's entries over the keys of each hop, as many hops as there are."""
    rings = pattern.new_zeros(*pattern.shape[:-1], int(hops.max()) + 1)
    return rings.scatter_add(-1, hops.to(pattern.device).expand(pattern.shape), pattern)


def _profile(rows: Rows, grid: Grid, items: slice) -> Mapping[str, Tensor]:
    inside, hops = grid.within(rows), grid.hops
    rings = by_hop(inside, hops)
    sizes = by_hop(torch.ones(hops.shape), hops).to(rings)
    per_cell = torch.where(sizes > 0, rings / sizes.clamp(min=1), torch.nan)
    distances = grid.distances.to(inside)
    return {
        "strength": rings.mean(dim=-2),
        "per_cell": per_cell.nanmean(dim=-2),
        "special": rows[..., grid.before :, : grid.before].mean(dim=-2),
        # A query with nothing on patches has no distance.
        "distance": ((inside * distances).sum(-1) / inside.sum(-1)).nanmean(dim=-1),
    }


METHODS = (
    LibraryMethod(
        id="spatial-profile",
        title="Attention strength by distance between patches, and mean attention distance",
        page="towers.md#spatial-profile",
        paper="How Does Attention Work in Vision Transformers?",
        year=2023,
        tier="B",
        status="reconstruction",
        needs=("rows", "pictures"),
        cost="1 forward per picture",
        call="headwise.find.towers.spatial_profile(model, pixel_values)",
    ),
)
