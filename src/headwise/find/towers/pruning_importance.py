"""What a vision model loses with each head of its tower: knock-outs judged by four measures.

After Li et al. (2023), "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt". z of one head is
set to 0 at all tokens. With p the softmax of the logits, y the true class, f the feature of the picture, and a prime
for the run without the head,

    probability   p(y) - p'(y)                                    -1 to 1
    accuracy      [argmax p = y] - [argmax p' = y]                -1, 0 or 1
    divergence    JS(p, p'), in nats                              0 to ln 2
    feature       1 - cos(f, f')                                  0 to 2

f is the residual stream behind the tower's last block, before any norm: at the first token where that is CLS, else the
mean of the patches. High means that the head matters. With `leave="one-in"` a head is judged by what it brings back
where all the others of its layer are taken out: the measure without the layer, less the measure with this head alone.

A reconstruction: the paper has several pruning-based scores and no formula of them was to be had. `accuracy` and
`probability` need labels, and they and `divergence` logits of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from headwise.errors import InputError, Refusal
from headwise.find.method import LibraryMethod
from headwise.find.towers.tower import Given, Inputs, grid_of, on_device, scores_of, shape_of, sites_of
from headwise.heads import Head, HeadSet, SiteId
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.site import Site
from headwise.scores import HeadScores, Provenance

Leave = Literal["one-out", "one-in"]
ROWS = 64
"""Rows of one forward: pictures times knock-outs."""


@dataclass(frozen=True, eq=False)
class PruningImportance:
    """Four measures of the same knock-outs, as scores of the tower's heads.

    Attributes:
        feature: of the picture's feature.
        divergence: of the class probabilities; None where the model gives no logits of classes.
        probability, accuracy: of the true class; None without such logits or labels.
    """

    feature: HeadScores
    divergence: HeadScores | None
    probability: HeadScores | None
    accuracy: HeadScores | None


def pruning_importance(
    model: AttachedModel,
    pictures: Given,
    labels: Int[Tensor, " item"] | Sequence[int] | None = None,
    *,
    leave: Leave = "one-out",
    stack: str | None = None,
    beside: Mapping[str, Tensor] | None = None,
    rows: int = ROWS,
) -> PruningImportance:
    """Take every head of a vision tower out, one at a time, and measure what changes.

    Args:
        pictures: `pixel_values` `[item, 3, row, column]`, or a mapping of all inputs.
        labels: the true class of every picture, an index into the logits.
        leave: `one-out` zeroes one head; `one-in` all heads of its layer but one.
        stack: the tower; `vision`, or the main stack, if left out.
        beside: inputs that all batches share: the texts that a CLIP's pictures are sorted by.
        rows: most rows of one forward, pictures times knock-outs.

    Raises:
        InputError: labels that are not one per picture, or no class; no such stack or setting.
        Refusal: a tower that packs its pictures, or z or residual stream out of reach.
    """
    if leave not in get_args(Leave):
        raise InputError(f"leave={leave!r} is no setting; choose one of {', '.join(get_args(Leave))}")
    if rows < 1:
        raise InputError(f"rows={rows!r} is no number of rows; give 1 or more")
    inputs = Inputs.of(model, pictures, beside)
    sites = sites_of(model, stack, needs=("z",))
    truth = _labels(labels, len(inputs))
    runs = _Runs(model, inputs, sites, rows)
    clean = runs.clean()
    if truth is not None and clean.logits is not None and int(truth.max()) >= clean.logits.shape[1]:
        raise InputError(f"labels go up to {int(truth.max())}, and {model.name} gives {clean.logits.shape[1]} classes")
    heads = [Head(site.id, index) for site in sites for index in range(site.n_heads)]
    sets = [HeadSet((head,)) for head in heads]
    if leave == "one-in":
        layers = [site.heads for site in sites]
        sets = [layer - HeadSet((head,)) for layer in layers for head in layer] + layers
    losses = [_loss(clean, seen, truth) for seen in runs.under(sets)]
    if leave == "one-in":
        empty = dict(zip([site.id for site in sites], losses[len(heads) :], strict=True))
        losses = [empty[head.site].less(loss) for head, loss in zip(heads, losses, strict=False)]
    about = model.provenance("pruning-importance", {"leave": leave, "stack": sites[0].id.stack})
    by = {name: _scores(inputs.ids, heads, losses, name, about) for name in MEASURES}
    feature = by["feature"]
    assert feature is not None
    return PruningImportance(feature, by["divergence"], by["probability"], by["accuracy"])


MEASURES = ("feature", "divergence", "probability", "accuracy")


@dataclass(frozen=True, eq=False)
class Seen:
    """What a run made of every picture: its feature, and its logits of classes, if it gives any. fp32, on the CPU."""

    feature: Float[Tensor, "item d_model"]
    logits: Float[Tensor, "item label"] | None


@dataclass(frozen=True, eq=False)
class Loss:
    """What a knock-out costs every picture, by each measure."""

    feature: Float[Tensor, " item"]
    divergence: Float[Tensor, " item"] | None
    probability: Float[Tensor, " item"] | None
    accuracy: Float[Tensor, " item"] | None

    def less(self, other: Loss) -> Loss:
        def difference(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            return None if mine is None else mine - theirs

        return Loss(*(difference(name) for name in MEASURES))


@dataclass(frozen=True, eq=False)
class _Runs:
    model: AttachedModel
    inputs: Inputs
    sites: Sequence[Site]
    rows: int

    def clean(self) -> Seen:
        parts = [self._seen(items, [HeadSet()]) for items in self.inputs.batches(self.rows)]
        return _joined([part for (part,) in parts])

    def under(self, sets: Sequence[HeadSet]) -> Iterator[Seen]:
        """What is seen with each set of heads zeroed. Pictures and sets share forwards."""
        size = min(self.rows, len(self.inputs))
        together = self.rows // size
        for first in range(0, len(sets), together):
            chunk = sets[first : first + together]
            parts = [self._seen(items, chunk) for items in self.inputs.batches(size)]
            yield from (_joined([part[place] for part in parts]) for place in range(len(chunk)))

    def _seen(self, items: slice, sets: Sequence[HeadSet]) -> list[Seen]:
        """The items once for each set, all in one forward."""
        given, n = self.inputs.rows(items), items.stop - items.start
        repeated = {
            name: value if name in self.inputs.shared else value.repeat(len(sets), *[1] * (value.dim() - 1))
            for name, value in given.items()
        }
        edits = [edit.zero(heads, rows=range(place * n, (place + 1) * n)) for place, heads in enumerate(sets) if heads]
        last = self.sites[-1].id
        asked = read.residual(SiteId(stack=last.stack, layer=last.layer).label)
        with torch.no_grad(), self.model.reading(asked) as got:
            if edits:
                with self.model.editing(*edits):
                    output = self.model(**on_device(self.model, repeated))
            else:
                output = self.model(**on_device(self.model, repeated))
        stream = got.residual_post[asked.heads]
        if len(stream) != n * len(sets):
            raise Refusal(
                f"the tower of {self.model.name} has a residual stream of {len(stream)} rows for {n * len(sets)} "
                "pictures: it packs them, so they have no rows to be taken out in"
            )
        grid = grid_of(shape_of(self.model, self.sites[0], given, stream.shape[1]), stream.shape[1])
        feature = (stream[:, 0] if grid.before else stream.mean(dim=1)).float().cpu()
        logits = _of_classes(output, n * len(sets))
        parts = [slice(place * n, (place + 1) * n) for place in range(len(sets))]
        return [Seen(feature[part], None if logits is None else logits[part]) for part in parts]


def _of_classes(output: Any, rows: int) -> Float[Tensor, "item label"] | None:
    """Logits of classes, or of the texts of two towers; a language model's are of tokens."""
    for name in ("logits_per_image", "logits"):
        logits = getattr(output, name, None)
        if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == rows and logits.shape[1] > 1:
            return logits.float().cpu()
    return None


