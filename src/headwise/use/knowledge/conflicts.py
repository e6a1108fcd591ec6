"""Items of a conflict, asked for one source: what is remembered or what is told, whatever their instruction says.

    against = answered_from(hw.encode(hw.probe("conflict").over(trust="context"), tokenizer, n=64), "memory")

An intervention that forces one source is measured on these: the answer is that of the source, the foil that of the
other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from headwise.errors import InputError
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet

Source = Literal["memory", "context"]
SOURCES: tuple[Source, ...] = get_args(Source)


def answered_from(items: ItemSet, source: Source) -> ItemSet:
    """The same prompts under the same ids, with the source's answer as the right one and the other as the foil.

    Items that change have no twin any more, and no other right answers; their attribute `trust` is the source, and
    `instructed` what it was.

    Raises:
        InputError: no source of that name; an item without the attribute `trust`, or without exactly one foil.
    """
    if source not in SOURCES:
        raise InputError(f"source={source!r} is neither 'memory' nor 'context'")
    return replace(items, items=tuple(_asked_for(each, source) for each in items))


def other_source(source: Source) -> Source:
    return "context" if source == "memory" else "memory"


def refuse_shared(found_on: tuple[str, ...], judged_on: ItemSet) -> None:
    """Raises InputError where what is chosen on `judged_on` was found on some of the same items."""
    shared = set(found_on) & set(judged_on.ids)
    if shared:
        raise InputError(
            f"{len(shared)} items, such as {min(shared)}, are among those that found the heads; leave them out "
            "(items.only), so that settings are chosen on others"
        )


def _asked_for(each: EncodedItem, source: Source) -> EncodedItem:
    trust = each.item.attributes.get("trust")
    if trust not in SOURCES or len(each.foils) != 1:
        raise InputError(
            f"item {each.id} does not say what is remembered and what is told; give it the attribute trust, which its "
            "answer comes from ('memory' or 'context'), and the answer from the other source as its one foil"
        )
    if trust == source:
        return each
    item = replace(
        each.item,
        answer=each.item.foils[0],
        also=(),
        foils=(each.item.answer,),
        twin=None,
        attributes={**each.item.attributes, "trust": source, "instructed": trust},
    )
    return replace(each, item=item, answer=each.foils[0], also=(), foils=(each.answer,), twin=None)


__all__ = ["SOURCES", "Source", "answered_from", "other_source", "refuse_shared"]
