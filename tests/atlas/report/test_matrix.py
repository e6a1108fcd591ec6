"""The specialisation matrix: behaviours of text and of pictures apart, and how far heads divide by them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import made
import numpy as np
import pytest
from scipy import stats

from headwise.atlas.report import page
from headwise.atlas.report.comparisons import matrix, text_against_pictures
from headwise.atlas.report.matrix import _kinds, matrix_of
from headwise.atlas.report.view import Kinds, Matrix
from headwise.atlas.summary import told
from headwise.heads import HeadSet
from headwise.verify.specialisation import Specialisation

NAMES = ("panel", "ioi", "count", "facts")
PICTURED = np.array([True, False, True, False])
HEADS = HeadSet.parse("L0H0, L0H1, L0H2, L0H3, L1H0, L1H1, L1H2, L1H3")


def specialisation() -> Specialisation:
    verified = np.zeros((8, 4), bool)
    verified[0, [0, 2]] = True  # two picture behaviours: one head of pictures
    verified[1, 1] = True
    verified[2, [1, 2]] = True  # of both
    verified[5, 3] = True
    effects = np.arange(32).reshape(8, 4) / 32
    units, none = ("logits",) * 4, ("",) * 8
    return Specialisation(NAMES, (), units, HEADS, effects, effects, verified, effects[:, 0], none, (), ())


def test_heads_are_counted_by_kind() -> None:
    found = _kinds(specialisation(), PICTURED)
    assert (found.text, found.pictures, found.both) == (3, 2, 1)
    assert found.by_chance == pytest.approx(3 * 2 / 8)
    # One or two of the two picture heads among the three text heads: 1 - C(5,2)/C(8,2).
    assert found.p == pytest.approx(1 - 10 / 28)
    assert (found.double, found.pairs) == (0, 0)


def test_only_pairs_across_the_kinds_are_counted() -> None:
    class Pair:
        def __init__(self, first: str, second: str, double: bool) -> None:
            self.first, self.second, self.double = first, second, double

    pairs = (
        Pair("panel", "ioi", True),
        Pair("panel", "count", True),  # both of pictures
        Pair("facts", "count", False),
        Pair("ioi", "facts", True),  # both of text
    )
    found = _kinds(replace(specialisation(), pairs=pairs), PICTURED)  # type: ignore[arg-type]
    assert (found.double, found.pairs) == (1, 2)


class Stored:
    """Of an atlas, what the matrix asks for."""

    def __init__(self, pictured: tuple[str, ...]) -> None:
        self.manifest = SimpleNamespace(probe=lambda name: SimpleNamespace(pictures=name in pictured))

    def crossed(self) -> tuple[()]:
        return ()

    def functional_dissociation(self) -> tuple[()]:
        return ()


def made_matrix(monkeypatch: pytest.MonkeyPatch, *pictured: str) -> Matrix:
    monkeypatch.setattr("headwise.atlas.report.matrix.specialisation", lambda *_: specialisation())
    found = matrix_of(Stored(pictured), [object()])  # type: ignore[arg-type, list-item]
    assert found is not None
    return found


def test_text_stands_left_and_pictures_right(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, whole = made_matrix(monkeypatch, "panel", "count"), specialisation()
    assert drawn.behaviours == ("ioi", "facts", "panel", "count")
    assert drawn.n_pictures == 2
    rows, columns = [0, 1, 2, 5], [1, 3, 0, 2]
    np.testing.assert_array_equal(drawn.shares, whole.effects[rows][:, columns])
    np.testing.assert_array_equal(drawn.verified, whole.verified[rows][:, columns])
    text = matrix(drawn)
    assert re.findall(r'colspan="(\d)" class="kind[^"]*">(\w+)</th>', text) == [("2", "Text"), ("2", "Pictures")]
    assert re.findall(r'class="up first"><span>([\w-]+)', text) == ["panel"]


@pytest.mark.parametrize("pictured", [(), NAMES])
def test_one_kind_alone_stands_as_it_is(monkeypatch: pytest.MonkeyPatch, pictured: tuple[str, ...]) -> None:
    drawn = made_matrix(monkeypatch, *pictured)
    assert drawn.behaviours == NAMES
    assert drawn.kinds is None
    assert "colgroup" not in matrix(drawn)


def test_it_is_said_in_words_on_the_page_and_in_the_terminal() -> None:
    kinds = Kinds(5, 4, 1, 0.56, float(stats.hypergeom.sf(0, 36, 5, 4)), 6, 12)
    said = text_against_pictures(kinds)
    assert said == (
        "5 heads verified for a behaviour of text, 4 for one of pictures, 1 for both (0.56 by chance, p 0.466). "
        "6 of 12 pairs of a text and a picture behaviour rest on different heads (double dissociation)."
    )
    assert "pairs" not in text_against_pictures(replace(kinds, double=0, pairs=0))
    report = made.report()
    assert report.matrix is not None
    report = replace(report, matrix=replace(report.matrix, n_pictures=3, kinds=kinds))
    assert said in page(report)
    assert said in told(report, Path("report.html"))
