"""Items whose circuits in planted induction models are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.zoo.planted import Planted

Exchange = Callable[..., ItemSet]


@pytest.fixture(scope="session")
def exchange() -> Exchange:
    """Lists of words that begin again; the twin has another word in the place `before` the answer's first one. So what
    differs goes by the induction heads' values (0), or by the previous-token head into their keys (1)."""

    def made(organism: Planted, before: int, seed: int = 0) -> ItemSet:
        items = []
        for number, example in enumerate(organism.examples("repeat", 3, seed=seed)):
            place = example.ids.index(example.answer) - before
            other = [word for word in organism.lexicon.content if word not in example.ids][number]
            twin = EncodedTwin((*example.ids[:place], other, *example.ids[place + 1 :]), (), {})
            item = Item(prompt="", answer="", id=f"{before}-{seed}-{number}")
            items.append(EncodedItem(item, example.ids, (example.answer,), (), ((example.foil,),), {}, twin))
        return ItemSet(f"exchanged-{before}", tuple(items), {}, "logit-difference", 0)

    return made
