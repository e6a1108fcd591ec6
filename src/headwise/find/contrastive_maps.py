"""Contrastive attention maps (CARVE): where a question looks, over where any question looks.

Ge et al., "Focusing by Contrastive Attention", 2025 (CARVE; code: YuyaoGe/CARVE). The model answers a
question about a picture, and describes the picture in general. With A^Q and A^G the attention of the newest token to
the image tokens, in the mean over heads, at step t of each answer and in layer l of a band B,

    C_l,t = A^Q_l,t / (A^G_l,t + floor)            S = sum_t w_t sum_{l in B} C_l,t,    w_t = t + 1, t from 0

over the steps that both answers have. If attention is what is to be seen in the picture times what is asked for, and a
general question asks for nothing, C is what is asked for. S is laid over the picture (`ContrastiveMap.pixels`); of its
highest `share` of pixels the patches that are connected are ranked by their sum of S, and the first max(3, share of
their number) are kept; the rest is blacked out, the picture cut to what is left and enlarged
(`ContrastiveMap.refined`). The paper asks again with both pictures.

    maps = contrastive_maps(model, items)
    maps[0].refined()

Exact: C, S, the choice of patches and their defaults (floor 1e-8, 32 steps, share 0.2, at least 3), as released. The
paper's band is the layers 20 to 25 (`layers="20-25"`) of models with 28 to 40; here it is the same share of the depth,
0.625 to 0.8125, counted for 32. Where a picture comes in tiles (SmolVLM), each is laid over its part, and where they
overlap the mean is taken: ours.

Per head (`contrastive-map`, ours): C with the head's own attention, summed as S, and as score the share of the sum that
lies on a region of the picture. A head that looks at the region whatever is asked has no more than its share of tokens.
Where a head hardly looks at the picture in general, 1e-8 lets any trace of attention count; a larger `floor` does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.patterns import require_whole
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item, Quote
from headwise.probes.outcome import observe, places
from headwise.probes.picture import Picture

GENERAL = "Write a general description of the image."
FLOOR = 1e-8
STEPS = 32
BAND = (0.625, 0.8125)
"""Layers 20 to 25 of 32, as shares of the depth."""
SHARE, FEWEST = 0.2, 3
BATCH = 4

Steps = dict[SiteId, Float[Tensor, "step head token"]]
"""Of one item: the newest token's attention to the image tokens, at each step of its answer."""


@dataclass(frozen=True, eq=False)
class ContrastiveMap:
    """Where one question looks in one of its pictures.

    Attributes:
        item: id of the item.
        picture: the picture.
        tokens: S of each of its image tokens.
        cells: the part of the picture of each token: left, top, right, bottom in pixels.
    """

    item: str
    picture: Picture
    tokens: Float[Tensor, " token"]
    cells: Float[Tensor, "token 4"] = field(repr=False)

    def pixels(self) -> Float[np.ndarray, "row column"]:
        """S laid over the picture, by straight lines between the middles of the cells; 0 where no token looks.

        Raises `Refusal` where the cells are no grids.
        """
        return laid_over(self.tokens, self.cells, self.picture.size)

    def kept(self, share: float = SHARE, fewest: int = FEWEST) -> Bool[np.ndarray, "row column"]:
        """The pixels of the patches that are kept, as `top_patches`."""
        return top_patches(self.pixels(), share, fewest)

    def refined(self, share: float = SHARE, fewest: int = FEWEST) -> Picture:
        """The picture with the rest blacked out, cut to what is kept and enlarged until it is as large as the whole."""
        kept = self.kept(share, fewest)
        left, top, right, bottom = crop_box(kept)
        cut = Picture.drawn((self.picture.array() * kept[..., None])[top:bottom, left:right]).image()
        scale = max(self.picture.size[0] / cut.width, self.picture.size[1] / cut.height)
        size = int(cut.width * scale), int(cut.height * scale)
        return Picture.drawn(np.asarray(cut.resize(size, resample=1)))  # Lanczos


def contrastive_maps(
    model: AttachedModel,
    items: ItemSet,
    *,
    general: str = GENERAL,
    layers: str = "",
    floor: float = FLOOR,
    steps: int = STEPS,
    span: str = "question",
) -> tuple[ContrastiveMap, ...]:
    """The map of every picture of every item, in their order.

    Args:
        general: what is asked in general, in place of the question.
        layers: the band, as "20-25"; empty for 0.625 to 0.8125 of the depth.
        floor: what is added to general attention.
        steps: most tokens of an answer.
        span: name of the question among the prompt's spans.

    Raises:
        InputError: no such layers; an item without a picture, or whose question cannot be put for another.
        Refusal: the model does not continue text.
    """
    band = band_of(model, layers)
    asked = _answers(model, items, band, steps)
    described = _answers(model, general_items(model, items, general, span), band, steps)
    assert items.reader is not None
    maps = []
    for each, own, other in zip(items, asked, described, strict=True):
        mean_own = torch.stack([own[site].mean(1) for site in band])
        mean_other = torch.stack([other[site].mean(1) for site in band])
        summed = weighted_contrast(mean_own, mean_other, floor).sum(0)
        sizes = [len(place) for place in each.spans["image"]]
        for picture, tokens in zip(each.item.pictures, torch.split(summed, sizes), strict=True):
            maps.append(ContrastiveMap(each.id, picture, tokens, items.reader.cells(picture)))
    return tuple(maps)


