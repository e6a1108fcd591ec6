"""Profile of the heads: how concentrated their attention is, and how far it reaches.

Four statistics of a row, each averaged over the tokens t of the prompt:

    entropy         -sum_s A_h[t, s] log A_h[t, s], in nats       (Vig and Belinkov, 2019)
    mean_distance   sum_s A_h[t, s] (t - s) / sum_s A_h[t, s], in tokens      (Vig and Belinkov, 2019)
    max             max_s A_h[t, s], the "confidence" of a head   (Voita et al., 2019)
    sink_mass       A_h[t, first attended token]                  (Xiao et al., 2024)

Vig and Belinkov, "Analyzing the Structure of Attention in a Transformer Language Model". Exact: the statistics of a
row. Reconstruction: every token of the prompt counts, the first as well, in whose row a causal head has no choice
(entropy 0, distance 0, maximum 1). In an encoder distances to later tokens are negative and cancel those to earlier
ones. Entropy grows with the length of the text, at most as log t: compare heads on the same items.
"""

from __future__ import annotations

from typing import get_args

from headwise.find.method import Method, Scored
from headwise.find.patterns import Statistic, mean_statistic, require_choice
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


def profile(model: AttachedModel, items: ItemSet, statistic: Statistic = "entropy") -> Scored:
    """Mean of one row statistic, per item and head, in its own unit.

    Raises `InputError` for an unknown statistic.
    """
    require_choice("statistic", statistic, get_args(Statistic))
    return mean_statistic(model, items, statistic)


METHODS = (
    Method(
        id="profile",
        title="entropy, largest weight, sink mass or distance of attention",
        page="methods/profile.md",
        paper="Vig and Belinkov, Analyzing the Structure of Attention in a Transformer Language Model",
        year=2019,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="needle",
        score=profile,
    ),
)
