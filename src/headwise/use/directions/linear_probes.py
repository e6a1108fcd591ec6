"""What a linear probe can tell from each head: heads and directions for inference-time intervention.

    items, labels = statements(hw.encode(hw.probe("facts"), model.tokenizer, n=64))   # answer: true, foil: false
    probed = head_probes(model, items, labels)
    probed.top(48), probed.p("L3H1"), probed.iti()

Li et al. (2023). Per head a logistic regression on z at the last token; heads are ranked by its accuracy on items that
it was not fitted on (a fifth of them). The regression is what scikit-learn's default gives:

    minimise over w, b:   |w|^2 / 2 + C * sum_i log(1 + exp(-y_i (w . z_i + b))),      C = 1, y_i = -1 or 1

by Newton's method in fp64. A head's direction is w, or the difference of the class means, or random; its sigma is the
standard deviation of z along it, over all items.

Accuracies are chosen from many heads on few items, so each is held against a null, which is ours: the same regressions
on permuted labels. `p` is the share of permutations (and the labels as they are) that reach a head's accuracy, and
`p_of_best` corrects for the choice among heads: the share in which any head does.

The two controls are apart: other heads (`iti(heads=...)`, with `headwise.sweep.matched.matched_sets`) and other
directions (`iti(direction="random")`). In the paper's code one switch does both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import scored_sites
from headwise.heads import HeadSet
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe
from headwise.use.directions.inference_time import ITI
from headwise.use.directions.logistic import accuracy, fitted
from headwise.use.intervention import named_heads

HEADS = 48
ALPHA = 15.0
SHARE = 0.2
PERMUTATIONS = 100
TOGETHER = 2**26
"""Numbers of the Hessians that are held at a time."""

Direction = Literal["probe", "mean-difference", "random"]


@dataclass(frozen=True, eq=False)
class HeadProbes:
    """What probes tell from every head.

    Attributes:
        heads: in the order of the head axis.
        accuracy: on the validation items.
        null: the same with permuted labels.
        weights: w of the probe, by head label.
        mean_difference: mean z of true less mean z of false items that it was fitted on, by head label.
        covariance: of z over all items, by head label.
        item_ids: all items; validation: which of them were not fitted on.
    """

    heads: HeadSet
    accuracy: Float[Tensor, " head"]
    null: Float[Tensor, "permutation head"]
    weights: dict[str, Float[Tensor, " head_dim"]]
    mean_difference: dict[str, Float[Tensor, " head_dim"]]
    covariance: dict[str, Float[Tensor, "head_dim head_dim"]]
    item_ids: tuple[str, ...]
    validation: tuple[bool, ...]

    def top(self, k: int = HEADS) -> HeadSet:
        """The k heads of highest validation accuracy; of equals the first. Raises InputError for a k that is none."""
        if not 1 <= k <= len(self.heads):
            raise InputError(f"k={k} heads cannot be chosen of {len(self.heads)}; give 1 to {len(self.heads)}")
        order = sorted(range(len(self.heads)), key=lambda place: (-float(self.accuracy[place]), place))
        return HeadSet(tuple(self.heads.heads[place] for place in order[:k]))

    def p(self, head: str) -> float:
        """Share of permutations, with the labels as they are counted in, in which this head is as accurate."""
        place = self._place(head)
        return (1 + int((self.null[:, place] >= self.accuracy[place]).sum())) / (1 + len(self.null))

    @property
    def p_of_best(self) -> float:
        """Share of permutations, counted likewise, in which some head is as accurate as the best one is."""
        best = self.accuracy.max()
        return (1 + int((self.null.max(1).values >= best).sum())) / (1 + len(self.null))

    def iti(
        self,
        k: int = HEADS,
        *,
        alpha: float = ALPHA,
        direction: Direction = "probe",
        heads: HeadSet | None = None,
        seed: int = 0,
    ) -> ITI:
        """The intervention on the k best heads, or on `heads`.

        Args:
            direction: `probe`, the weights of the regression; `mean-difference`; `random`, the control, by `seed`.

        Raises:
            InputError: heads that were not probed, a k or a direction that is none.
        """
        if direction not in get_args(Direction):
            raise InputError(f"direction={direction!r} is not one of {', '.join(get_args(Direction))}")
        chosen = self.top(k) if heads is None else named_heads(heads, ITI.id)
        places = [self._place(label) for label in chosen.labels]
        generator = torch.Generator().manual_seed(seed)
        drawn = {each: torch.randn(len(self.weights[each]), generator=generator).double() for each in self.heads.labels}
        source = {"probe": self.weights, "mean-difference": self.mean_difference, "random": drawn}[direction]
        theta, sigma = {}, {}
        for label in (self.heads.labels[place] for place in places):
            length = float(source[label].norm())
            if not length:
                raise InputError(f"{label} has no {direction} direction: its z does not differ; leave it out")
            theta[label] = source[label] / length
            sigma[label] = float((theta[label] @ self.covariance[label] @ theta[label]).clamp(min=0).sqrt())
        return ITI({label: value.float() for label, value in theta.items()}, sigma, alpha)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, the best first: head, accuracy, p, and mean and 95th percentile of the null."""
        rows = [
            (
                label,
                float(self.accuracy[self._place(label)]),
                self.p(label),
                *self._null_of(label),
            )
            for label in self.heads.labels
        ]
        table = pd.DataFrame(rows, columns=["head", "accuracy", "p", "null_mean", "null_95"])
        return table.sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)

    def _null_of(self, head: str) -> tuple[float, float]:
        """Mean and 95th percentile; NaN where labels were not permuted."""
        null = self.null[:, self._place(head)]
        return (float(null.mean()), float(null.quantile(0.95))) if len(null) else (math.nan, math.nan)

    def _place(self, head: str) -> int:
        try:
            return self.heads.labels.index(head)
        except ValueError:
            raise InputError(f"{head} was not probed; the probes are of {self.heads}") from None

    def __repr__(self) -> str:
        best = self.top(1).labels[0]
        return (
            f"<probes of {len(self.heads)} heads: best {best}, accuracy {float(self.accuracy.max()):.3f} on "
            f"{sum(self.validation)} items, p {self.p_of_best:.3g} among all heads>"
        )


