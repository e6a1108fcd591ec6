"""Vision tokens pruned per layer and per head, as masks: what a cache could let go of, tried before it is built.

PLPHP ("Per-Layer Per-Head Vision Token Pruning", 2025). With A the patterns, J the n image tokens of the prompt and the
row of the prompt's last token,

    gamma_l = mean_h sum_{j in J} A^{l,h}_{last,j}              how much layer l attends to the picture
    r_l     = r + d where gamma_l >= attentive,  r - d where gamma_l <= indifferent,  r between
    kept    = of each head its top ceil(r_l n) image tokens by A^{l,h}_{last,j}, and all other tokens

and from then on, in every row behind the prompt, the rest is hidden from the head. The prompt itself is read in full.

Reconstruction: no code was to be had; that the last row decides, and that two thresholds tell three classes of layers,
is from accounts of the paper. It has no numbers for r, d and the thresholds that could be confirmed, so none is set
here: without thresholds all layers keep r, and `vision_rates` takes thresholds from items. How many first layers keep
everything is not known either (`intact`, ours: 0).

Query heads that share a key/value head share its cache, so they keep the same tokens: those with the highest attention
in the sum over the group's heads. `vision_cache` says what a cache would be rid of, per group. As masks nothing is
freed, and nothing is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.find.method import scored_sites
from headwise.heads import KVGroup, SiteId
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.model.site import Site
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.use.intervention import Intervention, finite
from headwise.use.looking.paint import BATCH


@dataclass(frozen=True, eq=False, repr=False)
class VisionPruning(Intervention):
    """Hide from each head, behind the prompt, the image tokens that it looked at least: `VisionPruning(0.5)`.

    Attributes:
        rate: r, the share of the image tokens that a layer keeps. 1 without a spread changes nothing.
        spread: d, by how much more or less other layers keep; shares end at 0 and 1.
        attentive, indifferent: thresholds of gamma_l, from 0 to 1; None for no such layers.
        intact: so many first layers keep everything.
    """

    id: ClassVar[str] = "vision-pruning"
    rate: float
    spread: float = 0.0
    attentive: float | None = None
    indifferent: float | None = None
    intact: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "spread", "attentive", "indifferent"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, finite(given, f"{self.id}: {name}", 0.0, 1.0))
        if None not in (self.attentive, self.indifferent) and self.attentive < self.indifferent:  # type: ignore[operator]
            raise InputError(
                f"{self.id}: attentive={self.attentive} lies below indifferent={self.indifferent}; layers above the "
                "first keep more, those below the second less"
            )
        if self.spread and self.attentive is None and self.indifferent is None:
            raise InputError(
                f"{self.id}: spread={self.spread} is for layers past a threshold, and there is none; give attentive= "
                "and indifferent=, or take them from items with vision_rates()"
            )
        if isinstance(self.intact, bool) or not isinstance(self.intact, int) or self.intact < 0:
            raise InputError(f"{self.id}: intact={self.intact!r} is no number of layers; give a whole number from 0 on")

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        if "vision" not in model.table.stacks or model.table.stacks[0] == "vision":
            raise Refusal(f"{self.id}: {model.name} has no image tokens in a prompt; load a model that sees")
        pruned = [site for site in _layers(model) if site.layer >= self.intact]
        if not pruned:
            raise InputError(f"{self.id}: intact={self.intact} leaves {model.name} no layer to prune; give a lower one")
        if self.rate == 1 and (self.spread == 0 or self.indifferent is None):
            return ()
        return tuple(
            edit.block(site.label, keys=edit.last_row(partial(self._dropped, model.table.site(site))), scope="decode")
            for site in pruned
        )

    def rate_at(self, gamma: Float[Tensor, " *row"]) -> Float[Tensor, " *row"]:
        """r_l, the share that layers with such a gamma_l keep."""
        less = gamma <= (-1.0 if self.indifferent is None else self.indifferent)
        more = ~less & (gamma >= (math.inf if self.attentive is None else self.attentive))
        rate = torch.full_like(gamma, self.rate)
        return (rate + self.spread * more - self.spread * less).clamp(0.0, 1.0)

    def _dropped(self, site: Site, row: Float[Tensor, "batch head key"], here: Here) -> Bool[Tensor, "batch head key"]:
        assert here.window is not None
        frame = here.window.key_frame
        image = here.window.keys(frame.span("image") & frame.mask)
        assert image is not None
        kept = kept_tokens(row, image, self.rate_at(vision_attention(row, image)), site.group_size)
        return image[:, None] & ~kept.repeat_interleave(site.group_size, dim=1)


def vision_attention(row: Float[Tensor, "batch head key"], image: Bool[Tensor, "batch key"]) -> Float[Tensor, " batch"]:
    """gamma_l of one layer."""
    return (row.double() * image[:, None]).sum(-1).mean(-1)


def kept_tokens(
    row: Float[Tensor, "batch head key"],
    image: Bool[Tensor, "batch key"],
    rate: Float[Tensor, " batch"],
    group_size: int = 1,
) -> Bool[Tensor, "batch group key"]:
    """The image tokens that each key/value head keeps: of n, ceil(rate n) by the attention of its query heads.

    Args:
        row: the row of the last token of the prompt.
        image: the image tokens among the keys.
        rate: share kept in each row of the batch.
        group_size: query heads per key/value head.
    """
    of_group = row.double().reshape(len(row), -1, group_size, row.shape[-1]).sum(2).masked_fill(~image[:, None], -1.0)
    place = of_group.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    count = (rate.double() * image.sum(-1) - 1e-9).ceil()  # 0.1 times 30 is 3, whatever doubles make of it
    kept: Tensor = image[:, None] & (place < count[:, None, None])
    return kept


@dataclass(frozen=True)
class GroupCache:
    """What one key/value head holds of a picture's tokens, in the mean over prompts.

    Attributes:
        group: the key/value head.
        vision_attention: gamma_l of its layer.
        image_tokens, kept: how many there are, and how many it keeps.
        bytes_held, bytes_freed: of keys and values: of the whole prompt, and of the image tokens it drops.
    """

    group: KVGroup
    vision_attention: float
    image_tokens: float
    kept: float
    bytes_held: float
    bytes_freed: float


def vision_cache(model: AttachedModel, items: ItemSet, pruning: VisionPruning) -> tuple[GroupCache, ...]:
    """What a cache of its own for each key/value head would be rid of under `pruning`, in the mean over the prompts.

    One forward per item. Bytes are those of the model's dtype and of a cache that holds every token; a layer with a
    sliding window holds less.

    Raises:
        InputError: an item without a picture.
        Refusal: as `pruning` does on this model.
    """
    pruning.edits(model)
    itemsize = torch.empty((), dtype=model.dtype).element_size()
    sums: dict[KVGroup, Tensor] = {}
    for site, rows, image, tokens in _last_rows(model, items):
        found = model.table.site(site)
        gamma = vision_attention(rows, image)
        rate = torch.ones_like(gamma) if site.layer < pruning.intact else pruning.rate_at(gamma)
        kept = kept_tokens(rows, image, rate, found.group_size).sum(-1).double()
        width = (found.qk_dim + found.head_dim) * itemsize
        count = image.sum(-1).double()
        for group in range(found.n_kv_heads):
            freed = (count - kept[:, group]) * width
            total = torch.stack([gamma, count, kept[:, group], tokens * width, freed], dim=-1).sum(0)
            member = KVGroup(site, group)
            sums[member] = sums.get(member, torch.zeros_like(total)) + total
    return tuple(GroupCache(group, *(sums[group] / len(items)).tolist()) for group in sorted(sums))


def vision_rates(
    model: AttachedModel, items: ItemSet, rate: float, spread: float, *, share: float = 1 / 3, intact: int = 0
) -> VisionPruning:
    """A pruning whose thresholds leave `share` of the layers above the one and as many below the other.

    Thresholds are quantiles of the layers' mean gamma over the items (a reconstruction); judge it on other items.

    Raises:
        InputError: a share that leaves no layer between; an item without a picture.
    """
    if not 0 < share <= 0.5:
        raise InputError(
            f"share={share!r} is no share of the layers at either end; give a number above 0 and up to 0.5"
        )
    gammas: dict[SiteId, list[Tensor]] = {}
    for site, rows, image, _ in _last_rows(model, items):
        if site.layer >= intact:
            gammas.setdefault(site, []).append(vision_attention(rows, image))
    if not gammas:
        raise InputError(f"intact={intact} leaves {model.name} no layer to prune; give a lower one")
    means = torch.stack([torch.cat(parts).mean() for parts in gammas.values()])
    low, high = torch.quantile(means, torch.tensor([share, 1 - share], dtype=means.dtype)).tolist()
    return VisionPruning(rate, spread, attentive=high, indifferent=low, intact=intact)


def _layers(model: AttachedModel) -> tuple[SiteId, ...]:
    return tuple(site for site in scored_sites(model) if model.table.site(site).kind == "self")


def _last_rows(model: AttachedModel, items: ItemSet) -> Iterator[tuple[SiteId, Tensor, Tensor, Tensor]]:
    """Of every layer and batch: the rows of the last tokens, which keys are of pictures, and how many there are."""
    if without := next((each.id for each in items if "image" not in each.spans), None):
        raise InputError(f"item {without} of {items.probe} has no picture; use a probe of pictures")
    sites = _layers(model)
    for batch in items.batches(BATCH, answers=False):
        image = torch.zeros(len(batch.items), batch.prompt_length, dtype=torch.bool)
        for row, columns in enumerate(places(model, batch).spans["image"]):
            image[row, columns] = True
        last = read.rows([site.label for site in sites], queries=[batch.prompt_length - 1])
        with torch.no_grad(), model.reading(last) as got:
            observe(model, replace(batch, answers=batch.answers[:, :0]), wants={"logits"})
        tokens = batch.attention_mask.sum(1).double()
        for site in sites:
            yield site, got.rows[site.label][:, :, 0].cpu(), image, tokens


INTERVENTIONS = (
    InterventionEntry(
        id=VisionPruning.id,
        title="Hide from each head the image tokens that it looked at least, per layer and head",
        page="use/looking.md#vision-pruning",
        paper="PLPHP, Per-Layer Per-Head Vision Token Pruning",
        year=2025,
        tier="C",
        status="reconstruction",
        cost="1 forward; rows behind the prompt recomputed in all pruned layers",
        made=VisionPruning,
    ),
)

__all__ = [
    "INTERVENTIONS",
    "GroupCache",
    "VisionPruning",
    "kept_tokens",
    "vision_attention",
    "vision_cache",
    "vision_rates",
]
