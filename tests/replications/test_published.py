"""What a replication expects: ranges, ids, the registry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headwise.errors import InputError
from headwise.replications import REPLICATIONS, Expectation, Replication, published, replication, replications


def expects(low: float, high: float, number: float = 1.0) -> Expectation:
    return Expectation(quantity="q", published=number, low=low, high=high, measure=lambda scores: number)


@pytest.mark.parametrize(
    ("low", "high", "rule"),
    [(0.5, 2.0, "0.5 to 2"), (0.5, math.inf, "at least 0.5"), (-math.inf, 2.0, "at most 2"), (1.0, 1.0, "1")],
)
def test_a_rule_in_words(low: float, high: float, rule: str) -> None:
    assert expects(low, high).rule == rule


def test_both_ends_belong_to_the_rule_and_nan_passes_none() -> None:
    rule = expects(0.5, 2.0)
    assert [rule.passes(value) for value in (0.49, 0.5, 2.0, 2.01, math.nan)] == [False, True, True, False, False]
    assert not expects(0.5, math.inf).passes(math.nan)


def test_the_published_number_must_pass_its_own_rule() -> None:
    with pytest.raises(InputError, match="must lie within the rule 2 to 3"):
        expects(2, 3)


def test_an_open_side_is_null_in_json() -> None:
    assert expects(0.5, math.inf).to_json() == {"quantity": "q", "published": 1.0, "low": 0.5, "high": None}


def test_a_replication_needs_an_id_and_something_to_expect(tiny: Replication) -> None:
    with pytest.raises(InputError, match="lower-case"):
        replace(tiny, id="Tiny Result")
    with pytest.raises(InputError, match="expects nothing"):
        replace(tiny, expectations=())


def test_the_status_is_not_yet_run_until_results_are_recorded(tiny: Replication) -> None:
    assert tiny.status == "not yet run"
    assert replace(tiny, recorded="benchmarks/tiny.json").status == "run: benchmarks/tiny.json"


def test_the_registry(tiny: Replication, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replications() == tuple(sorted(REPLICATIONS, key=lambda each: each.id))
    monkeypatch.setattr(published, "_registered", {})
    published.register(tiny)
    assert replication("tiny-result") is tiny
    with pytest.raises(InputError, match="already"):
        published.register(tiny)
    with pytest.raises(InputError, match="did you mean tiny-result"):
        replication("tiny-results")
    with pytest.raises(InputError, match="choose one of: tiny-result"):
        replication("zzz")
