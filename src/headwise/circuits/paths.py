"""Path patching: what a part of a model does to the metric through what another part reads of it, and by no other way.

    path_patch(model, items, ["logits"])                      # what each part itself hands to the logits
    path_patch(model, items, ["L4H2.q"])                      # what reaches the query of one head
    path_patch(model, items, ["L4G1.k", "L4G1.v"], ["L0H3"])  # one sender, two receivers together

Wang et al. (2022), "Interpretability in the Wild"; Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path
Patching". For a sender and a set of receivers:

1. The clean run, with the sender's value of the corrupted run put in and every other head held at its clean z. Nothing
   moves from one position to another but what the sender moved. What the receivers get there is noted.
2. The clean run, with what was noted put in at the receivers, and at nothing else.

The effect is what 2 does to the metric, normalised as in `Patched` (noising). For the logits 1 is all.

Two choices, both named:

- `feed_forward`: `recomputed`, feed-forward parts between sender and receiver answer to the change, so that ways
  through them count (Wang et al.); `frozen`, they are held at their clean output, so that the path is the direct one.
- `norms`: `recomputed`, as the run does it; `frozen`, held at the clean run's scale. Then the logits are a sum over
  what is written, effects of senders add up, and two forwards give all of them (see `model/direct.py`).

Exact under grouped queries: a KV group has one key and one value, and that is one receiver.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from headwise.circuits.graph import Edge, Graph, Receiver, Sender
from headwise.circuits.patched import Cell, Patched
from headwise.circuits.path_runs import Asked, Held, by_runs
from headwise.circuits.path_sums import by_sum
from headwise.circuits.tracing import graph_of
from headwise.circuits.twins import patchable_metric, require_twins
from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.sweep.memory import halving


@halving
def path_patch(
    model: AttachedModel,
    items: ItemSet,
    receivers: Sequence[Receiver | str],
    senders: HeadSet | Sequence[Sender | Head | str] | None = None,
    *,
    feed_forward: Held = "recomputed",
    norms: Held = "recomputed",
    metric: str | Metric | None = None,
    scope: str = "all",
    tokens: int | None = None,
) -> Patched:
    """The effect of every sender through a set of receivers.

    Args:
        receivers: `logits` alone, or any of `L4H2.q`, `L4G1.k`, `L4G1.v`, `mlp.L4`, replaced together. One that does
            not read a sender gets nothing of it.
        senders: heads (`L0H3`), feed-forward parts (`mlp.L2`) and `input`; None is every head and feed-forward part
            that a receiver reads.
        feed_forward, norms: see the top of this file. Frozen norms are for `logits` with frozen feed-forward parts, and
            for a metric that is linear in the logits, such as logit-difference; where logits are soft-capped, the
            metric is that of the logits before the cap.
        metric: any metric of one run; None is that of the probe.
        scope: where senders are patched, as of edits. What a receiver gets differs there alone.
        tokens: most tokens of one forward (default: `headwise.sweep.memory.tokens_of` the device).

    Cost per item: two forwards; then, for each sender, one from the sender's block on, and for receivers other than the
    logits a second one from the first receiver's block on. With frozen norms two forwards and nothing else.

    Raises:
        InputError: no twin, or one of another length; a sender or receiver that the model does not have; a sender that
            no receiver reads (at or in front of which they all are); a metric or choice that cannot be served.
        Refusal: the stream of the model is not the sum of what its heads and feed-forward parts write, or cannot be
            read or edited; no item has a position in the scope.
    """
    require_twins(items)
    _check(feed_forward, norms)
    graph = graph_of(model)
    asked = Asked(model, items, graph, _receivers(graph, receivers), feed_forward, scope)
    cells = _senders(graph, asked.receivers, senders)
    chosen = patchable_metric(items, metric)
    if norms == "frozen":
        if not asked.to_logits or feed_forward != "frozen":
            raise InputError(
                "norms='frozen' is for receivers=['logits'] with feed_forward='frozen', where the logits are a sum "
                "over what is written; use norms='recomputed'"
            )
        values, clean, corrupted = by_sum(asked, cells, chosen, tokens)
    else:
        values, clean, corrupted = by_runs(asked, cells, chosen, tokens)
    return Patched(
        method="path-patching",
        cells=tuple(Cell(each.label) for each in cells),
        values=values,
        clean=clean,
        corrupted=corrupted,
        direction="noising",
        item_ids=items.ids,
        metric=chosen.id,
        probe=items.probe,
        seed=items.seed if type(items.seed) is int else None,
        settings={
            "receivers": [each.label for each in asked.receivers],
            "feed_forward": feed_forward,
            "norms": norms,
            "scope": scope,
        },
        of=weakref.ref(model),
    )


# -- what is asked for ------------------------------------------------------------------------------------------------


def _check(feed_forward: str, norms: str) -> None:
    for name, value in (("feed_forward", feed_forward), ("norms", norms)):
        if value not in get_args(Held):
            raise InputError(f"{name}={value!r} is neither 'recomputed' nor 'frozen'")


def _receivers(graph: Graph, given: Sequence[Receiver | str]) -> tuple[Receiver, ...]:
    found = tuple(dict.fromkeys(Receiver.parse(each) for each in _listed("receivers", given)))
    if not found:
        raise InputError("receivers= is empty; name some, such as ['logits'] or ['L4H2.q']")
    for each in found:
        if each not in graph.column:
            raise InputError(f"this model has no receiver {each}; its last ones are {_some(graph.receivers)}")
    if Receiver() in found and len(found) > 1:
        raise InputError("logits stand alone as a receiver: what reaches them directly goes by no other one; ask twice")
    return found


def _senders(
    graph: Graph, receivers: Sequence[Receiver], given: HeadSet | Sequence[Sender | Head | str] | None
) -> tuple[Sender, ...]:
    columns = [graph.column[each] for each in receivers]
    read_by = graph.reaches[:, columns].any(1)
    if given is None:
        found = tuple(s for s, seen in zip(graph.senders, read_by.tolist(), strict=True) if seen and s != Sender())
        if not found:
            raise InputError(f"nothing but the input writes what {receivers[0]} reads; name senders=['input']")
        return found
    found = tuple(dict.fromkeys(Sender.parse(each) for each in _listed("senders", given)))
    if not found:
        raise InputError("senders= is empty; name some, or leave it out for all in front of the receivers")
    for each in found:
        if each not in graph.row:
            raise InputError(f"this model has no sender {each}; its last ones are {_some(graph.senders)}")
        if not read_by[graph.row[each]]:
            why = graph.why_not(Edge(each, receivers[0]))
            raise InputError(f"there is no path {each} -> {receivers[0]}, {why}; name a receiver that comes after it")
    return found


def _listed(name: str, given: Any) -> list[Any]:
    if isinstance(given, (str, Receiver, Sender, Head)):
        return [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{name}={given!r} is no list of parts; write ['L4H2', 'mlp.L4'] or the like")
    return list(given)


def _some(parts: Sequence[Any]) -> str:
    return ", ".join(str(each) for each in parts[-4:])
