"""Stored cells of several behaviours together as what dissociations are told from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from headwise.atlas.cell import Cell, Result
from headwise.atlas.store import Store
from headwise.heads import HeadSet
from headwise.sweep import Controls
from headwise.verify.crossing import CrossedSet
from headwise.verify.functional_dissociation import FunctionalDissociation, scored


def crossed_of(store: Store, cells: Sequence[Cell]) -> list[CrossedSet]:
    """The heads behind each behaviour out on the fresh items of the others, as far as these cells are stored."""
    chosen: dict[str, Result] = {}
    for cell in cells:
        if cell.kind == "fresh" and store.has(cell):
            stored = store.read(cell)
            if not stored.refused and stored.about["heads"]:
                chosen[cell.probe] = stored
    found = (_crossed(store, probe, chosen) for probe in chosen)
    return [each for each in found if each.values]


def masked_of(store: Store, cells: Sequence[Cell]) -> tuple[FunctionalDissociation, ...]:
    """D at every share of heads, of the behaviours whose `masked` cell is stored; empty for fewer than two."""
    stored = {cell.probe: store.read(cell) for cell in cells if cell.kind == "masked" and store.has(cell)}
    rows = {probe: each for probe, each in stored.items() if not each.refused and each.arrays["base"].any()}
    if len(rows) < 2:
        return ()
    base = np.array([each.arrays["base"].mean() for each in rows.values()])
    found = []
    for place, alpha in enumerate(next(iter(rows.values())).about["alphas"]):
        performance = np.full((len(rows), len(rows)), np.nan)
        for row, each in enumerate(rows.values()):
            for column, name in enumerate(rows):
                if f"on/{name}" in each.arrays:
                    performance[row, column] = each.arrays[f"on/{name}"][place].mean()
        drawn = np.stack([each.arrays["random"][place].mean(axis=1) for each in rows.values()], axis=1)
        n = len(next(iter(rows.values())).about["heads"][place])
        found.append(scored(tuple(rows), float(alpha), n, base, performance, drawn))
    return tuple(found)


def chosen_of(fresh: Result) -> tuple[HeadSet, Controls]:
    """The heads of a `fresh` cell, and their control sets."""
    sets = tuple(HeadSet.parse(each) for each in fresh.about["controls"])
    return HeadSet.parse(fresh.about["heads"]), Controls(sets, fresh.about["match"], fresh.about["exhausted"])


def _crossed(store: Store, heads_of: str, chosen: Mapping[str, Result]) -> CrossedSet:
    heads, controls = chosen_of(chosen[heads_of])
    cells = {probe: Cell(kind="crossed", heads_of=heads_of, probe=probe) for probe in chosen}
    stored = {probe: store.read(cell) for probe, cell in cells.items() if store.has(cell)}
    tried = {probe: each.arrays for probe, each in stored.items() if not each.refused}
    return CrossedSet(
        heads_of,
        heads,
        controls,
        {probe: tuple(chosen[probe].about["item_ids"]) for probe in tried},
        {probe: each["clean"] for probe, each in tried.items()},
        {probe: each["values"] for probe, each in tried.items()},
        {probe: each["control_values"] for probe, each in tried.items()},
    )
