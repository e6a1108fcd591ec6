"""PAINT: the next token looks harder at two sorts of image tokens, which the vision tower itself points out.

Arif et al., 2025, "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of LVLM" (code: hasanar1f/PAINT).
Of each picture, with a^l_j the attention that [CLS] pays to patch j in layer l of the tower, summed over heads, n
patches and L layers,

    summary = the patches with a^{L-2}_j above Q3 + 1.5 (Q3 - Q1)        outliers of the last layer but one
    local   = the top n / 4 of a^0_j, less the summary

and in the language model, in the row of the last token of the prompt and in every row after it,

    s_j <- s_j + alpha w_h |s_j|    for j in local          s_j <- s_j + beta w_h |s_j|    for j in summary

alpha = 0.7, beta = 0.3, in all layers from the third on: the settings of the released evaluation of captions. That code
raises all heads alike, w_h = 1, which is the default here. The paper's text speaks of heads by their sensitivity to the
picture and gives no rule; `visual_sensitivity` is a reconstruction: w_h is the head's attention to the picture over
that of the mean head.

The size of a score counts: a number added to a whole row, which attention does not see, changes what PAINT does. Scores
are those of the kernel, with the position's part in them.

Where a picture's tokens are fewer than the patches, as in Gemma 3, SmolVLM or Qwen2-VL, a token has the mean of its
patches; a tower without [CLS] (SigLIP, Qwen) has the mean over all its rows in place of that one. Both are
reconstructions. A tile of a picture counts as a picture. The released code marks by the first picture of a batch; here
every row has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.find.last_row import last_row_masses
from headwise.find.method import scored_sites
from headwise.heads import HeadSet, SiteId
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.probes.encoding import ItemSet
from headwise.use.intervention import Intervention, finite
from headwise.use.scaling import by_head, heads_and_numbers

LOCAL, SUMMARY = 1, 2
"""What a token is marked with; 0 is neither."""
FIRST_LAYER = 2
BATCH = 16

Merging = Literal["grid", "runs"]
"""How patches become a token: squares of the grid of patches, or as many one after the other."""


MOST_BESIDE = 8
"""Tokens that a tower may have beside its patches: a class token, registers. More of them are patches left out."""


@dataclass(frozen=True, eq=False, repr=False)
class PAINT(Intervention):
    """Raise the attention of the next token to what the vision tower finds telling: `with PAINT()(model): ...`.

    Attributes:
        heads: the heads; None for all from layer `first_layer` on. Or a mapping from label to sensitivity.
        alpha: for local tokens; beta: for summary tokens. Both 0 change nothing.
        sensitivity: w_h: one number, or by head label.
        local: share of the patches that the local ones are chosen from.
        first_layer: with `heads=None`, the first layer of the language model that is changed.
    """

    id: ClassVar[str] = "paint"
    heads: HeadSet | None = None
    alpha: float = 0.7
    beta: float = 0.3
    sensitivity: float | Mapping[str, float] = 1.0
    local: float = 0.25
    first_layer: int = FIRST_LAYER

    def __post_init__(self) -> None:
        if self.heads is not None:
            heads, weights = heads_and_numbers(self.heads, self.sensitivity, f"{self.id}: sensitivity")
            object.__setattr__(self, "heads", heads)
            weights = by_head(weights, heads, f"{self.id}: sensitivity")
            for each in weights.values() if isinstance(weights, Mapping) else (weights,):
                finite(each, f"{self.id}: sensitivity", 0.0)
            object.__setattr__(self, "sensitivity", weights)
        elif isinstance(self.sensitivity, Mapping):
            raise InputError(f"{self.id}: sensitivity by head goes with these heads; give the mapping as heads=")
        else:
            object.__setattr__(self, "sensitivity", finite(self.sensitivity, f"{self.id}: sensitivity", 0.0))
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, finite(getattr(self, name), f"{self.id}: {name}", 0.0))
        object.__setattr__(self, "local", finite(self.local, f"{self.id}: local", 0.0, 1.0))
        if isinstance(self.first_layer, bool) or not isinstance(self.first_layer, int) or self.first_layer < 0:
            raise InputError(f"{self.id}: first_layer={self.first_layer!r} is no layer; give a whole number from 0 on")

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = self._heads(model)
        first, later = _tower(model)
        merging = _merging(model)
        if self.alpha == self.beta == 0:
            return ()
        seen = _Seen(self, merging)
        reads = (
            read.rows(first.label, reduce=seen.look_first, name="paint_first"),
            read.rows(later.label, reduce=seen.look_later, name="paint_later"),
        )
        return (replace(edit.bias(heads, seen.boost, keys="span:image", scope="last"), reads=reads),)

    def _heads(self, model: AttachedModel) -> HeadSet:
        if self.heads is not None:
            return model.heads(self.heads)
        sites = [site for site in scored_sites(model) if site.layer >= self.first_layer]
        if not sites:
            raise InputError(
                f"{self.id}: {model.name} has no layer {self.first_layer}; give a first_layer that it has, from 0 on"
            )
        return model.heads(sites)

    def _weights(self, names: Sequence[str]) -> list[float]:
        given = self.sensitivity
        return [given[name] if isinstance(given, Mapping) else given for name in names]


def visual_sensitivity(model: AttachedModel, items: ItemSet, first_layer: int = FIRST_LAYER) -> dict[str, float]:
    """w_h by head label: the mean mass that the last token of the prompts gives to the picture, over the mean head's.

    `PAINT(visual_sensitivity(model, items))` is on the heads from layer `first_layer` on. To judge it take other items
    than these.

    Raises:
        InputError: an item without a picture; no such layer; no head attends to a picture.
        Refusal: prompts are not read as one text that goes on.
    """
    if without := next((each.id for each in items if "image" not in each.spans), None):
        raise InputError(f"item {without} of {items.probe} has no picture; use a probe of pictures")
    masses: dict[SiteId, list[Tensor]] = {}
    for batch in items.batches(BATCH, answers=False):
        prompts = replace(batch, answers=batch.answers[:, :0])
        found = last_row_masses(
            model, prompts, lambda each: [[position for place in each.spans["image"] for position in place]]
        )
        for site, mass in found.items():
            if site.layer >= first_layer:
                masses.setdefault(site, []).append(mass[..., 0])
    if not masses:
        raise InputError(f"{model.name} has no layer {first_layer}; give a first_layer that it has, from 0 on")
    means = {site: torch.cat(parts).mean(0) for site, parts in masses.items()}
    of_all = float(torch.cat([*means.values()]).mean())
    if of_all == 0:
        raise InputError(f"no head of {model.name} attends to the pictures, so none is more sensitive to them")
    return {f"{site.label}H{head}": float(m) / of_all for site, mean in means.items() for head, m in enumerate(mean)}


def informed_tokens(
    first: Float[Tensor, " token"], later: Float[Tensor, " token"], local: float = 0.25
) -> Int[Tensor, " token"]:
    """1 at the local tokens of a picture, 2 at its summary tokens, 0 elsewhere.

    Args:
        first, later: attention of [CLS] to each token, in the first layer of the tower and in the last but one.
        local: share of the tokens with the highest `first`, rounded down.
    """
    marks = torch.zeros(len(first), dtype=torch.long)
    marks[first.topk(int(len(first) * local)).indices] = LOCAL
    marks[outliers(later)] = SUMMARY
    return marks


def outliers(values: Float[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Above the third quartile by more than 1.5 times the distance of the quartiles."""
    low, high = torch.quantile(values.double(), torch.tensor([0.25, 0.75], dtype=torch.float64, device=values.device))
    beyond: Tensor = values > high + 1.5 * (high - low)
    return beyond


