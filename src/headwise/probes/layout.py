"""Pictures as a processor writes them into a prompt: which tokens, where each of them looks, and what else the model
gets of them.

Nothing here is known of any model's name: the processor is tried on a picture, and what it does there is what it does.

- What stands for a picture in a text is what the chat template puts there, or else the processor's image token.
- A token of a picture is one with the id that a picture adds many of.
- Tensors of pictures are joined along their first axis, unless two pictures of one text share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from headwise.errors import InputError, Refusal
from headwise.probes.picture import PICTURE_MARK, Picture, Region

Ids = tuple[int, ...]
Pixels = Mapping[str, Tensor]
"""Inputs of a model that hold pictures, by name, as the processor gives them for one text."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names of the input that says for each token whether it is of a picture; which of them, the processor decides."""
_TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES)
_TILE = re.compile(r"row_(\d+)_col_(\d+)")


@dataclass(frozen=True, slots=True)
class Written:
    """A text with pictures in ids.

    Attributes:
        ids: as the model takes them, the tokens of every picture in place.
        pixels: what the model takes beside them.
        origin: for each id of the text as the tokenizer alone writes it, its place in `ids`; None for a mark, and where
            the processor writes the text around a picture in other ids.
        pictures: places in `ids` of the tokens of each picture.
        special: places of special tokens, and of what the processor put around the pictures.
    """

    ids: Ids
    pixels: Pixels
    origin: tuple[int | None, ...]
    pictures: tuple[Ids, ...]
    special: Ids


