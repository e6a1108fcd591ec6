"""Where two continuations of one prompt part: the token that decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headwise.errors import InputError
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which both have a token, and not the same; None where there is none."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (own, others) in pairs if own != others), None)


def at_parting(items: ItemSet) -> ItemSet:
    """The items cut where their answer and that of their twin part: what both say up to there belongs to both prompts,
    and the answer is the one token behind it. There are no foils, and no other right answers.

    Raises:
        InputError: an item has no twin with an answer, or one whose answer nowhere differs from the item's in a token.
    """
    return replace(items, items=tuple(_cut(items.probe, each) for each in items))


def _cut(probe: str, each: EncodedItem) -> EncodedItem:
    twin = each.twin
    place = None if twin is None else parting(each.answer, twin.answer)
    if twin is None or place is None:
        raise InputError(
            f"item {each.id} of {probe} has no twin whose answer parts from its own, so there is no token that tells "
            "them apart; use a probe whose twins have another answer"
        )
    said = each.answer[:place]
    return replace(
        each,
        prompt=each.prompt + said,
        answer=(each.answer[place],),
        also=(),
        foils=(),
        twin=EncodedTwin(twin.prompt + said, (twin.answer[place],), twin.spans),
    )
