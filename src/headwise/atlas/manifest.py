"""The manifest: everything that decides what the cells of an atlas hold, written down before the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from headwise.errors import InputError
from headwise.find.method import scored_sites
from headwise.heads import Head, HeadSet, SiteId
from headwise.model.attached import AttachedModel
from headwise.model.identity import weights_hash
from headwise.model.positions import check_scope
from headwise.scores import Provenance
from headwise.sweep import MODES, Mode
from headwise.sweep.memory import tokens_of

FORMAT_VERSION = 1
"""Of the folder: which files it has and how they are read."""
CELL_SCHEMA = 1
"""Of the cells: what is measured in each kind, and under which names it is stored."""
FORMAT = "headwise.atlas"

FEWEST_FRESH = 8
"""Items on which pairs of behaviours are tried, at least."""

FEWEST_ITEMS = 16
"""Of a probe: with half of them to test on, the fewest that a verdict is given for."""

DECIDING = ("headwise", "torch", "transformers")
"""Packages of which another version gives other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an atlas is made; two runs on one folder must agree in all of it.

    Attributes:
        items: items per probe; the first half finds heads, the second half tests them.
        max_tokens: longest item, in tokens of a prompt and its answer.
        mode, scope: of every knock-out.
        controls: control sets for each set of heads.
        doses: shares of a full knock-out at which the dose curve is measured.
        examples: items per probe that are stored as tokens.
        off_target: the probe on which heads should change nothing.

    Raises `InputError` for values that cannot be used.
    """

    items: int = 64
    seed: int = 0
    max_tokens: int = 256
    mode: Mode = "zero"
    scope: str = "all"
    controls: int = 50
    doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    examples: int = 3
    off_target: str = "text"

    @property
    def fresh(self) -> int:
        """Items of each behaviour on which the heads of all are tried: an eighth as many, at least `FEWEST_FRESH`.

        The work grows with the square of the number of behaviours, so it is kept to few items.
        """
        return max(FEWEST_FRESH, self.items // 8)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"no knock-out mode {self.mode!r}; choose from {', '.join(MODES)}")
        check_scope(self.scope)
        if not isinstance(self.items, int) or self.items < FEWEST_ITEMS:
            raise InputError(
                f"items={self.items!r} is too few: half of them find heads and half test them, and a verdict needs at "
                f"least {FEWEST_ITEMS // 2} to test on; use {FEWEST_ITEMS} or more"
            )
        for name, least in (("max_tokens", 1), ("controls", 1), ("examples", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r} must be a whole number, at least {least}")
        if any(not 0 < dose <= 1 for dose in self.doses):
            raise InputError(f"doses={self.doses} must be shares of a full knock-out, above 0 and up to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The model that was measured: its name, the hash of its weights, how it was run, and its heads.

    `device` is its type (`cpu`, `cuda`); `sites` has the number of heads of each site of the main stack, by label.
    """

    name: str
    revision: str | None
    weights_hash: str
    type: str
    parameters: int
    dtype: str
    kernel: str
    device: str
    sites: Mapping[str, int]

    @classmethod
    def of(cls, model: AttachedModel) -> ModelCard:
        """Raises `Refusal` for weights that are not in memory."""
        config = model.model.config
        return cls(
            name=model.name,
            revision=model.revision,
            weights_hash=weights_hash(model.model),
            type=str(getattr(config, "model_type", type(model.model).__name__)),
            parameters=sum(each.numel() for each in model.model.parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
            kernel=str(getattr(config, "_attn_implementation", None)),
            device=model.device.type,
            sites={id.label: model.table.site(id).n_heads for id in scored_sites(model)},
        )

    @property
    def heads(self) -> HeadSet:
        """The heads of the main stack."""
        return HeadSet(tuple(Head(SiteId.parse(site), index) for site, n in self.sites.items() for index in range(n)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeCard:
    """The items of one probe, by id.

    Attributes:
        metric: id of the metric that it is measured with.
        settings: the probe's own settings and the values they go through.
        finding: items that heads are found on; `testing`: those that test them, among which only those that the model
            answers count.
        dropped: how many items were passed over, by reason.
        digests: of what all items of a probe file say; empty for a probe, whose ids are made of its items.
        pictures: whether it asks about pictures: its items have some, and the answer does not stand in their text.
        file: path of a probe file, as it was given; empty for a probe.
    """

    id: str
    title: str
    metric: str
    settings: Mapping[str, Any]
    finding: tuple[str, ...]
    testing: tuple[str, ...]
    dropped: Mapping[str, int]
    digests: tuple[str, ...] = ()
    pictures: bool = False
    file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCard:
    """A method as it was when it was added to the atlas, and the settings it is run with."""

    id: str
    title: str
    paper: str
    year: int
    tier: str
    status: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an atlas is of, and its cells in the order in which they are run.

    Attributes:
        threads: threads of torch; a run that goes on with the atlas uses as many.
        batch_tokens: most tokens of one forward.
        left_out: probes and methods on a probe that are not run, each with the reason.
    """

    settings: Settings
    model: ModelCard
    threads: int
    probes: tuple[ProbeCard, ...]
    methods: tuple[MethodCard, ...]
    left_out: Mapping[str, str]
    cells: tuple[str, ...]
    batch_tokens: int
    versions: Mapping[str, str] = field(default_factory=Provenance.versions_now)
    format_version: int = FORMAT_VERSION
    cell_schema: int = CELL_SCHEMA

    def probe(self, id: str) -> ProbeCard:
        """The items of a probe. Raises `InputError` for one that the atlas does not have."""
        found = next((each for each in self.probes if each.id == id), None)
        if found is None:
            has = ", ".join(each.id for each in self.probes) or "none"
            raise InputError(f"this atlas has no probe {id!r}; its probes: {has}")
        return found

    @property
    def off_target(self) -> str:
        """The off-target probe; empty where there is none, as with encoders, whose behaviour it is."""
        id = self.settings.off_target
        card = next((each for each in self.probes if each.id == id), None)
        return id if card is not None and card.metric != "cosine-to-clean" else ""

    @property
    def behaviours(self) -> tuple[ProbeCard, ...]:
        """The probes that verdicts are about: all but the off-target one."""
        return tuple(each for each in self.probes if each.id != self.off_target)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, form: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`. Raises `InputError` for anything else."""
        try:
            plain = dict(form)
            if plain.pop("format") != FORMAT:
                raise InputError("it does not describe a headwise atlas")
            given = {each.name: plain.pop(each.name) for each in fields(cls)}
            if plain:
                raise InputError(f"it has an unknown field {sorted(plain)[0]!r}")
            settings = dict(given["settings"])
            settings["doses"] = tuple(settings["doses"])
            probes = (
                {**each, **{name: tuple(each[name]) for name in ("finding", "testing", "digests") if name in each}}
                for each in given["probes"]
            )
            return cls(
                **{
                    **given,
                    "settings": Settings(**settings),
                    "model": ModelCard(**given["model"]),
                    "probes": tuple(ProbeCard(**each) for each in probes),
                    "methods": tuple(MethodCard(**each) for each in given["methods"]),
                    "cells": tuple(given["cells"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"it is damaged ({type(error).__name__}: {error})") from None


def differences(stored: Manifest, settings: Settings, model: ModelCard) -> list[str]:
    """In what a run of now with these settings on this model would differ from an atlas, one phrase for each."""
    found = []
    for name in ("weights_hash", "dtype", "kernel", "device"):
        old, new = getattr(stored.model, name), getattr(model, name)
        if old != new:
            found.append(
                f"its model is {stored.model.name!r}, this one is {model.name!r} (the weights differ)"
                if name == "weights_hash"
                else f"{name} is {old} there and {new} here"
            )
    for each in fields(Settings):
        old, new = getattr(stored.settings, each.name), getattr(settings, each.name)
        if old != new:
            found.append(f"{each.name} is {old} there and {new} here")
    tokens = tokens_of(model.device)
    if stored.batch_tokens != tokens:
        found.append(f"forwards have up to {stored.batch_tokens} tokens there and {tokens} here")
    now = Provenance.versions_now()
    for package in DECIDING:
        then, here = stored.versions.get(package, "missing"), now.get(package, "missing")
        if then != here:
            found.append(f"{package} is {then} there and {here} here")
    return found
