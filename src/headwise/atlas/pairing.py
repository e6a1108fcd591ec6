"""Which behaviours rest on different heads: the cells in which the heads of each are tried on fresh items of all.

    fresh/PROBE             the heads that the behaviour rests on, their control sets, and items that chose nothing
    crossed/A/B             the heads of A, and their control sets, out on the fresh items of B
    masked/PROBE            the most important 20, 30 and 40 percent of heads by gate gradient, out on every behaviour

The heads are those behind the verdict on the cells before, so they are chosen once: methods that come later add no
second choice, and leave the pairs as they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from headwise.atlas.cell import PAIRED, Cell, Result
from headwise.atlas.crossed import chosen_of
from headwise.atlas.measuring import Measuring
from headwise.atlas.opened import Atlas
from headwise.atlas.planning import longest
from headwise.errors import InputError, Refusal
from headwise.find.search import find
from headwise.heads import HeadSet
from headwise.probes.encoding import ItemSet
from headwise.sweep import measure_sets
from headwise.verify.crossing import CONTROLS, fresh_again, fresh_items, heads_behind, random_sets, try_on
from headwise.verify.evidence import Evidence
from headwise.verify.functional_dissociation import ALPHAS, DRAWS, draws_of, share_of
from headwise.verify.gathering import accuracy
from headwise.verify.judging import judge
from headwise.verify.verdict import FamilyVerdict

Judged = Mapping[str, tuple[Evidence, FamilyVerdict]]


@dataclass(frozen=True, eq=False)
class Pairing:
    """What is measured beside `Measuring`, of several behaviours together."""

    measuring: Measuring
    _judged: dict[tuple[str, ...], Judged] = field(default_factory=dict)
    _items: dict[str, ItemSet] = field(default_factory=dict)

    def measure(self, cell: Cell) -> Result:
        """What belongs into a cell of `PAIRED` kind; as `Measuring.measure` for the others."""
        if cell.kind not in PAIRED:
            return self.measuring.measure(cell)
        try:
            return {"fresh": self._fresh, "crossed": self._crossed, "masked": self._masked}[cell.kind](cell)
        except (InputError, Refusal) as error:
            return Result(refused=str(error))

    def _fresh(self, cell: Cell) -> Result:
        """Without heads there is nothing to try, and no item is drawn: that is a verdict, and no refusal."""
        judged, probe = self._before(cell), cell.probe
        if probe not in judged:
            return self._why_not(cell)
        evidence, verdict = judged[probe]
        if verdict.refusal:
            return Result(refused=verdict.refusal)
        heads = heads_behind(verdict)
        if not heads:
            return Result({"heads": (), "item_ids": ()})
        manifest, settings = self.measuring.plan.manifest, self.measuring.plan.manifest.settings
        others = [heads_behind(each) for name, (_, each) in judged.items() if name != probe]
        controls = random_sets(
            heads,
            manifest.model.heads,
            HeadSet(tuple(head for each in others for head in each)),
            min(CONTROLS, settings.controls),
            settings.seed,
        )
        self._items[probe] = fresh_items(
            self.measuring.model,
            evidence,
            settings.fresh,
            finding=manifest.probe(probe).testing,  # those that the model gets wrong as well
            probe=self.measuring.plan.probes[probe],
            max_tokens=longest(self.measuring.model, settings),
            seed=settings.seed,
        )
        about = {
            "heads": heads.labels,
            "item_ids": self._items[probe].ids,
            "match": controls.match,
            "exhausted": controls.exhausted,
            "controls": [each.labels for each in controls.sets],
        }
        return Result(about)

    def _crossed(self, cell: Cell) -> Result:
        store = self.measuring.store
        chosen, on = (store.read(Cell(kind="fresh", probe=probe)) for probe in (cell.heads_of, cell.probe))
        if chosen.refused or on.refused:
            return Result(refused=chosen.refused or on.refused)
        if not chosen.about["heads"] or not on.about["heads"]:
            return Result({"heads": ()})
        heads, controls = chosen_of(chosen)
        items = self._fresh_items(cell.probe, on)
        evidence, _ = self._before(Cell(kind="fresh", probe=cell.probe))[cell.probe]
        knock_out = self.measuring.knock_out_of(cell.probe)
        found = try_on(self.measuring.model, items, heads, controls, knock_out, evidence)
        arrays = {"clean": found.clean, "values": found.values, "control_values": found.control_values}
        return Result({"heads": heads.labels}, arrays)

    def _masked(self, cell: Cell) -> Result:
        """As `functional_dissociation` says, on some of the held-out items, right or wrong.

        A behaviour that is added later has a row of its own; the rows before have no column for it.
        """
        measuring, probe = self.measuring, cell.probe
        if measuring.ground_of(probe) is None:
            return measuring.unsolved(cell)
        settings, heads = measuring.plan.manifest.settings, measuring.plan.manifest.model.heads.heads
        importance = find("gate-gradient", measuring.model, measuring.plan.items[probe].finding, per="token")
        tops = [importance.top(share_of(alpha, heads), stack=heads[0].stack) for alpha in ALPHAS]
        draws = [each for alpha in ALPHAS for each in draws_of(heads, alpha, DRAWS, settings.seed)]
        arrays: dict[str, np.ndarray] = {}
        for each in self._there(cell):
            found = measuring.ground_of(each)
            if found is None:
                continue
            testing = measuring.plan.items[each].testing
            items = testing.only([place < settings.fresh for place in range(len(testing))], "enough are there")
            sets = [*tops, HeadSet(), *draws] if each == probe else tops
            asked, how = accuracy(found.metric), measuring.knock_out_of(each)
            values = measure_sets(measuring.model, items, sets, how, asked).numpy()
            arrays[f"on/{each}"] = values[: len(tops)]
            if each == probe:
                arrays["base"] = values[len(tops)]
                arrays["random"] = values[len(tops) + 1 :].reshape(len(ALPHAS), DRAWS, len(items))
        about = {"alphas": ALPHAS, "heads": [each.labels for each in tops]}
        return Result(about, arrays)

    def _there(self, cell: Cell) -> list[str]:
        """The behaviours whose clean run stands before this cell."""
        cells = self.measuring.plan.manifest.cells
        before = {each for each in cells[: cells.index(cell.id)] if each.startswith("clean/")}
        return [each.id for each in self.measuring.plan.manifest.behaviours if f"clean/{each.id}" in before]

    def _fresh_items(self, probe: str, stored: Result) -> ItemSet:
        if probe not in self._items:
            settings = self.measuring.plan.manifest.settings
            self._items[probe] = fresh_again(
                self.measuring.model,
                self.measuring.plan.probes[probe],
                stored.about["item_ids"],
                longest(self.measuring.model, settings),
                settings.seed,
            )
        return self._items[probe]

    def _before(self, cell: Cell) -> Judged:
        """Evidence and verdicts of all behaviours, from the cells that stand before this one and enter into them.

        Not from those that are there: a cell measured anew must come out as it was, whatever was added since.
        """
        cells = self.measuring.plan.manifest.cells
        before = tuple(
            each for each in cells[: cells.index(cell.id)] if each.split("/")[0] in ("clean", "map", "joint")
        )
        if before not in self._judged:
            seen = Atlas(self.measuring.store, replace(self.measuring.plan.manifest, cells=before))
            there = [probe for probe in seen.judgeable if f"clean/{probe}" in before]
            evidence = {probe: seen.evidence(probe) for probe in there}
            self._judged[before] = {probe: (each, judge(each)) for probe, each in evidence.items()}
        return self._judged[before]

    def _why_not(self, cell: Cell) -> Result:
        whole = Atlas(self.measuring.store, self.measuring.plan.manifest)
        return Result(refused=whole.refused.get(cell.probe, f"{cell.probe} was not measured"))
