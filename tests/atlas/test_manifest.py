"""The manifest: there and back, and in what two of them differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headwise.atlas import Atlas, Manifest, Settings
from headwise.atlas.manifest import ModelCard, differences
from headwise.errors import InputError
from headwise.model.attached import AttachedModel
from headwise.scores import Provenance


def test_it_comes_back_from_json_as_it_was(finished: Atlas) -> None:
    again = Manifest.from_json(json.loads(json.dumps(finished.manifest.to_json())))
    assert again == finished.manifest
    assert Atlas.open(finished.folder).manifest == finished.manifest


def test_it_says_what_was_measured(finished: Atlas, model: AttachedModel) -> None:
    manifest = finished.manifest
    assert manifest.model == ModelCard.of(model)
    assert manifest.model.sites == {"L0": 4, "L1": 4}
    assert manifest.model.device == "cpu"
    assert manifest.model.heads == model.heads("main")
    assert [each.id for each in manifest.probes] == ["repeat", "text"]
    assert [each.id for each in manifest.behaviours] == ["repeat"]
    assert manifest.off_target == "text"
    assert [each.id for each in manifest.methods] == ["by-place", "silent"]
    assert manifest.methods[0].settings == {"best": 2}
    card = manifest.probe("repeat")
    assert len(card.finding) == len(card.testing) == 8
    assert not set(card.finding) & set(card.testing)
    with pytest.raises(InputError, match="no probe 'ioi'; its probes: repeat, text"):
        manifest.probe("ioi")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"items": 15}, "too few"),
        ({"items": 16.0}, "too few"),
        ({"mode": "remove"}, "no knock-out mode 'remove'"),
        ({"scope": "spam"}, "scope='spam' is not one of"),
        ({"controls": 0}, "controls=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"doses": (0.0, 1.0)}, "doses"),
    ],
)
def test_settings_that_cannot_be(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings(**changed)


def test_every_difference_is_named(finished: Atlas) -> None:
    stored = finished.manifest
    assert differences(stored, stored.settings, stored.model) == []
    other = replace(stored.model, name="other", weights_hash="0", dtype="float64", kernel="eager", device="cuda")
    said = "; ".join(differences(stored, replace(stored.settings, seed=7, mode="mean"), other))
    for part in (
        "'small', this one is 'other'",
        "dtype is float32 there",
        "kernel",
        "device is cpu there and cuda here",
        "seed is 0 there and 7 here",
        "mode",
    ):
        assert part in said


@pytest.mark.parametrize("package", ["headwise", "torch", "transformers"])
def test_other_versions_are_a_difference(finished: Atlas, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = finished.manifest
    now = {**stored.versions, package: "0.0.1", "numpy": "0.0.1"}
    monkeypatch.setattr(Provenance, "versions_now", staticmethod(lambda: now))
    was = stored.versions.get(package, "missing")
    assert differences(stored, stored.settings, stored.model) == [f"{package} is {was} there and 0.0.1 here"]


@pytest.mark.parametrize("spoil", [lambda form: form.pop("threads"), lambda form: form.update(extra=1)])
def test_another_form_is_no_manifest(finished: Atlas, spoil: Callable[[dict[str, Any]], Any]) -> None:
    form = finished.manifest.to_json()
    spoil(form)
    with pytest.raises(InputError, match=r"damaged|unknown field"):
        Manifest.from_json(form)
