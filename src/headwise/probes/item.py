"""One item of a probe: a prompt with named spans, its answer, and often a corrupted twin.

Nothing here knows a tokenizer. A span is a range of characters; `encode` finds its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np

from headwise.errors import InputError
from headwise.probes.picture import PICTURE_MARK, Picture, Region, Regions


@dataclass(frozen=True, slots=True)
class Range:
    """Characters `start` to `stop` (excluded) of a prompt."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Quote:
    """The `occurrence`-th place, counted from 0, where `text` stands in a prompt; None says that there is only one."""

    text: str
    occurrence: int | None = None

    def find(self, prompt: str) -> Range:
        """Where it stands. Raises `InputError` if it does not, or stands there more than once and none is picked."""
        places = occurrences(self.text, prompt)
        if not places:
            raise InputError(f"span text {self.text!r} is not in the prompt; quote it letter by letter")
        if self.occurrence is None and len(places) > 1:
            raise InputError(
                f"span text {self.text!r} occurs {len(places)} times in the prompt; say which one: "
                f'{{"text": {json.dumps(self.text, ensure_ascii=False)}, "occurrence": 0}}'
            )
        which = self.occurrence or 0
        if not 0 <= which < len(places):
            raise InputError(
                f"span text {self.text!r} is {len(places)} times in the prompt, and occurrence {which} is not among "
                f"them; count from 0, to {len(places) - 1}"
            )
        return places[which]


def occurrences(text: str, prompt: str) -> list[Range]:
    """Every place of `text` in `prompt`, overlapping ones too."""
    places, start = [], prompt.find(text)
    while start >= 0:
        places.append(Range(start, start + len(text)))
        start = prompt.find(text, start + 1)
    return places


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, for a model with a chat template."""

    role: str
    content: str


Spans = Mapping[str, tuple[Range | Quote, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """The corrupted partner of an item: the same length in tokens, another answer or none (empty); its own pictures, or
    those of the item where it has none."""

    prompt: str | tuple[Message, ...]
    answer: str = ""
    spans: Spans = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with a known answer.

    Attributes:
        id: the same for the same prompt and answer everywhere; results of two models are joined on it, and what found
            heads is told by it from what tests them.
        prompt: the text, or the messages a chat template makes a text of.
        answer: what comes next, as a continuation, so mostly with a space in front.
        also: other right answers.
        foils: wrong answers that the right one is compared with.
        spans: named places in the prompt; a name may have several places.
        twin: the corrupted partner.
        attributes: what the item is an instance of (depth, length, template ...).
        pictures: what stands at the `<image>` marks of the prompt, in their order.
        regions: named places in the pictures, the same in those of the twin.

    Raises `InputError` unless there are as many pictures as marks, and for a region outside them.
    """

    prompt: str | tuple[Message, ...]
    answer: str
    id: str = ""
    also: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    spans: Spans = field(default_factory=dict)
    twin: Twin | None = None
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    regions: Regions = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pictures and not self.regions:
            return  # a text may speak of `<image>`
        _check_pictures(self.prompt, self.pictures, self.regions)
        if self.twin is not None:
            _check_pictures(self.twin.prompt, self.twin.pictures or self.pictures, self.regions)

    def named(self, probe: str) -> Self:
        """This item with an id made of its text, so that equal items have equal ids whatever stream they came from."""
        # The None stands where ids once had the twin; those of results on disk stay what they were.
        content = json.dumps([_plain(self.prompt), self.answer, None, *(each.digest for each in self.pictures)])
        digest = hashlib.blake2s(content.encode(), digest_size=6).hexdigest()
        return replace(self, id=f"{probe}-{digest}")

    @property
    def digest(self) -> str:
        """Of all that it says and asks for, the twin with it: ids may be given by hand, and stay where texts change."""
        told = {name.name: getattr(self, name.name) for name in fields(self) if name.name not in ("id", "attributes")}
        return hashlib.blake2s(json.dumps(told, default=_told, sort_keys=True).encode(), digest_size=6).hexdigest()


def _told(value: Any) -> Any:
    """What JSON has no word for."""
    if isinstance(value, Picture):
        return value.digest
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)


def _check_pictures(prompt: str | tuple[Message, ...], pictures: tuple[Picture, ...], regions: Regions) -> None:
    text = prompt if isinstance(prompt, str) else "".join(each.content for each in prompt)
    marks = text.count(PICTURE_MARK)
    if marks != len(pictures):
        raise InputError(
            f"the prompt has {marks} marks {PICTURE_MARK} and the item {len(pictures)} pictures; put one mark in the "
            "prompt for each picture, where it stands"
        )
    for name, region in regions.items():
        if region.picture >= len(pictures):
            raise InputError(f"region {name!r} is of picture {region.picture}, and there are {len(pictures)}, from 0")
        width, height = pictures[region.picture].size
        if region.box[2] > width or region.box[3] > height:
            raise InputError(f"region {name!r} {region.box} reaches out of its picture of {width} x {height} pixels")


def _plain(prompt: str | tuple[Message, ...]) -> object:
    return prompt if isinstance(prompt, str) else [[each.role, each.content] for each in prompt]


class Passage:
    """A text under construction, whose pieces can be given names."""

    def __init__(self) -> None:
        self.text = ""
        self._spans: dict[str, tuple[Range, ...]] = {}

    def add(self, text: str, *names: str) -> Self:
        """Append `text`. Under each of `names` it becomes a place, without the blanks around it."""
        start = len(self.text) + len(text) - len(text.lstrip())
        self.text += text
        place = Range(start, len(self.text.rstrip()))
        for name in names:
            self._spans[name] = (*self._spans.get(name, ()), place)
        return self

    def mark(self, name: str, start: int) -> Self:
        """Give a name to everything from character `start` to the end."""
        self._spans[name] = (*self._spans.get(name, ()), Range(start, len(self.text)))
        return self

    @property
    def spans(self) -> dict[str, tuple[Range, ...]]:
        return dict(self._spans)

    def item(
        self,
        answer: str,
        *,
        twin: Passage | None = None,
        twin_answer: str = "",
        also: tuple[str, ...] = (),
        foils: tuple[str, ...] = (),
        pictures: tuple[Picture, ...] = (),
        twin_pictures: tuple[Picture, ...] = (),
        regions: Mapping[str, Region] | None = None,
        **attributes: str | int | float,
    ) -> Item:
        """An item with this text as its prompt."""
        partner = None
        if twin is not None:
            partner = Twin(prompt=twin.text, answer=twin_answer, spans=twin.spans, pictures=twin_pictures)
        return Item(
            prompt=self.text,
            answer=answer,
            also=also,
            foils=foils,
            spans=self.spans,
            twin=partner,
            attributes=attributes,
            pictures=pictures,
            regions=regions or {},
        )
