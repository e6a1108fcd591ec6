"""What each kind of cell measures. A cell hangs on the manifest and on stored cells alone, so it can be run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from headwise.atlas.cell import Cell, Result
from headwise.atlas.examples import kept, pattern_of
from headwise.atlas.planning import GROWING, Plan
from headwise.atlas.store import Store, Unreadable
from headwise.errors import InputError, Refusal
from headwise.find.choosing import stand_out
from headwise.find.search import find
from headwise.heads import Head, HeadSet, SiteId
from headwise.metrics import metric
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores, Provenance
from headwise.sweep import Controls, KnockOut, measure_sets
from headwise.sweep.knockout import reference_of
from headwise.verify.evidence import Family, Joint
from headwise.verify.gathering import Ground, ground, joint_of, map_of

SHOWN = 6
"""Heads whose patterns are stored with the example items."""


@dataclass(frozen=True, eq=False)
class Measuring:
    """One model, one plan, and the store that holds what was measured before."""

    model: AttachedModel
    plan: Plan
    store: Store

    def measure(self, cell: Cell) -> Result:
        """What belongs into a cell. What the model or the items cannot give is a refusal in the result, no error."""
        try:
            return getattr(self, f"_{cell.kind}")(cell)  # type: ignore[no-any-return]
        except Unreadable:
            raise
        except (InputError, Refusal) as error:
            return Result(refused=str(error))

    # -- cells ------------------------------------------------------------------------------------------------------

    def _clean(self, cell: Cell) -> Result:
        """Of the off-target probe, too: there nothing is refused and no item is dropped."""
        halves = self.plan.items[cell.probe]
        if cell.probe == self.plan.manifest.off_target:
            values = measure_sets(self.model, halves.testing, [HeadSet()], self.knock_out_of(cell.probe))[0].numpy()
            chosen = metric(halves.testing.metric)
            named = {"metric": chosen.id, "unit": chosen.unit, "better": chosen.better, "item_ids": halves.testing.ids}
            return Result({**named, "chance": None, "solved": None}, {"clean": values})
        found = ground(self.model, halves.testing, self.knock_out_of(cell.probe), seed=self.plan.manifest.settings.seed)
        about: dict[str, Any] = {
            "metric": found.metric.id,
            "unit": found.metric.unit,
            "better": found.metric.better,
            "item_ids": found.items.ids,
            "chance": found.chance,
            "solved": found.solved,
        }
        return Result(about, {"clean": found.clean}, found.refusal)

    def _find(self, cell: Cell) -> Result:
        """On a probe that the model does not solve only the methods that are at home there: they describe patterns."""
        method = self.plan.methods[cell.method]
        if cell.probe not in (method.probe, self.plan.manifest.off_target) and self.ground_of(cell.probe) is None:
            return self.unsolved(cell)
        scores = find(method, self.model, self.plan.items[cell.probe].finding)
        if not scores.heads:
            return Result(refused=f"{cell.method} gives no head a score on any of these items")
        k = stand_out(scores)
        return scores_as_result(scores, {"k": k, "top": scores.top(k).labels})

    def _map(self, cell: Cell) -> Result:
        heads = self.model.heads(cell.site)
        if cell.probe == self.plan.manifest.off_target:
            testing = self.plan.items[cell.probe].testing
            alone = [HeadSet((head,)) for head in heads.heads]
            values = measure_sets(self.model, testing, alone, self.knock_out_of(cell.probe)).numpy()
            return Result({"heads": heads.labels}, {"values": values})
        found = self.ground_of(cell.probe)
        if found is None:
            return self.unsolved(cell)
        return Result({"heads": heads.labels}, {"values": map_of(self.model, found, heads)})

    def _joint(self, cell: Cell) -> Result:
        """One head alone needs no control sets of its own: it is a claim of the map. A set that an earlier joint cell
        of the probe holds is one claim with it, and is not measured again."""
        found, chosen = self.ground_of(cell.probe), self.store.read(_find_of(cell))
        if found is None:
            return self.unsolved(cell)
        if chosen.refused:
            return Result(refused=chosen.refused)
        heads = HeadSet.parse(chosen.about["top"])
        if len(heads) == 1:
            return Result({"heads": heads.labels, "alone": True})
        if (same := self._measured_before(cell, heads)) is not None:
            return Result({"heads": heads.labels, "alone": False, "same_as": same.id})
        settings = self.plan.manifest.settings
        joint = joint_of(
            self.model,
            found,
            cell.method,
            heads,
            available=self.plan.manifest.model.heads,
            n_controls=settings.controls,
            seed=settings.seed,
        )
        about = {
            "heads": heads.labels,
            "alone": False,
            "match": joint.controls.match,
            "exhausted": joint.controls.exhausted,
            "controls": [each.labels for each in joint.controls.sets],
        }
        return Result(about, {"values": joint.values, "control_values": joint.control_values})

    def _offtarget(self, cell: Cell) -> Result:
        off_target = self.plan.manifest.off_target
        if self.ground_of(cell.probe) is None:
            return self.unsolved(cell)
        chosen = self.store.read(_find_of(cell))
        if chosen.refused:
            return Result(refused=chosen.refused)
        heads = HeadSet.parse(chosen.about["top"])
        testing = self.plan.items[off_target].testing
        values = measure_sets(self.model, testing, [heads], self.knock_out_of(cell.probe)).numpy()
        return Result({"heads": heads.labels, "probe": off_target}, {"values": values[0]})

    def _dose(self, cell: Cell) -> Result:
        """Of the set of heads that costs most together; grown by the effect of each head alone."""
        found = self.ground_of(cell.probe)
        if found is None:
            return self.unsolved(cell)
        settings = self.plan.manifest.settings
        effects = self._effects(cell.probe, found)
        if isinstance(effects, str):
            return Result(refused=effects)
        name, heads = self._costliest(cell.probe, found, effects)
        every = self.plan.manifest.model.heads
        ranked = sorted(effects, key=lambda head: (-effects[head], head))
        sizes = [size for size in GROWING if size <= len(ranked)]
        growing = [HeadSet(tuple(ranked[:size])) for size in sizes]
        full = found.knock_out
        doses = [
            measure_sets(self.model, found.items, [heads], replace(full, strength=dose), found.metric).numpy()[0]
            for dose in settings.doses
        ]
        sets = [*growing, every - heads]
        values = measure_sets(self.model, found.items, sets, full, found.metric).numpy()
        about = {
            "name": name,
            "heads": heads.labels,
            "doses": settings.doses,
            "growing": [each.label for each in ranked[: max(sizes, default=0)]],
            "sizes": sizes,
        }
        return Result(about, {"doses": np.stack(doses), "growing": values[:-1], "kept_only": values[-1]})

    def _examples(self, cell: Cell) -> Result:
        """Where the heads with the largest effect look from the place at which the answer is predicted."""
        found = self.ground_of(cell.probe)
        if found is None:
            return self.unsolved(cell)
        effects = self._effects(cell.probe, found)
        if isinstance(effects, str):
            return Result(refused=effects)
        heads = HeadSet(tuple(sorted(effects, key=lambda head: (-effects[head], head))[:SHOWN]))
        shown: list[dict[str, Any]] = []
        arrays: dict[str, np.ndarray] = {}
        for number, each in enumerate(found.items.items[: self.plan.manifest.settings.examples]):
            whole = "embedding" in found.metric.wants
            tokens, arrays[f"weights_{number}"] = pattern_of(self.model, found.items, each, heads, whole=whole)
            answer = "" if whole else each.item.answer  # which is not asked for there
            about: dict[str, Any] = {"item": each.id, "answer": answer, "tokens": tokens}
            if each.item.pictures:
                about["pictures"], of_pictures = kept(each, found.items.reader, number)
                arrays |= of_pictures
            shown.append(about)
        return Result({"heads": heads.labels, "items": shown}, arrays)

    # -- what they share --------------------------------------------------------------------------------------------

    def unsolved(self, cell: Cell) -> Result:
        """What every cell of a behaviour is that the model does not solve."""
        return Result(refused=self.store.read(Cell(kind="clean", probe=cell.probe)).refused)

    def ground_of(self, probe: str) -> Ground | None:
        """The clean run as it is stored; None where the model does not solve the probe."""
        stored = self.store.read(Cell(kind="clean", probe=probe))
        if stored.refused:
            return None
        testing = self.plan.items[probe].testing
        kept = set(stored.about["item_ids"])
        solved = stored.about["solved"]
        settings = self.plan.manifest.settings
        return Ground(
            family=Family(probe, stored.about["metric"], settings.mode, settings.scope),
            items=testing.only([each.id in kept for each in testing], "the model gets it wrong"),
            metric=metric(stored.about["metric"]),
            knock_out=self.knock_out_of(probe),
            clean=stored.arrays["clean"],
            chance=stored.about["chance"],
            solved=float("nan") if solved is None else solved,
        )

    def knock_out_of(self, probe: str) -> KnockOut:
        settings = self.plan.manifest.settings
        if settings.mode not in ("mean", "resample"):
            return KnockOut(settings.mode, settings.scope)
        if probe not in self._references:
            self._references[probe] = reference_of(self.model, self.plan.items[probe].finding)
        return KnockOut(settings.mode, settings.scope, self._references[probe], settings.seed)

    @cached_property
    def _references(self) -> dict[str, Any]:
        return {}

    def _measured_before(self, cell: Cell, heads: HeadSet) -> Cell | None:
        """The joint cell of the same probe, earlier in the manifest, that measured these heads."""
        for each in self.plan.cells:
            if each == cell:
                return None
            if each.kind == "joint" and each.probe == cell.probe:
                stored = self.store.read(each)
                if is_measured(stored) and HeadSet.parse(stored.about["heads"]) == heads:
                    return each
        return None

    def _effects(self, probe: str, found: Ground) -> dict[Head, float] | str:
        """Mean drop of every head of the map; why there is none where a part of the map was refused."""
        effects: dict[Head, float] = {}
        for site in self.plan.manifest.model.sites:
            stored = self.store.read(Cell(kind="map", probe=probe, site=site))
            if stored.refused:
                return stored.refused
            drops = (found.clean - stored.arrays["values"]) * found.metric.sign
            effects.update(zip(map(Head.parse, stored.about["heads"]), drops.mean(axis=1).tolist(), strict=True))
        return effects

    def _costliest(self, probe: str, found: Ground, effects: Mapping[Head, float]) -> tuple[str, HeadSet]:
        best = max(effects, key=lambda head: (effects[head], head))
        candidates = [(effects[best], "map", HeadSet((best,)))]
        cells = [each for each in self.plan.cells if each.probe == probe]
        for joint in joints_of(self.store, cells):
            drop = float((found.clean - joint.values).mean()) * found.metric.sign
            candidates.append((drop, joint.name, joint.heads))
        _, name, heads = max(candidates, key=lambda each: each[0])
        return name, heads


def scores_as_result(scores: HeadScores, about: Mapping[str, Any]) -> Result:
    """Scores as a cell holds them: one tensor per stack, and the names of its axes."""
    return Result(
        {
            "axes": ["item", "site", "head"],
            "sites": {stack: [site.label for site in sites] for stack, sites in scores.sites.items()},
            "item_ids": scores.item_ids,
            "provenance": scores.provenance.to_dict(),
            **about,
        },
        dict(scores.values),
    )


def scores_of(result: Result) -> HeadScores:
    """Inverse of `scores_as_result`."""
    about = result.about
    sites = {stack: tuple(map(SiteId.parse, labels)) for stack, labels in about["sites"].items()}
    return HeadScores(result.arrays, sites, tuple(about["item_ids"]), Provenance.from_dict(about["provenance"]))


def joints_of(store: Store, cells: Sequence[Cell]) -> tuple[Joint, ...]:
    """The sets of these cells' stored joint cells as evidence: one for each set, named for all methods that named it.

    The same heads are one claim whoever named them: their p would go into the correction several times otherwise, and
    more methods would make q smaller.
    """
    found: dict[HeadSet, tuple[list[str], Result]] = {}
    for cell in cells:
        if cell.kind != "joint" or not store.has(cell):
            continue
        stored = store.read(cell)
        if stored.refused or stored.about["alone"]:
            continue
        heads = HeadSet.parse(stored.about["heads"])
        if heads in found:
            found[heads][0].append(cell.method)
        elif is_measured(stored):
            found[heads] = ([cell.method], stored)
    return tuple(joint_from(stored, ", ".join(methods)) for methods, stored in found.values())


def is_measured(joint: Result) -> bool:
    """Whether a joint cell holds a set's values itself: no refusal, no head alone, no name of another cell."""
    return not joint.refused and not joint.about["alone"] and "same_as" not in joint.about


def joint_from(result: Result, name: str) -> Joint:
    """A joint cell that measured its set, as evidence."""
    sets = tuple(HeadSet.parse(each) for each in result.about["controls"])
    controls = Controls(sets, result.about["match"], result.about["exhausted"])
    heads = HeadSet.parse(result.about["heads"])
    return Joint(name, heads, result.arrays["values"], controls, result.arrays["control_values"])


def _find_of(cell: Cell) -> Cell:
    return Cell(kind="find", method=cell.method, probe=cell.probe)
