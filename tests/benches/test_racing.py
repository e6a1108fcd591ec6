"""`headwise bench race`: the figures of a small run, and what they are counted from."""

from __future__ import annotations

import numpy as np
import pytest

from headwise.benches import racing
from headwise.benches.detectors import attached
from headwise.benches.racing import CASES, WORLDS, Case, keeps_its_promise, measure, simulated
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import planted


def small(seed: int) -> AttachedModel:
    return attached(planted(layers=4, heads=6, circuits=("indirect-object",), seed=seed + 1))


def test_a_promise_is_kept_within_epsilon_and_broken_beyond() -> None:
    effects = np.array([1.0, 0.8, 0.7, 0.0])
    named = np.array([True, False, True, False])  # 0.7 in place of 0.8
    assert keeps_its_promise(effects, named, 0.1)
    assert not keeps_its_promise(effects, named, 0.05)
    left_out = np.array([False, True, True, False])  # rank 2 is 0.8, and 1.0 is 0.2 above it
    assert keeps_its_promise(effects, left_out, 0.2)
    assert not keeps_its_promise(effects, left_out, 0.15)


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_races_on_made_up_tables_keep_their_promise(name: str) -> None:
    found = simulated(WORLDS[name], 0, 12)
    assert found["top_k"] == 1.0
    assert 0.04 < found["share_of_map"] <= 1.0


def test_worlds_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    effects, screen = WORLDS["decoys"](rng)
    assert set(np.argsort(-screen)[:3]) & set(np.argsort(-effects.mean(axis=1))[:3]) == set()
    effects, _ = WORLDS["near_ties"](rng)
    ranked = np.sort(effects.mean(axis=1))[::-1]
    assert ranked[2] - ranked[3] < racing.EPSILON < ranked[7] - ranked[8]
    effects, _ = WORLDS["rare"](rng)
    assert (np.abs(effects[:3]) < 0.1).mean() > 0.5
    effects, _ = WORLDS["heavy_tails"](rng)
    assert np.abs(effects).max() > racing.LARGEST


def test_races_go_up_to_a_fortieth_of_the_heads() -> None:
    n_heads = {"planted_12x12": 144, "planted_24x16": 384, "organism": 72}
    assert {case.name: max(case.ks) for case in CASES} == {name: n // 40 for name, n in n_heads.items()}


def test_a_planted_llama_has_a_width_that_its_heads_divide() -> None:
    config = planted(layers=4, heads=12).model.config
    assert config.hidden_size % 12 == 0


def test_a_small_model_agrees_with_its_exact_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "WORLDS", {"clear": WORLDS["clear"]})
    found = measure(seeds=5, cases=(Case("small", small, "ioi", 16, 16, (3,)),))
    assert found["simulated.clear.same"] == 1.0
    for key in ("top_k", "top_k_uncut", "same", "verdicts", "as_on_the_model"):
        assert found[f"small.k_3.{key}"] == 1.0, key
    assert found["small.k_3.verified"] == 3
    assert 0 < found["small.k_3.share"] < found["small.k_3.share_of_map"] < 1
    assert found["small.k_3.share"] < found["small.k_3.share_common"]
