"""Previous-token heads: how much of a head's attention lies on the token just before.

Olsson et al., 2022, "In-context Learning and Induction Heads"; the score is read off their pattern:

    score_h = mean_{t > first} A_h[t, t-1]

Exact: the mean mass on the position before. Reconstruction: which texts and tokens it is averaged over. Here queries
are all tokens of the prompt but its first, and the default probe is `repeat`, random words, in which the word before is
not next by its meaning.

A head that rests on the first token gets 1 / (n - 1) from the second one, so short prompts blur the score.
"""

from __future__ import annotations

from headwise.find.method import Method, Scored
from headwise.find.offset import mass_at_offset
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


def previous_token(model: AttachedModel, items: ItemSet) -> Scored:
    """Mean mass on the token before, per item and head, from 0 to 1."""
    return mass_at_offset(model, items, offset=1)


METHODS = (
    Method(
        id="previous-token",
        title="attention to the token just before",
        page="methods/previous-token.md",
        paper="Olsson et al., In-context Learning and Induction Heads",
        year=2022,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="repeat",
        score=previous_token,
    ),
)
