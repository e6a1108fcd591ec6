"""`atlas`: run all cells that are not there yet, each stored before the next one of its kind begins."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from headwise import freed_memory
from headwise.atlas.asking import Asked
from headwise.atlas.cell import Cell
from headwise.atlas.manifest import FORMAT_VERSION, Manifest, Settings
from headwise.atlas.measuring import Measuring
from headwise.atlas.opened import Atlas
from headwise.atlas.pairing import Pairing
from headwise.atlas.planning import Plan, plan
from headwise.atlas.processes import one_by_one, processes_for, side_by_side, stages
from headwise.atlas.progress import Shown
from headwise.atlas.store import Store
from headwise.atlas.tables import write_tables
from headwise.errors import InputError
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.sweep import Mode
from headwise.sweep.clean_runs import remembered

FEW = 4
"""Behaviours that are enough for any number of processes: fewer leave most of many cores without work."""


class Watching(Protocol):
    """Who is told how a run goes; see `headwise.atlas.progress`."""

    def planning(self, probe: str, place: int, of: int) -> None:
        """Before the items of a probe are written for the model and timed; `place` counts from 0."""

    def planned(self, plan: Plan, left: Sequence[Cell]) -> None:
        """Before the first cell."""

    def began(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, refused: str) -> None: ...


@freed_memory.kept()
@remembered()
def atlas(
    model: AttachedModel,
    out: str | Path,
    *,
    probes: Sequence[Asked] | None = None,
    methods: Sequence[str | Method] | None = None,
    items: int = 64,
    seed: int = 0,
    mode: Mode = "zero",
    scope: str = "all",
    max_tokens: int = 256,
    controls: int = 50,
    off_target: str = "text",
    watching: Watching | None = None,
) -> Atlas:
    """Score every head by every method, test what was found on other items, and keep all of it in a folder.

        atlas = hw.atlas(model, "atlas-planted", probes=["ioi", "repeat"])
        atlas.judged()

    The folder is an atlas as soon as this has begun. Called again with the same arguments it goes on where it stopped,
    and measures nothing twice; with more probes or methods it adds their cells.

    Args:
        out: the folder; made if it is not there.
        probes: what the model is asked (`headwise list probes`), and probe files; if left out, all probes that its
            tokenizer can express, those with pictures only where the model sees.
        methods: what heads are scored by (`headwise list methods`); all but `knock-out` if left out, since every head
            is knocked out anyway.
        items: items per probe, or of a file at most. The first half finds heads, the second half tests them.
        seed: of every random draw.
        mode, scope: how heads are taken out, and where.
        max_tokens: longest item, in tokens of prompt and answer; longer ones are passed over and counted.
        controls: control sets for each set of heads; a verdict wants at least 50.
        off_target: the probe on which the heads should change nothing.
        watching: is told how it goes; None shows it on stderr, `headwise.atlas.progress.Silent()` says nothing.

    Raises:
        InputError: no such probe or method; too few items; a scope that does not exist, or a span that no probe has; a
            folder that holds another atlas, or something else.
        Refusal: nothing can be asked of the model; another process is at work on the folder; the disk is full. What was
            finished is kept.
    """
    if not isinstance(model, AttachedModel):
        raise InputError(f"atlas takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    for name, given in (("probes", probes), ("methods", methods)):
        if isinstance(given, str) or (given is not None and not len(given)):
            raise InputError(f"{name} takes a list of ids; write {name}={[given] if given else None!r}")
    settings = Settings(
        items=items,
        seed=seed,
        max_tokens=max_tokens,
        mode=mode,
        scope=scope,
        controls=controls,
        off_target=off_target,
    )
    store = Store(Path(out))
    with ExitStack() as opened:
        opened.enter_context(store.locked())
        watcher = watching if watching is not None else opened.enter_context(Shown())
        earlier = store.manifest() if store.exists else None
        if earlier is not None and earlier.format_version < FORMAT_VERSION:
            raise InputError(
                f"{out} has format_version {earlier.format_version}, which this headwise only reads (Atlas.open); "
                "choose another --out"
            )
        processes = _processes(model, probes, earlier)
        threads = torch.get_num_threads() if processes == 1 else 1
        with _threads(earlier.threads if earlier is not None else threads):
            planned = plan(model, settings, probes, methods, earlier, watcher.planning)
            left = [cell for cell in planned.cells if not store.has(cell)]
            planned = replace(planned, processes=min(processes, max(map(len, stages(left)), default=1)))
            if planned.manifest != earlier:
                store.write_manifest(planned.manifest)
            _run(Measuring(model, planned, store), watcher)
        atlas = Atlas(store, planned.manifest)
        write_tables(atlas, store)
    return atlas


def _processes(model: AttachedModel, probes: Sequence[Asked] | None, earlier: Manifest | None) -> int:
    """How many processes: one where there are fewer behaviours than these to part, which threads then share.

    An atlas that was begun with one thread goes on so, in as many processes as there is work for.
    """
    most = processes_for(model)
    if earlier is not None:
        return most if earlier.threads == 1 else 1
    return most if probes is None or len(probes) >= min(most, FEW) else 1


def _run(measuring: Measuring, watcher: Watching) -> None:
    store, planned, pairing = measuring.store, measuring.plan, Pairing(measuring)
    left = [cell for cell in planned.cells if not store.has(cell)]
    store.log("began", left=len(left), cells=len(planned.cells), versions=dict(planned.manifest.versions))
    watcher.planned(planned, left)

    def measure(cell: Cell) -> str:
        began = time.perf_counter()
        result = pairing.measure(cell)
        store.write_cell(cell, result)
        store.log("cell", cell=cell.id, seconds=round(time.perf_counter() - began, 3), refused=result.refused)
        return result.refused

    if planned.processes > 1 and left:
        steps = side_by_side(left, measure, planned.seconds, planned.processes)
    else:
        steps = one_by_one(left, measure)
    going: dict[str, None] = {}
    with closing(steps):
        try:
            for what, cell, refused in steps:
                if what == "began":
                    going[cell.id] = None
                    watcher.began(cell)
                else:
                    del going[cell.id]
                    watcher.finished(cell, refused)
        except KeyboardInterrupt:
            store.log("interrupted", cells=list(going))
            raise
    store.log("finished")


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """As many threads as the cells that are there were made with: sums are taken in another order with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
