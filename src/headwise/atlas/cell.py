"""A cell: one unit of work of an atlas, named so that its name says all that it hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from headwise.errors import InputError

Kind = Literal["clean", "find", "map", "joint", "offtarget", "fresh", "crossed", "masked", "dose", "examples"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PAIRED: tuple[Kind, ...] = ("fresh", "crossed", "masked")
"""Those of several behaviours together; see `headwise.atlas.pairing`."""

_PARTS: dict[str, tuple[str, ...]] = {
    "clean": ("probe",),
    "find": ("method", "probe"),
    "map": ("probe", "site"),
    "joint": ("method", "probe"),
    "offtarget": ("method", "probe"),
    "fresh": ("probe",),
    "crossed": ("heads_of", "probe"),
    "masked": ("probe",),
    "dose": ("probe",),
    "examples": ("probe",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What a cell measures; `id` is its name in the manifest and its path under `cells/`.

    - `clean/PROBE`: which held-out items the model answers, their metric without a knock-out, and chance;
    - `find/METHOD/PROBE`: the scores of a method on the finding items;
    - `map/PROBE/SITE`: the metric of the held-out items with each head of a site out, one at a time;
    - `joint/METHOD/PROBE`: the same with the best heads of a method out together, and with each control set out; where
      another method named the same heads, only the name of the joint cell that measured them;
    - `offtarget/METHOD/PROBE`: the off-target metric with these heads out;
    - `fresh/PROBE`: the heads that a behaviour rests on, their control sets, and items that neither found nor tested a
      head;
    - `crossed/HEADS_OF/PROBE`: the metric of the fresh items of one behaviour with the heads of another out (or of the
      same), and with each of their control sets out;
    - `masked/PROBE`: the accuracy on every behaviour with the heads out that are most important for one by their gate
      gradient, and on this one with random heads out;
    - `dose/PROBE`: the metric with the probe's heads partly out, one more at a time, and with all others out;
    - `examples/PROBE`: a few items as tokens, with their pictures, and where the probe's heads look.
    """

    kind: Kind
    probe: str
    method: str = ""
    site: str = ""
    heads_of: str = ""

    @property
    def id(self) -> str:
        return "/".join((self.kind, *(getattr(self, part) for part in _PARTS[self.kind])))

    @classmethod
    def parse(cls, id: str) -> Cell:
        """The cell of an id. Raises `InputError` for what is none."""
        kind, *parts = id.split("/")
        if kind not in _PARTS or len(parts) != len(_PARTS[kind]) or not all(parts):
            raise InputError(f"{id!r} names no cell of an atlas; cells are named as in {', '.join(_PARTS)}/...")
        return cls(kind=kind, **dict(zip(_PARTS[kind], parts, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """What a cell measured: plain values, and arrays by name.

    Attributes:
        about: what JSON can hold.
        arrays: what is stored as tensors.
        refused: why nothing was measured, in one line; empty where something was.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    refused: str = ""
