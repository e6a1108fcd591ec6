"""How much of what a model does a circuit does by itself.

    found = faithfulness(model, circuit, items)
    found.value, found.of_items

The model is run as the circuit (see `circuit_run`): along kept edges a receiver reads what the sender writes, along the
others what is `outside` in its place. With M the metric,

    faithfulness = (M_circuit - M_empty) / (M_clean - M_empty)

0 is what no edge does, 1 what the model does; it may be more. With `resample` M_empty is M of the corrupted run, and
this is the normalisation of Hanna et al. (2024). With `mean` and `zero` it is M of the circuit without edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.circuits.circuit import Circuit, require_same_graph
from headwise.circuits.circuit_run import Stage, Written, written_in, written_reads
from headwise.circuits.graph import Graph, Sender
from headwise.circuits.patched import FLAT, flat
from headwise.circuits.tracing import graph_of
from headwise.circuits.twins import pairs_of, patchable_metric, require_twins
from headwise.errors import InputError, Refusal
from headwise.heads import SiteId
from headwise.metrics import Metric
from headwise.model import read
from headwise.model.arriving import Arrival, arrivals_of
from headwise.model.attached import AttachedModel
from headwise.model.direct import MULTIPLE
from headwise.model.stream import StreamWrites, stream_writes
from headwise.probes.encoding import ItemSet
from headwise.sweep.memory import halving

Outside = Literal["resample", "mean", "zero"]
OUTSIDE: tuple[Outside, ...] = get_args(Outside)


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """A model as a circuit, item by item.

    Attributes:
        values: M of the model as the circuit, in units of the metric.
        clean: M of the model.
        empty: M of the circuit without edges; with `resample` that of the corrupted run.
        outside: what is read along edges that are not kept.
        item_ids, metric: what it was measured on.
    """

    values: Float[Tensor, " item"]
    clean: Float[Tensor, " item"]
    empty: Float[Tensor, " item"]
    outside: Outside
    item_ids: tuple[str, ...]
    metric: str

    @property
    def undefined(self) -> Bool[Tensor, " item"]:
        """Items on which the model and the empty circuit do not differ, so that there is nothing to be a share of."""
        return flat(self.clean, self.empty)

    @property
    def n_undefined(self) -> int:
        return int(self.undefined.sum())

    @property
    def of_items(self) -> Float[Tensor, " item"]:
        """The faithfulness on every item; NaN where it is undefined."""
        return ((self.values - self.empty) / (self.clean - self.empty)).masked_fill(self.undefined, torch.nan)

    @property
    def value(self) -> float:
        """Over the items that are not undefined, the ratio of the means; NaN where there is no such item, or the
        differences cancel."""
        differences = (self.clean - self.empty)[~self.undefined]
        if not len(differences) or abs(float(differences.mean())) <= FLAT * float(differences.abs().mean()):
            return float("nan")
        return float((self.values - self.empty)[~self.undefined].mean() / differences.mean())

    def above(self, margin: float) -> Faithfulness:
        """The same of the items on which `clean - empty` is at least `margin` in size: a small one makes shares large.

        Raises InputError where no item is left.
        """
        left = (self.clean - self.empty).abs() >= margin
        if not bool(left.any()):
            raise InputError(
                f"no item has a difference of {margin} in {self.metric} between the model and the empty circuit; the "
                f"largest is {float((self.clean - self.empty).abs().max()):.3g}"
            )
        ids = tuple(id for id, kept in zip(self.item_ids, left.tolist(), strict=True) if kept)
        return Faithfulness(self.values[left], self.clean[left], self.empty[left], self.outside, ids, self.metric)

    def __repr__(self) -> str:
        undefined = f", {self.n_undefined} undefined" if self.n_undefined else ""
        return f"<faithfulness {self.value:.3f} ({self.outside} outside, {len(self.item_ids)} items{undefined})>"


def faithfulness(
    model: AttachedModel,
    circuit: Circuit,
    items: ItemSet,
    outside: Outside = "resample",
    metric: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> Faithfulness:
    """How much of the model's metric is there when it runs as `circuit`; errors and the rest as `run_circuits`."""
    return run_circuits(model, [circuit], items, outside, metric, tokens=tokens)[0]


