"""Which probes and methods an atlas has: those that it had before, and those that are asked for or fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise import catalogue
from headwise.atlas.manifest import Manifest, ProbeCard, Settings
from headwise.atlas.own import ProbeFile, is_file
from headwise.errors import InputError
from headwise.find.method import Method
from headwise.find.search import method as method_named
from headwise.model.attached import AttachedModel
from headwise.probes import probe as probe_named
from headwise.probes.stream import Probe
from headwise.sweep.knockout import continues

BY_REQUEST = (
    "knock-out",
    "activation-patching",
    "path-patching",
    "memory-context",
    "arithmetic",
    "chain-of-thought",
    "hydra",
    "codes",
)
"""Methods that are run only where they are named: all but the last take a forward for every head and item, as the map
does, which knocks every head out on the held-out items; `codes` trains ten auto-encoders on each probe."""

Asked = str | Path | Probe
"""A probe: its id, a probe file, or itself."""


def sees(model: AttachedModel) -> bool:
    """Whether the model has a processor that takes pictures, so that they can stand in its prompts."""
    return getattr(model.processor, "image_processor", None) is not None


def shows_pictures(probe: Probe) -> bool:
    """Whether its items have pictures; the first one tells."""
    first = next(probe.items(), None)
    return first is not None and bool(first.pictures)


def methods_of(
    model: AttachedModel, named: Sequence[str | Method] | None, earlier: Manifest | None
) -> dict[str, Method]:
    """Those of the atlas, then those that are asked for. Left out, all but `BY_REQUEST`; of a model that sees nothing,
    none that is at home on pictures."""
    if named is None:
        every = [each for each in catalogue.entries("methods") if isinstance(each, Method)]
        blind = frozenset() if sees(model) else frozenset(each.id for each in _registered() if shows_pictures(each))
        asked = {each.id: each for each in every if each.id not in BY_REQUEST and each.probe not in blind}
    else:
        asked = {found.id: found for found in map(method_named, named)}
    stored = [each.id for each in earlier.methods] if earlier is not None else []
    return {**{id: asked.get(id) or method_named(id) for id in stored}, **asked}


def probes_of(
    model: AttachedModel, named: Sequence[Asked] | None, settings: Settings, earlier: Manifest | None
) -> list[Probe]:
    """Those of the atlas with the settings it has them with, then those that are asked for; the off-target one last.

    Left out, those of pictures come first, for a model that sees: pairs are tried among the first behaviours, and both
    kinds are to be among them. A model that sees nothing is asked none.
    """
    off_target = probe_named(settings.off_target)
    speaks = continues(model)
    if named is None:
        every = _registered() if speaks else [off_target]
        pictured = [each for each in every if shows_pictures(each)]
        others = [each for each in every if each not in pictured]
        found = [*(pictured if sees(model) else ()), *others]
    else:
        found = [_probe(each) for each in named]
        _require_own_names(found, off_target)
        if speaks and all(each.id == off_target.id for each in found):
            raise InputError(
                f"{off_target.id} is the off-target probe, on which heads should change nothing, so it gets no "
                "verdicts; name a behaviour as well (probes=['ioi']), or another off_target="
            )
    asked = {each.id: each for each in found}
    stored: dict[str, Probe] = {}
    for card in earlier.probes if earlier is not None else ():
        if named is not None and card.id in asked:
            stored[card.id] = asked[card.id]
        else:
            stored[card.id] = _as_it_was(card)
    together = {**stored, **{id: each for id, each in asked.items() if id not in stored}}
    last = together.pop(off_target.id, off_target)
    return [*together.values(), last]


def _registered() -> list[Probe]:
    return [each for each in catalogue.entries("probes") if isinstance(each, Probe)]


def _probe(given: Asked) -> Probe:
    if isinstance(given, Probe):
        return given
    return ProbeFile.of(given) if isinstance(given, Path) or is_file(given) else probe_named(given)


def _as_it_was(card: ProbeCard) -> Probe:
    if card.file:
        return ProbeFile.of(card.file)
    return probe_named(card.id).over(**{name: tuple(values) for name, values in card.settings.items()})


def _require_own_names(found: Sequence[Probe], off_target: Probe) -> None:
    """Raises `InputError` for a probe file whose name is that of another probe: results would not say which it was."""
    taken = {each.id for each in _registered()} | {off_target.id}
    for each in found:
        if isinstance(each, ProbeFile):
            if each.id in taken:
                raise InputError(f"probe file {each.file} would be called {each.id!r}, as another probe is; rename it")
            taken.add(each.id)
