"""How well a head's neighbourhoods of pictures are those of a vision encoder: mutual k nearest neighbours, per head.

HeRA ("Mind the Heads", 2026) measures heads so before it trains them. Items ask the same of different pictures. f_h(i)
is what head h makes of item i, e(i) what an encoder makes of its picture, and N_k(i) the k other items with the highest
cosine to i in one of the two spaces:

    s_h(i) = |N_k^{f_h}(i) and N_k^e(i)| / k        MKNN_h = mean_i s_h(i)

1 where both spaces have the same neighbours, k / (n - 1) in the mean where they have nothing to do with each other.
It grows with k / n, so only scores of equally many items and equal k compare. The prompts have to be the same word for
word: else neighbours are those of the text.

The metric is that of the "Platonic Representation Hypothesis" (Huh et al., 2024). The rest is a reconstruction, as no
code was to be had: f_h is z in the mean over the image tokens, k = 10, and e is what the language model is given of the
picture (the tower's output behind the projector, in the mean over its tokens) unless other features are given:

    scores = find("vision-alignment", model, features=encoder_features(dino, image_processor, items))

The paper trains the heads with the lowest scores, by a contrastive loss that draws a head's neighbours towards those of
the encoder; `neighbour_loss` is its reconstruction, for heads that are trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from headwise.errors import InputError
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.patterns import require_whole
from headwise.find.search import BATCH
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places

NEIGHBOURS = 10
TEMPERATURE = 0.07


def vision_alignment(
    model: AttachedModel,
    items: ItemSet,
    *,
    neighbours: int = NEIGHBOURS,
    features: Float[Tensor, "item width"] | None = None,
) -> Scored:
    """`vision-alignment`: of each item, the share of its neighbours in a head's space that are the encoder's, 0 to 1.

    Args:
        neighbours: k.
        features: e, of another encoder, in the order of the items; None is what the language model is given.

    Raises:
        InputError: prompts that are not all the same, no more items than neighbours, features of another number.
    """
    require_whole("neighbours", neighbours, 1)
    _require_same_prompts(items)
    if len(items) <= neighbours:
        raise InputError(f"{neighbours} neighbours of each item take more items than {len(items)}; give more, or fewer")
    if features is not None and len(features) != len(items):
        raise InputError(f"features have {len(features)} rows for {len(items)} items; give one row for each, in order")
    own, of_heads = _features(model, items)
    nearest = nearest_items(own if features is None else features, neighbours)
    return {
        site: torch.stack([_shared(nearest_items(z, neighbours), nearest) for z in values.unbind(1)], dim=1)
        for site, values in of_heads.items()
    }


def mutual_knn(
    one: Float[Tensor, "item width"], other: Float[Tensor, "item other_width"], neighbours: int = NEIGHBOURS
) -> Float[Tensor, " item"]:
    """The share of each item's k nearest in one space that are among its k nearest in the other; the mean is MKNN.

    Raises:
        InputError: spaces of different items, or no more items than neighbours.
    """
    if len(one) != len(other) or not 0 < neighbours < len(one):
        raise InputError(
            f"mutual_knn compares as many items in both spaces, more than neighbours; it was given {len(one)} and "
            f"{len(other)} items and neighbours={neighbours}"
        )
    return _shared(nearest_items(one, neighbours), nearest_items(other, neighbours))


def nearest_items(space: Float[Tensor, "item width"], neighbours: int) -> Bool[Tensor, "item item"]:
    """True at the k other items with the highest cosine; of equal ones the first."""
    itself = torch.eye(len(space), dtype=torch.bool, device=space.device)
    cosine = _cosine(space.double()).masked_fill(itself, -torch.inf)
    order: Int[Tensor, "item item"] = cosine.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(cosine, dtype=torch.bool).scatter(1, order[:, :neighbours], True)


def neighbour_loss(
    space: Float[Tensor, "item width"],
    encoder: Float[Tensor, "item other_width"],
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, ""]:
    """Lower where an item is closer to its neighbours in the encoder's space than to the others; differentiable in
    `space`.

    Of every item, the mean of -log softmax(cosine / temperature) over its neighbours, among all other items. A
    reconstruction from the paper's words; its temperature is not known.
    """
    near = nearest_items(encoder.detach(), neighbours)
    itself = torch.eye(len(space), dtype=torch.bool, device=space.device)
    log_share = (_cosine(space) / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    return -log_share[near].mean()


def encoder_features(encoder: Any, image_processor: Callable[..., Any], items: ItemSet) -> Float[Tensor, "item width"]:
    """What a vision encoder of transformers makes of the items' pictures: its last hidden state, in the mean over its
    tokens, [CLS] and registers with them.

    Args:
        encoder: the network, or an attached model.
        image_processor: called with `images=[...]`, gives `pixel_values`.

    Raises:
        InputError: an item without one picture.
    """
    network = encoder.model if isinstance(encoder, AttachedModel) else encoder
    _require_one_picture(items)
    states = []
    for each in items:
        pixels = image_processor(images=[each.item.pictures[0].image()], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states.append(network(pixel_values=pixels.to(network.device, network.dtype)).last_hidden_state.mean(1))
    return torch.cat(states).double().cpu()


def _features(
    model: AttachedModel, items: ItemSet
) -> tuple[Float[Tensor, "item width"], dict[SiteId, Float[Tensor, "item head head_dim"]]]:
    """In the mean over the image tokens: the residual stream before the first block, and z of every head."""
    sites = scored_sites(model)
    given: list[Tensor] = []
    of_heads: dict[SiteId, list[Tensor]] = {site: [] for site in sites}
    for batch in items.batches(BATCH, answers=False):
        columns = places(model, batch).spans["image"]
        image = torch.zeros(len(columns), batch.prompt_length, dtype=torch.float64)
        for row, listed in enumerate(columns):
            image[row, listed] = 1 / len(listed)
        reads = (
            read.z([site.label for site in sites], reduce=partial(_mean_over, image)),
            read.residual("L0", where="pre", reduce=partial(_mean_over, image), name="given"),
        )
        with torch.no_grad(), model.reading(*reads) as got:
            observe(model, replace(batch, answers=batch.answers[:, :0]), wants={"logits"})
        given.extend(got.given["L0"])
        for site in sites:
            of_heads[site].extend(got.z[site.label])
    return torch.cat(given), {site: torch.cat(parts) for site, parts in of_heads.items()}


def _mean_over(weights: Float[Tensor, "item column"], values: Float[Tensor, "item column *dim"]) -> Tensor:
    return torch.einsum("ic,ic...->i...", weights, values.detach().double().cpu())


def _cosine(space: Float[Tensor, "item width"]) -> Float[Tensor, "item item"]:
    units = normalize(space, dim=-1)
    return units @ units.T


def _shared(one: Bool[Tensor, "item item"], other: Bool[Tensor, "item item"]) -> Float[Tensor, " item"]:
    return (one & other).sum(-1).double() / one.sum(-1)


def _require_same_prompts(items: ItemSet) -> None:
    _require_one_picture(items)
    prompts = {each.item.prompt for each in items}
    if len(prompts) > 1:
        raise InputError(
            f"{items.probe} asks in {len(prompts)} different prompts, and neighbours would be those of the text; give "
            "items that ask the same of different pictures, such as those of the probe listing"
        )


def _require_one_picture(items: ItemSet) -> None:
    odd = next((each for each in items if len(each.item.pictures) != 1), None)
    if odd is not None:
        raise InputError(
            f"item {odd.id} of {items.probe} has {len(odd.item.pictures)} pictures; neighbours are those of one picture"
        )


METHODS = (
    Method(
        id="vision-alignment",
        title="how far a head's neighbourhoods of pictures are those of a vision encoder",
        page="methods/vision-alignment.md",
        paper="Mind the Heads (HeRA)",
        year=2026,
        tier="C",
        status="reconstruction",
        needs=("z", "span:image"),
        cost="1 forward per item",
        probe="listing",
        score=vision_alignment,
    ),
)
