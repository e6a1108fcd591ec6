"""How much of the difference between items and their twins every sender, edge, query, key and value carries.

    nodes = attribute_nodes(model, items, "eap-ig-inputs", steps=5)
    edges = attribute_edges(model, items, "eap-ig-inputs", steps=5)
    edges.ranked()[:10]

With u what a sender writes and g the gradient of the metric M, by one of the methods of `gradients.py`:

    node    <u_corrupted - u_clean, g at u>
    edge    <c_corrupted - c_clean, g at the stream as the receiver reads it>

u of a head is its z, and c is what the sender adds to the stream; summed over columns and width. The gradient that an
edge takes is that of its receiver alone: the metric's gradient by q of one head, k or v of one KV group, or what a
feed-forward part makes, taken back to the stream in front of the block past all else that reads it. It passes the norm
in front of the receiver as the run computes it (norms "recomputed").

After Syed, Rager and Conmy (2023), "Attribution Patching Outperforms Automated Circuit Discovery" (EAP); Hanna,
Pezzelle and Belinkov (2024), "Have Faith in Faithfulness" (EAP-IG); Kramar et al. (2024), "AtP*" (GradDrop, QK fix).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.circuits.attributed import EdgeScores, Measured, NodeScores, PortScores
from headwise.circuits.gradients import Ends, Method, Point, differentiable_metric, ends_of
from headwise.circuits.patched import flat
from headwise.circuits.taps import Place, Taps
from headwise.circuits.tracing import Origin, Reading, Traced, traced
from headwise.circuits.twins import require_twins
from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe
from headwise.scores import Provenance
from headwise.sweep.measuring import chunks_of
from headwise.sweep.memory import budget_of, halving, tokens_of

NodeMethod = Literal["eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "grad-drop"]
PortMethod = Literal["atp", "atp-qk"]

STEPS = 5
"""Runs of an interpolation, as most papers with EAP-IG take."""

HELD = 16 * 2**30
"""Bytes that the differences of all senders and the gradients of one block may take, where `tokens` is not given."""


@halving
def attribute_nodes(
    model: AttachedModel,
    items: ItemSet,
    method: NodeMethod = "eap-ig-inputs",
    *,
    steps: int = STEPS,
    metric: str | Metric | None = None,
    tokens: int | None = None,
) -> NodeScores:
    """Scores of the input, every head (at z) and every feed-forward part: what patching them would do, by first order.

    Args:
        method: see `gradients.py`; for interpolations of the input k runs from 1 to `steps`, as in the official code
            for nodes. `grad-drop` is at the clean run: of L backward passes each leaves out what one block writes, and
            the score is 1/(L - 1) of the sum of the absolute scores (Kramar et al. 2024, section 3.1.2), so that a
            direct and an indirect effect of opposite sign do not cancel. It has no sign and no completeness.
        steps: runs of an interpolation.
        metric: of logits, and with a gradient (default: that of the probe).
        tokens: most tokens of one run.

    Raises:
        InputError: items without twins of their length, a metric without a gradient, or an unknown method.
        Refusal: the model has no graph (`graph_of`), or gradients do not pass it.
    """
    _require(method, get_args(NodeMethod), steps)
    require_twins(items)
    found = traced(model)
    dropping = method == "grad-drop"
    if dropping and len(found.layers) < 2:
        raise InputError("grad-drop leaves out one block at a time, and this model has one; use eap")
    run = _Items(found, items, differentiable_metric(items, metric), budget_of(items, tokens, model.device))
    values = torch.zeros(len(items), len(found.graph.senders), dtype=torch.float64)
    for at, ends in run.chunks():
        apart = {origin: ends.difference(origin.place) for origin in found.origins}
        for point in ends.points("eap" if method == "grad-drop" else method, range(1, steps + 1)):
            taps, metrics = ends.run_at(point, [origin.place for origin in found.origins])
            for drop in found.layers if dropping else [()]:
                scores = _node_scores(ends, taps, metrics.sum(), point, apart, drop)
                values[at] += scores.abs() / (len(found.layers) - 1) if dropping else scores
    explained = torch.full_like(values[:, 0], torch.nan) if dropping else values[:, 0]
    settings = {} if method in ("eap", "clean-corrupted", "grad-drop") else {"steps": steps}
    return NodeScores(found.graph, values, run.measured(explained), run.provenance(method, settings))


@halving
def attribute_edges(
    model: AttachedModel,
    items: ItemSet,
    method: Method = "eap-ig-inputs",
    *,
    steps: int = STEPS,
    metric: str | Metric | None = None,
    tokens: int | None = None,
    per_item: bool = False,
) -> EdgeScores:
    """Scores of every edge: what patching the one edge would do, by first order.

    Beside the model and the graph of a backward pass this holds, for S senders, R receivers in a block and T tokens of
    a run, 4 T d_model (S + R) bytes.

    Args:
        method: see `gradients.py`; for interpolations of the input k runs from 0 to `steps` - 1, as in the official
            code for edges.
        steps, metric: as of `attribute_nodes`.
        tokens: most tokens of one run (default: as many as `HELD` bytes hold by the formula above, and no more than
            `sweep.memory.tokens_of` the device).
        per_item: keep the scores of every item, items x S x all receivers.

    Raises:
        As `attribute_nodes`.
    """
    _require(method, get_args(Method), steps)
    require_twins(items)
    found = traced(model)
    graph, shape = found.graph, found.graph.reaches.shape
    budget = budget_of(items, _tokens_held(found, items) if tokens is None else tokens, model.device)
    run = _Items(found, items, differentiable_metric(items, metric), budget)
    total, squares, defined = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    explained = torch.zeros(len(items), dtype=torch.float64)
    kept = torch.zeros(len(items), *shape, dtype=torch.float64) if per_item else None
    effect = torch.zeros((), dtype=torch.float64)
    ks = range(1, steps + 1) if method == "eap-ig-activations" else range(steps)
    for at, ends in run.chunks():
        scores = torch.zeros(len(at), *shape, dtype=torch.float64)
        written = {origin: ends.written(origin) for origin in found.origins}
        for point in ends.points(method, ks):
            for rows, columns, share in _edge_scores(ends, point, written):
                scores[:, rows.start : rows.stop, columns.start : columns.stop] += share
        of_metric = (ends.clean.metric, ends.corrupted.metric)
        differs = ~flat(*of_metric)
        total += scores.sum(0)
        squares += scores.square().sum(0)
        defined += scores[differs].sum(0)
        effect += (of_metric[1] - of_metric[0])[differs].sum()
        explained[at] = scores[:, 0].sum(1)
        if kept is not None:
            kept[at] = scores
    blank = torch.where(graph.reaches, 0.0, torch.nan)
    n = len(items)
    spread = (squares - total.square() / n).clamp(min=0) / (n - 1) if n > 1 else torch.full(shape, torch.nan)
    return EdgeScores(
        graph=graph,
        values=total / n + blank,
        standard_error=(spread / n).sqrt() + blank,
        normalised=defined / torch.where(effect == 0, torch.nan, effect) + blank,
        measured=run.measured(explained),
        provenance=run.provenance(method, {"steps": steps} if "ig" in method else {}),
        per_item=None if kept is None else kept + blank,
    )


@halving
def attribute_ports(
    model: AttachedModel,
    items: ItemSet,
    method: PortMethod = "atp-qk",
    *,
    metric: str | Metric | None = None,
    tokens: int | None = None,
) -> PortScores:
    """Scores of q of every head, and of k and v of every KV group, at the clean run (Kramar et al. 2024).

    `atp` is `<q_corrupted - q_clean, dM/dq>`, and so for k and v. Where a softmax is saturated its gradient is near 0,
    however far the twin's query would move it. `atp-qk` is their QK fix: the softmax is computed anew with the twin's
    queries (or keys), and the first order begins behind it, `<z(q_corrupted) - z_clean, dM/dz>`. Values have no softmax
    before them; for v both are the same. The paper moves the key of one column at a time, here all columns move at
    once, as a patch of a whole group does.

    Raises:
        As `attribute_nodes`.
    """
    _require(method, get_args(PortMethod), 1)
    require_twins(items)
    found = traced(model)
    run = _Items(found, items, differentiable_metric(items, metric), budget_of(items, tokens, model.device))
    readings = [reading for reading in found.readings if reading.place[0] in ("q", "k", "v")]
    places = [reading.place for reading in readings]
    listed = [column for reading in readings for column in reading.columns]
    values = torch.zeros(len(items), len(found.graph.receivers), dtype=torch.float64)
    for at, ends in run.chunks(besides=places):
        point = next(iter(ends.points("eap", range(1))))
        taps, metrics = ends.run_at(point, [*places, *_sites(found), found.origins[0].place])
        gradient = taps.gradients(metrics.sum(), [*places, *_sites(found)])
        moved = {port: _z_with(ends, port) for port in ("q", "k")} if method == "atp-qk" else {}
        for reading in readings:
            port, site = reading.place
            if port in moved:
                apart = ends.on_tokens(moved[port][site] - ends.clean.taps.value(("z", site)).double())
                scores = _dotted(apart, ends.on_tokens(gradient["z", site]))
                scores = scores.reshape(len(at), len(reading.columns), -1).sum(2)  # a key serves its group's heads
            else:
                scores = _dotted(ends.difference(reading.place), ends.on_tokens(gradient[reading.place]))
            values[at, reading.columns.start : reading.columns.stop] = scores
    explained = torch.full((len(items),), torch.nan, dtype=torch.float64)
    receivers = tuple(found.graph.receivers[column] for column in listed)
    return PortScores(found.graph, receivers, values[:, listed], run.measured(explained), run.provenance(method, {}))


class _Items:
    """Items in runs, with what was measured of them."""

    def __init__(self, found: Traced, items: ItemSet, chosen: Metric, budget: int) -> None:
        self.found, self.items, self.chosen, self.budget = found, items, chosen, budget
        self.clean = torch.zeros(len(items), dtype=torch.float64)
        self.corrupted = torch.zeros_like(self.clean)

    def chunks(self, besides: list[Place] | None = None) -> Iterator[tuple[list[int], Ends]]:
        """The items that share runs: their places in the set, and their two ends."""
        for at, part in chunks_of(self.items, self.budget, self.found.model.device):
            ends = ends_of(self.found, self.items, self.chosen, part, besides or ())
            self.clean[at], self.corrupted[at] = ends.clean.metric, ends.corrupted.metric
            yield at, ends

    def measured(self, explained: Float[Tensor, " item"]) -> Measured:
        return Measured(self.clean, self.corrupted, explained, self.items.ids, self.chosen.id, self.chosen.sign)

    def provenance(self, method: str, settings: dict[str, int]) -> Provenance:
        seed = self.items.seed if isinstance(self.items.seed, int) else None
        asked = {"metric": self.chosen.id, **settings}
        return self.found.model.provenance(method, asked, probe=self.items.probe, seed=seed)


def _node_scores(
    ends: Ends, taps: Taps, total: Tensor, point: Point, apart: dict[Origin, Tensor], drop: tuple[Place, ...]
) -> Float[Tensor, "item sender"]:
    scores = torch.zeros(len(ends.attended), len(ends.traced.graph.senders), dtype=torch.float64)
    with taps.cutting(drop):
        gradient = taps.gradients(total, [origin.place for origin in point.origins])
    for origin in point.origins:
        if origin.place in drop:  # autograd hands out what arrived there, before the cut
            continue
        at = ends.on_tokens(gradient[origin.place])
        difference = apart[origin]
        if difference.dim() == 3:
            at, difference = at[:, :, None], difference[:, :, None]
        scores[:, origin.rows.start : origin.rows.stop] = point.weight * _dotted(difference, at)
    return scores


def _edge_scores(
    ends: Ends, point: Point, written: dict[Origin, Tensor]
) -> Iterator[tuple[range, range, Float[Tensor, "item sender receiver"]]]:
    """Scores of the edges from the senders of a point, in parts: their rows, their columns, the scores."""
    taps, metrics = ends.run_at(point, ends.traced.places)
    readings, reaches = ends.traced.readings, ends.traced.graph.reaches
    gradient = taps.gradients(metrics.sum(), [reading.place for reading in readings])
    for reading in readings:
        senders = [origin for origin in point.origins if reaches[origin.rows.start, reading.columns.start]]
        if not senders:
            continue
        at = torch.stack([ends.on_tokens(each) for each in _at_stream(taps, reading, gradient[reading.place])])
        for origin in senders:
            share = torch.einsum("btsd,rbtd->bsr", written[origin], at.to(written[origin].dtype))
            yield origin.rows, reading.columns, point.weight * share.double().cpu()


def _at_stream(taps: Taps, reading: Reading, gradient: Tensor) -> Iterator[Float[Tensor, "item column d_model"]]:
    """The metric's gradient by the stream, through each receiver of a reading alone."""
    if reading.place == reading.stream:
        yield gradient
        return
    if gradient.dim() == 3:
        yield taps.at_stream(reading.place, reading.stream, gradient, reading.cut)
        return
    for index in range(gradient.shape[2]):
        alone = torch.zeros_like(gradient)
        alone[:, :, index] = gradient[:, :, index]
        yield taps.at_stream(reading.place, reading.stream, alone, reading.cut)


