"""What parts of a circuit are worth in it, what it lacks, and what it does on other tasks.

minimality(model, circuit, items).losses            # what each edge is worth
completeness(model, circuit, items).incompleteness  # what the model does without parts of it, beside what it does
cross_task(model, {"ioi": circuit}, {"ioi": items, "repeat": others})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.circuits.circuit import Circuit
from headwise.circuits.faithfulness import Faithfulness, Outside, run_circuits
from headwise.circuits.graph import Edge, Sender
from headwise.errors import InputError
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


@dataclass(frozen=True, eq=False)
class Minimality:
    """A circuit without each of some parts.

    Attributes:
        circuit: the faithfulness of the whole one.
        parts: edges or nodes.
        without: the faithfulness without each of them.
    """

    circuit: Faithfulness
    parts: tuple[Edge | Sender, ...]
    without: tuple[Faithfulness, ...]

    @property
    def losses(self) -> dict[str, float]:
        """What is lost without each part: faithfulness of the circuit less that without it. Near 0: not needed."""
        return {
            part.label: self.circuit.value - each.value for part, each in zip(self.parts, self.without, strict=True)
        }


def minimality(
    model: AttachedModel,
    circuit: Circuit,
    items: ItemSet,
    parts: Sequence[Edge | Sender | str] | None = None,
    outside: Outside = "resample",
    metric: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> Minimality:
    """What faithfulness is lost when each part alone is taken out of a circuit (Wang et al. 2022).

    Args:
        parts: edges (`L0H1 -> L4H2.q`) or nodes (`L0H1`, with all their edges); None is every edge.

    Raises:
        As `run_circuits`; InputError for a part that is not in the circuit.
    """
    listed = circuit.edges if parts is None else [parts] if isinstance(parts, (str, Edge, Sender)) else parts
    named = [_part(circuit, part) for part in listed]
    runs = run_circuits(
        model, [circuit, *(circuit.without(part) for part in named)], items, outside, metric, tokens=tokens
    )
    return Minimality(runs[0], tuple(named), tuple(runs[1:]))


def _part(circuit: Circuit, part: Edge | Sender | str) -> Edge | Sender:
    found: Edge | Sender
    if isinstance(part, Sender):
        found = part
    else:
        found = Edge.parse(part) if isinstance(part, Edge) or "->" in part else Sender.parse(part)
    if found not in (circuit if isinstance(found, Edge) else circuit.nodes):
        raise InputError(f"{found} is not in the circuit, so nothing is lost without it; name parts that are")
    return found


@dataclass(frozen=True, eq=False)
class CircuitCompleteness:
    """The circuit and the whole model, each without the same nodes.

    Attributes:
        sets: the nodes that were taken out.
        circuit, model: faithfulness of the circuit, and of the model, without each set.
    """

    sets: tuple[tuple[Sender, ...], ...]
    circuit: tuple[Faithfulness, ...]
    model: tuple[Faithfulness, ...]

    @property
    def incompleteness(self) -> Float[Tensor, " set"]:
        """|F(circuit without K) - F(model without K)| for every K; 0 where the circuit has all that stands in for K."""
        pairs = zip(self.circuit, self.model, strict=True)
        return torch.tensor([abs(of_circuit.value - of_model.value) for of_circuit, of_model in pairs])


def completeness(
    model: AttachedModel,
    circuit: Circuit,
    items: ItemSet,
    sets: Sequence[Sequence[Sender | str]] | None = None,
    outside: Outside = "resample",
    metric: str | Metric | None = None,
    *,
    tokens: int | None = None,
) -> CircuitCompleteness:
    """Whether the model does without some nodes of a circuit what the circuit does without them (Wang et al. 2022).

    A circuit that lacks a back-up falls further than the model when what it backs up is taken out.

    Args:
        sets: nodes to take out together; None is every node of the circuit but the input alone.

    Raises:
        As `run_circuits`; InputError for a node that the model does not have.
    """
    chosen = [[node] for node in circuit.nodes if node != Sender()] if sets is None else sets
    chosen = [chosen] if isinstance(chosen, (str, Sender)) else chosen
    sets_of = ([each] if isinstance(each, (str, Sender)) else each for each in chosen)
    named = [tuple(Sender.parse(node) for node in each) for each in sets_of]
    if not named:
        raise InputError(
            "completeness takes sets of nodes out, and there are none; name some, or give a larger circuit"
        )
    full = Circuit.full(circuit.graph)
    both = [*(circuit.without(*each) for each in named), *(full.without(*each) for each in named)]
    runs = run_circuits(model, both, items, outside, metric, tokens=tokens)
    return CircuitCompleteness(tuple(named), tuple(runs[: len(named)]), tuple(runs[len(named) :]))


def cross_task(
    model: AttachedModel,
    circuits: Mapping[str, Circuit],
    tasks: Mapping[str, ItemSet],
    outside: Outside = "resample",
    *,
    tokens: int | None = None,
) -> dict[tuple[str, str], Faithfulness]:
    """The faithfulness of every circuit on every task, by task and circuit; each normalised on the task's own items.

    Hanna et al., "Are formal and functional linguistic mechanisms dissociated?" (2025): F(task <- circuit). Each task
    is measured with its probe's own metric.
    """
    found: dict[tuple[str, str], Faithfulness] = {}
    for task, items in tasks.items():
        runs = run_circuits(model, list(circuits.values()), items, outside, tokens=tokens)
        found |= {(task, circuit): run for circuit, run in zip(circuits, runs, strict=True)}
    return found