def _joined(parts: Sequence[Seen]) -> Seen:
    logits = [part.logits for part in parts if part.logits is not None]
    return Seen(torch.cat([part.feature for part in parts]), torch.cat(logits) if logits else None)


def _loss(clean: Seen, without: Seen, labels: Int[Tensor, " item"] | None) -> Loss:
    # Half the squared distance of the directions is 1 - cos, and is 0 where nothing changed.
    one, two = (normalize(seen.feature.double(), dim=-1) for seen in (clean, without))
    feature = (one - two).square().sum(-1) / 2
    if clean.logits is None or without.logits is None:
        return Loss(feature, None, None, None)
    before, after = (logits.double().softmax(-1) for logits in (clean.logits, without.logits))
    divergence = jensen_shannon(before, after)
    if labels is None:
        return Loss(feature, divergence, None, None)
    true = labels[:, None]
    probability = (before.gather(1, true) - after.gather(1, true))[:, 0]
    right = [(seen.argmax(-1) == labels).double() for seen in (before, after)]
    return Loss(feature, divergence, probability, right[0] - right[1])


def jensen_shannon(p: Float[Tensor, "*item label"], q: Float[Tensor, "*item label"]) -> Float[Tensor, "*item"]:
    """Jensen-Shannon divergence in nats, 0 to ln 2."""
    middle = (p + q) / 2

    def relative(one: Tensor) -> Tensor:
        return (torch.xlogy(one, one) - torch.xlogy(one, middle)).sum(-1)

    return ((relative(p) + relative(q)) / 2).clamp(min=0)


def _labels(labels: Int[Tensor, " item"] | Sequence[int] | None, items: int) -> Int[Tensor, " item"] | None:
    if labels is None:
        return None
    found = torch.as_tensor(labels)
    if found.shape != (items,) or found.is_floating_point() or int(found.min()) < 0:
        raise InputError(f"labels of shape {list(found.shape)} and dtype {found.dtype}; give {items} class numbers")
    return found.long().cpu()


def _scores(
    ids: Sequence[str], heads: Sequence[Head], losses: Sequence[Loss], name: str, about: Provenance
) -> HeadScores | None:
    if getattr(losses[0], name) is None:
        return None
    by_site: dict[SiteId, list[Tensor]] = {}
    for head, loss in zip(heads, losses, strict=False):
        by_site.setdefault(head.site, []).append(getattr(loss, name))
    made = replace(about, settings={**about.settings, "measure": name})
    return scores_of(ids, {site: torch.stack(columns, dim=1) for site, columns in by_site.items()}, made)


METHODS = (
    LibraryMethod(
        id="pruning-importance",
        title="What a vision model loses with each head of its tower",
        page="towers.md#pruning-importance",
        paper="How Does Attention Work in Vision Transformers?",
        year=2023,
        tier="B",
        status="reconstruction",
        needs=("z", "pictures"),
        cost="1 forward per picture and head, and 1 without",
        call="headwise.find.towers.pruning_importance(model, pixel_values, labels)",
    ),
)