@dataclass(frozen=True)
class PictureReader:
    """A processor, and what was found by trying it.

    Attributes:
        mark: what stands for a picture in a text.
        mark_id: the id in `mark` that the processor replaces.
        token: id of a picture's tokens.
        by_row: names of the inputs in which the pictures of one text share a row.
        types: name of the input that tells tokens of pictures from others; empty where there is none.
    """

    processor: Any = field(repr=False)
    mark: str
    mark_id: int
    token: int
    by_row: frozenset[str]
    types: str
    _counts: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _cells: dict[tuple[int, int], Float[Tensor, "token 4"]] = field(default_factory=dict, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def text(self, prompt: str) -> str:
        """A prompt with this processor's marks in place of `<image>`."""
        return prompt.replace(PICTURE_MARK, self.mark)

    def chat(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation whose pictures stand as `<image>`; raises what the template raises."""
        messages = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in turns]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def write(self, text: str, pictures: Sequence[Picture]) -> Written:
        """A text, in which `mark` stands for each of the pictures, in ids.

        Raises:
            InputError: the processor does not take it, or a picture cannot be read.
        """
        plain = tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        given = self._processed(text, [each.image() for each in pictures])
        ids = tuple(given["input_ids"][0].tolist())
        places = self._parted([at for at, id in enumerate(ids) if id == self.token], ids, pictures)
        origin, special = self._aligned(plain, ids, places)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        pixels = {name: value for name, value in tensors.items() if name not in _TEXT_INPUTS}
        return Written(ids, pixels, origin, places, special)

    def cells(self, picture: Picture) -> Float[Tensor, "token 4"]:
        """The part of a picture that each of its tokens stands for: left, top, right, bottom in pixels.

        Raises:
            Refusal: how the tokens lie cannot be told.
        """
        if picture.size not in self._cells:
            self._cells[picture.size] = self._measured(picture)
        return self._cells[picture.size]

    def inside(self, region: Region, picture: Picture) -> tuple[int, ...]:
        """The tokens of a picture, counted from its first, whose middle lies in a region.

        Raises:
            InputError: none does.
            Refusal: as `cells`.
        """
        left, top, right, bottom = region.box
        boxes = self.cells(picture)
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        found = ((x >= left) & (x < right) & (y >= top) & (y < bottom)).nonzero()[:, 0]
        if not len(found):
            raise InputError(
                f"the region {region.box} holds the middle of no token of a picture of {picture.size[0]} x "
                f"{picture.size[1]} pixels, which has {len(boxes)} tokens; give a larger box"
            )
        return tuple(found.tolist())

    def joined(self, parts: Sequence[Pixels]) -> dict[str, Tensor]:
        """The inputs of several texts as those of one batch."""
        names = dict.fromkeys(name for part in parts for name in part)
        joined = {}
        for name in names:
            tensors = [part[name] for part in parts if name in part]
            if name in self.by_row:
                tensors = [*_alike(tensors)]
                if len(tensors) < len(parts):
                    raise Refusal(
                        f"{type(self.processor).__name__} gives {name} by rows, so items with and without pictures "
                        "cannot share a batch; use batches of one item"
                    )
            if len({each.shape[1:] for each in tensors}) > 1:
                raise Refusal(
                    f"{type(self.processor).__name__} makes {name} of other sizes for other pictures, so they cannot "
                    "share a batch; use batches of one item, or pictures of one size"
                )
            joined[name] = torch.cat(tensors)
        return joined

    def _processed(self, text: str, images: Sequence[Any]) -> Mapping[str, Any]:
        try:
            given = self.processor(
                text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt", verbose=False
            )
        except Exception as error:  # every processor refuses in its own way
            line = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{type(self.processor).__name__} does not take this prompt: {line[0]}") from error
        return dict(given)

    def _parted(self, places: list[int], ids: Ids, pictures: Sequence[Picture]) -> tuple[Ids, ...]:
        counts = [self._count(each) for each in pictures]
        if sum(counts) != len(places):
            raise InputError(
                f"{type(self.processor).__name__} wrote {len(places)} tokens for {len(pictures)} pictures that have "
                f"{sum(counts)} by themselves; give one mark to each picture"
            )
        parted, start = [], 0
        for count in counts:
            parted.append(tuple(places[start : start + count]))
            start += count
        return tuple(parted)

    def _count(self, picture: Picture) -> int:
        """Tokens of a picture, which hang on its size alone."""
        if picture.size not in self._counts:
            ids = self._processed(self.mark, [picture.image()])["input_ids"][0]
            self._counts[picture.size] = int((ids == self.token).sum())
        return self._counts[picture.size]

    def _aligned(self, plain: Ids, ids: Ids, pictures: Sequence[Ids]) -> tuple[tuple[int | None, ...], Ids]:
        origin: list[int | None] = [None] * len(plain)
        special = [at for at, id in enumerate(ids) if id in self._specials]
        marks = [at for at, id in enumerate(plain) if id == self.mark_id]
        # A text that stands before, between or behind pictures: the same stretch of both rows of ids.
        starts, stops = [0, *(at + 1 for at in marks)], [*marks, len(plain)]
        begins = [0, *(each[-1] + 1 for each in pictures)]
        ends = [*(each[0] for each in pictures), len(ids)]
        for start, stop, begin, end in zip(starts, stops, begins, ends, strict=True):
            matcher = SequenceMatcher(None, plain[start:stop], ids[begin:end], autojunk=False)
            taken = set()
            for block in matcher.get_matching_blocks():
                for offset in range(block.size):
                    origin[start + block.a + offset] = begin + block.b + offset
                    taken.add(begin + block.b + offset)
            special += [at for at in range(begin, end) if at not in taken]
        inside = [at for each in pictures for at in range(each[0], each[-1] + 1) if ids[at] != self.token]
        return tuple(origin), tuple(sorted({*special, *inside}))

    @cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids) - {self.token}

    def _measured(self, picture: Picture) -> Float[Tensor, "token 4"]:
        given = self._processed(self.mark, [picture.image()])
        ids = given["input_ids"][0].tolist()
        width, height = picture.size
        if "image_grid_thw" in given:
            merge = int(getattr(self.processor.image_processor, "merge_size", 1))
            _, rows, columns = given["image_grid_thw"][0].tolist()
            return _grid(rows // merge, columns // merge, (0.0, 0.0, width, height))
        runs = _runs([at for at, id in enumerate(ids) if id == self.token])
        boxes = []
        tiles = [_TILE.search(str(self.tokenizer.convert_ids_to_tokens(ids[max(run[0] - 1, 0)]))) for run in runs]
        if len(runs) - sum(map(bool, tiles)) > 1:
            raise Refusal(
                f"{type(self.processor).__name__} makes {len(runs)} stretches of tokens of a picture and does not say "
                "which tile each is, so where they look is not known; leave regions out"
            )
        n_rows = max((int(tile[1]) for tile in tiles if tile), default=1)
        n_columns = max((int(tile[2]) for tile in tiles if tile), default=1)
        for run, tile in zip(runs, tiles, strict=True):
            side = math.isqrt(len(run))
            if side * side != len(run):
                raise Refusal(
                    f"{type(self.processor).__name__} makes {len(run)} tokens of a picture of {width} x {height}, "
                    "which are no square, so where each of them looks is not known; leave regions out"
                )
            box = self._seen(width, height)
            if tile:
                row, column = int(tile[1]) - 1, int(tile[2]) - 1
                box = (
                    width * column / n_columns,
                    height * row / n_rows,
                    width * (column + 1) / n_columns,
                    height * (row + 1) / n_rows,
                )
            boxes.append(_grid(side, side, box))
        return torch.cat(boxes)

    def _seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a picture that is left when its edges are cut off."""
        image = self.processor.image_processor
        crop, size = getattr(image, "crop_size", None), getattr(image, "size", None) or {}
        if not getattr(image, "do_center_crop", False) or not crop:
            return 0.0, 0.0, float(width), float(height)
        scale = 1.0
        if getattr(image, "do_resize", False):
            shortest = dict(size).get("shortest_edge")
            if not shortest:  # to a fixed size: what is cut off is a share of both sides
                across, down = dict(size)["width"] / width, dict(size)["height"] / height
                return _middle(width, height, dict(crop)["width"] / across, dict(crop)["height"] / down)
            scale = shortest / min(width, height)
        return _middle(width, height, dict(crop)["width"] / scale, dict(crop)["height"] / scale)


_READERS: WeakKeyDictionary[Any, PictureReader] = WeakKeyDictionary()


def picture_reader(processor: Any) -> PictureReader:
    """How a processor writes pictures into prompts; it is tried once.

    Raises:
        Refusal: it has no mark for a picture in a text, or cannot be used.
    """
    if processor not in _READERS:
        _READERS[processor] = _tried(processor)
    return _READERS[processor]


def spans_in(
    processor: Any, text: str, pictures: Sequence[Picture], regions: Mapping[str, Region] | None = None
) -> dict[str, list[list[int]]]:
    """Columns of `image`, `image:0` ..., `text`, `special` and `region:NAME` in a prompt of one row, as `spans=` takes
    them.

    Args:
        text: with `<image>` for each picture. Its special tokens are counted in, as `processor(text=...)` writes them.

    Raises:
        InputError, Refusal: as `PictureReader.write` and `PictureReader.inside`.
    """
    reader = picture_reader(processor)
    full = reader.text(text)
    written = reader.write(full, pictures)
    whole = processor(text=[full], images=[[each.image() for each in pictures]], return_tensors="pt")["input_ids"][0]
    front = _front(tuple(whole.tolist()), written.ids)
    named = named_places(reader, written, pictures, regions or {}, front)
    return {name: [[column for place in places for column in place]] for name, places in named.items()}


def named_places(
    reader: PictureReader, written: Written, pictures: Sequence[Picture], regions: Mapping[str, Region], front: int
) -> dict[str, tuple[Ids, ...]]:
    """The spans that every text with pictures has, with `front` more ids before it, which count as special."""
    places = [tuple(front + at for at in each) for each in written.pictures]
    special = (*range(front), *(front + at for at in written.special))
    taken = {*special, *(at for each in places for at in each)}
    text = tuple(at for at in range(front, front + len(written.ids)) if at not in taken)
    named: dict[str, tuple[Ids, ...]] = {"image": tuple(places)}
    named |= {f"image:{number}": (each,) for number, each in enumerate(places)}
    if text:
        named["text"] = (text,)
    if special:
        named["special"] = (special,)
    for name, region in regions.items():
        own = places[region.picture]
        named[f"region:{name}"] = (tuple(own[at] for at in reader.inside(region, pictures[region.picture])),)
    return named


def _tried(processor: Any) -> PictureReader:
    name = type(processor).__name__
    tokenizer = getattr(processor, "tokenizer", None)
    image_token = getattr(processor, "image_token", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None or not isinstance(image_token, str):
        raise Refusal(
            f"{name} writes no pictures into a text: it has no image token; use the processor of a model that reads "
            "both"
        )
    mark_id = tokenizer.convert_tokens_to_ids(image_token)
    sample = Picture.drawn(np.full((64, 64, 3), 127, np.uint8)).image()
    trouble = ""
    for mark in dict.fromkeys((_template_mark(processor, image_token), image_token)):
        trial = PictureReader(processor, mark, mark_id, -1, frozenset(), "")
        try:
            one, two = trial._processed(mark, [sample]), trial._processed(mark + mark, [sample, sample])
        except InputError as error:
            trouble = str(error)
            continue
        ids = one["input_ids"][0].tolist()
        candidates = {
            getattr(processor, "image_token_id", None),
            getattr(tokenizer, "image_token_id", None),
            *(getattr(processor, "image_token_ids", None) or ()),
        }
        token = max((each for each in candidates if isinstance(each, int)), key=ids.count, default=None)
        if token is None or not ids.count(token) or two["input_ids"][0].tolist().count(token) != 2 * ids.count(token):
            trouble = f"{name} adds no tokens for a picture where {mark!r} stands"
            continue
        _refuse_along_tokens(name, one, trial, sample)
        by_row = frozenset(
            key
            for key, value in two.items()
            if key not in _TEXT_INPUTS and isinstance(value, Tensor) and len(value) == 1 and value.dim() > 1
        )
        types = next((each for each in TOKEN_TYPES if each in one), "")
        return PictureReader(processor, mark, mark_id, token, by_row, types)
    raise Refusal(f"pictures cannot be written into a prompt: {trouble}; check the processor's image token")


def _refuse_along_tokens(name: str, short: Mapping[str, Any], trial: PictureReader, sample: Any) -> None:
    """Raises Refusal for inputs beside the text that are as long as it: a batch would have to pad them with it."""
    special = {*trial.tokenizer.all_special_ids, *trial.tokenizer.get_added_vocab().values()}
    word = next(text for text, id in trial.tokenizer.get_vocab().items() if id not in special)
    words = trial.tokenizer.convert_tokens_to_string([word] * 5)
    try:
        long = trial._processed(trial.mark + words, [sample])
    except InputError:
        return  # it does not take this text, so nothing is seen by it
    for key, value in short.items():
        if key not in _TEXT_INPUTS and isinstance(value, Tensor) and value.shape != long[key].shape:
            raise Refusal(
                f"{name} gives {key} along the tokens of the text, which items with pictures cannot be made of; run "
                "the model on the processor's own inputs"
            )


def _template_mark(processor: Any, image_token: str) -> str:
    """What a chat template writes between two texts where a picture stands between them."""
    parts = [{"type": "text", "text": "(before)"}, {"type": "image"}, {"type": "text", "text": "(behind)"}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except Exception:  # no template, or one that takes no such message
        return image_token
    _, _, rest = str(text).partition("(before)")
    mark, behind, _ = rest.partition("(behind)")
    return mark.strip() if behind and image_token in mark else image_token


def _parts(content: str) -> list[dict[str, str]]:
    texts = content.split(PICTURE_MARK)
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _front(whole: Ids, bare: Ids) -> int:
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return start
    raise Refusal("this processor writes a text differently with and without its special tokens; give spans by hand")


def _runs(places: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for at in places:
        if runs and at == runs[-1][-1] + 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs


def _grid(rows: int, columns: int, box: tuple[float, float, float, float]) -> Float[Tensor, "token 4"]:
    left, top, right, bottom = box
    across, down = (right - left) / columns, (bottom - top) / rows
    cells = [
        (left + across * column, top + down * row, left + across * (column + 1), top + down * (row + 1))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.tensor(cells, dtype=torch.float64)


def _middle(width: float, height: float, across: float, down: float) -> tuple[float, float, float, float]:
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2


def _alike(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows of different sizes, filled up with zeros, which models that take them so leave out."""
    shape = [max(sizes) for sizes in zip(*(each.shape[1:] for each in tensors), strict=True)]
    filled = []
    for each in tensors:
        room = [(0, most - own) for most, own in zip(shape, each.shape[1:], strict=True)]
        filled.append(pad(each, [side for pair in reversed(room) for side in pair]))
    return filled


__all__ = ["PictureReader", "Written", "named_places", "picture_reader", "spans_in"]
