"""How to repeat an atlas: the command, and what no command can say."""

from __future__ import annotations

import shlex

from headwise import catalogue
from headwise.atlas.manifest import Manifest, ProbeCard
from headwise.probes.stream import Probe


def command_of(manifest: Manifest, folder: str) -> str:
    """The command that makes an atlas like this one; it hangs on no default.

    Permissions (`--allow-pickle`, `--trust-remote-code`) are not in a manifest: a model that needs one says so itself.
    """
    settings, model = manifest.settings, manifest.model
    options = {
        "out": folder,
        "probes": ",".join(each.file or each.id for each in manifest.behaviours),
        "methods": ",".join(each.id for each in manifest.methods),
        "items": settings.items,
        "seed": settings.seed,
        "mode": settings.mode,
        "scope": settings.scope,
        "max-tokens": settings.max_tokens,
        "controls": settings.controls,
        "off-target": settings.off_target,
        "device": model.device,
        "dtype": model.dtype,
        "attn": model.kernel if model.kernel != "None" else None,
        "revision": model.revision,
    }
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["headwise", "atlas", model.name, *given])


def beyond_command(manifest: Manifest) -> str:
    """What the command leaves out, in words: probes and methods that are not registered, or not with these settings.
    Empty where it says all."""
    probes = {each.id: each for each in catalogue.entries("probes") if isinstance(each, Probe)}
    methods = {each.id for each in catalogue.entries("methods")}
    own = [each.id for each in manifest.methods if each.id not in methods]
    for card in (each for each in manifest.behaviours if not each.file):
        if card.id not in probes:
            own.append(card.id)
        elif changed := _changed(card, probes[card.id]):
            own.append(f"{card.id} with {changed}")
    return f"give these in Python (headwise.atlas): {'; '.join(own)}" if own else ""


def _changed(card: ProbeCard, registered: Probe) -> str:
    usual = {name: list(values) for name, values in registered.grid.items()}
    return ", ".join(
        f"{name} {', '.join(map(str, values))}"
        for name, values in card.settings.items()
        if list(values) != usual.get(name)
    )
