"""One item in ids, as one tokenizer (and its processor, where there are pictures) writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headwise.probes.item import Item
from headwise.probes.layout import Ids, Pixels

Places = Mapping[str, tuple[Ids, ...]]
"""Of each name, the token positions of each of its places."""


@dataclass(frozen=True, slots=True)
class EncodedTwin:
    """The corrupted partner: as many ids as the prompt, and its own answer and places."""

    prompt: Ids
    answer: Ids
    spans: Places
    pixels: Pixels = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One item in ids.

    Attributes:
        item: what was encoded.
        prompt: ids of the prompt, with what the tokenizer puts in front of a text.
        answer: ids that the answer adds to the prompt.
        also, foils: ids that other right answers and the wrong ones add.
        spans: token positions in `prompt`; for each name, the positions of each of its places.
        twin: the partner, if the item has one.
        pixels: what the model takes of its pictures beside the ids. Its spans are then also `image`, `image:0` ... for
            each picture, `region:NAME`, `text` and `special` (what is neither), where there are such tokens.
    """

    item: Item
    prompt: Ids
    answer: Ids
    also: tuple[Ids, ...]
    foils: tuple[Ids, ...]
    spans: Places
    twin: EncodedTwin | None
    pixels: Pixels = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.item.id
