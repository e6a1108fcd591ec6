"""From an atlas on disk to what its report shows: the one place that knows both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas
from scipy import stats

from headwise.atlas.report.command import beyond_command, command_of
from headwise.atlas.report.matrix import matrix_of
from headwise.atlas.report.numerals import counted
from headwise.atlas.report.view import (
    NAN,
    Behaviour,
    Claim,
    Dose,
    Example,
    Failure,
    Fresh,
    HeadMap,
    Off,
    Pattern,
    Report,
    Shot,
    Shown,
    naming,
)
from headwise.heads import HeadSet, SiteId
from headwise.scores import HeadScores
from headwise.verify.dissociation import Together
from headwise.verify.evidence import Evidence
from headwise.verify.verdict import FamilyVerdict, JointVerdict, SingleVerdict

if TYPE_CHECKING:
    from headwise.atlas.examples import Example as Kept
    from headwise.atlas.manifest import Manifest
    from headwise.atlas.opened import Atlas
    from headwise.atlas.opened import Dose as Measured

CONFIDENCE = 0.95
FILES = (
    Shown("manifest.json", "what was planned, written before the first cell"),
    Shown("cells/", "every result as it was measured: JSON, and safetensors for arrays"),
    Shown("tables/", "scores, effects, controls, verdicts, items, off_target, together, pairs, functional as Parquet"),
)


def report_of(atlas: Atlas, *, command: str = "") -> Report:
    """What the report of an atlas shows, finished or not.

    `command` repeats the run; made from the manifest if left out.
    """
    manifest = atlas.manifest
    families = atlas.families()
    off = _Off(atlas.off_target, manifest.off_target)
    fresh = {probe: _fresh(found) for probe, found in atlas.together().items()}
    behaviours = tuple(
        replace(_behaviour(atlas, evidence, verdict, off), fresh=fresh.get(verdict.family.probe))
        for evidence, verdict in families
    )
    alone = {each.family.probe: each.verified for _, each in families}
    return Report(
        model=manifest.model.name,
        n_heads=len(manifest.model.heads),
        asked=_asked(manifest),
        origin=_origin(manifest),
        command=command or command_of(manifest, str(atlas.folder)),
        behaviours=behaviours,
        maps=_maps(atlas, families, alone),
        matrix=matrix_of(atlas, families),
        examples=tuple(each for probe in alone for each in _examples(atlas, probe, alone[probe])),
        doses=tuple(each for probe in alone for each in _doses(atlas.dose(probe))),
        refused=_refused(atlas, {each.probe for each in behaviours if each.refusal}),
        complete=atlas.complete,
        files=FILES,
    )


class _Off:
    """Off-target changes by the behaviour and the heads that they are of; a head of the map is of no behaviour."""

    def __init__(self, table: pandas.DataFrame, probe: str) -> None:
        self._found = {
            (row.probe, row.heads): Off(
                probe, float(row.change), row.unit, float(row.low), float(row.high), int(row.n_items)
            )
            for row in table.itertuples()
        }

    def of(self, heads: HeadSet, probe: str = "") -> tuple[Off, ...]:
        found = self._found.get((probe, ", ".join(heads.labels)))
        return () if found is None else (found,)


def _behaviour(atlas: Atlas, evidence: Evidence, verdict: FamilyVerdict, off: _Off) -> Behaviour:
    family = verdict.family
    card = atlas.manifest.probe(family.probe)
    chosen = [(method, atlas.chosen(method, probe)) for method, probe in atlas.scored if probe == family.probe]

    def joint(each: JointVerdict) -> Claim:
        alone = len(each.heads & verdict.verified)
        of_set = off.of(each.heads, family.probe)
        return _claim(
            each, each.heads, method=each.name, controls=tuple(each.controls.tolist()), alone=alone, off=of_set
        )

    def single(each: SingleVerdict) -> Claim:
        heads = HeadSet((each.head,))
        named_by = tuple(method for method, top in chosen if heads <= top)
        return _claim(each, heads, named_by=named_by, off=off.of(heads))

    singles = sorted(map(single, verdict.singles), key=lambda each: -Behaviour.rank(each))
    return Behaviour(
        probe=family.probe,
        title=card.title,
        metric=family.metric,
        unit=verdict.unit,
        mode=family.mode,
        scope=family.scope,
        n_items=verdict.n_items,
        family_size=verdict.size,
        clean=verdict.clean,
        chance=verdict.chance,
        solved=verdict.solved,
        smallest=verdict.smallest,
        refusal=verdict.refusal,
        joints=tuple(map(joint, verdict.joints)),
        singles=tuple(singles),
    )


def _fresh(found: Together) -> Fresh:
    return Fresh(
        found.heads.labels,
        found.share.value,
        found.share.low,
        found.share.high,
        found.ceiling,
        found.n_items,
        len(found.controls),
        found.holds,
    )


def _claim(
    each: SingleVerdict | JointVerdict,
    heads: HeadSet,
    *,
    method: str = "",
    controls: tuple[float, ...] = (),
    alone: int = 0,
    named_by: tuple[str, ...] = (),
    off: tuple[Off, ...] = (),
) -> Claim:
    against = each.against
    return Claim(
        heads=heads.labels,
        method=method,
        effect=each.effect,
        excess=against.excess,
        low=against.ci[0],
        high=against.ci[1],
        ceiling=against.ceiling,
        n_controls=against.n,
        match=each.match,
        p=against.p,
        p_floor=against.p_floor,
        p_kind=against.kind,
        q=each.q,
        ruling=each.ruling,
        reason=each.reason,
        controls=controls,
        alone=alone,
        named_by=named_by,
        off=off,
    )


def _maps(
    atlas: Atlas, families: Sequence[tuple[Evidence, FamilyVerdict]], alone: dict[str, HeadSet]
) -> tuple[HeadMap, ...]:
    maps = [_effects(evidence, verdict) for evidence, verdict in families if not verdict.refusal and evidence.heads]
    papers = {each.id: f"{each.paper} ({each.year}), tier {each.tier}" for each in atlas.manifest.methods}
    for method, probe in atlas.scored:
        scores = atlas.scores(method, probe)
        maps += _scores(scores, method, probe, papers.get(method, ""), alone.get(probe, HeadSet()))
    return tuple(maps)


def _effects(evidence: Evidence, verdict: FamilyVerdict) -> HeadMap:
    sites = evidence.heads.sites
    heads = evidence.heads.heads
    values = np.full((len(sites), 1 + max(each.index for each in heads)), np.nan)
    drops = evidence.drops(evidence.values).mean(axis=1)
    for head, drop in zip(heads, drops, strict=True):
        values[sites.index(head.site), head.index] = drop
    return HeadMap(
        title="knock-out effect",
        note=f"{evidence.family.metric}, {evidence.unit}; mode {evidence.family.mode}, scope {evidence.family.scope}",
        probe=evidence.family.probe,
        n_items=len(evidence.item_ids),
        rows=tuple(site.label for site in sites),
        values=values,
        descriptive=False,
        marked=_places(sites, verdict.verified),
        stack=sites[0].stack,
    )


def _scores(scores: HeadScores, method: str, probe: str, note: str, alone: HeadSet) -> list[HeadMap]:
    return [
        HeadMap(
            title=method,
            note=note,
            probe=probe,
            n_items=len(scores.item_ids),
            rows=tuple(site.label for site in scores.sites[stack]),
            values=values,
            descriptive=True,
            marked=_places(scores.sites[stack], alone),
            stack=stack,
        )
        for stack, values in scores.mean().items()
    ]


def _places(sites: Sequence[SiteId], heads: HeadSet) -> tuple[tuple[int, int], ...]:
    return tuple((list(sites).index(each.site), each.index) for each in heads.heads if each.site in sites)


def _examples(atlas: Atlas, probe: str, alone: HeadSet) -> list[Example]:
    return [_example(probe, each, alone) for each in atlas.examples(probe)]


def _example(probe: str, stored: Kept, alone: HeadSet) -> Example:
    """All tokens of a picture become one, which has their weights together."""
    shown: dict[int, list[int]] = {place: [place] for place in range(len(stored.tokens))}
    tokens = list(stored.tokens)
    for number, each in enumerate(stored.pictures):
        first, *others = each.tokens.tolist()
        shown[first] = [first, *others]
        tokens[first] = f" [picture {number + 1}]" if len(stored.pictures) > 1 else " [picture]"
        for place in others:
            del shown[place]
    patterns = tuple(
        Pattern(
            head.label,
            tuple(float(weights[places].sum()) for places in shown.values()),
            head in alone,
            tuple(tuple(weights[each.tokens].tolist()) for each in stored.pictures),
        )
        for head, weights in zip(stored.heads, stored.weights, strict=True)
    )
    shots = tuple(Shot(each.size, each.pixels, each.boxes, each.unknown) for each in stored.pictures)
    return Example(probe, stored.item, tuple(tokens[place] for place in shown), stored.answer, patterns, shots)


def _doses(measured: Measured | None) -> list[Dose]:
    if measured is None:
        return []
    heads = ", ".join(measured.heads.labels)
    where = "largest effect alone" if measured.name == "map" else naming(measured.name)
    picked = f"{heads} ({where}; the costliest on these items)"
    by_share = _dose(measured, picked, "share taken out", measured.doses, measured.dose_drops)
    ranked = "heads by the effect of each alone on these items"
    return [by_share, _dose(measured, ranked, "heads out", measured.sizes, measured.growing_drops)]


def _dose(measured: Measured, title: str, x_name: str, x: Sequence[float], drops: np.ndarray) -> Dose:
    """Mean drops with Student's interval over items; nothing out costs nothing."""
    n = drops.shape[1]
    mean = drops.mean(axis=1)
    half = np.full(len(mean), NAN)
    if n > 1:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * drops.std(axis=1, ddof=1) / n**0.5
    return Dose(
        measured.probe,
        title,
        x_name,
        measured.unit,
        n,
        (0.0, *map(float, x)),
        (0.0, *mean.tolist()),
        (0.0, *(mean - half).tolist()),
        (0.0, *(mean + half).tolist()),
    )