@halving
def run_circuits(
    model: AttachedModel,
    circuits: Sequence[Circuit],
    items: ItemSet,
    outside: Outside = "resample",
    metric: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> list[Faithfulness]:
    """The faithfulness of many circuits of one model, which share their forwards.

    Args:
        items: for `resample` with twins of equal length.
        outside: what a receiver reads along edges that are not in the circuit. `resample`: what the sender wrote in the
            run on the twin, column by column. `mean`: the mean of what it writes, over all positions of all items.
            `zero`: nothing; biases stay.
        metric: any of the logits; None is that of the probe.
        tokens: most tokens of one forward. What senders write is held for as many, which takes about
            `4 * tokens * d_model * (2 * all senders + those that a kept edge comes from)` bytes.

    Raises:
        InputError: no items; items without twins, or with twins of another length; a circuit of a model of another
            shape; a metric of what is generated.
        Refusal: the stream of the model is not the sum of its senders, or something cannot be read or put in place.
    """
    if not isinstance(circuits, Sequence) or not all(isinstance(each, Circuit) for each in circuits):
        raise InputError(
            f"circuits={circuits!r} is no list of circuits; write [Circuit.of(graph, edges)], or select(...)"
        )
    chosen = require_runnable(items, outside, metric)
    graph = graph_of(model)
    for circuit in circuits:
        require_same_graph(circuit.graph, graph)
    kept = torch.stack([torch.zeros_like(graph.reaches, device="cpu"), *(circuit.kept for circuit in circuits)])
    clean = torch.full((len(items),), torch.nan, dtype=torch.float64)
    values = torch.full((len(kept), len(items)), torch.nan, dtype=torch.float64)
    for found_at, stage in _stages(model, graph, items, outside, chosen, tokens):
        clean[found_at] = stage.pairs.values(stage.clean.outcome, stage.clean.outcome)[0]
        values[:, found_at] = stage.values(kept)
    ids = tuple(item.id for item in items)
    return [Faithfulness(each, clean, values[0], outside, ids, chosen.id) for each in values[1:]]


def require_runnable(items: ItemSet, outside: Outside, metric: str | Metric | None) -> Metric:
    """The metric. Raises InputError for items, a metric or an `outside` that circuits cannot be run with."""
    if outside not in OUTSIDE:
        raise InputError(f"outside={outside!r} is not one of {', '.join(OUTSIDE)}")
    if outside == "resample":
        require_twins(items)
    elif not items.items:
        raise InputError(f"{items.probe}: there are no items to run on; encode at least one")
    chosen = patchable_metric(items, metric)
    if chosen.wants != {"logits"}:
        raise InputError(f"{chosen.id} is not of the logits, where a circuit ends; use logit-difference or another one")
    return chosen


def _stages(
    model: AttachedModel, graph: Graph, items: ItemSet, outside: Outside, metric: Metric, tokens: int | None
) -> Iterator[tuple[list[int], Stage]]:
    """Items in forwards, and what is to stand outside of circuits."""
    writes = stream_writes(model)
    _require_heads_first(model, graph)
    arrivals = arrivals_of(writes)
    mean = _mean(model, writes, items, metric, tokens) if outside == "mean" else None
    for found_at, pairs, together in pairs_of(model, items, metric, tokens):
        last = read.residual(writes.blocks[-1].label, name="last")
        clean = pairs.run("clean", *written_reads(writes), last, begun_in=True)
        written = written_in(writes, clean)
        _require_whole(model, writes, arrivals, written, clean.got["last"][writes.blocks[-1].label])
        if mean is not None:
            replaced = mean
        elif outside == "zero":
            replaced = written.with_each(torch.zeros_like)
        else:
            replaced = written_in(writes, pairs.run("corrupted", *written_reads(writes)))
        yield found_at, Stage(pairs, graph, writes, arrivals, clean, written, replaced, together)


def _require_whole(
    model: AttachedModel, writes: StreamWrites, arrivals: Mapping[str, Arrival], written: Written, last: Tensor
) -> None:
    """What the senders wrote must be the stream behind the last block: something may have been put on the model."""
    stream = written.input
    for block in writes.blocks:
        site = writes.sites.get(block.label)
        if site is not None:
            stream = stream + arrivals[site.label](written.heads[site.id].sum(2))
        if block.mlp is not None:
            stream = stream + arrivals[f"mlp.{block.label}"](written.mlps[SiteId.parse(block.label)])
    apart = float((stream - last.to(stream)).abs().max()) / max(float(last.abs().max()), 1e-30)
    if not apart <= MULTIPLE.get(model.dtype, 1e-4):
        raise Refusal(
            f"what the heads and feed-forward parts of {model.name} write is not its stream ({apart:.1e} of it is of "
            "something else, such as a hook or an open plan that adds to it), so circuits cannot be run; take that off"
        )


def _require_heads_first(model: AttachedModel, graph: Graph) -> None:
    """Blocks are run heads first, so these must not read the feed-forward part of their own block."""
    for receiver in graph.receivers:
        if receiver.member is None:
            continue
        beside = graph.row.get(Sender(block=receiver.member.site))
        if beside is not None and bool(graph.reaches[beside, graph.column[receiver]]):
            raise Refusal(
                f"{receiver} of {model.name} reads the feed-forward part of its own block, and circuits are run heads "
                "first; use node_faithfulness"
            )


def _mean(model: AttachedModel, writes: StreamWrites, items: ItemSet, metric: Metric, tokens: int | None) -> Written:
    """The mean of what every sender writes, over the positions of all items."""
    total: Written | None = None
    positions = 0
    for _, pairs, _ in pairs_of(model, items, metric, tokens):
        attended = pairs.batch("clean").attention_mask.bool().to(model.device)
        found = written_in(writes, pairs.run("clean", *written_reads(writes)))
        part = found.with_each(partial(_summed, attended))
        total = part if total is None else total.joined(part, torch.add)
        positions += int(attended.sum())
    assert total is not None
    return total.with_each(lambda value: value / positions)


def _summed(attended: Bool[Tensor, "item position"], value: Tensor) -> Tensor:
    return value[attended].sum(0)[None, None]
