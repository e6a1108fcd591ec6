"""The pages on heads in use: the table of interventions says what the catalogue says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

import headwise as hw
from headwise.catalogue import InterventionEntry, entries
from headwise.errors import Refusal
from headwise.fit import Schedule, fit_head_lora
from headwise.use import Intervention, intervention
from headwise.use.baking import bake

DOCS = Path(__file__).parents[2] / "docs"
INDEX = (DOCS / "use" / "index.md").read_text(encoding="utf-8")
ROWS = {found[1]: found[0] for found in re.finditer(r"^\| \[`([a-z0-9-]+)`\]\(.*$", INDEX, flags=re.MULTILINE)}
"""By id: the row of the table."""


def registered() -> list[InterventionEntry]:
    own = [each for each in entries("interventions") if isinstance(each, InterventionEntry)]
    return [each for each in own if not each.page.startswith("https://")]


def test_the_table_has_every_intervention_once() -> None:
    assert sorted(re.findall(r"^\| \[`([a-z0-9-]+)`\]", INDEX, flags=re.MULTILINE)) == [
        each.id for each in registered()
    ]


@pytest.mark.parametrize("entry", registered(), ids=lambda each: each.id)
def test_a_row_has_the_page_the_year_and_the_cost_of_the_catalogue(entry: InterventionEntry) -> None:
    cells = [cell.strip() for cell in ROWS[entry.id].strip("|").split("|")]
    link, paper, _, cost, bakes = cells
    assert link == f"[`{entry.id}`]({entry.page.removeprefix('use/')})"
    assert str(entry.year) in paper
    assert entry.cost.startswith(cost)
    assert bakes.startswith(("yes", "no", "with"))


UNIT = {"L0H1": torch.ones(12) / 12**0.5}
PERMANENT: dict[str, tuple[object, ...]] = {
    "attention-calibration": ("L0H1",),
    "attention-temperature": ("L0H1", 2.0),
    "context-aware": (),
    "decore": ("L0H1",),
    "dola": ((0, 1),),
    "factual-scaling": ("L0H1", 3.0),
    "gaze-redirection": ("L0H1",),
    "head-adapter": (),
    "head-offset": (UNIT,),
    "head-pursuit": ("L0H1",),
    "head-removal": ("L0H1",),
    "head-scaling": ("L0H1", 2.0),
    "iti": (UNIT, {"L0H1": 1.0}, 5.0, "all"),
    "juice": ("L0H1",),
    "just-run-once": ("L0H1",),
    "paint": (),
    "ph3": ("L0H1",),
    "rotary-dimensions": ("L0H1",),
    "soft-injection": (UNIT,),
    "span-emphasis": ("L0H1", "rule"),
    "temporal-edit": ({"L0G1": torch.ones(12)},),
    "vision-head-reinforcement": (),
    "vision-pruning": (0.5,),
    "visual-attention-redistribution": ((3,), 0.6, None, 0.5, 0.2, "L0H1"),
    "zero-tuning": ("L0H1", 2.0),
}
"""Settings of each intervention that are at all positions, where it has such."""


@pytest.mark.parametrize("entry", registered(), ids=lambda each: each.id)
def test_what_the_table_says_bakes_does(entry: InterventionEntry) -> None:
    made: type[Intervention] = intervention(entry.id)
    given = made(*PERMANENT[entry.id]) if entry.id != "head-adapter" else trained()
    model = llava() if entry.page.startswith("use/looking.md") else llama()
    if ROWS[entry.id].strip("|").split("|")[-1].strip().startswith("no"):
        with pytest.raises(Refusal, match="cannot be baked"):
            bake(model, given)
    else:
        assert all(line.tensors for line in bake(model, given).report.lines)


def trained() -> Intervention:
    items = hw.encode(hw.probe("text"), llama().tokenizer, n=2)
    return fit_head_lora(llama(), "L1H0", items, rank=1, schedule=Schedule(steps=2)).adapter


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


@cache
def llava() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llava")


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in (DOCS / "use").glob("*.md") if f"use/{page.name}" not in contents]
