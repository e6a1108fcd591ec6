"""A few items as an atlas keeps them: their tokens, where heads look, and their pictures, made small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from headwise.atlas.cell import Result
from headwise.errors import Refusal
from headwise.heads import HeadSet
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.layout import PictureReader
from headwise.probes.outcome import observe, places

LONGEST_SIDE = 160
"""Of a stored picture, in pixels. The pages that show it are sent around, and cells are larger than these pixels."""

_ARRAYS = ("pixels", "tokens", "boxes")


@dataclass(frozen=True, eq=False, slots=True)
class SeenPicture:
    """A picture of an example, and where its tokens look.

    Attributes:
        size: its width and height in pixels, as the item has it.
        pixels: the same picture, made smaller where a side was longer than `LONGEST_SIDE`.
        tokens: places of its tokens in the prompt.
        boxes: left, top, right and bottom of the part that each token stands for, in pixels of `size`; none where that
            is not known.
        unknown: why not; empty where it is.
    """

    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "row column 3"]
    tokens: Int[np.ndarray, " token"]
    boxes: Float[np.ndarray, "box 4"]
    unknown: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One held-out item and where heads look from the place at which its answer is predicted.

    Attributes:
        tokens: of the prompt, as text.
        answer: what comes next; empty where nothing is asked for (encoders).
        heads: those with the largest effect on the probe, in canonical order.
        weights: of each head on each token; of an encoder the mean over all queries.
        pictures: those of the item, in their order.
    """

    item: str
    tokens: tuple[str, ...]
    answer: str
    heads: HeadSet
    weights: Float[np.ndarray, "head token"]
    pictures: tuple[SeenPicture, ...] = ()


def pattern_of(
    model: AttachedModel, items: ItemSet, item: EncodedItem, heads: HeadSet, *, whole: bool
) -> tuple[list[str], Float[np.ndarray, "head token"]]:
    """The tokens of one of the items, and the rows of the heads: from its last token, or as the mean of all rows.

    Args:
        whole: whether all rows are meant, and the tokens that an encoder puts behind a text count.

    Raises:
        Refusal: the heads are of a decoder beside an encoder, and do not look at the prompt.
    """
    (batch,) = replace(items, items=(item,)).batches(1)
    if not whole and places(model, batch).prompt_length is None:
        raise Refusal("the heads of a decoder beside an encoder do not look at the prompt, so there is nothing to show")
    queries = None if whole else [batch.prompt_length - 1]
    with torch.no_grad(), model.reading(read.rows(heads=heads, queries=queries)) as got:
        observe(model, batch, wants={"embedding"} if whole else {"logits"})
    parts = [got.rows[site][0].double().mean(dim=1).cpu().numpy() for site in heads.sites]
    ids = [*item.prompt, *(items.suffix if whole else ())]
    tokens = [model.tokenizer.decode([id]) for id in ids]
    return tokens, np.concatenate(parts)[:, : len(tokens)]


def pictures_of(item: EncodedItem, reader: PictureReader | None) -> Iterator[SeenPicture]:
    """The pictures of an item in their order; none where it has none."""
    if reader is None:
        return
    for number, each in enumerate(item.item.pictures):
        (tokens,) = item.spans[f"image:{number}"]
        boxes, unknown = np.empty((0, 4)), ""
        try:
            boxes = reader.cells(each).numpy()
        except Refusal as reason:
            unknown = str(reason)
        yield SeenPicture(each.size, _smaller(each.array()), np.array(tokens), boxes, unknown)


def kept(
    item: EncodedItem, reader: PictureReader | None, number: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The pictures of an item as a cell holds them under the item's number: plain values, and arrays by name."""
    about: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for place, each in enumerate(pictures_of(item, reader)):
        about.append({"size": each.size, "unknown": each.unknown})
        arrays |= {f"{name}_{number}_{place}": getattr(each, name) for name in _ARRAYS}
    return about, arrays


def examples_of(stored: Result) -> tuple[Example, ...]:
    """The items of an `examples` cell."""
    heads = HeadSet.parse(stored.about["heads"])
    return tuple(
        Example(
            each["item"],
            tuple(each["tokens"]),
            each["answer"],
            heads,
            stored.arrays[f"weights_{number}"],
            _seen(each.get("pictures", ()), stored.arrays, number),
        )
        for number, each in enumerate(stored.about["items"])
    )


def _seen(about: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], number: int) -> tuple[SeenPicture, ...]:
    return tuple(
        SeenPicture(
            size=(each["size"][0], each["size"][1]),
            unknown=each["unknown"],
            **{name: arrays[f"{name}_{number}_{place}"] for name in _ARRAYS},
        )
        for place, each in enumerate(about)
    )


def _smaller(pixels: UInt8[np.ndarray, "row column 3"]) -> UInt8[np.ndarray, "row column 3"]:
    """Each pixel the mean of those that it stands for, the sides in their proportion."""
    share = min(1.0, LONGEST_SIDE / max(pixels.shape[:2]))
    small = pixels.astype(np.float64)
    for axis in (0, 1):
        n = pixels.shape[axis]
        starts = np.arange(max(1, round(n * share))) * n // max(1, round(n * share))
        counts = np.diff([*starts, n])
        small = np.add.reduceat(small, starts, axis=axis) / counts.reshape([-1 if axis == at else 1 for at in range(3)])
    return small.round().astype(np.uint8)


__all__ = ["LONGEST_SIDE", "Example", "SeenPicture", "examples_of", "kept", "pattern_of", "pictures_of"]
