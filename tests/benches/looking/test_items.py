"""The items: none is used twice, and crossed questions are answered by the other place."""

from __future__ import annotations

from random import Random

from headwise.benches.looking import items
from headwise.probes import Item, held_out, probe
from headwise.probes.scenes import GRID, STRIP, Scene, Thing
from headwise.probes.seeing import about_panel, about_place


def test_what_judges_was_never_trained_on() -> None:
    stream = [each for _, each in zip(range(60), probe("panel").items("x"), strict=False)]
    judging, others = (list(items._for(purpose, stream)) for purpose in ("judging", "finding"))
    assert judging
    assert others
    assert all(map(held_out, judging))
    assert not any(map(held_out, others))
    assert len(judging) + len(others) == 60


def first(place: items.Place, n: int) -> list[Item]:
    return [each for _, each in zip(range(n), items._crossed(place, Random(0)), strict=False)]


def test_a_crossed_question_is_answered_by_the_other_place() -> None:
    things = (Thing("star", "red"), None, Thing("ring", "blue"), None, None, None)
    scene = Scene(STRIP, things)
    crossing = items._crossing(scene, [2, 0], [about_panel(scene, each) for each in (2, 0)], Random(0))
    assert "panel 3?" in str(crossing.prompt)
    assert (crossing.answer, crossing.foils) == (" red star", (" blue ring",))
    assert crossing.regions["target"] == STRIP.region(0)
    assert crossing.regions["panel-3"] == STRIP.region(2)
    scene = Scene(GRID, (*things, None, None, None))
    crossing = items._crossing(scene, [0, 2], [about_place(scene, each, "color") for each in (0, 2)], Random(0))
    assert (crossing.answer, crossing.foils) == (" blue", (" red",))
    assert crossing.regions["target"] == GRID.region(2)


def test_crossed_questions_have_pictures_of_their_own_and_other_answers() -> None:
    places: tuple[items.Place, ...] = ("panel", "cell")
    for place in places:
        found = first(place, 12)
        assert len({each.pictures[0].digest for each in found}) == 12
        assert all(each.answer != each.foils[0] for each in found)
        assert [each.answer for each in found] == [each.answer for each in first(place, 12)]
    kinds = {str(each.prompt).split()[2] for each in first("cell", 24)}
    assert kinds == {"color", "shape"}