def weighted_contrast(
    asked: Float[Tensor, "*head step token"], general: Float[Tensor, "*head other_step token"], floor: float = FLOOR
) -> Float[Tensor, "*head token"]:
    """sum_t (t + 1) A^Q_t / (A^G_t + floor) over the steps that both have."""
    both = min(asked.shape[-2], general.shape[-2])
    ratio = asked[..., :both, :] / (general[..., :both, :] + floor)
    return torch.einsum("t,...tj->...j", torch.arange(1, both + 1, dtype=ratio.dtype), ratio)


def laid_over(
    tokens: Float[Tensor, " token"], cells: Float[Tensor, "token 4"], size: tuple[int, int]
) -> Float[np.ndarray, "row column"]:
    """Values of tokens as a picture of `size` (width, height); the mean where grids of tokens overlap.

    Raises `Refusal` where the cells are no grids.
    """
    total, covered = np.zeros(size[::-1]), np.zeros(size[::-1])
    for part in _grids(cells):
        own = cells[part]
        columns = int((own[:, 1] == own[0, 1]).sum())
        box = [round(float(edge)) for edge in (*own[:, :2].min(0).values, *own[:, 2:].max(0).values)]
        left, top, right, bottom = box[0], box[1], min(box[2], size[0]), min(box[3], size[1])
        if len(own) % columns:
            raise Refusal("the tokens of this picture are no grid, so no map can be laid over it; use .tokens")
        grid = tokens[part].double().reshape(1, 1, -1, columns)
        wide = interpolate(grid, size=(bottom - top, right - left), mode="bilinear", align_corners=False)[0, 0]
        total[top:bottom, left:right] += wide.numpy()
        covered[top:bottom, left:right] += 1
    return total / np.maximum(covered, 1)


def top_patches(
    values: Float[np.ndarray, "row column"], share: float = SHARE, fewest: int = FEWEST
) -> Bool[np.ndarray, "row column"]:
    """Of the highest `share` of the pixels, the connected patches with the largest sums: `fewest` of them, or `share`
    of all patches where that is more.

    Raises `InputError` for a share outside 0 to 1, or fewer than one patch.
    """
    require_whole("fewest", fewest, 1)
    if not 0 < share < 1:
        raise InputError(f"share={share!r} is no share of a picture; give a number between 0 and 1")
    patches, count = ndimage.label(values >= np.percentile(values, (1 - share) * 100))
    sums = ndimage.sum(values, patches, range(1, count + 1))
    ranked = np.argsort(-np.asarray(sums), kind="stable")[: max(fewest, int(count * share))]
    return np.isin(patches, ranked + 1)


