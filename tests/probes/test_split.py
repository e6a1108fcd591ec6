"""What is held out of training: one in ten, and never so that a fact could not be learnt."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from headwise.probes import PROBES, Item, Twin, held_out, probe
from headwise.probes.facts import DATED_FRAMES, FRAMES
from headwise.words import dated_facts, facts


@pytest.mark.parametrize("id", [each.id for each in PROBES if each.id not in ("facts", "dated")])
def test_about_one_in_ten_is_held_out(id: str) -> None:
    items = list(islice(probe(id).items("split"), 600))
    share = sum(map(held_out, items)) / len(items)
    assert 0.05 < share < 0.16  # 1 in 10 of 600 draws, five standard deviations


def asked(relation: str, subject: str, frame: int, **more: int) -> Item:
    return Item(prompt="", answer="", attributes={"relation": relation, "subject": subject, "frame": frame, **more})


def test_a_fact_is_never_held_out_in_both_frames() -> None:
    told = [[held_out(asked(f.relation, f.subject, frame)) for frame in (0, 1)] for f in facts()]
    told += [
        [held_out(asked(f.relation, f.subject, frame, year=year)) for frame in (0, 1)]
        for f in dated_facts()
        for year in range(f.first, f.last + 1)
    ]
    assert not [both for both in told if all(both)]
    shares = [sum(frame) / len(told) for frame in zip(*told, strict=True)]
    assert all(0.05 < share < 0.16 for share in shares)
    assert {len(frames) for frames in FRAMES.values()} == {len(DATED_FRAMES)} == {2}


def test_the_frame_of_an_item_is_what_decides() -> None:
    for item in islice(probe("facts").items(0), 100):
        has = item.attributes
        assert held_out(item) == held_out(asked(str(has["relation"]), str(has["subject"]), int(has["frame"])))


def test_a_sum_is_held_out_with_its_terms_in_either_order() -> None:
    def of(first: int, second: int, operation: str = "+") -> bool:
        attributes: dict[str, str | int | float] = {"operation": operation, "first": first, "second": second}
        return held_out(Item(prompt="", answer="", attributes=attributes))

    pairs = [(a, b) for a in range(60) for b in range(60)]
    assert all(of(a, b) == of(b, a) for a, b in pairs)
    assert any(of(a, b, "-") != of(b, a, "-") for a, b in pairs)
    assert any(of(a, b, "-") != of(a, b) for a, b in pairs)


def test_the_part_does_not_depend_on_the_stream() -> None:
    of_one = {item.id: held_out(item) for item in islice(probe("ioi").items(0), 300)}
    assert of_one == {item.id: held_out(item) for item in islice(probe("ioi").items(0), 300)}
    assert 0 < sum(of_one.values()) < 300


def test_a_prompt_is_held_out_whatever_its_twin() -> None:
    """Or a prompt could be trained on with one twin and asked for with another."""
    for number in range(60):
        item = Item(prompt=f"word {number}", answer=" a")
        others = [replace(item, twin=Twin(prompt=f"other {n}")).named("p") for n in range(5)]
        assert len({other.id for other in others}) == 1
        assert len({held_out(other) for other in others}) == 1
