"""An atlas as it is read: scores, evidence, verdicts, examples. Verdicts are not stored: they are judged from cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas
from jaxtyping import Float

from headwise.atlas.cell import Cell, Result
from headwise.atlas.crossed import crossed_of, masked_of
from headwise.atlas.examples import Example, examples_of
from headwise.atlas.manifest import FORMAT_VERSION, Manifest
from headwise.atlas.measuring import joints_of, scores_of
from headwise.atlas.store import Store
from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.metrics import metric
from headwise.scores import HeadScores
from headwise.verify.crossing import CrossedSet
from headwise.verify.dissociation import Together, together
from headwise.verify.evidence import Evidence, Family, Values
from headwise.verify.functional_dissociation import FunctionalDissociation
from headwise.verify.judging import judge
from headwise.verify.specialisation import Specialisation, specialisation
from headwise.verify.verdict import FamilyVerdict

if TYPE_CHECKING:
    from headwise.atlas.comparing import AtlasComparison


@dataclass(frozen=True, eq=False, slots=True)
class Dose:
    """How the effect of a set grows: with the share that is taken out, and with the number of heads.

    Descriptive: the heads are ordered, and the costliest set is picked, on the held-out items that it shows.

    Attributes:
        name: where the set is from: the methods that named it (with commas between them), or `map` where no set costs
            more than the best head alone.
        heads: the set.
        doses: shares of a full knock-out; `dose_drops` what each cost on every item.
        growing: heads by the effect of each alone; `sizes` how many of them were out, `growing_drops` what that cost.
        kept_only: what it cost to take all other heads of the stack out.
        reach: distance of the clean metric from chance.
    """

    probe: str
    unit: str
    name: str
    heads: HeadSet
    doses: tuple[float, ...]
    dose_drops: Float[np.ndarray, "dose item"]
    growing: tuple[Head, ...]
    sizes: tuple[int, ...]
    growing_drops: Float[np.ndarray, "size item"]
    kept_only: Values
    reach: float


@dataclass(frozen=True, slots=True)
class VerifiedHead:
    """A head that is verified alone for a behaviour, and a method that chose it.

    `method` is `knock-out` where the map of all heads found it and no method did. `effect` is in the metric's unit.
    """

    head: Head
    method: str
    probe: str
    effect: float
    q: float


@dataclass(frozen=True, eq=False, repr=False)
class Atlas:
    """An atlas on disk. Reading needs no model, changes nothing, and works while another process writes it.

    Attributes:
        store: its files.
        manifest: what it is of, and how it was made.
    """

    store: Store
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Atlas:
        """The atlas in a folder. Raises `InputError` if there is none, or one of a newer headwise."""
        store = Store(Path(folder))
        return cls(store, store.manifest())

    @property
    def folder(self) -> Path:
        return self.store.folder

    @property
    def read_only(self) -> bool:
        """Whether it is of an older format, which can be read and not gone on with."""
        return self.manifest.format_version < FORMAT_VERSION

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, those that are not measured yet as well."""
        return tuple(Cell.parse(id) for id in self.manifest.cells)

    @property
    def left(self) -> tuple[Cell, ...]:
        """The cells that are not measured yet."""
        return tuple(cell for cell in self.cells if not self.store.has(cell))

    @property
    def complete(self) -> bool:
        return not self.left

    @property
    def probes(self) -> tuple[str, ...]:
        """The behaviours that verdicts are about."""
        return tuple(each.id for each in self.manifest.behaviours)

    @property
    def refused(self) -> dict[str, str]:
        """Probes and cells of which nothing was measured, with the reason.

        A refused probe stands for all its cells, and refused scores for what would be tested by them.
        """
        reasons = dict(self.manifest.left_out)
        for probe in self.probes:
            clean = self._cell("clean", probe=probe).refused if self._has("clean", probe=probe) else ""
            if reason := clean or self._map_refused(probe):
                reasons[probe] = reason
        for cell in self.cells:
            chosen_by = f"find/{cell.method}/{cell.probe}"
            if cell.kind == "clean" or cell.probe in reasons or chosen_by in reasons or not self.store.has(cell):
                continue
            of, on = cell.heads_of, cell.probe
            if cell.kind == "crossed" and reasons.keys() & {of, f"fresh/{of}", f"fresh/{on}"}:
                continue
            if reason := self.store.read(cell).refused:
                reasons[cell.id] = reason
        return reasons

    # -- what was found ---------------------------------------------------------------------------------------------

    @property
    def scored(self) -> tuple[tuple[str, str], ...]:
        """Method and probe of every map of scores that is there."""
        finds = (cell for cell in self.cells if cell.kind == "find" and self.store.has(cell))
        return tuple((cell.method, cell.probe) for cell in finds if not self.store.read(cell).refused)

    def scores(self, method: str, probe: str) -> HeadScores:
        """The scores of a method on the finding items: descriptive. Raises `InputError` if it has none."""
        return scores_of(self._measured("find", method=method, probe=probe))

    def chosen(self, method: str, probe: str) -> HeadSet:
        """The heads that stand out by these scores: those that were tested together. Raises as `scores`."""
        return HeadSet.parse(self._measured("find", method=method, probe=probe).about["top"])

    # -- what was tested --------------------------------------------------------------------------------------------

    def evidence(self, probe: str) -> Evidence:
        """All that was measured on the held-out items of a behaviour.

        Raises:
            InputError: no such behaviour; its clean run or map is not finished, or could not be measured.
        """
        if probe not in self.probes:
            raise InputError(f"this atlas has no behaviour {probe!r}; it has {', '.join(self.probes) or 'none'}")
        clean = self._cell("clean", probe=probe)
        if "metric" not in clean.about:
            raise InputError(f"{probe} could not be measured: {clean.refused}")
        chosen = metric(clean.about["metric"])
        solved, chance = clean.about["solved"], clean.about["chance"]
        items = tuple(clean.about["item_ids"])
        heads, values = self._map(probe) if not clean.refused else (HeadSet(), np.empty((0, len(items))))
        joints = joints_of(self.store, [cell for cell in self.cells if cell.probe == probe])
        settings = self.manifest.settings
        return Evidence(
            family=Family(probe, chosen.id, settings.mode, settings.scope),
            better=chosen.better,
            unit=chosen.unit,
            item_ids=items,
            clean=clean.arrays["clean"],
            chance=float("nan") if chance is None else chance,
            solved=float("nan") if solved is None else solved,
            heads=heads,
            values=values,
            joints=joints,
            finding_ids=self.manifest.probe(probe).finding,
        )

    def families(self) -> list[tuple[Evidence, FamilyVerdict]]:
        """Evidence and verdict of every behaviour whose map is finished; q is over all claims that are there now.

        A behaviour whose map could not be measured is in `refused`, and not among these.
        """
        judgeable, there = self.judgeable, dict[str, list[str]]()
        for cell in self.cells:
            if self.store.has(cell):
                there.setdefault(cell.probe, []).append(cell.id)
        found = []
        for probe in judgeable:
            key = (probe, *there.get(probe, ()))
            if key not in self._judged:
                evidence = self.evidence(probe)
                self._judged[key] = evidence, judge(evidence)
            found.append(self._judged[key])
        return found

    @cached_property
    def _judged(self) -> dict[tuple[str, ...], tuple[Evidence, FamilyVerdict]]:
        """By behaviour and its cells that are there: tables, report and summary ask for the same ones."""
        return {}

    def judged(self) -> list[FamilyVerdict]:
        """The verdicts of `families`."""
        return [verdict for _, verdict in self.families()]

    @property
    def judgeable(self) -> tuple[str, ...]:
        """The behaviours whose clean run and map are finished, and could be measured."""
        return tuple(probe for probe in self.probes if self._judgeable(probe))

    def counting(self, probe: str) -> frozenset[str] | None:
        """The held-out items that count: those that the model answers. None where that is not measured yet."""
        if not self._has("clean", probe=probe):
            return None
        return frozenset(self._cell("clean", probe=probe).about.get("item_ids", ()))

    def verified(self) -> tuple[VerifiedHead, ...]:
        """Every head that is verified alone: one entry for each behaviour, and each method that chose it there."""
        found = []
        for verdict in self.judged():
            probe = verdict.family.probe
            choices = {method: self.chosen(method, probe) for method, of in self.scored if of == probe}
            for each in verdict.singles:
                if each.ruling == "verified":
                    methods = [method for method, heads in choices.items() if each.head in heads] or ["knock-out"]
                    found += [VerifiedHead(each.head, method, probe, each.effect, each.q) for method in methods]
        return tuple(found)

    # -- several behaviours together ---------------------------------------------------------------------------------

    def crossed(self) -> list[CrossedSet]:
        """The heads behind each behaviour out on fresh items of the others, as far as that is measured."""
        return crossed_of(self.store, self.cells)

    def together(self) -> dict[str, Together]:
        """By behaviour: the heads behind it out together, on fresh items of it, as far as that is measured."""
        tried = (each for each in self.crossed() if each.behaviour in each.values)
        return {each.behaviour: together(each, self.evidence(each.behaviour)) for each in tried}

    def functional_dissociation(self) -> tuple[FunctionalDissociation, ...]:
        """The dissociation score of Li et al. 2023 at 20, 30 and 40 percent of the heads; empty for one behaviour."""
        return masked_of(self.store, self.cells)

    def specialisation(self) -> Specialisation:
        """Every head on every behaviour, and pairs of behaviours that rest on different heads.

        Raises `InputError` where no behaviour has a verdict yet.
        """
        return specialisation(self.families(), self.crossed())

    # -- beside the verdicts ----------------------------------------------------------------------------------------

    @cached_property
    def off_target(self) -> pandas.DataFrame:
        """What knock-outs do to the off-target probe: one row per head alone, and per set of a method.

        Columns: probe, method (of the set; empty for one head alone), heads, change, low, high, unit, n_items. `change`
        is positive where the knock-out harms, with its 95 percent interval over items.
        """
        probe = self.manifest.off_target
        rows: list[dict[str, object]] = []
        if probe and self._has("clean", probe=probe):
            clean = self._cell("clean", probe=probe)
            for cell in self.cells:
                if cell.kind not in ("map", "offtarget") or not self.store.has(cell):
                    continue
                if cell.kind == "map" and cell.probe != probe:
                    continue
                stored = self.store.read(cell)
                if stored.refused:
                    continue
                sets = stored.about["heads"] if cell.kind == "map" else [", ".join(stored.about["heads"])]
                for heads, values in zip(sets, np.atleast_2d(stored.arrays["values"]), strict=True):
                    behaviour = "" if cell.kind == "map" else cell.probe
                    rows.append({"probe": behaviour, "method": cell.method, "heads": heads, **_change(clean, values)})
        columns = ["probe", "method", "heads", "change", "low", "high", "unit", "n_items"]
        return pandas.DataFrame(rows, columns=columns)

    def dose(self, probe: str) -> Dose | None:
        """The dose curve of a behaviour; None where there is none (not solved, or not measured yet)."""
        stored = self._if_measured("dose", probe)
        if stored is None:
            return None
        evidence = self.evidence(probe)
        about, arrays = stored.about, stored.arrays
        return Dose(
            probe=probe,
            unit=evidence.unit,
            name=about["name"],
            heads=HeadSet.parse(about["heads"]),
            doses=tuple(about["doses"]),
            dose_drops=evidence.drops(arrays["doses"]),
            growing=tuple(map(Head.parse, about["growing"])),
            sizes=tuple(about["sizes"]),
            growing_drops=evidence.drops(arrays["growing"]),
            kept_only=evidence.drops(arrays["kept_only"]),
            reach=evidence.reach,
        )

    def examples(self, probe: str) -> tuple[Example, ...]:
        """A few held-out items of a behaviour with the patterns of its heads; empty where there are none."""
        stored = self._if_measured("examples", probe)
        return () if stored is None else examples_of(stored)

    def tables(self) -> Mapping[str, pandas.DataFrame]:
        """All of it as tables: scores, effects, controls, verdicts, items, off_target (see `docs/atlas.md`)."""
        from headwise.atlas.tables import tables

        return tables(self)

    def compare(self, other: Atlas) -> AtlasComparison:
        """Which heads appeared, moved and vanished from this atlas to another one (see `AtlasComparison`)."""
        from headwise.atlas.comparing import compare

        return compare(self, other)

    def __repr__(self) -> str:
        model, done = self.manifest.model, len(self.cells) - len(self.left)
        return (
            f"<Atlas of {model.name!r} in {self.folder}: {len(model.heads)} heads, {len(self.probes)} behaviours, "
            f"{len(self.manifest.methods)} methods, {done} of {len(self.cells)} cells>"
        )

    # -- cells ------------------------------------------------------------------------------------------------------

    def _cell(self, kind: str, **parts: str) -> Result:
        return self.store.read(Cell(kind=kind, **parts))  # type: ignore[arg-type]

    def _has(self, kind: str, **parts: str) -> bool:
        return self.store.has(Cell(kind=kind, **parts))  # type: ignore[arg-type]

    def _measured(self, kind: str, **parts: str) -> Result:
        cell = Cell(kind=kind, **parts)  # type: ignore[arg-type]
        if cell.id not in self.manifest.cells:
            raise InputError(
                f"this atlas has no cell {cell.id}; {self.manifest.left_out.get(cell.id, 'see atlas.cells')}"
            )
        stored = self.store.read(cell)
        if stored.refused:
            raise InputError(f"{cell.id} was not measured: {stored.refused}")
        return stored

    def _if_measured(self, kind: str, probe: str) -> Result | None:
        if probe not in self.probes:
            raise InputError(f"this atlas has no behaviour {probe!r}; it has {', '.join(self.probes) or 'none'}")
        if not self._has(kind, probe=probe):
            return None
        stored = self._cell(kind, probe=probe)
        return None if stored.refused else stored

    def _judgeable(self, probe: str) -> bool:
        if not self._has("clean", probe=probe):
            return False
        clean = self._cell("clean", probe=probe)
        if clean.refused:
            return "metric" in clean.about
        finished = all(self._has("map", probe=probe, site=site) for site in self.manifest.model.sites)
        return finished and not self._map_refused(probe)

    def _map_refused(self, probe: str) -> str:
        """Why a part of a behaviour's map could not be measured; empty where nothing says so yet."""
        parts = [Cell(kind="map", probe=probe, site=site) for site in self.manifest.model.sites]
        return next((why for each in parts if self.store.has(each) and (why := self.store.read(each).refused)), "")

    def _map(self, probe: str) -> tuple[HeadSet, Float[np.ndarray, "head item"]]:
        stored = [self._cell("map", probe=probe, site=site) for site in self.manifest.model.sites]
        if refused := self._map_refused(probe):
            raise InputError(f"the map of {probe} could not be measured: {refused}")
        heads = HeadSet.parse([label for each in stored for label in each.about["heads"]])
        return heads, np.concatenate([each.arrays["values"] for each in stored])


def _change(clean: Result, values: Values) -> dict[str, object]:
    change = (clean.arrays["clean"] - values) * metric(clean.about["metric"]).sign
    n = len(change)
    half = 1.96 * float(change.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    mean = float(change.mean())
    return {"change": mean, "low": mean - half, "high": mean + half, "unit": clean.about["unit"], "n_items": n}
