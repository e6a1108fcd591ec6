"""Numbers, markup, colours and axes."""

from __future__ import annotations

from math import inf, isclose, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.atlas.report import colours
from headwise.atlas.report.charts import Axis
from headwise.atlas.report.colours import Scale, contrast
from headwise.atlas.report.markup import Html, cell, join, tag
from headwise.atlas.report.numerals import chance_of, counted, interval, number, percent, tick


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (3.14159, "3.14"),
        (-0.5, "\u22120.500"),
        (12345.6, "12,300"),
        (0.000123456, "0.000123"),
        (1.234e-7, "1.23e\u221207"),
        (nan, "\u2013"),
        (inf, "\u221e"),
        (999.96, "1,000"),
    ],
)
def test_numbers_have_three_figures(value: float, written: str) -> None:
    assert number(value) == written


def test_shares_chances_and_intervals() -> None:
    assert percent(0.474) == "47\u202f%"
    assert percent(0.004) == "0.4\u202f%"
    assert percent(-0.3) == "\u221230\u202f%"
    assert percent(-0.0001) == "0.0\u202f%"
    assert percent(nan) == "\u2013"
    assert chance_of(0.00099) == "<\u202f0.001"
    assert chance_of(0.032) == "0.032"
    assert interval(-1, 2.5) == "[\u22121.00, 2.50]"
    assert interval(nan, 1) == "\u2013"
    assert counted(1, "head") == "1 head"
    assert counted(1200, "head") == "1,200 heads"


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("b", "<i>", title='"&') == '<b title="&quot;&amp;">&lt;i&gt;</b>'
    assert tag("b", Html("<i></i>")) == "<b><i></i></b>"
    assert join("a", None, ["<", ("b",)]) == "a&lt;b"
    assert (
        tag("td", class_="n", data_label="x", colspan=3, hidden=None)
        == '<td class="n" data-label="x" colspan="3"></td>'
    )
    assert tag("line", x1=0.5) == '<line x1="0.5"/>'
    assert cell("q", "1") == '<td data-label="q"><div>1</div></td>'
    assert tag("b", "\x00") == "<b>\ufffd</b>"


@given(st.text())
def test_no_text_makes_an_element(text: str) -> None:
    assert tag("b", text).count("<") == 2


@pytest.mark.parametrize("palette", [colours._LIGHT, colours._DARK])
def test_numbers_on_every_step_can_be_read(palette: colours.Palette) -> None:
    for step, ground in colours.grounds(palette).items():
        assert contrast(ground, colours.ink_on(ground)) >= 4.5, step


@pytest.mark.parametrize("palette", [colours._LIGHT, colours._DARK])
def test_lightness_alone_gives_the_order_of_steps(palette: colours.Palette) -> None:
    grounds = colours.grounds(palette)
    for letter in "cm":
        away = [contrast(grounds["c0"], grounds[f"{letter}{i}"]) for i in range(1, colours.STEPS + 1)]
        assert away == sorted(away)
        assert len(set(away)) == len(away)


def test_contrast_of_black_and_white() -> None:
    assert isclose(contrast("000000", "ffffff"), 21)
    assert isclose(contrast("777777", "777777"), 1)


def test_scales() -> None:
    both = Scale.over([-1.0, 2.0])
    assert (both.low, both.high) == (-2.0, 2.0)
    assert [both.step(v) for v in (-2.0, -1.0, 0.0, 0.05, 1.0, 2.0, nan)] == [
        "m8",
        "m4",
        "c0",
        "c0",
        "c4",
        "c8",
        "none",
    ]
    up = Scale.over([0.2, 0.6])
    assert [up.step(v) for v in (0.2, 0.4, 0.6)] == ["c0", "c4", "c8"]
    down = Scale.over([-0.6, -0.2])
    assert [down.step(v) for v in (-0.6, -0.4, -0.2)] == ["m8", "m4", "c0"]
    assert Scale.over([0.0, 0.0]).step(0.0) == "c0"
    assert [step for step, _ in both.legend()] == colours.steps()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 5), (-0.3, 2.2), (0, 0.004), (-7, 0), (0, 12345)])
def test_axes_have_a_few_round_ticks(low: float, high: float) -> None:
    axis = Axis(low, high, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= each <= high + 1e-9 and len(tick(each)) <= 7 for each in ticks)
    assert axis.at(low) == 0
    assert axis.at(high) == 100


def test_an_axis_without_extent_does_not_divide_by_it() -> None:
    assert Axis(1.0, 1.0, 0, 100).ticks() == [1.0]
    assert Axis(1.0, 1.0, 0, 100).at(1.0) == 0
