"""Gradient of the loss at a gate on each head.

After Michel, Levy and Neubig (2019), "Are Sixteen Heads Really Better than One?". With xi_h a factor on head h, 1
in the model as it is, and L the loss of one example x,

    I_h = E_x | dL/dxi_h |,      dL/dxi_h = sum_t < z_h[t], dL/dz_h[t] >

One backward gives it for all heads. It is a first-order guess at the size of a knock-out's effect, without its sign.

Settings:

- `per`: `example` is the paper's formula, the absolute value of each example's sum over tokens. `token` is what the
  released code computes: the absolute value is taken at every token, and their sum divided by the number of tokens. The
  two rank heads differently. (The code divides by the tokens of all examples together, here each item is divided by its
  own, so that an item's score is its own; for items of one length the means are the same.)
- `normalise`: divide the scores of each layer by the l2 norm of the layer's mean scores, an option of the code.

L is the cross-entropy of the answer, the mean over its tokens, each predicted from the true ones before it. Exact, but
for the division just named; the loss of the paper is that of its tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from headwise.errors import InputError
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.search import over_batches
from headwise.metrics import Metric, metric
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, refuse_two_sided

Per = Literal["example", "token"]


def gate_gradient(
    model: AttachedModel,
    items: ItemSet,
    *,
    per: Per = "example",
    normalise: bool = False,
    loss: str | Metric = "cross-entropy",
) -> Scored:
    """`gate-gradient`, in units of the loss (nats per token); never negative.

    Raises:
        InputError: an unknown `per`, or a loss that is no metric or has no gradient.
    """
    if per not in get_args(Per):
        raise InputError(f"per={per!r} is not known; choose from {', '.join(get_args(Per))}")
    chosen = loss if isinstance(loss, Metric) else metric(loss)
    if "generation" in chosen.needs or "clean" in chosen.needs:
        raise InputError(f"loss={chosen.id!r} has no gradient here; use cross-entropy or another metric of the logits")
    sites = scored_sites(model)
    heads = model.heads([id.label for id in sites])

    def score(batch: Batch) -> Scored:
        refuse_two_sided(model, batch)
        with _weights_at_rest(model.model), torch.enable_grad(), model.reading(read.gate(heads)) as got:
            losses = chosen(observe(model, batch, wants=chosen.wants, gradients=True))
            if not losses.requires_grad:
                raise InputError(f"loss={chosen.id!r} has no gradient; use cross-entropy or another smooth metric")
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return {id: _reduced(got.gate.grad[id.label], batch, per) for id in sites}

    scored = over_batches(items, score)
    if not normalise:
        return scored
    return {id: values / values.double().mean(0).norm().clamp(min=1e-20) for id, values in scored.items()}


def _reduced(gradient: torch.Tensor, batch: Batch, per: Per) -> torch.Tensor:
    """`[item, position, head]` to `[item, head]`; what stands on padding reaches no answer, so its gradient is 0."""
    gradient = gradient.double()
    if per == "example":
        return gradient.sum(1).abs()
    tokens = torch.tensor([len(each.prompt) + max(len(each.answer) - 1, 0) for each in batch.items])
    return gradient.abs().sum(1) / tokens[:, None].to(gradient)


@contextmanager
def _weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter collects a gradient: only that at z is wanted, and a caller's own `.grad` is left alone."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


METHODS = (
    Method(
        id="gate-gradient",
        title="Size of the loss's gradient at a gate on each head",
        page="methods/gate-gradient.md",
        paper="Michel, Levy and Neubig, Are Sixteen Heads Really Better than One?",
        year=2019,
        tier="B",
        status="exact",
        needs=("z", "gradients", "logits", "answer"),
        cost="1 forward and backward per item, all heads at once",
        probe="ioi",
        score=gate_gradient,
    ),
)
