"""Two atlases side by side, made by hand: what they hold is given, only the comparison is real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwise.atlas import Atlas
from headwise.atlas.comparing import compare
from headwise.errors import InputError
from headwise.heads import Head, HeadSet, SiteId
from headwise.scores import HeadScores, Provenance
from headwise.verify.evidence import Evidence, Family
from headwise.verify.verdict import Against, FamilyVerdict, SingleVerdict

HEADS = HeadSet(tuple(Head.of(0, index) for index in range(4)))
ITEMS = tuple(f"item-{i}" for i in range(10))
NONE = Against(0, 0.0, (0.0, 0.0), 1.0, 1.0, "rank", 0.0)


@dataclass(frozen=True)
class Model:
    name: str


@dataclass(frozen=True)
class Settings:
    mode: str = "zero"
    scope: str = "all"


@dataclass(frozen=True)
class Manifest:
    model: Model
    settings: Settings = Settings()


class Made:
    """The face of an `Atlas` that a comparison reads."""

    def __init__(
        self,
        name: str,
        effects: Mapping[str, Mapping[str, float]],
        verified: Mapping[str, Sequence[str]],
        *,
        items: Sequence[str] = ITEMS,
        scores: Mapping[tuple[str, str], Sequence[float]] | None = None,
        refusal: str = "",
        mode: str = "zero",
        noise: float = 0.01,
    ) -> None:
        self.folder = Path(name)
        self.manifest = Manifest(Model(name), Settings(mode))
        self.given, self.named, self.items, self.refusal, self.noise = effects, verified, tuple(items), refusal, noise
        self.means = dict(scores or {})

    @property
    def scored(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.means)

    def chosen(self, method: str, probe: str) -> HeadSet:
        return self.scores(method, probe).top(1)

    def scores(self, method: str, probe: str) -> HeadScores:
        values = np.array([[list(self.means[method, probe])]] * 2)
        return HeadScores({"main": values}, {"main": (SiteId(layer=0),)}, ("a", "b"), Provenance(method))

    def families(self) -> list[tuple[Evidence, FamilyVerdict]]:
        return [self.family(probe) for probe in self.given]

    def family(self, probe: str) -> tuple[Evidence, FamilyVerdict]:
        rng = np.random.default_rng(len(self.folder.name))
        n, effects = len(self.items), self.given[probe]
        clean = np.full(n, 10.0)
        values = np.array(
            [clean - effects.get(each.label, 0.0) - self.noise * rng.standard_normal(n) for each in HEADS.heads]
        )
        family = Family(probe, "logit-difference")
        evidence = Evidence(family, "higher", "logits", self.items, clean, 0.0, 1.0, HEADS, values)
        singles = tuple(
            SingleVerdict(each, 0.0, NONE, NONE, "layers", 0.0, _ruling(each, self.named.get(probe, ())), "")
            for each in HEADS.heads
        )
        verdict = FamilyVerdict(family, "logits", n, 4, 10.0, 0.0, 1.0, 0.5, self.refusal, (), singles)
        return evidence, verdict


def _ruling(head: Head, verified: Sequence[str]) -> Any:
    return "verified" if head.label in verified else "not verified"


FIRST = Made("first", {"ioi": {"L0H0": 5.0, "L0H1": 4.0, "L0H2": 3.0}}, {"ioi": ["L0H0", "L0H1", "L0H2"]})
SECOND = Made("second!", {"ioi": {"L0H0": 5.0, "L0H1": 2.0, "L0H3": 3.0}}, {"ioi": ["L0H0", "L0H1", "L0H3"]})


def compared(one: Made, other: Made) -> Any:
    return compare(one, other)  # type: ignore[arg-type]


def test_which_heads_appeared_moved_vanished_and_stayed() -> None:
    found = compared(FIRST, SECOND)
    changes = {each.head.label: each.change for each in found.heads}
    assert changes == {"L0H0": "stayed", "L0H1": "moved", "L0H2": "vanished", "L0H3": "appeared"}
    moved = found.of("moved")[0]
    assert moved.before == pytest.approx(0.4, abs=0.01)
    assert moved.after == pytest.approx(0.2, abs=0.01)
    assert moved.difference == pytest.approx(-0.2, abs=0.01)
    assert moved.low < moved.difference < moved.high < 0
    assert moved.n_items == 10
    assert "moved: L0H1 (ioi)" in str(found)
    assert list(found.to_pandas()["change"]) == ["stayed", "moved", "vanished", "appeared"]


def test_the_other_way_round_signs_turn() -> None:
    found = compared(SECOND, FIRST)
    assert {each.head.label for each in found.of("appeared")} == {"L0H2"}
    assert found.of("moved")[0].difference == pytest.approx(0.2, abs=0.01)


def test_items_are_joined_by_id_and_not_by_place() -> None:
    """Each item has its own effect; turned round, the pairs still fit and the difference is the same on all of them."""
    turned = Made("first", FIRST.given, FIRST.named, items=ITEMS[::-1], noise=0.0)
    straight = Made("first", FIRST.given, FIRST.named, noise=0.0)
    for each in compared(straight, turned).heads:
        assert each.difference == pytest.approx(0)
        assert each.n_items == 10


def test_without_items_in_common_each_side_has_its_own() -> None:
    other = Made("second!", SECOND.given, SECOND.named, items=[f"other-{i}" for i in range(8)])
    moved = compared(FIRST, other).of("moved")[0]
    assert moved.n_items == 0
    assert moved.difference == pytest.approx(-0.2, abs=0.01)
    assert moved.high < 0


def test_scores_are_compared_where_both_have_them() -> None:
    one = replace_scores(FIRST, {("m", "ioi"): [3, 2, 1, 0], ("n", "ioi"): [0, 1, 2, 3]})
    other = replace_scores(SECOND, {("m", "ioi"): [0, 1, 2, 3]})
    (found,) = compared(one, other).scores
    assert (found.method, found.probe) == ("m", "ioi")
    assert found.comparison.spearman == pytest.approx(-1)
    assert found.comparison.jaccard == 0
    assert compared(one, other).scores_to_pandas()["k"].tolist() == [1]


def replace_scores(made: Made, scores: Mapping[tuple[str, str], Sequence[float]]) -> Made:
    return Made(str(made.folder), made.given, made.named, scores=scores)


def test_what_only_one_has_is_named() -> None:
    more = Made("more", {**FIRST.given, "facts": {}}, FIRST.named)
    assert compared(FIRST, more).not_compared == {"facts": "first has no finished map of it"}
    refused = Made("refused", FIRST.given, {}, refusal="not solved")
    assert compared(FIRST, refused).not_compared == {"ioi": "not solved"}
    assert compared(FIRST, refused).heads == ()


def test_other_knock_outs_and_nothing_in_common_are_refused() -> None:
    with pytest.raises(InputError, match="mode is 'zero' in first and 'mean' in other"):
        compared(FIRST, Made("other", {}, {}, mode="mean"))
    with pytest.raises(InputError, match="nothing to compare"):
        compared(FIRST, Made("other", {"facts": {}}, {}))


def test_an_atlas_compared_with_itself_stays(finished: Atlas) -> None:
    found = finished.compare(Atlas.open(finished.folder))
    assert {each.change for each in found.heads} <= {"stayed"}
    assert [each.comparison.spearman for each in found.scores] == [pytest.approx(1)]
