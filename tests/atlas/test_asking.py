"""Which probes and methods are asked of a model that sees, and of one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headwise.atlas import Manifest, Settings
from headwise.atlas.asking import methods_of, probes_of, sees, shows_pictures
from headwise.atlas.planning import plan
from headwise.errors import Refusal
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.probes import PICTURE_PROBES, PROBES, probe
from headwise.probes.item import Item
from headwise.probes.stream import Probe

SMALL = Settings(items=16, controls=4)


def test_probes_say_themselves_whether_they_show_pictures() -> None:
    assert not [each.id for each in PROBES if shows_pictures(each)]
    assert [each.id for each in PICTURE_PROBES if not shows_pictures(each)] == []


def test_a_model_that_sees_is_asked_about_pictures_first(seeing: AttachedModel) -> None:
    asked = [each.id for each in probes_of(seeing, None, SMALL, None)]
    of_pictures = {each.id for each in PICTURE_PROBES}
    assert sees(seeing)
    assert set(asked[: len(of_pictures)]) == of_pictures
    assert {each.id for each in PROBES} <= set(asked)
    assert asked[-1] == "text"


def test_one_that_does_not_is_offered_nothing_of_pictures(model: AttachedModel) -> None:
    asked = [each.id for each in probes_of(model, None, SMALL, None)]
    assert not sees(model)
    assert set(asked) == {each.id for each in PROBES}
    of_pictures = {each.id for each in PICTURE_PROBES}
    homes = {each.probe for each in methods_of(model, None, None).values()}
    assert "repeat" in homes
    assert not homes & of_pictures


def test_methods_at_home_on_pictures_are_for_models_that_see(
    seeing: AttachedModel, model: AttachedModel, method: Callable[..., Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {
        "probes": (probe("panel"), probe("repeat")),
        "methods": (method("at-home", probe="panel"), method("one")),
    }
    monkeypatch.setattr("headwise.atlas.asking.catalogue.entries", lambda kind: entries[kind])
    assert list(methods_of(seeing, None, None)) == ["at-home", "one"]
    assert list(methods_of(model, None, None)) == ["one"]


def test_naming_such_a_probe_is_refused_with_the_reason(model: AttachedModel, method: Callable[..., Method]) -> None:
    with pytest.raises(Refusal, match=r"panel, item .*: it has pictures, and the model has no processor"):
        plan(model, SMALL, ["panel"], [method("one")], None)


def test_a_behaviour_is_of_pictures_where_they_have_the_answer(
    seeing: AttachedModel,
    ask: Callable[..., tuple[Item, ...]],
    probe_of: Callable[..., Probe],
    method: Callable[..., Method],
) -> None:
    """A sentence between pictures that says the answer makes it one of text."""
    seen, plain = ask(seeing, 20), ask(seeing, 20, pictures=0)
    probes = [
        probe_of("seen", seen),
        probe_of("said", seen, in_prompt=True),
        probe_of("plain", plain),
    ]
    manifest = plan(seeing, SMALL, probes, [method("one", probe="seen")], None).manifest
    assert {each.id: each.pictures for each in manifest.behaviours} == {"seen": True, "said": False, "plain": False}
    assert Manifest.from_json(manifest.to_json()) == manifest
