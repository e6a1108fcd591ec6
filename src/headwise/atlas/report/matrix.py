"""Heads by behaviours, as the report shows them; behaviours of text and of pictures apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from scipy import stats

from headwise.atlas.report.view import Alike, Kinds, Masked, Matrix, Pair
from headwise.verify.evidence import Evidence
from headwise.verify.specialisation import Specialisation, specialisation
from headwise.verify.verdict import FamilyVerdict

if TYPE_CHECKING:
    from headwise.atlas.opened import Atlas


def matrix_of(atlas: Atlas, families: Sequence[tuple[Evidence, FamilyVerdict]]) -> Matrix | None:
    """The heads that are verified for something; None where there is none, or only one behaviour."""
    if not families:
        return None
    found = specialisation(families, atlas.crossed())
    kept = np.asarray(found.verified.any(axis=1))
    if not kept.any() or len(found.behaviours) < 2:
        return None
    pictured = np.array([atlas.manifest.probe(name).pictures for name in found.behaviours])
    both = bool(pictured.any() and not pictured.all())
    order = np.argsort(pictured, kind="stable") if both else np.arange(len(pictured))
    pairs = [
        Pair(of.heads_of, other, of.own, of.other, of.excess.low, of.excess.high, each.double)
        for each in sorted(found.pairs, key=lambda each: not each.double)
        for of, other in ((each.of_first, each.second), (each.of_second, each.first))
    ]
    alike = [
        Alike(each.first, each.second, each.spearman, each.shared, each.shared_by_chance, each.p)
        for each in found.similarity
        if each.n_first and each.n_second
    ]
    return Matrix(
        behaviours=tuple(found.behaviours[place] for place in order),
        heads=tuple(label for label, keep in zip(found.heads.labels, kept, strict=True) if keep),
        shares=found.effects[kept][:, order],
        verified=found.verified[kept][:, order],
        selectivity=found.selectivity[kept],
        index="tau (Yanai et al. 2005): 1 for a head that serves one behaviour, 0 for one that serves all alike",
        pairs=tuple(pairs),
        alike=tuple(alike),
        masked=_masked(atlas),
        n_pictures=int(pictured.sum()) if both else 0,
        kinds=_kinds(found, pictured) if both else None,
    )


def _kinds(found: Specialisation, pictured: Bool[np.ndarray, " behaviour"]) -> Kinds:
    text, pictures = found.verified[:, ~pictured].any(axis=1), found.verified[:, pictured].any(axis=1)
    n, n_text, n_pictures, both = len(found.heads), int(text.sum()), int(pictures.sum()), int((text & pictures).sum())
    kind = dict(zip(found.behaviours, pictured, strict=True))
    across = [each.double for each in found.pairs if kind[each.first] != kind[each.second]]
    return Kinds(
        text=n_text,
        pictures=n_pictures,
        both=both,
        by_chance=n_text * n_pictures / n,
        p=float(stats.hypergeom.sf(both - 1, n, n_text, n_pictures)),
        double=sum(across),
        pairs=len(across),
    )


def _masked(atlas: Atlas) -> tuple[Masked, ...]:
    return tuple(
        Masked(
            each.alpha,
            each.n_heads,
            *(
                float(np.nanmean(scores))
                for scores in (each.original, each.scale_free, each.random_original, each.random_scale_free)
            ),
        )
        for each in atlas.functional_dissociation()
    )
