"""The organism's siblings: other seeds and another shape from the same script, beside the package, not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headwise as hw
from headwise.benches.organism import accuracies

ORGANISMS = Path(__file__).parents[2] / "organisms"
pytestmark = pytest.mark.skipif(not ORGANISMS.is_dir(), reason="the siblings lie in the repository alone")
SIBLINGS = ("sibling-1", "sibling-2", "sibling-3", "sibling-gpt2")


def figures(name: str) -> dict[str, float]:
    return dict(json.loads((ORGANISMS / name / "figures.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SIBLINGS)
def test_every_behaviour_is_at_least_95_percent_right(name: str) -> None:
    shares = {key: share for key, share in figures(name).items() if key.endswith(".accuracy")}
    assert len(shares) == 13
    assert min(shares.values()) >= 0.95


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_card_has_the_figures(name: str) -> None:
    card = (ORGANISMS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}:")
    for key, share in figures(name).items():
        if key.endswith(".accuracy"):
            assert f"| {key.removesuffix('.accuracy')} | {share:.3f} |" in card


@pytest.mark.prove
@pytest.mark.parametrize("name", SIBLINGS)
def test_its_figures_are_those_of_its_card_and_the_doctor_passes(name: str) -> None:
    with hw.load(str(ORGANISMS / name), dtype="float32") as model:
        assert [(site.n_heads, site.n_kv_heads) for site in model.sites] == [
            (8, 8) if name == "sibling-gpt2" else (12, 6)
        ] * 6
        assert model.doctor().passed
        found = accuracies(model)
    for key, value in figures(name).items():
        assert found[key] == pytest.approx(value, abs=0.02), key
