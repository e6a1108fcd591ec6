"""Induction heads: attention to what came after the previous occurrence of the token; and the lag curve.

Ji-An et al., 2024, "Linking In-context Learning in Transformers to Human Episodic Memory" (code: corxyz/icl-cmr). With
prev(t) the latest column before t that holds the token of t:

    matching score    mean_t A_h[t, prev(t) + 1]
    lag curve         a_h(l) = mean_t A_h[t, prev(t) + l],  l = -5 ... 5

Exact: both means, over the lags that the paper shows. Reconstruction: the text (the paper repeats a list of random
tokens; the probe `repeat`, random words) and what is done where the list is not one of distinct tokens said twice:

- where an item has the span `repeated` (probe `repeat`: the second saying of the list, from its second word on),
  queries are its tokens; in other items every token that comes again;
- keys lie before the query: where prev(t) + l is the query itself, or behind it, there is nothing to be matched;
- special tokens are neither query nor key, so a sink on the first token is on no lag.

An induction head has its peak at lag 1; heads that also follow neighbours (lags 2, -1) fall off on both sides, which is
what the paper compares with human recall. The fit of that model to the curve is not part of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.find.method import Method, Scored
from headwise.find.patterns import Tokens, mean_pair_masses, require_whole
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet

LAGS = tuple(range(-5, 6))


@dataclass(frozen=True, slots=True, eq=False)
class LagCurve:
    """Attention around the previous occurrence of a token.

    Attributes:
        lags: in tokens behind (positive) or before the previous occurrence.
        mass: `[item, head, lag]` by site, mean mass over queries; NaN where an item has no such pair of tokens.
    """

    lags: tuple[int, ...]
    mass: Mapping[SiteId, Float[Tensor, "item head lag"]]


def matching_score(model: AttachedModel, items: ItemSet, lag: int = 1) -> Scored:
    """Mean mass `lag` tokens behind the previous occurrence, per item and head; NaN where no token comes again.

    Raises `InputError` for a lag that is no whole number.
    """
    return {site: mass[..., 0] for site, mass in lag_curve(model, items, (lag,)).mass.items()}


def lag_curve(model: AttachedModel, items: ItemSet, lags: Sequence[int] = LAGS) -> LagCurve:
    """The mean mass at every lag, from one forward per batch.

    Raises `InputError` for no lags, or one that is no whole number.
    """
    if not lags:
        raise InputError("lag_curve needs at least one lag; leave lags out for -5 to 5")
    for lag in lags:
        require_whole("lag", lag)

    def curve(batch: Batch) -> dict[SiteId, Tensor]:
        tokens = Tokens.of(model, batch)
        return mean_pair_masses(model, tokens, *(_keys_at(tokens, lag) for lag in lags))

    return LagCurve(tuple(lags), over_batches(items, curve, answers=False))


def _keys_at(tokens: Tokens, lag: int) -> Int[Tensor, "item column"]:
    previous = tokens.previous()
    at = previous + lag
    asked = (previous >= 0) & tokens.within("repeated") & (at >= 0) & (at < tokens.columns)
    return at.masked_fill(~(asked & tokens.words.gather(1, at.where(asked, 0))), -1)


METHODS = (
    Method(
        id="induction",
        title="attention to what followed the previous occurrence of the token",
        page="methods/induction.md",
        paper="Ji-An et al., Linking In-context Learning in Transformers to Human Episodic Memory",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="repeat",
        score=matching_score,
    ),
)
