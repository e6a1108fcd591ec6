"""Vision-aware heads: how far a head's output moves when the picture is taken out of the prompt.

Vision-aware head divergence of He et al., 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence". With the picture x_V and the text x_T, at the last token of the prompt, from which the first token of the
answer is told,

    VHD_h = || z_h(x_V, x_T) - z_h(x_T) ||_2

where "without the picture" drops its tokens and the markers around them, so that positions behind them shift. (Line
breaks that a processor puts around a picture, or between the rows of its tiles, stay.) T-VHD of an item is the sum over
its k largest heads (`token_divergence`).

A reconstruction: the paper's code was not to be had. Of two notes on it neither says whether the distance is taken of z
or of what the head writes, z_h W_O^h: `of` has both, z the default. Large heads move far: `distance="relative"` divides
by the sum of both norms (0 to 1), and `"cosine"` is 1 less the cosine of both.

A head that cannot reach the picture, by itself or through earlier layers, has 0 but for rounding and for the shift of
positions, which moves heads that look at places. Whether a moving head serves the answer, taking it out tells.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.patterns import require_choice
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.running.decided import with_markers
from headwise.model.running.run import picture_token
from headwise.probes.batch import Batch, pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.layout import picture_reader
from headwise.probes.outcome import observe, places
from headwise.scores import HeadScores

Of = Literal["z", "write"]
Distance = Literal["l2", "relative", "cosine"]
Over = Literal["model", "layer"]

IMAGE = "image"
"""The span of a prompt's picture tokens."""
_MARKERS = re.compile(r"(vision_(start|end)_token|[be]oi_token|image_(start|end|break)_token)_(id|index)")
_TILE = re.compile(r"<(row_\d+_col_\d+|global-img)>")


def vision_aware(model: AttachedModel, items: ItemSet, *, of: Of = "z", distance: Distance = "l2") -> Scored:
    """`vision-aware`: the distance between a head's output with and without the pictures, per item and head.

    Args:
        of: `z`, or `write`, what the head adds to the residual stream.
        distance: `l2`; `relative`, as a share of both norms; or `cosine`.

    Raises:
        InputError: a setting that is none; a prompt that is nothing but pictures, or ends in one.
        Refusal: the model reads no pictures, or its prompts are not read as one text that goes on.
    """
    require_choice("of", of, get_args(Of))
    require_choice("distance", distance, get_args(Distance))
    markers = picture_markers(model)
    return over_batches(items, partial(_divergences, model, items, markers, of, distance), answers=False)


def token_divergence(scores: HeadScores, k: int, over: Over = "model") -> Float[np.ndarray, " item"]:
    """T-VHD: the sum of the k largest divergences of each item, of the whole model or of each layer, then summed.

    The notes on the paper leave the pooling open, and k; both are said here. Take it of scores with the defaults.

    Raises:
        InputError: scores of another method, a k that is no number of heads, or an `over` that is none.
    """
    if scores.provenance.method != "vision-aware":
        raise InputError(f"T-VHD is of scores of vision-aware, and these are of {scores.provenance.method}")
    require_choice("over", over, get_args(Over))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r} is no number of heads; give a whole number from 1 on")
    stacks = [np.nan_to_num(values) for values in scores.values.values()]
    if over == "layer":
        largest = [(-np.sort(-values, axis=2)[:, :, :k]).sum(axis=(1, 2)) for values in stacks]
        return np.asarray(np.sum(largest, axis=0))
    joined = np.concatenate([values.reshape(len(values), -1) for values in stacks], axis=1)
    return (-np.sort(-joined, axis=1)[:, :k]).sum(axis=1)  # type: ignore[no-any-return]


def divergence(
    seeing: Float[Tensor, "*rows dim"], lacking: Float[Tensor, "*rows dim"], distance: Distance = "l2"
) -> Float[Tensor, " *rows"]:
    """How far what heads give with the picture is from what they give without."""
    seeing, lacking = seeing.double(), lacking.double()
    if distance == "cosine":
        apart = 1 - torch.nn.functional.cosine_similarity(seeing, lacking, dim=-1)
        return apart.masked_fill((seeing == lacking).all(-1), 0.0)  # also where both are silent
    moved: Tensor = torch.linalg.vector_norm(seeing - lacking, dim=-1)
    if distance == "l2":
        return moved
    norms: Tensor = torch.linalg.vector_norm(seeing, dim=-1) + torch.linalg.vector_norm(lacking, dim=-1)
    return moved / norms.clamp(min=1e-30)