def of_tokens(patches: Float[Tensor, " patch"], count: int, merging: Merging) -> Float[Tensor, " token"]:
    """The mean over the patches of each of a picture's `count` tokens.

    Raises:
        Refusal: the patches do not make so many tokens.
    """
    each = len(patches) // max(count, 1)
    if count < 1 or each * count != len(patches):
        raise Refusal(
            f"{len(patches)} patches do not make {count} image tokens in one way; PAINT is not for this model"
        )
    if merging == "runs" or each == 1:
        return patches.reshape(count, each).mean(1)
    side, block = math.isqrt(len(patches)), math.isqrt(each)
    if side**2 != len(patches) or block**2 != each:
        raise Refusal(f"{len(patches)} patches in {count} image tokens are no squares of a grid; PAINT is not for them")
    squares = patches.reshape(side // block, block, side // block, block)
    means: Tensor = squares.mean(dim=(1, 3))
    return means.flatten()


class _Seen:
    """What the tower showed of the pictures of the latest forward that had some, and the marks made of it."""

    def __init__(self, settings: PAINT, merging: Merging) -> None:
        self.settings, self.merging = settings, merging
        self.first: list[Tensor] = []
        self.later: list[Tensor] = []
        self.marks: Tensor | None = None  # [row, column]

    def look_first(self, rows: Float[Tensor, "picture head patch patch"]) -> None:
        if self.marks is not None:  # the pictures of another prompt
            self.first, self.later, self.marks = [], [], None
        self.first += _looked_at(rows)

    def look_later(self, rows: Float[Tensor, "picture head patch patch"]) -> None:
        self.later += _looked_at(rows)

    def boost(self, scores: Float[Tensor, "batch head query key"], here: Here) -> Tensor:
        if here.window is None:
            raise Refusal(f"{PAINT.id}: key columns cannot be told at {here.label}; leave its heads out")
        frame = here.window.key_frame
        if self.marks is None:
            self.marks = self._marked(frame.span("image")).to(scores.device)
        if len(self.marks) != frame.batch:
            raise Refusal(
                f"{PAINT.id}: the prompt had {len(self.marks)} rows, and the run goes on with {frame.batch}; use a way "
                "to generate that keeps its rows"
            )
        marks = here.window.keys(pad(self.marks, (0, max(0, frame.total - self.marks.shape[1]))))
        assert marks is not None
        amount = self.settings.alpha * (marks == LOCAL) + self.settings.beta * (marks == SUMMARY)
        weights = scores.new_tensor(self.settings._weights(here.names))
        return amount.to(scores)[:, None, None] * weights[:, None, None] * scores.abs()

    def _marked(self, image: Bool[Tensor, "row column"]) -> Int[Tensor, "row column"]:
        """Tokens of pictures in the order of the rows are those that the tower saw, in its order."""
        counts = image.sum(1).tolist()
        patches, tokens = sum(shown.shape[1] for shown in self.first), sum(counts)
        if not self.first or not tokens:
            raise Refusal(
                f"{PAINT.id}: no picture came by the vision tower in this run; give the prompt with its picture to "
                "generate(), or in one forward"
            )
        sizes = [shown.shape[1] for shown in self.first]
        beside = sizes[0] % (tokens // len(sizes)) if len({*sizes}) == 1 and tokens % len(sizes) == 0 else 0
        if beside > MOST_BESIDE:
            beside = 0
        each, rest = divmod(patches - beside * len(sizes), tokens)
        if rest or each == 0:
            raise Refusal(
                f"{PAINT.id}: the vision tower saw {patches} patches, and the prompts have {tokens} image tokens, so "
                "which belongs to which is not known; PAINT is not for this model"
            )
        marked = [self._picture(*shown, beside, each) for shown in zip(self.first, self.later, strict=True)]
        ends = [0, *torch.tensor(list(map(len, marked))).cumsum(0).tolist()]
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        if not {*starts} <= {*ends}:
            raise Refusal(f"{PAINT.id}: a picture's tokens stand in two rows; give every row its own pictures")
        marks = torch.zeros(image.shape, dtype=torch.long)
        marks[image.cpu()] = torch.cat(marked)
        return marks

    def _picture(self, first: Tensor, later: Tensor, beside: int, each: int) -> Int[Tensor, " token"]:
        """`beside` tokens of the tower stand in front of the patches, and the first of them is [CLS]."""
        row = 0 if beside else 1
        count = (first.shape[1] - beside) // each
        values = [of_tokens(shown[row, beside:], count, self.merging) for shown in (first, later)]
        return informed_tokens(values[0], values[1], self.settings.local)


def _looked_at(rows: Float[Tensor, "picture head patch patch"]) -> list[Float[Tensor, "2 patch"]]:
    """Of each picture: what its first row attends to, and what the mean row does, summed over heads."""
    summed = rows.detach().double().sum(1)
    return list(torch.stack([summed[:, 0], summed.mean(1)], dim=1).cpu())


def _tower(model: AttachedModel) -> tuple[SiteId, SiteId]:
    """The first and the last but one attention of the vision tower."""
    sites = sorted(site.id for site in model.sites if site.id.stack == "vision")
    if not sites or scored_sites(model)[0].stack == "vision":
        raise Refusal(f"{PAINT.id}: {model.name} has no language model that looks at a vision tower; load one that has")
    return sites[0], sites[max(len(sites) - 2, 0)]


def _merging(model: AttachedModel) -> Merging:
    config: Any = model.model.config
    vision = getattr(config, "vision_config", None)
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    if full and "class_embedding" in {name.rpartition(".")[2] for name, _ in model.model.named_parameters()}:
        raise Refusal(f"{PAINT.id}: {model.name} takes [CLS] for an image token; PAINT chooses among patches alone")
    if getattr(vision, "fullatt_block_indexes", None) is not None:
        raise Refusal(
            f"{PAINT.id}: the vision tower of {model.name} attends in windows, so no layer of it sees a whole picture; "
            "PAINT is for towers that do"
        )
    return "runs" if hasattr(vision, "spatial_merge_size") else "grid"


INTERVENTIONS = (
    InterventionEntry(
        id=PAINT.id,
        title="Look harder at the image tokens that the vision tower points out",
        page="use/looking.md#paint",
        paper="Arif et al., Fixing Imbalanced Attention to Mitigate In-Context Hallucination (PAINT)",
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward; the last row of these heads recomputed, two layers of the tower read",
        made=PAINT,
    ),
)

__all__ = ["INTERVENTIONS", "PAINT", "informed_tokens", "of_tokens", "outliers", "visual_sensitivity"]