def _z_with(ends: Ends, port: str) -> dict[SiteId, Tensor]:
    """z of every head with the twin's queries (or keys) in place, and all else as in the clean run: every z is put back
    behind its site, so that one run serves all of them."""
    put = {place: ends.corrupted.taps.value(place) for place in _ports(ends.traced, port)}
    put |= {place: ends.clean.taps.value(place) for place in _sites(ends.traced)}
    taps = Taps(list(put), put)
    with torch.no_grad(), taps.open(ends.traced.model):
        observe(ends.traced.model, ends.clean.batch, wants=ends.chosen.wants)
    return {place[1]: taps.taken[place].double() for place in _sites(ends.traced)}


def _sites(found: Traced) -> list[Place]:
    return [origin.place for origin in found.origins if origin.place[0] == "z"]


def _ports(found: Traced, port: str) -> list[Place]:
    return [reading.place for reading in found.readings if reading.place[0] == port]


def _dotted(
    difference: Float[Tensor, "item column part dim"], gradient: Float[Tensor, "item column part dim"]
) -> Float[Tensor, "item part"]:
    return (difference * gradient.to(difference)).double().sum((1, 3)).cpu()


def _tokens_held(found: Traced, items: ItemSet) -> int:
    senders, widest = len(found.graph.senders), max(len(each.columns) for each in found.readings)
    d_model = max(site.d_model for site in found.writes.sites.values())
    longest = max(len(each.prompt) + len(each.answer) for each in items)
    return max(longest, min(tokens_of(found.model.device), HELD // (4 * d_model * (senders + 2 * widest))))


def _require(method: str, known: tuple[str, ...], steps: int) -> None:
    if method not in known:
        raise InputError(f"method={method!r} is not known; choose from {', '.join(known)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r} is not a number of runs; give a whole number from 1")
