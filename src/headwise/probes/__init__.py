"""Probes: questions with known answers, for any tokenizer.

from headwise.probes import encode, probe
items = encode(probe("ioi"), tokenizer, n=64)
"""

from __future__ import annotations

from headwise.catalogue import entry, register
from headwise.probes.albums import PICTURE_NEEDLE, TEXT_NEEDLE
from headwise.probes.arithmetic import ARITHMETIC, GREATER_THAN
from headwise.probes.batch import Batch
from headwise.probes.choice import CHOICE
from headwise.probes.conflict import CONFLICT
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.existence import EXISTENCE, LISTING
from headwise.probes.facts import DATED, FACTS
from headwise.probes.fewshot import FEWSHOT
from headwise.probes.files import read_items
from headwise.probes.ioi import IOI
from headwise.probes.item import Item, Message, Quote, Range, Twin
from headwise.probes.needle import HASH, NEEDLE
from headwise.probes.objects import COLORED_OBJECTS, ENTITY_TRACKING
from headwise.probes.ontology import ONTOLOGY
from headwise.probes.refusal import REFUSE
from headwise.probes.repeat import ECHO, REPEAT
from headwise.probes.seeing import COUNT, PANEL, PLACE, STRIP_IN_ORDER
from headwise.probes.split import held_out
from headwise.probes.stream import Probe
from headwise.probes.text import TEXT

PROBES = (
    ARITHMETIC,
    CHOICE,
    COLORED_OBJECTS,
    CONFLICT,
    DATED,
    ECHO,
    ENTITY_TRACKING,
    FACTS,
    FEWSHOT,
    GREATER_THAN,
    HASH,
    IOI,
    NEEDLE,
    ONTOLOGY,
    REFUSE,
    REPEAT,
    TEXT,
)
"""Of text alone."""

PICTURE_PROBES = (COUNT, EXISTENCE, LISTING, PANEL, PICTURE_NEEDLE, PLACE, STRIP_IN_ORDER, TEXT_NEEDLE)
"""Of pictures, for models that see."""

for _probe in (*PROBES, *PICTURE_PROBES):
    register(_probe)


def probe(id: str) -> Probe:
    """The probe of that id, also one that another package registered. Raises `InputError`, with the nearest ids."""
    found = entry("probes", id)
    assert isinstance(found, Probe)
    return found


__all__ = [
    "PICTURE_PROBES",
    "PROBES",
    "Batch",
    "EncodedItem",
    "EncodedTwin",
    "Item",
    "ItemSet",
    "Message",
    "Probe",
    "Quote",
    "Range",
    "Twin",
    "encode",
    "held_out",
    "probe",
    "read_items",
]
