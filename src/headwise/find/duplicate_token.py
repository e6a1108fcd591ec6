"""Duplicate-token heads: attention to earlier occurrences of the same token.

Wang et al., 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small". Their
duplicate-token heads attend from the second occurrence of a name to the first one, and are told by their attention on
random tokens said twice:

    score_h = mean_t sum_{s < t, x_s = x_t} A_h[t, s]     over the t whose token occurred before

Exact: the mass on earlier occurrences. Reconstruction: where a token occurred several times, the sum over all of them.
Special tokens are neither query nor key. Where an item has the span `repeated` (probe `repeat`: the second saying of
the list, from its second word on), queries are its tokens, as in the paper; elsewhere every token that comes again.
"""

from __future__ import annotations

from headwise.find.method import Method, Scored
from headwise.find.patterns import Tokens, Weights, mean_mass
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


def duplicate_token(model: AttachedModel, items: ItemSet) -> Scored:
    """Mean mass on earlier occurrences of the same token, per item and head; NaN for an item in which none comes
    again."""

    def keys(tokens: Tokens) -> Weights:
        asked = tokens.words & tokens.within("repeated")
        return lambda queries: (
            (tokens.ids[:, queries].unsqueeze(-1) == tokens.ids.unsqueeze(1))
            & (tokens.columns < queries.unsqueeze(-1))
            & asked[:, queries].unsqueeze(-1)
            & tokens.words.unsqueeze(1)
        )

    return mean_mass(model, items, keys)


METHODS = (
    Method(
        id="duplicate-token",
        title="attention to earlier occurrences of the same token",
        page="methods/duplicate-token.md",
        paper="Wang et al., Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        year=2022,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="repeat",
        score=duplicate_token,
    ),
)
