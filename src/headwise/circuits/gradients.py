"""Gradients of a metric at the parts of a model, between the clean and the corrupted run of items.

The ends are the item ("clean") and the item with its twin's prompt in place ("corrupted"). `points` says between which
of them, and with what put in place, gradients are taken; their weighted sum stands for the gradient on the way from one
end to the other:

    eap                   at the clean run (Nanda 2023; Syed, Rager and Conmy 2023)
    clean-corrupted       half at the clean and half at the corrupted run
    eap-ig-inputs         m runs on the way of the input: x_corr + (k/m) (x_clean - x_corr) enters the first block, and
                          all behind it follows (Hanna, Pezzelle and Belinkov 2024)
    eap-ig-activations    m runs for every site and every feed-forward part: its own output on the way, what is behind
                          it follows; each serves the senders that it moves (after Marks et al. 2024)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.circuits.taps import Place, Taps
from headwise.circuits.tracing import Origin, Traced, contribution
from headwise.circuits.twins import corrupted, patchable_metric
from headwise.errors import InputError
from headwise.metrics import Metric
from headwise.model.at_rest import weights_at_rest
from headwise.model.stream import WritesOfRun
from headwise.probes.batch import Batch, pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, observe, refuse_two_sided

Method = Literal["eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"]


@dataclass(frozen=True, eq=False)
class Point:
    """One run at which gradients are taken.

    Attributes:
        corrupted: whether the twins run, and not the items.
        put: what is put in place.
        weight: share of this run in the sum.
        origins: the senders that it is for.
    """

    corrupted: bool
    put: dict[Place, Tensor]
    weight: float
    origins: tuple[Origin, ...]


@dataclass(frozen=True, eq=False)
class End:
    """The items, or their twins, as they run: what stood at every tap, and the metric."""

    batch: Batch
    taps: Taps
    run: WritesOfRun
    outcome: Outcome
    metric: Float[Tensor, " item"]


@dataclass(frozen=True, eq=False)
class Ends:
    """The two runs of a batch of items; made by `ends_of`."""

    traced: Traced
    chosen: Metric
    clean: End
    corrupted: End

    @property
    def attended(self) -> Bool[Tensor, "item column"]:
        return self.clean.batch.attention_mask.bool().to(self.traced.model.device)

    def difference(self, place: Place) -> Tensor:
        """Corrupted less clean, in fp32 at least; 0 on padding."""
        clean, corrupted = self.clean.taps.value(place), self.corrupted.taps.value(place)
        wide = torch.promote_types(clean.dtype, torch.float32)
        return self.on_tokens(corrupted.to(wide) - clean.to(wide))

    def written(self, origin: Origin) -> Float[Tensor, "item column sender d_model"]:
        """What the senders of an origin add to the stream, corrupted less clean; 0 on padding."""
        clean, corrupted = (contribution(end.taps, end.run, origin.place) for end in (self.clean, self.corrupted))
        return self.on_tokens(corrupted - clean)

    def between(self, place: Place, share: float) -> Tensor:
        """On the straight line from the corrupted value (share 0) to the clean one (1)."""
        clean, corrupted = self.clean.taps.value(place), self.corrupted.taps.value(place)
        wide = torch.promote_types(clean.dtype, torch.float32)
        return (corrupted.to(wide) + share * (clean.to(wide) - corrupted.to(wide))).to(clean)

    def on_tokens(self, x: Tensor) -> Tensor:
        """Without what stands on padding, which may be no number."""
        mask = self.attended
        return x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), 0.0)

    def points(self, method: Method, steps: range) -> Iterator[Point]:
        """The runs of a method; see the top of this file. `steps` are the k of the interpolations."""
        origins = self.traced.origins
        if method in ("eap", "clean-corrupted"):
            weight = 1.0 if method == "eap" else 0.5
            yield Point(False, {}, weight, origins)
            if method == "clean-corrupted":
                yield Point(True, {}, weight, origins)
            return
        m = len(steps)
        for moved in [origins[0]] if method == "eap-ig-inputs" else origins:
            for k in steps:
                for_these = origins if method == "eap-ig-inputs" else (moved,)
                yield Point(False, {moved.place: self.between(moved.place, k / m)}, 1 / m, for_these)

    def run_at(self, point: Point, places: Sequence[Place]) -> tuple[Taps, Float[Tensor, " item"]]:
        """A run with gradients by what stands at `places`, and the metric in its graph.

        Raises:
            InputError: the metric has no gradient.
        """
        model = self.traced.model
        taps = Taps(places, point.put)
        batch = (self.corrupted if point.corrupted else self.clean).batch
        with weights_at_rest(model.model), torch.enable_grad(), taps.open(model):
            values = self.value(observe(model, batch, wants=self.chosen.wants, gradients=True))
        if not values.requires_grad:
            raise InputError(f"metric {self.chosen.id} has no gradient; use logit-difference or another smooth metric")
        return taps, values

    def value(self, outcome: Outcome) -> Float[Tensor, " item"]:
        return self.chosen(outcome, self.clean.outcome if "clean" in self.chosen.needs else None)


def ends_of(
    traced: Traced, items: ItemSet, chosen: Metric, part: Sequence[EncodedItem], besides: Sequence[Place] = ()
) -> Ends:
    """The clean and the corrupted run of some items, without gradients; `besides` is tapped beside the senders."""
    model = traced.model
    places = [*(origin.place for origin in traced.origins), *besides]
    ends: list[End] = []
    for each in (part, [corrupted(item) for item in part]):
        batch = pad(each, items.pad, items.suffix, answers=True)
        refuse_two_sided(model, batch)
        taps = Taps(places)
        with torch.no_grad(), traced.writes.recording() as run, taps.open(model):
            outcome = observe(model, batch, wants=chosen.wants)
        clean = ends[0].outcome if ends else outcome
        values = chosen(outcome, clean if "clean" in chosen.needs else None)
        ends.append(End(batch, taps, run, outcome, values.detach().double().cpu()))
    return Ends(traced, chosen, ends[0], ends[1])


def differentiable_metric(items: ItemSet, chosen: str | Metric | None) -> Metric:
    """The metric, that of the probe for None. Raises InputError for one that is not of logits."""
    found = patchable_metric(items, chosen)
    if found.wants != {"logits"}:
        raise InputError(f"metric {found.id} is not of the logits; use logit-difference or another metric of these")
    return found