def _refused(atlas: Atlas, known: set[str]) -> tuple[Failure, ...]:
    return tuple(Failure(what, reason) for what, reason in atlas.refused.items() if what not in known)


def _asked(manifest: Manifest) -> tuple[Shown, ...]:
    settings, model = manifest.settings, manifest.model
    return (
        Shown("Model", f"{model.type}, {len(model.sites)} layers, {len(model.heads)} heads, {_size(model.parameters)}"),
        Shown("Items per probe", f"{settings.items}, half to find heads, half to test them"),
        Shown("Knock-out", f"mode {settings.mode}, scope {settings.scope}"),
        Shown("Behaviours", ", ".join(each.id for each in manifest.behaviours) or "none"),
        Shown("Methods", ", ".join(each.id for each in manifest.methods) or "none"),
        Shown("Seed", str(settings.seed)),
    )


def _origin(manifest: Manifest) -> tuple[Shown, ...]:
    model, settings = manifest.model, manifest.settings
    beyond, threads = beyond_command(manifest), counted(manifest.threads, "thread")
    lines = [
        *([Shown("Beyond the command", beyond)] if beyond else []),
        Shown("Weights", model.weights_hash),
        Shown("Revision", model.revision or "none"),
        Shown("Run in", f"{model.dtype} on {model.device}, kernel {model.kernel}, {threads}"),
        Shown("Forwards", f"up to {manifest.batch_tokens:,} tokens; items up to {settings.max_tokens} tokens"),
        Shown("Control sets", f"{settings.controls} for each set of heads"),
        Shown("Off-target", _off_target(manifest)),
        Shown("Format", f"{manifest.format_version}, cells {manifest.cell_schema}"),
    ]
    return (*lines, *(Shown(name, version) for name, version in manifest.versions.items()))


def _off_target(manifest: Manifest) -> str:
    """With its settings, which may be other than the probe's own: long texts are shortened to fit."""
    if not manifest.off_target:
        return "none"
    settings = manifest.probe(manifest.off_target).settings
    said = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in settings.items())
    return f"{manifest.off_target} ({said})" if said else manifest.off_target


def _size(parameters: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit} parameters"
    return f"{parameters} parameters"
