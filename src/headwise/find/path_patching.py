"""Patching heads: what changes when a head says what it would say on a corrupted prompt.

Every item has a corrupted twin of equal length: the same text but for what the answer depends on. With M the metric,

    s_h = (M_patched - M_clean) / (M_corrupted - M_clean)

0 is nothing, 1 all that the clean and the corrupted run differ by; s_h < 0: the head works against the rest. Items on
which the two do not differ have no score, and the denominator is the mean over the others, so that the mean score is a
ratio of means. Two methods.

`activation-patching` puts z_h of the corrupted run into the clean run (`noising`), or z_h of the clean run into the
corrupted one (`denoising`, and the same share of the way back). What follows answers to it: a total effect. Written up
by Heimersheim and Nanda (2024), "How to use and interpret activation patching".

`path-patching` asks for the effect through chosen receivers alone, after Merullo, Eickhoff and Pavlick (2023), "Circuit
Component Reuse Across Tasks in Transformer Language Models", who took it from Wang et al. (2022). The clean run is
repeated with z_h of the corrupted run and every other head held at its clean z; what the receivers get of it there is
put into a second clean run. The setting `receivers` names them, separated by commas: `logits`, or a set of `L4H2.q`,
`L4G1.k`, `L4G1.v` (a KV group has one key and one value for all its heads) and `mlp.L4`. A circuit is traced from the
end: first what writes to the `logits` (movers), then what reaches their queries, and so on. Heads that no receiver
reads have no score.

Exact. Choices that are named: `scope`, where the head is patched, is every token; theirs is the last one (`last`, which
goes on through the answer), and that is the same for the logits. `feed_forward` and `norms` are recomputed as in their
first variant; `feed_forward="frozen"` is their second one. `metric` is any metric of one run, by default the probe's;
theirs is the logit difference. Theirs holds heads at the patched position alone and averages over batches, here they
are held everywhere and scores are kept per item. They write the share with the other sign, as a per cent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.circuits.graph import Receiver
from headwise.circuits.patched import Direction, Patched
from headwise.circuits.patching import patch_map
from headwise.circuits.path_runs import Held
from headwise.circuits.paths import path_patch
from headwise.circuits.tracing import graph_of
from headwise.find.method import Method, Scored, scored_sites
from headwise.heads import Head, HeadSet, SiteId
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


def activation_patching(
    model: AttachedModel,
    items: ItemSet,
    *,
    direction: Direction = "noising",
    scope: str = "all",
    metric: str | Metric | None = None,
) -> Scored:
    """`activation-patching` of z.

    Raises:
        InputError, Refusal: as `patch_map`; a metric that is the same on the clean and the corrupted run of every item.
    """
    heads = heads_of(model)
    return shares(model, patch_map(model, items, "z", heads, direction=direction, scope=scope, metric=metric))


def path_patching(
    model: AttachedModel,
    items: ItemSet,
    *,
    receivers: str = "logits",
    feed_forward: Held = "recomputed",
    norms: Held = "recomputed",
    scope: str = "all",
    metric: str | Metric | None = None,
) -> Scored:
    """`path-patching` from every head that a receiver reads.

    Raises:
        InputError, Refusal: as `path_patch`; a metric that is the same on the clean and the corrupted run of every
            item.
    """
    wanted = tuple(Receiver.parse(each.strip()) for each in receivers.split(","))
    patched = path_patch(
        model,
        items,
        wanted,
        _read_by(model, wanted),
        feed_forward=feed_forward,
        norms=norms,
        scope=scope,
        metric=metric,
    )
    return shares(model, patched)


def heads_of(model: AttachedModel) -> HeadSet:
    """The heads that methods score: those of the main stack."""
    return model.heads([id.label for id in scored_sites(model)])


def shares(model: AttachedModel, patched: Patched) -> Scored:
    """The effects of heads as shares of what clean and corrupted run differ by, see `Patched.head_scores`."""
    scores = patched.head_scores(model)
    found = _without_scores(model, len(patched.item_ids))
    for stack, values in scores.values.items():
        for place, site in enumerate(scores.sites[stack]):
            found[site] = torch.tensor(values[:, place, : found[site].shape[1]])
    return found


def by_site(model: AttachedModel, patched: Patched, values: Float[Tensor, "cell item"]) -> Scored:
    """Values of cells, each of one head, as scores; NaN for heads without a cell."""
    found = _without_scores(model, len(patched.item_ids))
    for cell, row in zip(patched.cells, values, strict=True):
        head = Head.parse(cell.member)
        found[head.site][:, head.index] = row
    return found


def _without_scores(model: AttachedModel, items: int) -> dict[SiteId, Float[Tensor, "item head"]]:
    sites = [model.table.site(id) for id in scored_sites(model)]
    return {site.id: torch.full((items, site.n_heads), torch.nan, dtype=torch.float64) for site in sites}


def _read_by(model: AttachedModel, receivers: tuple[Receiver, ...]) -> tuple[Head, ...] | None:
    """The heads that one of the receivers reads; None where there are none, for which `path_patch` has the words."""
    if receivers == (Receiver(),):
        return heads_of(model).heads
    graph = graph_of(model)
    columns = [graph.column[each] for each in receivers if each in graph.column]
    seen = zip(graph.senders, graph.reaches[:, columns].any(1).tolist(), strict=True)
    return tuple(sender.head for sender, reached in seen if reached and sender.head is not None) or None


METHODS = (
    Method(
        id="activation-patching",
        title="What a head's value on a corrupted prompt does to the clean run, or the other way round",
        page="methods/activation-patching.md",
        paper="Heimersheim and Nanda, How to use and interpret activation patching",
        year=2024,
        tier="A",
        status="exact",
        needs=("z", "answer", "twin"),
        cost="1 forward per head and item",
        probe="ioi",
        score=activation_patching,
    ),
    Method(
        id="path-patching",
        title="What a head passes to the logits, or to other heads, along that path alone",
        page="methods/path-patching.md",
        paper="Merullo, Eickhoff and Pavlick, Circuit Component Reuse Across Tasks in Transformer Language Models",
        year=2023,
        tier="A",
        status="exact",
        needs=("z", "projection", "answer", "twin"),
        cost="1 forward per head and item, 2 to other heads",
        probe="ioi",
        score=path_patching,
    ),
)
