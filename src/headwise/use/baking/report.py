"""What baking says about itself: a line for every edit, what was removed, and what was measured of the saved folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

FILE = "headwise-bake.json"
FORMAT = 1


@dataclass(frozen=True)
class Line:
    """One edit.

    Attributes:
        edit: in words.
        result: `exact`, its form in weights computes the same function; or `impossible`.
        why: how it was done, or why it cannot be.
        tensors: what was changed for it.
    """

    edit: str
    result: Literal["exact", "impossible"]
    why: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removal:
    """KV groups taken out of the weights.

    Attributes:
        groups: their labels.
        sliced: whether the weights became smaller; else columns are zero and `why` says why.
        parameters, bytes: before and after, of the tensors in memory, tied ones counted once.
    """

    groups: tuple[str, ...]
    sliced: bool
    why: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]


@dataclass(frozen=True)
class Check:
    """What the saved folder, loaded anew, computes beside the model under the edits.

    Attributes:
        difference: largest difference of outputs, as a share of the largest output.
        tolerance: what it may be.
        effect: the same difference between the model without and with the edits: what there was to get right.
        inputs: what was run.
    """

    difference: float
    tolerance: float
    effect: float
    inputs: str


@dataclass(frozen=True)
class BakeReport:
    """All of it; `str(report)` is a page of text.

    Attributes:
        source, revision, weights_hash: the model that was baked.
        architecture: the class that loads what is saved; `housing` says what is another than in the source.
        check: None until it is saved.
    """

    lines: tuple[Line, ...]
    source: str
    revision: str | None
    weights_hash: str
    architecture: str
    housing: str = ""
    removal: Removal | None = None
    check: Check | None = None

    @property
    def exact(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.result == "exact")

    @property
    def impossible(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.result == "impossible")

    def to_json(self, **about: Any) -> str:
        return json.dumps({"format": FORMAT, **about, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        text = [f"{self.source} -> {self.architecture}" + (f" ({self.housing})" if self.housing else "")]
        text += [f"{line.result:10s} {line.edit}: {line.why}" for line in self.lines]
        if self.removal is not None:
            (before, after), what = self.removal.bytes, ", ".join(self.removal.groups)
            removed = f"removed    {what}: {before} -> {after} bytes"
            text.append(removed if self.removal.sliced else f"silent     {what}: {self.removal.why}")
        if self.check is not None:
            text.append(
                f"checked    loaded anew, differs by {self.check.difference:.2g} (may: {self.check.tolerance:.2g}) "
                f"where the edits change {self.check.effect:.2g}, on {self.check.inputs}"
            )
        return "\n".join(text)


__all__ = ["BakeReport", "Check", "Line", "Removal"]
