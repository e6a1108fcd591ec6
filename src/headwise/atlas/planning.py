"""What an atlas will measure: which probes and methods fit the model, on which items, in which cells, and for how long.

Everything is settled here, before the first cell, so that a run that was stopped goes on with the same cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from headwise.atlas.asking import BY_REQUEST, Asked, methods_of, probes_of
from headwise.atlas.cell import Cell
from headwise.atlas.manifest import Manifest, MethodCard, ModelCard, ProbeCard, Settings, differences
from headwise.atlas.own import ProbeFile
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.find.method import Method
from headwise.metrics import measure
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.stream import Probe
from headwise.sweep.knockout import continues
from headwise.sweep.memory import tokens_of
from headwise.verify.crossing import CONTROLS
from headwise.verify.functional_dissociation import ALPHAS, DRAWS

OF_THE_ANSWER = frozenset({"answer", "foils", "twin", "logits", "gradients", "generation"})
"""A method that needs one of these speaks about the behaviour itself, so its heads are tested on every probe it fits.
Methods of the pattern alone are scored on every probe and tested on their own."""

MOST_CROSSED = 16
"""Behaviours of which every pair is tried: the work grows with their square."""

FEWEST_SENTENCES = 2
"""Of the off-target text, where it has to be shortened."""

TIMED = 4
"""Items of the forward that is timed for the estimate."""


@dataclass(frozen=True, eq=False)
class Halves:
    """The items of one probe: those that heads are found on, and those that test them."""

    finding: ItemSet
    testing: ItemSet


@dataclass(frozen=True, eq=False)
class Plan:
    """A manifest, the probes and the items that it names, and how long a token takes on each probe, in seconds.

    `shortened` says of a probe that had to be shortened how, in words; `processes` measure cells side by side.
    """

    manifest: Manifest
    probes: Mapping[str, Probe]
    items: Mapping[str, Halves]
    methods: Mapping[str, Method]
    pace: Mapping[str, float]
    shortened: Mapping[str, str]
    processes: int = 1

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(Cell.parse(id) for id in self.manifest.cells)

    def seconds(self, cell: Cell) -> float:
        """About how long a cell takes."""
        return self.tokens(cell) * self.pace.get(cell.probe, 0.0)

    def tokens(self, cell: Cell) -> int:
        """About how many tokens a cell runs."""
        settings, halves = self.manifest.settings, self.items[cell.probe]
        finding, testing = _tokens(halves.finding), _tokens(halves.testing)
        if cell.kind == "map":
            return self.manifest.model.sites[cell.site] * testing
        fresh = settings.fresh * testing // max(len(halves.testing), 1)
        return {
            "clean": 2 * testing,
            "find": 3 * finding,
            "joint": (1 + settings.controls) * testing,
            "offtarget": _tokens(self.items[settings.off_target].testing) if cell.kind == "offtarget" else 0,
            "fresh": 3 * fresh,
            "masked": 3 * finding + (len(ALPHAS) * (len(self.items) + DRAWS) + 1) * fresh,
            "crossed": (2 + min(CONTROLS, settings.controls)) * fresh,
            "dose": (len(settings.doses) + len(GROWING) + 1) * testing,
            "examples": settings.examples * testing // max(len(halves.testing), 1),
        }[cell.kind]


GROWING = (1, 2, 3, 4, 6, 8)
"""Sizes of the growing set of a dose cell."""


def plan(
    model: AttachedModel,
    settings: Settings,
    probes: Sequence[Asked] | None,
    methods: Sequence[str | Method] | None,
    earlier: Manifest | None,
    told: Callable[[str, int, int], None] = lambda probe, place, of: None,
) -> Plan:
    """What is to be measured; of an atlas that exists, what it has and what is asked for beyond it.

    `told` is told of every probe before its items are written and timed: its id, its place, and how many there are.

    Raises:
        InputError: no such probe or method (the nearest are named); items that the tokenizer cannot express, of a probe
            that was asked for by name; no probe but the off-target one; a scope in a span that no probe has; an atlas
            of another model, other settings or other versions.
        Refusal: nothing can be asked of the model.
    """
    card = ModelCard.of(model)
    if earlier is not None and (differ := differences(earlier, settings, card)):
        raise InputError(
            f"this atlas is another one: {'; '.join(differ)}; choose another --out, or the same settings and versions"
        )
    if model.tokenizer is None:
        raise Refusal(
            f"{model.name} has no tokenizer, so no probe can be written for it and no head verified; attach one that "
            "fits it: hw.attach(model, tokenizer)"
        )
    chosen_methods = methods_of(model, methods, earlier)
    asked = probes_of(model, probes, settings, earlier)
    items: dict[str, Halves] = {}
    left_out = dict(earlier.left_out) if earlier is not None else {}
    pace: dict[str, float] = {}
    shortened: dict[str, str] = {}
    spans: dict[str, tuple[str, ...]] = {}
    cards = {each.id: each for each in earlier.probes} if earlier is not None else {}
    for place, each in enumerate(asked):
        told(each.id, place, len(asked))
        by_name = probes is not None and each.id != settings.off_target
        try:
            halves, seconds, shorter = _fitting(each, model, settings)
        except HeadwiseError as error:
            if by_name or each.id in cards:
                raise
            left_out[each.id] = str(error)
            continue
        spans[each.id] = _spans(halves.testing)
        if settings.scope.startswith("span:") and settings.scope.removeprefix("span:") not in spans[each.id]:
            left_out[each.id] = (
                f"not every item of {each.id} has the span of scope {settings.scope!r}, so no head can be taken out "
                f"there; its spans: {', '.join(spans[each.id]) or 'none'}"
            )
            continue
        pace[each.id] = seconds
        if shorter:
            shortened[each.id] = shorter
        made = ProbeCard(
            id=each.id,
            title=each.title,
            metric=halves.testing.metric,
            settings={name: list(values) for name, values in halves.testing.settings.items()},
            finding=halves.finding.ids,
            testing=halves.testing.ids,
            dropped=dict(halves.testing.dropped),
            digests=tuple(item.digest for item in each.items()) if isinstance(each, ProbeFile) else (),
            pictures=halves.testing.reader is not None and not each.in_prompt,
            file=each.file if isinstance(each, ProbeFile) else "",
        )
        if each.id in cards and (cards[each.id].finding, cards[each.id].testing) != (made.finding, made.testing):
            raise InputError(
                f"the items of {each.id} are not those of this atlas (its settings are "
                f"{dict(cards[each.id].settings)} there and {dict(made.settings)} here); choose another --out"
            )
        if each.id in cards and (cards[each.id].digests or made.digests) != made.digests:
            raise InputError(
                f"items of {each.id} have the ids of this atlas and other texts, answers, spans or pictures; choose "
                "another --out"
            )
        cards.setdefault(each.id, made)
        items[each.id] = halves
    if not any(each.id != settings.off_target or each.metric == "cosine-to-clean" for each in cards.values()):
        if any(id in spans for id in left_out):
            has = "; ".join(f"{id}: {', '.join(named) or 'none'}" for id, named in spans.items())
            raise InputError(
                f"no probe that can be asked has the span of scope {settings.scope!r}; the spans there are: {has}"
            )
        reason = next(iter(left_out.values()), "no probe was asked for")
        raise Refusal(f"{model.name} can be asked none of {len(left_out)} probes, so no head can be verified: {reason}")
    manifest = Manifest(
        settings=settings,
        model=card if earlier is None else earlier.model,
        threads=torch.get_num_threads() if earlier is None else earlier.threads,
        probes=tuple(cards.values()),
        methods=_cards(chosen_methods, earlier),
        left_out=left_out,
        cells=(),
        batch_tokens=tokens_of(model.device),
    )
    if earlier is not None:
        manifest = replace(manifest, versions=earlier.versions)
    cells, unfit = _cells(model, manifest, items, chosen_methods, earlier)
    manifest = replace(manifest, cells=cells, left_out={**left_out, **unfit})
    return Plan(manifest, {each.id: each for each in asked}, items, chosen_methods, pace, shortened)


def _fitting(probe: Probe, model: AttachedModel, settings: Settings) -> tuple[Halves, float, str]:
    """Items of a probe, seconds per token, and how the probe was shortened to give them (empty where it was not).

    The off-target probe gets as many of its sentences as fit. Other probes are what they are: shorter ones would be
    other questions.
    """
    shorter = [probe]
    given = probe.grid.get("sentences", ())
    if probe.id == settings.off_target and len(given) == 1 and isinstance(given[0], int):
        shorter += [probe.over(sentences=n) for n in range(given[0] - 1, FEWEST_SENTENCES - 1, -1)]
    first: HeadwiseError | None = None
    for each in shorter:
        try:
            halves = _halves(each, model, settings)
            seconds = _pace(model, halves.testing)
        except HeadwiseError as error:
            first = first or error
            continue
        if each is probe:
            return halves, seconds, ""
        (n,) = each.grid["sentences"]
        return halves, seconds, f"{n} sentences in place of {given[0]}, to fit {longest(model, settings)} tokens"
    assert first is not None
    raise first


def _spans(items: ItemSet) -> tuple[str, ...]:
    """Names of the places that every item has."""
    return tuple(sorted(set.intersection(*(set(each.spans) for each in items))))


def _halves(probe: Probe, model: AttachedModel, settings: Settings) -> Halves:
    half, most = settings.items // 2, longest(model, settings)
    if isinstance(probe, ProbeFile):
        sets = [encode(each, model, max_tokens=most, name=probe.id) for each in probe.halves]
        found, tested = (replace(each, items=each.items[:half]) for each in sets)
    else:
        items = encode(probe, model, n=settings.items, seed=settings.seed, max_tokens=most)
        found, tested = replace(items, items=items.items[:half]), replace(items, items=items.items[half:])
    if not continues(model):
        found, tested = (replace(each, metric="cosine-to-clean") for each in (found, tested))
    return Halves(found, tested)


def longest(model: AttachedModel, settings: Settings) -> int:
    """Most tokens of an item: as set, or as many as the tokenizer says that the model takes."""
    limit = getattr(model.tokenizer, "model_max_length", None)
    return min(settings.max_tokens, limit) if isinstance(limit, int) else settings.max_tokens


def _pace(model: AttachedModel, items: ItemSet) -> float:
    """Seconds that a token takes, by one timed forward. Raises `Refusal` if the model cannot be asked these items."""
    few = replace(items, items=items.items[:TIMED])
    began = time.perf_counter()
    measure(model, few, batch_size=TIMED)
    return (time.perf_counter() - began) / _tokens(few)


def _tokens(items: ItemSet) -> int:
    return sum(len(each.prompt) + len(each.answer) for each in items)


def _cards(methods: Mapping[str, Method], earlier: Manifest | None) -> tuple[MethodCard, ...]:
    """The methods of an atlas as they were, then the new ones. Raises `InputError` for one with other settings."""
    stored = {each.id: each for each in earlier.methods} if earlier is not None else {}
    for id, card in stored.items():
        now = _card(methods[id]).settings
        if dict(card.settings) != dict(now):
            raise InputError(
                f"{id} has the settings {dict(card.settings)} in this atlas and {dict(now)} here; choose another --out"
            )
    return tuple(stored.get(id) or _card(method) for id, method in methods.items())


def _card(method: Method) -> MethodCard:
    # As JSON gives them back, so that a manifest that was read equals the one that was written.
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in method.settings.items()}
    return MethodCard(
        id=method.id,
        title=method.title,
        paper=method.paper,
        year=method.year,
        tier=method.tier,
        status=method.status,
        settings=settings,
    )


def _cells(
    model: AttachedModel,
    manifest: Manifest,
    items: Mapping[str, Halves],
    methods: Mapping[str, Method],
    earlier: Manifest | None,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """All cells: those that the atlas has, in their order, then the new ones; and what does not fit, with why."""
    unfit: dict[str, str] = {}
    cells: list[Cell] = []
    off_target = manifest.off_target
    behaviours = [each.id for each in manifest.behaviours]
    cells += [Cell(kind="clean", probe=probe) for probe in (*behaviours, *([off_target] if off_target else []))]
    tested: list[tuple[str, str]] = []
    for probe in (*behaviours, *([off_target] if off_target else [])):
        for id, method in methods.items():
            listed = "*" in method.probes or probe in method.probes or probe == method.probe
            if not listed or (probe == off_target and probe != method.probe):
                continue
            if reason := method.missing(model, items[probe].finding):
                unfit[f"find/{id}/{probe}"] = reason
                continue
            cells.append(Cell(kind="find", method=id, probe=probe))
            if probe != off_target and is_tested(method, probe):
                tested.append((id, probe))
    sites = tuple(manifest.model.sites)
    for probe in (*behaviours, *([off_target] if off_target else [])):
        cells += [Cell(kind="map", probe=probe, site=site) for site in sites]
    for id, probe in tested:
        cells.append(Cell(kind="joint", method=id, probe=probe))
        if off_target:
            cells.append(Cell(kind="offtarget", method=id, probe=probe))
    paired, beyond = behaviours[:MOST_CROSSED], behaviours[MOST_CROSSED:]
    cells += [Cell(kind="fresh", probe=probe) for probe in paired]
    cells += [Cell(kind="crossed", heads_of=of, probe=probe) for of in paired for probe in paired]
    if len(paired) > 1 and continues(model):
        cells += [Cell(kind="masked", probe=probe) for probe in paired]
    for probe in beyond:
        unfit[f"fresh/{probe}"] = (
            f"pairs of behaviours are tried among the first {MOST_CROSSED}; headwise.verify.crossing tries others"
        )
    for probe in behaviours:
        cells += [Cell(kind="dose", probe=probe), Cell(kind="examples", probe=probe)]
    known = earlier.cells if earlier is not None else ()
    new = (each.id for each in cells)
    return (*known, *(id for id in new if id not in set(known))), unfit


def is_tested(method: Method, probe: str) -> bool:
    """Whether the heads of a method are tested on a probe that it is scored on; see `OF_THE_ANSWER`."""
    of_the_answer = method.id in BY_REQUEST or bool(OF_THE_ANSWER & set(method.needs))
    return of_the_answer or probe == method.probe or probe in method.probes