def crop_box(kept: Bool[np.ndarray, "row column"]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is kept, the last two excluded; the whole picture where nothing is."""
    rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
    if not len(rows):
        return 0, 0, kept.shape[1], kept.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def contrastive_map(
    model: AttachedModel,
    items: ItemSet,
    *,
    span: str = "region:target",
    general: str = GENERAL,
    floor: float = FLOOR,
    steps: int = STEPS,
) -> Scored:
    """`contrastive-map`: the share of a head's own map that lies on a region, 0 to 1; NaN for a head with no map.

    Args:
        span: name of the region among the item's spans.
        general, floor, steps: as in `contrastive_maps`.

    Raises as `contrastive_maps`.
    """
    sites = _sites(model)
    asked = _answers(model, items, sites, steps)
    described = _answers(model, general_items(model, items, general, "question"), sites, steps)
    scored: dict[SiteId, list[Tensor]] = {site: [] for site in sites}
    for each, own, other in zip(items, asked, described, strict=True):
        columns = [position for place in each.spans["image"] for position in place]
        region = {position for place in each.spans[span] for position in place}
        inside = torch.tensor([column in region for column in columns])
        for site in sites:
            summed = weighted_contrast(own[site].transpose(0, 1), other[site].transpose(0, 1), floor)
            scored[site].append(summed[:, inside].sum(-1) / summed.sum(-1))
    return {site: torch.stack(values) for site, values in scored.items()}


def general_items(model: AttachedModel, items: ItemSet, instruction: str = GENERAL, span: str = "question") -> ItemSet:
    """The items with an instruction in place of their question; their answers, which no longer fit, are not looked at.

    Raises:
        InputError: a prompt in messages, or in which the question has no single place; no instruction.
    """
    if not instruction.strip():
        raise InputError("general= is empty; give what is to be asked in place of the questions")
    asked = [_general(items.probe, each, instruction.strip(), span) for each in items]
    return encode(asked, model, n=len(asked), name=items.probe)


def band_of(model: AttachedModel, layers: str = "") -> tuple[SiteId, ...]:
    """The layers of the main stack that a map is made of. Raises `InputError` for layers that the model lacks."""
    sites = _sites(model)
    if not layers:
        first, behind = math.floor(BAND[0] * len(sites)), math.ceil(BAND[1] * len(sites))
        return sites[first:behind]
    found = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", layers)
    band = tuple(site for site in sites if found and int(found[1]) <= site.layer <= int(found[2]))
    if not band:
        raise InputError(
            f"layers={layers!r} names no layers of {model.name}, which has {sites[0].label} to {sites[-1].label}; give "
            "the first and the last, such as '20-25'"
        )
    return band


def _general(probe: str, each: EncodedItem, instruction: str, span: str) -> Item:
    found = each.item.spans.get(span, ())
    if not isinstance(each.item.prompt, str) or len(found) != 1:
        raise InputError(
            f"item {each.id} of {probe} has no single place {span!r} in a plain text, where another question could "
            "stand; name the question in its spans"
        )
    place = found[0].find(each.item.prompt) if isinstance(found[0], Quote) else found[0]
    prompt = each.item.prompt[: place.start] + instruction + each.item.prompt[place.stop :]
    return Item(prompt=prompt, answer=each.item.answer, id=each.id, pictures=each.item.pictures)


def _answers(model: AttachedModel, items: ItemSet, sites: Sequence[SiteId], steps: int) -> list[Steps]:
    """What the model looks at while it answers each item."""
    require_whole("steps", steps, 1)
    if without := next((each.id for each in items if "image" not in each.spans), None):
        raise InputError(f"item {without} of {items.probe} has no picture; use a probe of pictures")
    return [found for batch in items.batches(BATCH, answers=False) for found in _of_batch(model, batch, sites, steps)]


def _of_batch(model: AttachedModel, batch: Any, sites: Sequence[SiteId], steps: int) -> Iterator[Steps]:
    columns = places(model, batch)
    if columns.prompt_length is None:
        raise Refusal(
            f"{model.name} does not continue its prompts, so there is no answer to look at; use one that does"
        )
    reduce: Callable[[Tensor], Tensor] = partial(_newest, columns.prompt_length)
    rows = read.rows([site.label for site in sites], queries="last", reduce=reduce)
    with torch.no_grad(), model.reading(rows) as got:
        outcome = observe(model, batch, wants={"generation"}, new_tokens=steps)
    assert outcome.generated is not None
    for item, said in enumerate((outcome.generated >= 0).sum(1).tolist()):
        image = columns.spans["image"][item]
        yield {
            site: torch.stack([step[item][:, image] for step in got.rows[site.label][:said]]).double() for site in sites
        }


def _newest(width: int, rows: Float[Tensor, "item head query key"]) -> Float[Tensor, "item head key"]:
    return rows[:, :, -1, :width].cpu()


def _grids(cells: Float[Tensor, "token 4"]) -> list[slice]:
    """The stretches of cells that go on row by row."""
    starts = [0]
    for at in range(1, len(cells)):
        left, top = cells[at, 0], cells[at, 1]
        beside = bool(top == cells[at - 1, 1]) and bool(left > cells[at - 1, 0])
        below = bool(top > cells[at - 1, 1]) and bool(left == cells[starts[-1], 0])
        alike = torch.allclose(cells[at, 2:] - cells[at, :2], cells[starts[-1], 2:] - cells[starts[-1], :2], rtol=1e-3)
        if not ((beside or below) and alike):
            starts.append(at)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True)]


def _sites(model: AttachedModel) -> tuple[SiteId, ...]:
    return tuple(site for site in scored_sites(model) if model.table.site(site).kind == "self")


METHODS = (
    Method(
        id="contrastive-map",
        title="where a head looks for a question, over where it looks for any",
        page="methods/contrastive-map.md",
        paper="Ge et al., Focusing by Contrastive Attention (CARVE)",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("rows", "generation", "span:image", "span:question", "span:{span}"),
        cost="2 answers of up to 32 tokens per item",
        probe="place",
        score=contrastive_map,
    ),
)
