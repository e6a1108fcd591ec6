"""Rotary position embedding, found by running: which dimensions of q and k turn together, and how fast.

A pair of dimensions (a, b) is turned by its frequency w at every step of position (Su et al., 2021, RoFormer):

    q'_a = q_a cos(w p) - q_b sin(w p),    q'_b = q_b cos(w p) + q_a sin(w p)

Positions count relative to each other alone, so a model whose positions are all moved on by one computes the same
stream, and every q turned by one more step. Frequencies are read from the tables of the model (`inv_freq`); which
dimensions form a pair, and which table a site has, is told by that turn and not by the name of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import Refusal
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.finding.recording import quietly
from headwise.model.running.run import parameter_names

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from the turn, relative to the largest value; the wrong pairs are off by about 1."""

_FOUND: WeakKeyDictionary[AttachedModel, Mapping[SiteId, Rotary]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Rotary:
    """The turning dimensions of q and k at one site.

    Attributes:
        pairs: dimensions of q (and k) that turn together, those with the highest frequency first.
        frequency: radians per position of each pair, falling.
    """

    pairs: Int[Tensor, "pair 2"]
    frequency: Float[Tensor, " pair"]


def rotary_of(model: AttachedModel) -> Mapping[SiteId, Rotary]:
    """The turning dimensions of every site that has any; found by two runs of the probe forward, and remembered.

    Raises:
        Refusal: the model has no table of frequencies or takes no positions, or no site turns by its tables.
        PlanConflict: the model is running.
    """
    if model not in _FOUND:
        with model.unplanned():
            _FOUND[model] = _found(model)
    return _FOUND[model]


def _found(model: AttachedModel) -> dict[SiteId, Rotary]:
    tables = [
        buffer.detach().double().cpu()
        for name, buffer in model.model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1
    ]
    if not tables:
        raise Refusal(f"{model.name} has no rotary embedding with a table of frequencies, so no dimension has one")
    example = model.example
    if "position_ids" not in parameter_names(type(model.model).forward) or "input_ids" not in example:
        raise Refusal(f"{model.name} takes no position_ids, so which dimensions turn cannot be found by moving them")
    attended = example.get("attention_mask", torch.ones_like(example["input_ids"]))
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    seen = [site.label for site in model.sites if site.kind == "self" and site.capabilities["qk"]]
    turned = []
    with quietly(model.model), torch.no_grad():
        for step in (0, 1):
            with model.reading(read.q(seen)) as got:
                model(**{**example, "position_ids": positions + step})
            turned.append({label: got.q[label][attended.bool()].double().cpu() for label in seen})
    tolerance = TOLERANCE.get(model.dtype, 1e-1)
    found = {SiteId.parse(label): _pairs(turned[0][label], turned[1][label], tables, tolerance) for label in seen}
    rotary = {site: each for site, each in found.items() if each is not None}
    if not rotary:
        raise Refusal(f"no site of {model.name} turns q by its table of frequencies when positions are moved")
    return rotary


def _pairs(
    before: Float[Tensor, "token head dim"], after: Float[Tensor, "token head dim"], tables: list[Tensor], within: float
) -> Rotary | None:
    """The pairs and the table by which `after` is `before` one position on; None where there are none."""
    scale = before.abs().max()
    if bool((after - before).abs().max() <= within * 1e-3 * scale):
        return None  # a site without positions
    best, off = None, torch.inf
    for table in tables:
        for pairs in _layouts(2 * len(table), before.shape[-1]):
            one, other = before[..., pairs[:, 0]], before[..., pairs[:, 1]]
            expected = before.clone()
            expected[..., pairs[:, 0]] = one * table.cos() - other * table.sin()
            expected[..., pairs[:, 1]] = other * table.cos() + one * table.sin()
            apart = float((expected - after).abs().max() / scale)
            if apart < off:
                best, off = Rotary(pairs, table), apart
    if best is None or off > within:
        return None
    order = best.frequency.argsort(descending=True, stable=True)
    return Rotary(best.pairs[order], best.frequency[order])


def _layouts(turning: int, width: int) -> Iterator[Int[Tensor, "pair 2"]]:
    """Ways to pair `turning` of `width` dimensions: halves or neighbours, at the beginning or at the end."""
    if turning > width:
        return
    for start in sorted({0, width - turning}):
        dims = torch.arange(start, start + turning)
        yield dims.view(2, -1).T
        yield dims.view(-1, 2)
