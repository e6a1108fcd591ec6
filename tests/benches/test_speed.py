"""The benches of speed on tiny models: they run, what they compare agrees, what disagrees is an error. No times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headwise.benches import controls, direct, importance, peers, scoped, sweep
from headwise.benches.peers import Work
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, Shape
from headwise.benches.turns import cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.heads import HeadSet


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the peers, which have a test of their own."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def test_turns_rotate_and_every_way_runs_as_often() -> None:
    run: list[str] = []
    ways: dict[str, Any] = {name: (lambda name=name: run.append(name)) for name in "abc"}
    taken = cpu_seconds(ways, turns=4)
    assert "".join(run) == "abcbcacababc"
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(time >= 0 for times in taken.values() for time in times)
    assert ratio([1, 9, 4], [2, 1, 100]) == 2


def test_importance(work: Work) -> None:
    found = importance.measure_shape(work, turns=1)
    assert found.keys() == {"forwards", "forwards_hf_all_logits", "forwards_hf_last_logit", "max_diff"}
    assert found["max_diff"] < 1e-4
    assert all(math.isfinite(value) and value > 0 for name, value in found.items() if name != "max_diff")


def test_direct(work: Work) -> None:
    found = direct.measure_shape(work, turns=1)
    assert found.keys() == {"forwards", "sources.forwards", "noise", "max_diff", "sources.max_diff"}
    assert max(found["max_diff"], found["sources.max_diff"]) < 1e-4


def test_scoped(work: Work) -> None:
    found = scoped.measure_shape(work, turns=1, compared=5)
    assert found.keys() == {"forwards", "max_diff"}
    assert 0 <= found["max_diff"] < 1e-5


def test_controls(work: Work) -> None:
    sets = controls.drawn(work.shape, range(1, 3), sets=3, size=4, seed=0)
    assert {len(heads) for heads in sets} == {4}
    assert {head.site.layer for heads in sets for head in heads} == {1, 2}
    assert len({heads.labels for heads in sets}) == 3
    found = controls.measure_sets_of(work, sets, turns=1)
    assert found.keys() == {"ratio", "max_diff"}
    assert found["max_diff"] < 1e-5


def test_sweep(work: Work) -> None:
    found = sweep.measure_shape(work, turns=2, samples=3)
    assert found.keys() == {
        "ratio_hf_all_logits",
        "ratio_hf_last_logit",
        "seconds",
        "gemm_fraction",
        "max_diff_fp32",
    }
    assert found["max_diff_fp32"] < 1e-5
    assert 0 < found["gemm_fraction"] < 1
    assert sweep.difference_in_fp64(work.shape, tokens=9) < 1e-12


def test_heads_that_peers_are_asked_for_are_of_all_layers() -> None:
    heads = sweep.all_heads(GPT2_SMALL)
    assert len(heads) == 144
    few = sweep.spread(GPT2_SMALL, 12)
    assert [head.site.layer for head in few] == list(range(12))
    assert len({head.index for head in few}) == 12
    assert sorted(sweep.spread(GPT2_SMALL, 144)) == sorted(heads)


def test_products_of_the_exact_suffix_are_counted_as_layers() -> None:
    """In layers of GPT-2: 55 whole ones, 11 feed-forward parts of 2/3, 11 projections to q, k and v of 1/4."""
    layer = 12 * 768 * 768
    assert sweep.suffix_products(GPT2_SMALL) == pytest.approx(12 * (55 + 11 * 2 / 3 + 11 / 4) * layer)
    into, feed_forward = 768 * (768 + 2 * 256), 3 * 768 * 2048
    layer = into + 768 * 768 + feed_forward
    assert sweep.suffix_products(LLAMA_GQA) == 12 * (55 * layer + 11 * feed_forward + 11 * into)


def test_the_settings_are_varied_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def stand_in(work: Work, samples: int) -> float:
        shape = work.shape
        seen.append((shape.layers, shape.heads, shape.width // shape.heads, len(work.items), work.ids.shape[1]))
        return 2.0

    monkeypatch.setattr(sweep, "_against_hooks", stand_in)
    found = sweep.varied(base=Shape("gpt2", 6, 6, 6, 48, 96, 97, 512))
    assert set(found.values()) == {2.0}
    assert {"tokens_16.ratio", "items_8.ratio", "layers_24.ratio", "heads_12.ratio"} <= found.keys()
    assert len(seen) == len(found)
    assert {each[2] for each in seen} == {8}
    usual = (6, 6, 8, 2, 64)
    assert all(sum(a != b for a, b in zip(each, usual, strict=True)) <= 1 for each in seen)


def test_one_setting_against_hooks(work: Work) -> None:
    assert sweep._against_hooks(work, samples=2, turns=1) > 0


def off(values: Any) -> Any:
    return values + 0.1


@pytest.mark.parametrize(
    ("bench", "name", "run"),
    [
        (importance, "gate_gradient", lambda work: importance.measure_shape(work, turns=1)),
        (direct, "direct_logit_by_source", lambda work: direct.measure_shape(work, turns=1)),
        (scoped, "measure_sets", lambda work: scoped.measure_shape(work, turns=1, compared=2)),
        (sweep, "measure_sets", lambda work: sweep.measure_shape(work, turns=1, samples=2)),
        (controls, "measure_sets", lambda work: controls.measure_sets_of(work, [HeadSet.parse("L0H1")], turns=1)),
    ],
)
def test_other_numbers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, work: Work, bench: Any, name: str, run: Callable[[Work], Any]
) -> None:
    right = getattr(bench, name)

    def wrong(*args: Any, **options: Any) -> Any:
        values = right(*args, **options)
        return off(values) if isinstance(values, torch.Tensor) else {key: off(each) for key, each in values.items()}

    monkeypatch.setattr(bench, name, wrong)
    with pytest.raises(HeadwiseError, match="apart"):
        run(work)
    with pytest.raises(HeadwiseError, match="nnsight gives another effect"):
        sweep._require_alike("nnsight", torch.zeros(2), torch.ones(2))
