"""What several models agree about: counted by hand on reports made by hand, and the page of two real atlases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pytest

import headwise as hw
from headwise.atlas import Atlas
from headwise.atlas.report.siblings import claims_of, main, page, repeats
from headwise.atlas.report.view import Off, Report
from headwise.zoo.planted import planted


def report(name: str, *behaviours: object) -> Report:
    return replace(made.report(), model=name, behaviours=behaviours, matrix=None)


@pytest.fixture
def three() -> list[Report]:
    """ioi: induction's set holds in two of three; single heads in one. facts: refused by the third model."""

    def ioi(effect: float, ruling: str, singles: tuple[str, ...] = ()) -> object:
        joint = made.claim(
            "L1H0", "L2H1", effect=effect, method="induction, copying", ruling=ruling, controls=(0.1, 0.3)
        )
        alone = [
            made.claim(head, effect=0.84, q=0.01, off=(Off("text", 0.5, "nats", 0.1, 0.9, 8),)) for head in singles
        ]
        return made.behaviour("ioi", "names", (joint,), (*alone, made.claim("L5H5", effect=0.0, ruling="not verified")))

    def facts(refusal: str) -> object:
        return made.behaviour("facts", "facts", (), (made.claim("L0H0", effect=2.1),), refusal=refusal, solved=0.1)

    return [
        report("one", ioi(2.1, "verified", ("L1H0", "L2H1")), facts("")),
        report("two", ioi(4.2, "verified"), facts("")),
        report("three", ioi(0.1, "not verified"), replace(facts("not solved"), singles=())),
    ]


def test_a_claim_holds_in_as_many_models_as_it_is_verified_in(three: list[Report]) -> None:
    found = repeats(three).set_index(["probe", "method"])
    assert set(found.index) == {("ioi", "induction"), ("ioi", "copying"), ("ioi", "alone"), ("facts", "alone")}
    both = found.loc[("ioi", "induction")]
    assert (both.tested, both.verified, both.heads) == (3, 2, "2")
    assert (both.lowest, both.highest) == pytest.approx((0.5, 1.0))  # of a clean metric of 4.2 above chance
    assert both.ceiling == pytest.approx(np.quantile([0.1, 0.3], 0.95) / 4.2)
    assert found.loc[("ioi", "copying")].equals(both)
    alone = found.loc[("ioi", "alone")]
    assert (alone.tested, alone.verified, alone.heads, alone.highest) == (3, 1, "2", pytest.approx(0.2))
    assert alone.q == 0.01
    facts = found.loc[("facts", "alone")]
    assert (facts.tested, facts.verified, facts.heads) == (2, 2, "1")  # the third could not be asked


def test_every_claim_is_a_row_with_its_figures(three: list[Report]) -> None:
    found = claims_of(three[:1])
    assert list(found["method"]) == ["induction", "copying", "alone", "alone", "alone"]
    single = found[found["heads"] == "L2H1"].iloc[0]
    assert (single.share, single.off_target, single.n_heads) == (pytest.approx(0.2), 0.5, 1)
    assert "L5H5" not in set(found["heads"])  # alone, and not verified


@pytest.fixture(scope="module")
def two(run: Callable[..., Atlas], finished: Atlas, tmp_path_factory: pytest.TempPathFactory) -> tuple[Atlas, Atlas]:
    other = planted("llama", layers=2, heads=4, circuits=("induction",), seed=1)
    with hw.attach(other.model, other.tokenizer, example=other.example, name="other") as model:
        return finished, run(tmp_path_factory.mktemp("other") / "atlas", model)


def test_the_page_of_two_models(two: tuple[Atlas, Atlas], tmp_path: Path) -> None:
    out = tmp_path / "siblings.md"
    main([str(out), *(str(each.folder) for each in two)])
    text = out.read_text()
    assert text == page(two)
    assert "| behaviour | small | other |" in text
    assert text.count("verified alone") >= 2
    for each in two:
        for verified in each.verified():
            assert f"| {verified.head.label} | repeat |" in text.split(f"## {each.manifest.model.name}")[1]
    widths = [{row.count(" |") for row in table.splitlines() if row.startswith("|")} for table in text.split("\n\n")]
    assert all(len(each) <= 2 for each in widths)  # the rule below the head has no blanks


def test_what_is_not_alike_is_refused(two: tuple[Atlas, Atlas], run: Callable[..., Atlas], tmp_path: Path) -> None:
    with pytest.raises(hw.InputError, match="1 folder given"):
        page(two[:1])
    with pytest.raises(hw.InputError, match="of one model"):
        page((two[0], two[0]))
    seed = run(tmp_path / "atlas", seed=1)
    with pytest.raises(hw.InputError, match=r"seed differs .*0, 1"):
        page((two[1], seed))
    with pytest.raises(SystemExit, match=r"siblings: .*nowhere"):
        main([str(tmp_path / "x.md"), str(tmp_path / "nowhere")])
