"""Items without a tokenizer: quotes, texts under construction, ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.probes import Item, Message, Quote, Range, Twin
from headwise.probes.item import Passage, occurrences
from headwise.probes.picture import Picture, Region


def test_every_place_of_a_text_is_found_overlapping_ones_too() -> None:
    assert occurrences("aa", "aaba aaa") == [Range(0, 2), Range(5, 7), Range(6, 8)]
    assert occurrences("x", "aaba") == []


@given(st.text("ab", min_size=1, max_size=3), st.text("ab", max_size=12))
@settings(deadline=None, max_examples=50)
def test_places_hold_the_text_and_none_is_missed(text: str, prompt: str) -> None:
    starts = [place.start for place in occurrences(text, prompt)]
    assert starts == [start for start in range(len(prompt)) if prompt.startswith(text, start)]
    assert all(prompt[place.start : place.stop] == text for place in occurrences(text, prompt))


def test_a_quote_finds_its_place() -> None:
    assert Quote("ball").find("a ball.") == Range(2, 6)
    assert Quote("a", 1).find("a ball.") == Range(3, 4)
    assert Quote("ball", 0).find("a ball.") == Range(2, 6)


@pytest.mark.parametrize(
    ("quote", "said"),
    [
        (Quote("cup"), "span text 'cup' is not in the prompt; quote it letter by letter"),
        (Quote("a"), 'occurs 2 times in the prompt; say which one: {"text": "a", "occurrence": 0}'),
        (Quote("a", 2), "is 2 times in the prompt, and occurrence 2 is not among them; count from 0, to 1"),
        (Quote("a", -1), "occurrence -1 is not among them"),
    ],
)
def test_a_quote_that_cannot_be_found_says_why(quote: Quote, said: str) -> None:
    with pytest.raises(InputError) as caught:
        quote.find("a ball.")
    assert said in str(caught.value)


def test_a_passage_names_its_pieces_without_the_blanks_around_them() -> None:
    passage = Passage().add("The").add(" ball ", "thing", "noun").add("is").add(" red\n", "color").add("ball", "thing")
    assert passage.text == "The ball is red\nball"
    assert passage.spans == {
        "thing": (Range(4, 8), Range(16, 20)),
        "noun": (Range(4, 8),),
        "color": (Range(12, 15),),
    }
    passage.mark("rest", 9)
    assert passage.text[passage.spans["rest"][0].start :] == "is red\nball"


def test_a_passage_becomes_an_item() -> None:
    twin = Passage().add("b", "x")
    item = Passage().add("a", "x").item(" c", twin=twin, twin_answer=" d", also=(" e",), foils=(" f",), depth=0.5)
    assert item == Item(
        prompt="a",
        answer=" c",
        also=(" e",),
        foils=(" f",),
        spans={"x": (Range(0, 1),)},
        twin=Twin(prompt="b", answer=" d", spans={"x": (Range(0, 1),)}),
        attributes={"depth": 0.5},
    )
    assert Passage().add("a").item(" c").twin is None


def test_an_id_is_that_of_the_text() -> None:
    item = Item(prompt="a", answer=" b", twin=Twin(prompt="c"))
    id = item.named("p").id
    assert id.startswith("p-")
    other_twin = replace(item, foils=(" x",), attributes={"n": 1}, id="other", twin=Twin(prompt="d"))
    assert other_twin.named("p").id == replace(item, twin=None).named("p").id == id  # the same question
    others = [
        replace(item, prompt="A"),
        replace(item, answer="b"),
        replace(item, prompt=(Message("user", "a"),)),
        replace(item, prompt=(Message("system", "a"),)),
    ]
    ids = {other.named("p").id for other in others}
    assert len(ids) == len(others)
    assert id not in ids


def test_ids_stay_what_they_were() -> None:
    """Results on disk are joined on them."""
    assert Item(prompt="5 + 3 =", answer=" 8").named("arithmetic").id == "arithmetic-4bc205d3b55b"


def test_a_digest_is_of_all_that_is_said() -> None:
    item = Item(prompt="what is it? <image>", answer=" a", foils=(" b",), pictures=(drawn(),), regions=region(8))
    assert item.digest == replace(item, id="another", attributes={"depth": 3}).digest
    assert item.digest == replace(item, regions=region(np.int64(8))).digest
    others = [
        replace(item, answer=" c"),
        replace(item, foils=(" c",)),
        replace(item, spans={"it": (Quote("it"),)}),
        replace(item, twin=Twin(prompt="what is at? <image>", answer=" c")),
        replace(item, pictures=(drawn(1),)),
        replace(item, regions=region(9)),
    ]
    assert len({item.digest, *(each.digest for each in others)}) == 7


def drawn(shade: int = 0) -> Picture:
    return Picture.drawn(np.full((16, 16, 3), shade, dtype=np.uint8))


def region(side: Any) -> dict[str, Region]:
    return {"left": Region(0, (0, 0, side, side))}
