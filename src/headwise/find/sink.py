"""Attention sinks: how much of a head's attention lies on the first token.

The column score of Yu et al., 2024, "Unveiling and Harnessing Hidden Attention Sinks" (code: GATECH-EIC/ACT), at the
first token, where Xiao et al., 2024 ("Efficient Streaming Language Models with Attention Sinks") found the sink:

    score_h = c_first = 1 / T sum_{t >= first} A_h[t, first]

Exact: the column score. The first token's own row counts, as in the paper; a causal head cannot but give it 1, so no
score lies below 1 / T. ACT calls a column a sink above 0.1. Under left padding the first token is the first attended
one. In an encoder every token sees every other, and T are the tokens of the prompt. On a site with a learned sink, the
mass there is not that of the first token: `read.statistics(wanted=["learned_sink"])` has it.
"""

from __future__ import annotations

from headwise.find.method import Method, Scored
from headwise.find.patterns import mean_statistic
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


def sink(model: AttachedModel, items: ItemSet) -> Scored:
    """Mean mass on the first attended token, over the tokens of the prompt, per item and head, from 0 to 1."""
    return mean_statistic(model, items, "sink_mass")


METHODS = (
    Method(
        id="sink",
        title="attention to the first token",
        page="methods/sink.md",
        paper="Yu et al., Unveiling and Harnessing Hidden Attention Sinks",
        year=2024,
        tier="B",
        status="exact",
        needs=("rows",),
        cost="1 forward",
        probe="needle",
        score=sink,
    ),
)
