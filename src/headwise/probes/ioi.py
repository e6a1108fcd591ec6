"""The indirect object: two people, one of whom gives something to the other."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.stream import Probe, require
from headwise.probes.text import with_article
from headwise.words import word_list

# {0} and {1} are the two people in the order of their first mention, {2} is who acts.
FRAMES = (
    "When {0} and {1} went to the {place},{2} gave {object} to",
    "Today {0} and {1} met at the {place}. Then{2} gave {object} to",
    "Yesterday {0} and {1} were in the {place}, and{2} handed {object} to",
    "After {0} and {1} left the {place},{2} sent {object} to",
)
ORDERS = ("receiver-first", "giver-first")


def _ioi(random: Random, *, order: str) -> Item:
    require("order", order, ORDERS)
    receiver, giver, third = random.sample(word_list("names"), 3)
    frame = random.randrange(len(FRAMES))
    fillings = {
        "place": random.choice(word_list("places")),
        "object": with_article(random.choice(word_list("objects"))),
    }
    pair = (receiver, giver) if order == "receiver-first" else (giver, receiver)

    def text(acting: str) -> Passage:
        passage = Passage()
        rest = FRAMES[frame]
        for slot, name in zip(("{0}", "{1}", "{2}"), (*pair, acting), strict=True):
            before, rest = rest.split(slot)
            passage.add(before.format(**fillings))
            role = "s2" if slot == "{2}" else "io" if name == receiver else "s1"
            passage.add(f" {name}" if slot == "{2}" else name, role)
        return passage.add(rest.format(**fillings))

    return text(giver).item(f" {receiver}", twin=text(third), foils=(f" {giver}",), order=order, frame=frame)


IOI = Probe(
    id="ioi",
    title="who receives what one of two people gives (indirect object identification)",
    page="probes.md#ioi",
    make=_ioi,
    metric="logit-difference",
    chance=0.0,
    spans=("io", "s1", "s2"),
    grid={"order": ORDERS},
)
