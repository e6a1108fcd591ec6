"""Specialisation: the matrix, selectivity and similarity, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from headwise.heads import HeadSet
from headwise.verify.evidence import Evidence, Family
from headwise.verify.specialisation import behaviour_names, selectivity, similarity, specialisation
from headwise.verify.verdict import Against, FamilyVerdict, SingleVerdict

NAN = math.nan
AGAINST = Against(n=20, excess=0.0, ci=(0.0, 0.0), p=1.0, p_floor=0.0, kind="rank", ceiling=0.0)


def evidence(
    probe: str,
    effects: Mapping[str, Sequence[float]],
    clean: Sequence[float],
    *,
    chance: float = 0.0,
    better: str = "higher",
    mode: str = "zero",
) -> Evidence:
    """Of heads with these losses on each item."""
    heads = HeadSet.parse(list(effects))
    sign = 1 if better == "higher" else -1
    losses = np.array([effects[label] for label in heads.labels]).reshape(len(heads), len(clean))
    return Evidence(
        Family(probe, "m", mode),  # type: ignore[arg-type]
        better,  # type: ignore[arg-type]
        "logits",
        tuple(f"{probe}-{i}" for i in range(len(clean))),
        np.array(clean, dtype=float),
        chance,
        1.0,
        heads,
        np.array(clean) - sign * losses,
    )


def verdict(of: Evidence, verified: Sequence[str] = (), refusal: str = "") -> FamilyVerdict:
    singles = tuple(
        SingleVerdict(
            head, 0.0, AGAINST, AGAINST, "layers", 0.0, "verified" if head.label in verified else "refused", ""
        )
        for head in of.heads.heads
    )
    return FamilyVerdict(of.family, of.unit, len(of.item_ids), 1, 0.0, 0.0, 1.0, 0.0, refusal, (), singles)


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_effects_are_shares_of_reach_and_heads_are_joined_by_name() -> None:
    # Mean loss 3 of a reach of 10 - 4; where less is better, 0.5 of 2 - 1.
    one = evidence("a", {"L0H0": [2, 4], "L1H1": [0, 0]}, [9, 11], chance=4)
    other = evidence("b", {"L1H1": [0.4, 0.6], "L2H0": [0, 0]}, [1, 1], chance=2, better="lower")
    found = specialisation([(one, verdict(one, ["L0H0"])), (other, verdict(other, ["L1H1"]))])
    assert found.behaviours == ("a", "b")
    assert found.heads.labels == ("L0H0", "L1H1", "L2H0")
    np.testing.assert_allclose(found.effects, [[0.5, NAN], [0, 0.5], [NAN, 0]])
    np.testing.assert_allclose(found.raw, [[3, NAN], [0, 0.5], [NAN, 0]])
    assert found.verified.tolist() == [[True, False], [False, True], [False, False]]
    assert found.preferred == ("", "b", "")
    np.testing.assert_allclose(found.selectivity, [NAN, 1, NAN])  # L0H0 was measured on one behaviour only


def test_a_behaviour_that_is_not_solved_is_no_column() -> None:
    one, other = evidence("a", {"L0H0": [1, 1]}, [2, 2]), evidence("b", {"L0H0": [1, 1]}, [2, 2])
    found = specialisation([(one, verdict(one, ["L0H0"])), (other, verdict(other, refusal="it gets 0 of 64 right"))])
    assert (found.behaviours, found.refused, found.effects.shape) == (("a",), ("b",), (1, 1))
    assert found.similarity == ()
    assert len(found.similarity_to_pandas().columns) == 9


def test_nothing_is_left_where_everything_is_refused() -> None:
    one = evidence("a", {"L0H0": [1, 1]}, [2, 2])
    found = specialisation([(one, verdict(one, refusal="no"))])
    assert (len(found.heads), found.behaviours, len(found.to_pandas())) == (0, (), 0)


def test_the_table_has_a_row_for_each_head_and_behaviour() -> None:
    one, other = evidence("a", {"L0H0": [1, 1], "L0H1": [0, 0]}, [2, 2]), evidence("b", {"L0H0": [1, 1]}, [4, 4])
    table = specialisation([(one, verdict(one, ["L0H0"])), (other, verdict(other))]).to_pandas()
    assert list(zip(table["head"], table["behaviour"], table["effect"].fillna(-1), strict=True)) == [
        ("L0H0", "a", 0.5),
        ("L0H0", "b", 0.25),
        ("L0H1", "a", 0.0),
        ("L0H1", "b", -1.0),
    ]
    assert table["selectivity"].tolist()[:2] == [0.5, 0.5]
    assert set(table["preferred"]) == {"a", ""}


def test_families_of_one_probe_are_named_by_their_keys() -> None:
    parts = [evidence("a", {}, [1]), evidence("b", {}, [1]), evidence("a", {}, [1], mode="mean")]
    assert behaviour_names(parts) == ("a/m/zero/all", "b", "a/m/mean/all")


@pytest.mark.parametrize(
    ("effects", "tau"),
    [
        ([0.8, 0, 0], 1),
        ([0.4, 0.4, 0.4], 0),
        ([0.8, 0.4, 0], 0.75),  # (0 + 0.5 + 1) / 2
        ([0.8, 0.4, -0.4], 0.75),  # what is won without the head does not count
        ([0.8, 0.4, NAN], 0.5),
        ([0.8, NAN, NAN], NAN),
        ([-0.1, 0, 0], NAN),
    ],
)
def test_selectivity(effects: list[float], tau: float) -> None:
    np.testing.assert_allclose(selectivity(np.array([effects])), [tau])


def test_items_without_a_number_are_left_out() -> None:
    one = evidence("a", {"L0H0": [1, 1, NAN]}, [2, 2, NAN])
    assert specialisation([(one, verdict(one))]).effects.tolist() == [[0.5]]


# -- similarity -------------------------------------------------------------------------------------------------------


def test_similarity_in_closed_form() -> None:
    effects = np.zeros((11, 2))
    effects[:4] = [[3, 4], [0, 3], [4, 0], [0, 0]]
    effects[10] = [NAN, 5]  # on one of them only: left out
    verified = np.zeros((11, 2), dtype=bool)
    verified[:3, 0], verified[:4, 1], verified[10, 1] = True, True, True
    found = similarity("a", "b", effects, verified)
    assert found.cosine == pytest.approx(12 / 25)
    assert found.spearman == pytest.approx(stats.spearmanr(*effects[:10].T).statistic)
    assert (found.n_first, found.n_second, found.shared) == (3, 4, 3)
    assert found.shared_by_chance == pytest.approx(1.2)
    assert found.p == pytest.approx(math.comb(4, 3) / math.comb(10, 3))


def test_columns_without_effects_have_no_cosine() -> None:
    found = similarity("a", "b", np.zeros((3, 2)), np.zeros((3, 2), dtype=bool))
    assert math.isnan(found.cosine)
    assert math.isnan(found.spearman)
    assert (found.shared, found.p) == (0, 1)