def statements(items: ItemSet) -> tuple[ItemSet, list[bool]]:
    """Each item twice: with its answer, which is true, and with its first wrong one; prompt and answer are one text.

    Both have the id of the item, and so are never parted by `head_probes`.

    Raises InputError for an item without a foil.
    """
    made: list[EncodedItem] = []
    for each in items:
        if not each.answer or not each.foils:
            raise InputError(f"item {each.id} has no answer or no wrong one, so it makes no statements; use others")
        made += [replace(each, prompt=each.prompt + said, answer=()) for said in (each.answer, each.foils[0])]
    return replace(items, items=tuple(made)), [True, False] * len(items)


def head_probes(
    model: AttachedModel,
    items: ItemSet,
    labels: Sequence[bool],
    *,
    heads: Any = None,
    share: float = SHARE,
    permutations: int = PERMUTATIONS,
    c: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> HeadProbes:
    """Fit a probe on z of every head at the last token of each prompt.

    Args:
        labels: one per item, true or false. Items of one id stay together, in the split and in permutations: where an
            id has both labels, they change places within it.
        heads: in any form; None is all of the main stack.
        share: of ids that are kept for validation.
        permutations: of the null; 0 leaves it out.
        c: the inverse strength of the penalty.
        seed: of the split and the permutations.

    Cost: one forward per item, and a regression per head and permutation.

    Raises:
        InputError: labels that do not fit, of one class, or too few ids for a share; c not above 0.
        Refusal: as `observe`.
    """
    truth = torch.tensor([bool(each) for each in labels])
    if len(truth) != len(items) or not bool(truth.any()) or bool(truth.all()):
        raise InputError(f"labels are {len(truth)} for {len(items)} items; give one each, of both classes")
    if not c > 0 or permutations < 0:
        raise InputError(f"c={c!r} is to be above 0 and permutations={permutations!r} a number of them")
    ids = list(dict.fromkeys(items.ids))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator).tolist()
    aside = {ids[place] for place in order[: round(share * len(ids))]}
    held = torch.tensor([id in aside for id in items.ids])
    for part in (truth[held], truth[~held]):
        if not bool(part.any()) or bool(part.all()):
            raise InputError(
                f"{int(held.sum())} of {len(items)} items are kept for validation, and a part has one class only; "
                "give more items, or another share"
            )
    chosen = named_heads(model.heads([s.label for s in scored_sites(model)] if heads is None else heads), "head_probes")
    z = last_z(model, items, chosen, batch_size=batch_size)
    shuffled = torch.stack([truth, *(_permuted(truth, items.ids, generator) for _ in range(permutations))])
    found = torch.zeros(len(shuffled), len(chosen), dtype=torch.float64)
    weights: dict[str, Tensor] = {}
    difference: dict[str, Tensor] = {}
    covariance: dict[str, Tensor] = {}
    place = 0
    for site in chosen.sites:
        n_heads = len(chosen.at(site))
        x = torch.stack([z[label] for label in chosen.labels[place : place + n_heads]])  # [head, item, head_dim]
        together = max(1, TOGETHER // (n_heads * (x.shape[-1] + 1) ** 2))
        for start in range(0, len(shuffled), together):
            y = shuffled[start : start + together]
            w, b = fitted(x[:, ~held], y[:, ~held], c)
            found[start : start + together, place : place + n_heads] = accuracy(x[:, held], y[:, held], w, b)
            if start == 0:
                weights |= dict(zip(chosen.labels[place : place + n_heads], w[0], strict=True))
        for label, own in zip(chosen.labels[place : place + n_heads], x, strict=True):
            seen, said = own[~held], truth[~held]
            difference[label] = seen[said].mean(0) - seen[~said].mean(0)
            covariance[label] = torch.cov(own.T, correction=0)
        place += n_heads
    return HeadProbes(chosen, found[0], found[1:], weights, difference, covariance, items.ids, tuple(held.tolist()))


def last_z(
    model: AttachedModel, items: ItemSet, heads: HeadSet, *, batch_size: int = 16
) -> dict[str, Float[Tensor, "item head_dim"]]:
    """z of heads at the last token of each prompt, by head label, in fp64 on the CPU. Raises as `observe`."""
    parts: dict[str, list[Tensor]] = {label: [] for label in heads.labels}
    for batch in items.batches(batch_size, answers=False):
        alone = replace(batch, answers=batch.answers[:, :0])
        with torch.no_grad(), model.reading(read.z(heads, queries=[-1])) as got:
            observe(model, alone, wants={"logits"})
        for label in parts:
            parts[label].append(got.z[label][:, -1].double().cpu())
    found = {label: torch.cat(each) for label, each in parts.items()}
    broken = next((label for label, each in found.items() if not bool(each.isfinite().all())), None)
    if broken is not None:
        raise Refusal(f"z of {broken} is not finite, so nothing can be fitted; load the model with dtype='float32'")
    return found


def _permuted(truth: Bool[Tensor, " item"], ids: Sequence[str], generator: torch.Generator) -> Bool[Tensor, " item"]:
    """Labels exchanged within each id that has both, and else between ids of one item each."""
    places: dict[str, list[int]] = {}
    for place, id in enumerate(ids):
        places.setdefault(id, []).append(place)
    groups = [found for found in places.values() if len(found) > 1]
    singles = [found[0] for found in places.values() if len(found) == 1]
    permuted = truth.clone()
    for group in [*groups, *([singles] if singles else [])]:
        order = torch.randperm(len(group), generator=generator)
        permuted[group] = truth[group][order]
    return permuted


__all__ = ["Direction", "HeadProbes", "head_probes", "last_z", "statements"]
