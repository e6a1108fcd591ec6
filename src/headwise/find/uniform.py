"""Uniform heads: how close a head is to equal attention over all that it may see.

Our own score; no paper defines one. Clark et al., 2019 ("What Does BERT Look At?"), describe such heads as broad, with
an entropy close to that of uniform attention. With n_t the number of keys that t may see:

    score_h = mean_t sum_{s visible} min(A_h[t, s], 1 / n_t)  =  mean_t (1 - TV(A_h[t], uniform over visible keys))

TV is the total variation distance, half the sum of absolute differences. So the score is the share of the mass that
lies where uniform attention would put it: 1 for a uniform head, mean_t 1 / n_t for one that attends to single tokens.
Unlike an entropy it is linear in the mass that is out of place. Queries are tokens of the prompt that see two keys or
more. What a query may see is told by the mask, so windows count as they are; with a learned sink the weights are
those among the keys, brought to a sum of 1.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.find.method import Method, Scored
from headwise.find.patterns import Tokens, mean_over, reduced
from headwise.find.search import over_batches
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.attention.rows import uniform_pattern
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet


def uniform(model: AttachedModel, items: ItemSet) -> Scored:
    """Mean overlap with equal attention, per item and head, from 0 to 1; NaN where no token sees two keys."""
    return over_batches(items, partial(_overlaps, model), answers=False)


def _overlaps(model: AttachedModel, batch: Batch) -> Scored:
    tokens = Tokens.of(model, batch)
    parts = reduced(model, tokens, _overlap, of=read.scores)
    found = {}
    for site, chunks in parts.items():
        overlaps = torch.cat(chunks, dim=2)
        found[site] = mean_over(overlaps, tokens.prompt & ~overlaps.isnan().any(1))
    return found


def _overlap(
    scores: Float[Tensor, "item head query key"], queries: Int[Tensor, " query"]
) -> Float[Tensor, "item head query"]:
    """The overlap of each row with the uniform one; NaN for rows with fewer than two visible keys."""
    seen = scores > -torch.inf
    weights = scores.masked_fill(seen.sum(-1, keepdim=True) < 2, 0.0).softmax(-1)
    overlap = torch.minimum(weights, uniform_pattern(seen, weights.dtype)).sum(-1)
    return overlap.masked_fill(seen.sum(-1) < 2, torch.nan).cpu()


METHODS = (
    Method(
        id="uniform",
        title="closeness to equal attention over all visible tokens",
        page="methods/uniform.md",
        paper="headwise's own; broad heads are described by Clark et al., What Does BERT Look At?",
        year=2019,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="needle",
        score=uniform,
    ),
)
