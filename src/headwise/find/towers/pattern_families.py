"""Families of pattern: heads of a tower that look the same way, wherever the query stands.

After Li et al. (2023), "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt". Each row of a
pattern is shifted so that its query is in the middle, and the rows are averaged over queries i and items: with
n_r x n_c patches,

    M_h(o) = mean_i A_{i, i + o}         o from -(n_r - 1), -(n_c - 1) to n_r - 1, n_c - 1; 0 outside the picture

an image of 2 n_r - 1 rows and 2 n_c - 1 columns that adds up to the mass on patches. Heads are compared by the distance
of sqrt(M / sum M) (Hellinger), so that one sharp head does not outweigh all the others, and joined bottom-up by Ward's
criterion into as many families as are asked for. Coordinates in a plane are their first two principal components.

A reconstruction: the paper puts the images in a plane by an autoencoder, whose form was not to be had. Principal
components need no training and give the same plane every time; the distance and the clustering are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster import hierarchy
from torch import Tensor

from headwise.errors import InputError
from headwise.find.method import LibraryMethod
from headwise.find.towers.tower import BATCH, Given, Grid, Inputs, Rows, over_rows, sites_of
from headwise.heads import Head, HeadSet
from headwise.model.attached import AttachedModel

FAMILIES = 6


@dataclass(frozen=True, eq=False)
class PatternFamilies:
    """Heads of a tower by the way they look.

    Attributes:
        heads: the heads, in the order of the other attributes' first axis.
        maps: M of the file's docstring, the query in the middle: `[head, 2 rows - 1, 2 columns - 1]`.
        family: number of each head's family, counted from 0, the largest first.
        coordinates: place of each head in the plane.
        explained: share of the heads' differences that each of the two axes shows.
    """

    heads: HeadSet
    maps: Float[np.ndarray, "head row column"]
    family: Int[np.ndarray, " head"]
    coordinates: Float[np.ndarray, "head 2"]
    explained: tuple[float, float]

    @property
    def families(self) -> tuple[HeadSet, ...]:
        """The heads of each family."""
        members = self.heads.heads
        return tuple(
            HeadSet(tuple(head for head, family in zip(members, self.family, strict=True) if family == number))
            for number in range(int(self.family.max()) + 1)
        )

    def map_of(self, head: Head | str) -> Float[np.ndarray, "row column"]:
        """The map of one head. Raises `InputError` for a head that is not here."""
        found = Head.parse(head)
        if found not in self.heads:
            raise InputError(f"{found} has no map here; the maps are of {self.heads}")
        one: Float[np.ndarray, "row column"] = self.maps[self.heads.heads.index(found)]
        return one

    def typical(self, family: int) -> Float[np.ndarray, "row column"]:
        """Mean map of a family."""
        mean: Float[np.ndarray, "row column"] = self.maps[self.family == family].mean(axis=0)
        return mean


def pattern_families(
    model: AttachedModel,
    pictures: Given,
    *,
    families: int = FAMILIES,
    stack: str | None = None,
    grid: tuple[int, int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    batch: int = BATCH,
) -> PatternFamilies:
    """Sort the heads of a tower into families by their mean pattern around the query.

    Args:
        families: how many, 1 to the number of heads.
        pictures, stack, grid, beside: as in `spatial_profile`.

    Raises:
        InputError: a number of families that there cannot be; and as `spatial_profile`.
        Refusal: as `spatial_profile`.
    """
    inputs = Inputs.of(model, pictures, beside)
    sites = sites_of(model, stack)
    found = over_rows(model, inputs, sites, _maps, shape=grid, batch=batch).of("map")
    heads = HeadSet(tuple(Head(site, index) for site in sorted(found) for index in range(found[site].shape[1])))
    maps = torch.cat([found[site].double().mean(0) for site in sorted(found)]).numpy()
    if not 1 <= families <= len(maps):
        raise InputError(f"families={families!r} cannot be made of {len(maps)} heads; use 1 to {len(maps)}")
    family, coordinates, explained = sorted_into(maps, families)
    return PatternFamilies(heads, maps, family, coordinates, explained)


def centred(pattern: Float[Tensor, "*head query key"], grid: Grid) -> Float[Tensor, "*head row column"]:
    """The mean of all rows of a pattern between patches, each shifted so that its query is in the middle."""
    height, width = 2 * grid.rows - 1, 2 * grid.columns - 1
    row, column = (grid.offsets + torch.tensor([grid.rows - 1, grid.columns - 1])).unbind(-1)
    place = (row * width + column).flatten().to(pattern.device)
    blank = pattern.new_zeros(*pattern.shape[:-2], height * width)
    mean = blank.index_add(-1, place, pattern.flatten(-2)) / len(grid)
    return mean.reshape(*pattern.shape[:-2], height, width)


def sorted_into(
    maps: Float[np.ndarray, "head row column"], families: int
) -> tuple[Int[np.ndarray, " head"], Float[np.ndarray, "head 2"], tuple[float, float]]:
    """Family of each map, its place in the plane, and what share of the differences each axis shows.

    A head with nothing on patches has a map of zeros, and is compared as such.
    """
    flat = maps.reshape(len(maps), -1)
    mass = flat.sum(axis=1, keepdims=True)
    points = np.sqrt(np.divide(flat, mass, out=np.zeros_like(flat), where=mass > 0))
    if len(points) == 1:
        return np.zeros(1, dtype=np.int64), np.zeros((1, 2)), (0.0, 0.0)
    cut = hierarchy.cut_tree(hierarchy.linkage(points, method="ward"), n_clusters=families)[:, 0]
    # The largest family is number 0; of equal ones that of the earlier head.
    size = Counter(cut.tolist())
    order = sorted(size, key=lambda each: (-size[each], cut.tolist().index(each)))
    left, strength, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    # The sign of a component is nobody's: the head that is furthest out is on the positive side.
    axes = left[:, :2] * strength[:2]
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) < 0, -1, 1)
    whole = float((strength**2).sum())
    shares = [float(each**2) / whole if whole > 0 else 0.0 for each in strength[:2]]
    return np.array([order.index(each) for each in cut]), axes, (shares[0], shares[1])


def _maps(rows: Rows, grid: Grid, items: slice) -> Mapping[str, Tensor]:
    return {"map": centred(grid.within(rows), grid)}


METHODS = (
    LibraryMethod(
        id="pattern-families",
        title="Families of heads that look the same way around the query",
        page="towers.md#pattern-families",
        paper="How Does Attention Work in Vision Transformers?",
        year=2023,
        tier="B",
        status="reconstruction",
        needs=("rows", "pictures"),
        cost="1 forward per picture",
        call="headwise.find.towers.pattern_families(model, pixel_values)",
    ),
)
