"""headwise finds what each attention head of a transformer does, proves it causally, and puts it to use.

    model = hw.load("zoo:tiny-llama")            # or a hub id, a folder; hw.attach(model) for one in memory
    with model.reading(hw.read.z()) as got:      # what the heads compute
        model(**inputs)
    with model.editing(hw.edit.zero("L1H2")):    # what happens without one
        model.generate(**inputs)
    model.doctor()                               # proof that both do what they say on this model
    items = hw.encode(hw.probe("ioi"), model)      # questions with known answers
    hw.measure(model, items, edits=[hw.edit.zero("L1H2")])   # a number per item

Names are looked up when they are first used, so that importing headwise does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise import fit, use
    from headwise.atlas.opened import Atlas
    from headwise.atlas.running import atlas
    from headwise.errors import HeadwiseError, InputError, NotFired, PlanConflict, Refusal
    from headwise.find.search import find
    from headwise.heads import Head, HeadSet, KVGroup, SiteId
    from headwise.loading import load
    from headwise.metrics import keep_right, measure, metric
    from headwise.model import edit, read
    from headwise.model.attached import AttachedModel, attach
    from headwise.model.reference import Reference, reference
    from headwise.probes import encode, probe, read_items
    from headwise.scores import HeadScores, Provenance
    from headwise.use.baking.bake import bake
    from headwise.verify.result import Verdict
    from headwise.verify.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "Atlas",
    "AttachedModel",
    "Head",
    "HeadScores",
    "HeadSet",
    "HeadwiseError",
    "InputError",
    "KVGroup",
    "NotFired",
    "PlanConflict",
    "Provenance",
    "Reference",
    "Refusal",
    "SiteId",
    "Verdict",
    "atlas",
    "attach",
    "bake",
    "edit",
    "encode",
    "find",
    "fit",
    "keep_right",
    "load",
    "measure",
    "metric",
    "probe",
    "read",
    "read_items",
    "reference",
    "use",
    "verify",
]

_MODULES = ("edit", "read")
_ROOMS = ("atlas", "find", "fit", "use", "verify")
_HOMES = {
    "headwise.atlas.opened": ("Atlas",),
    "headwise.errors": ("HeadwiseError", "InputError", "NotFired", "PlanConflict", "Refusal"),
    "headwise.heads": ("Head", "HeadSet", "KVGroup", "SiteId"),
    "headwise.loading": ("load",),
    "headwise.metrics": ("keep_right", "measure", "metric"),
    "headwise.model.attached": ("AttachedModel", "attach"),
    "headwise.model.reference": ("Reference", "reference"),
    "headwise.probes": ("encode", "probe", "read_items"),
    "headwise.scores": ("HeadScores", "Provenance"),
    "headwise.use.baking": ("bake",),
    "headwise.verify.result": ("Verdict",),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"headwise.model.{name}")
    elif name in _ROOMS:
        value = import_module(f"headwise.{name}")
    else:
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module 'headwise' has no attribute {name!r}")
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
