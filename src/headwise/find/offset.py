"""Heads that look a fixed number of tokens back (or ahead).

Voita et al., 2019, "Analyzing Multi-Head Self-Attention", call a head positional that attends to one relative position.
Their test counts how often the largest weight lies there (at least 90 percent of the time, for -1 and +1). Here, the
mass instead of the count, so that soft heads are ranked too, and any offset k:

    score_h = mean_t A_h[t, t-k]     over the t for which t-k is a token

Reconstruction: the mass in place of the count. The default offset is 2: 1 is the method `previous-token`, and 0 is the
token itself. Negative offsets look ahead; only encoders can.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from headwise.find.method import Method, Scored
from headwise.find.patterns import Tokens, mean_pair_masses, require_whole
from headwise.find.search import over_batches
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet


def mass_at_offset(model: AttachedModel, items: ItemSet, offset: int = 2) -> Scored:
    """Mean mass on the token `offset` before, per item and head; NaN for an item with no such pair of tokens.

    Raises `InputError` for an offset that is no whole number.
    """
    require_whole("offset", offset)

    def means(batch: Batch) -> Scored:
        tokens = Tokens.of(model, batch)
        found = mean_pair_masses(model, tokens, _keys_at(tokens, offset))
        return {site: mass[..., 0] for site, mass in found.items()}

    return over_batches(items, means, answers=False)


def _keys_at(tokens: Tokens, offset: int) -> Int[Tensor, "item column"]:
    """Both ends are tokens of the text: in front of the first one there is padding, or nothing."""
    at = tokens.columns - offset
    inside = (at >= 0) & (at < tokens.width)
    keys = at.where(inside, 0).expand(len(tokens.ids), -1)
    return keys.masked_fill(~(inside & tokens.prompt & tokens.attended.gather(1, keys)), -1)


METHODS = (
    Method(
        id="offset",
        title="attention to the token a fixed number of places before",
        page="methods/offset.md",
        paper="Voita et al., Analyzing Multi-Head Self-Attention",
        year=2019,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="repeat",
        score=mass_at_offset,
    ),
)
