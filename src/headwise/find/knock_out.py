"""What taking each head out alone does to the probe's metric, the exact measure that other scores are guesses at.

With M the metric of an item and M_h the same with head h taken out,

    s_h = +-(M - M_h),      the sign such that s_h > 0 means that the head helps

(+ where a higher metric is better). Michel, Levy and Neubig (2019), "Are Sixteen Heads Really Better than One?", report
it for every head; `mode` and `scope` are where papers differ:

- `zero` (their choice, and the default): z_h becomes 0;
- `mean`, `resample`: z_h becomes its mean over these items, or that of a random token of them (drawn with `seed`);
- `uniform`: the head attends alike to all that it may see (Zhou et al. 2024, "On the Role of Attention Heads in LLM
  Safety").

Exact. `metric` is any metric's id, by default the probe's. A model without logits, such as a sentence encoder, needs
`metric="cosine-to-clean"`: then s_h is 1 less the cosine of its embedding with that of the model as it is.
"""

from __future__ import annotations

import torch

from headwise.find.method import Method, Scored, scored_sites
from headwise.heads import HeadSet
from headwise.metrics import Metric
from headwise.metrics import metric as metric_named
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.sweep import KnockOut, Mode, measure_sets
from headwise.sweep.knockout import reference_of


def knock_out(
    model: AttachedModel,
    items: ItemSet,
    *,
    mode: Mode = "zero",
    scope: str = "all",
    metric: str | Metric | None = None,
    seed: int = 0,
) -> Scored:
    """`knock-out`, in units of the metric.

    Raises:
        InputError, Refusal: as `KnockOut`, `metric` and `measure_sets`.
    """
    chosen = metric if isinstance(metric, Metric) else metric_named(items.metric if metric is None else metric)
    reference = reference_of(model, items) if mode in ("mean", "resample") else None
    how = KnockOut(mode, scope, reference, seed)
    sites = scored_sites(model)
    heads = model.heads([id.label for id in sites]).heads
    clean, *without = measure_sets(model, items, [HeadSet(), *(HeadSet((head,)) for head in heads)], how, chosen)
    drops = [chosen.sign * (clean - values) for values in without]
    return {
        id: torch.stack([drop for head, drop in zip(heads, drops, strict=True) if head.site == id], dim=1)
        for id in sites
    }


METHODS = (
    Method(
        id="knock-out",
        title="What taking each head out alone costs",
        page="methods/knock-out.md",
        paper="Michel, Levy and Neubig, Are Sixteen Heads Really Better than One?",
        year=2019,
        tier="B",
        status="exact",
        needs=("z",),
        cost="1 forward per head and item",
        probe="ioi",
        score=knock_out,
    ),
)
