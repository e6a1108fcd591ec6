"""Siblings of the visual organism: other seeds and another tower by the same script, beside the package, not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headwise as hw
from headwise.benches.visual_organism import BEHAVIOURS, figures

ORGANISMS = Path(__file__).parents[2] / "organisms"
pytestmark = pytest.mark.skipif(not ORGANISMS.is_dir(), reason="the siblings lie in the repository alone")
SIBLINGS = ("visual-sibling-1", "visual-sibling-2", "visual-sibling-3", "visual-sibling-siglip")
LACKING: dict[str, set[str]] = {
    "visual-sibling-1": {"strip"},
    "visual-sibling-2": {"strip"},
    "visual-sibling-3": {"listing", "strip"},
    "visual-sibling-siglip": {"count", "listing", "panel", "picture-needle", "strip"},
}
"""What is below 95 percent on clear pictures, by sibling; the cards say how far."""


def stored(name: str) -> dict[str, float]:
    return dict(json.loads((ORGANISMS / name / "figures.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SIBLINGS)
def test_what_is_below_95_percent_is_known(name: str) -> None:
    below = {behaviour for behaviour in BEHAVIOURS if stored(name)[f"{behaviour}.accuracy"] < 0.95}
    assert below == LACKING[name]


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_card_has_the_figures(name: str) -> None:
    card = (ORGANISMS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}:")
    for behaviour in BEHAVIOURS:
        assert f"| {behaviour} | {stored(name)[f'{behaviour}.accuracy']:.3f} |" in card


@pytest.mark.prove
@pytest.mark.parametrize("name", SIBLINGS)
def test_its_figures_are_those_of_its_card_and_the_doctor_passes(name: str) -> None:
    with hw.load(str(ORGANISMS / name), dtype="float32") as model:
        decoder = [(site.n_heads, site.n_kv_heads) for site in model.sites if site.id.stack == "main"]
        assert decoder == ([(10, 10)] * 5 if name == "visual-sibling-siglip" else [(8, 4)] * 6)
        assert model.doctor().passed
        found = figures(model)
    for key, value in stored(name).items():
        assert found[key] == pytest.approx(value, abs=0.03), key
