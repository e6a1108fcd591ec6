"""Measurements behind `headwise bench NAME`: ratios against what a user would do instead, taken in one run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from headwise.catalogue import BenchEntry, register


def _say(what: str) -> None:
    print(f"headwise: {what}", file=sys.stderr, flush=True)


def _of(module: str, **more: Any) -> Callable[..., Mapping[str, float]]:
    """The module's `measure`, imported when it is run; `more` is passed on to it."""

    def run(seed: int = 0) -> Mapping[str, float]:
        measure = importlib.import_module(f"headwise.benches.{module}").measure
        return measure(seed=seed, **more)  # type: ignore[no-any-return]

    return run


def _organism(seed: int = 0, device: str | None = None, dtype: str | None = None) -> Mapping[str, float]:
    from headwise.benches.organism import measure

    return measure(seed=seed, device=device, dtype=dtype)


_BENCHES: Mapping[str, tuple[str, Callable[..., Mapping[str, float]]]] = {
    "organism": ("what the trained organism gets right on items it never saw", _organism),
    "visual-organism": (
        "what the visual organism gets right on pictures it never saw, and how often it hallucinates",
        _of("visual_organism"),
    ),
    "overhead": ("what attaching, reading z and row statistics cost, in time and memory", _of("overhead")),
    "detectors": ("recall and precision of every method on models whose heads are known", _of("detectors", said=_say)),
    "calibration": (
        "how often a verified claim is false, and how often a real effect is verified",
        _of("calibration", said=_say),
    ),
    "sweep": ("the exact map of all heads, against hooks and peers and the machine's limit", _of("sweep", said=_say)),
    "scoped": ("the map of all heads at the last token, in forwards", _of("scoped", said=_say)),
    "race": ("heads that matter found by racing: cost and agreement", _of("racing", said=_say)),
    "importance": ("importance of all heads by gradient, in forwards", _of("importance", said=_say)),
    "circuits": (
        "circuits of the organism: how small, how faithful on other items, and their cost",
        _of("circuits", said=_say),
    ),
    "direct": ("the direct path of all heads to the logits, in forwards", _of("direct", said=_say)),
    "stats": ("row statistics without n x n, in time and memory", _of("statistics")),
    "decode": ("what it costs to watch heads while a model writes", _of("decoding")),
    "uses": (
        "what heads in use are worth on the organism, against random heads",
        _of("uses", said=_say),
    ),
    "use-overhead": ("what interventions cost in generate", _of("use_overhead", said=_say)),
    "looking": (
        "what looking heads are worth on the visual organism, against random heads",
        _of("looking", said=_say),
    ),
    "looking-overhead": ("what edits of looking heads cost in generate", _of("looking.overhead", said=_say)),
    "controls": ("control sets of ten heads, against one run per set", _of("controls", said=_say)),
}

for _id, (_title, _run) in _BENCHES.items():
    register(BenchEntry(id=_id, title=_title, page=f"benchmarks.md#{_id}", run=_run))
