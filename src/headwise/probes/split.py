"""Which items a model that is trained on probes never sees: about one in ten, fixed by the item alone."""

from __future__ import annotations

import hashlib

from headwise.probes.item import Item

ONE_IN = 10


def held_out(item: Item) -> bool:
    """Whether an item belongs to the held-out part.

    Facts stay learnable: of the two ways to ask for a fact (`frame`) at most one is held out. A sum is held out with
    its terms in either order. Questions about pictures repeat, so an item with pictures goes by the first.
    """
    if item.pictures:
        return _draw(item.pictures[0].digest) == 0
    has = item.attributes
    if {"operation", "first", "second"} <= has.keys():
        terms = (int(has["first"]), int(has["second"]))
        return _draw(has["operation"], *(sorted(terms) if has["operation"] == "+" else terms)) == 0
    if {"frame", "relation", "subject"} <= has.keys():
        return _draw(has["relation"], has["subject"], has.get("year", "")) == has["frame"]
    prompt = item.prompt if isinstance(item.prompt, str) else [(each.role, each.content) for each in item.prompt]
    return _draw(prompt) == 0  # not the id: the same prompt has several, with other twins


def _draw(*parts: object) -> int:
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big") % ONE_IN