def picture_markers(model: AttachedModel) -> tuple[int, ...]:
    """Ids that stand around the tokens of a picture and mean nothing without it, as configuration and processor say.

    Raises:
        Refusal: the model reads no pictures in its prompts.
    """
    network = model.model
    if picture_token(network) is None:
        raise Refusal(
            f"{model.name} has no token for pictures in its prompts; use a model that reads pictures and text"
        )
    config = getattr(network, "config", None)
    names = [name for name in dir(config) if _MARKERS.fullmatch(name)]
    found = {getattr(config, name) for name in names} | _of_processor(model.processor)
    return tuple(sorted(id for id in found - {picture_token(network)} if isinstance(id, int)))


def without_pictures(each: EncodedItem, markers: Sequence[int]) -> EncodedItem:
    """An item whose pictures were never there; its spans are gone with them.

    Raises:
        InputError: nothing is left, or the prompt ends in a picture.
    """
    ids = torch.tensor([each.prompt])
    gone = torch.zeros_like(ids, dtype=torch.bool)
    gone[0, [at for place in each.spans[IMAGE] for at in place]] = True
    kept = ids[~with_markers(ids, gone, markers)]
    if gone[0, -1] or not len(kept):
        raise InputError(f"item {each.id} ends in a picture, or is nothing else; put the question behind the picture")
    return replace(each, prompt=tuple(kept.tolist()), spans={}, twin=None, pixels={})


def prompts_of(batch: Batch) -> Batch:
    """A batch of which only the prompts are run, whatever the answers."""
    return replace(batch, answers=batch.answers[:, :0])


def _divergences(
    model: AttachedModel,
    items: ItemSet,
    markers: Sequence[int],
    of: Of,
    distance: Distance,
    batch: Batch,
) -> Scored:
    if places(model, batch).prompt_length is None:
        raise Refusal(
            f"{model.name} does not read prompt and answer as one text, so no token of its prompts says what comes "
            "next; use a model that continues text"
        )
    bare = pad([without_pictures(each, markers) for each in batch.items], items.pad, items.suffix, answers=False)
    seeing, lacking = _last(model, batch, of), _last(model, bare, of)
    return {site: divergence(seeing[site], lacking[site], distance) for site in seeing}


def _last(model: AttachedModel, batch: Batch, of: Of) -> dict[SiteId, Float[Tensor, "item head dim"]]:
    """What every head gives at the last token of the prompts."""
    sites = scored_sites(model)
    make = read.z if of == "z" else read.write
    asked = make([id.label for id in sites], queries=[batch.prompt_length - 1], name="given")
    with torch.no_grad(), model.reading(asked) as got:
        observe(model, prompts_of(batch), wants={"logits"})
    return {id: got.given[id.label][:, 0].cpu() for id in sites}


def _of_processor(processor: Any) -> set[int]:
    """What a processor writes for a picture, beside the picture's own tokens."""
    if processor is None or getattr(processor, "image_processor", None) is None:
        return set()
    reader = picture_reader(processor)
    mark = set(reader.tokenizer(reader.mark, add_special_tokens=False)["input_ids"])
    added = reader.tokenizer.get_added_vocab()
    special = {added[token] for token in added if _TILE.fullmatch(token)}
    around = {getattr(processor, name, None) for name in ("fake_image_token", "boi_token", "eoi_token")}
    special |= {added[token] for token in around if token in added}
    return ((mark & set(reader.tokenizer.all_special_ids)) | special) - {reader.token}


METHODS = (
    Method(
        id="vision-aware",
        title="how far a head's output moves when the picture is taken out of the prompt",
        page="methods/vision-aware.md",
        paper="He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("z", "span:image"),
        cost="2 forwards, one without the pictures",
        probe="existence",
        score=vision_aware,
    ),
)
