"""Verdicts on evidence made by hand: every criterion, every ruling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.sweep import Controls
from headwise.verify.evidence import Evidence, Joint
from headwise.verify.judging import judge, why_refused
from headwise.verify.statistics import rank_p, studentised_p

Made = Callable[..., Evidence]
REAL = {"L0H1": 9.0, "L1H2": 6.0, "L2H3": 5.5, "L3H4": 3.0}


def with_rows(evidence: Evidence, drops: dict[str, np.ndarray | float]) -> Evidence:
    """The same with other drops of some heads."""
    values = evidence.values.copy()
    for label, drop in drops.items():
        values[evidence.heads.labels.index(label)] = evidence.clean - drop
    return replace(evidence, values=values)


def test_heads_that_matter_are_verified_and_no_others(evidence: Made) -> None:
    found = judge(evidence(REAL))
    assert found.verified == HeadSet.parse(list(REAL))
    assert {each.ruling for each in found.singles} == {"verified", "not verified"}
    assert found.size == 32
    assert found.smallest == pytest.approx(0.05 * found.clean)
    for each in found.singles:
        assert each.effect == pytest.approx(REAL.get(each.head.label, 0.0), abs=0.3)
        assert each.q >= each.against.p


def test_nothing_is_verified_where_nothing_matters(evidence: Made) -> None:
    for seed in range(20):
        assert not judge(evidence(seed=seed)).verified


def test_a_metric_that_is_better_low_turns_the_sign(evidence: Made) -> None:
    up = evidence(REAL)
    down = replace(up, better="lower", clean=-up.clean, values=-up.values)
    assert judge(down).verified == judge(up).verified
    assert judge(replace(up, clean=-up.clean, values=-up.values)).refusal


def test_where_lower_is_better_the_bound_on_small_effects_is_above_zero(evidence: Made) -> None:
    """Noise heads above all that are left as controls would pass a bound that has the wrong sign."""
    ladder = {f"L{i // 8}H{i % 8}": 0.4 * 0.55**i for i in range(10)}
    up = evidence(ladder, noise=1e-4)
    down = replace(up, better="lower", clean=-up.clean, values=-up.values)
    found = judge(down)
    assert found.smallest == pytest.approx(0.05 * up.clean.mean())
    assert not found.verified
    assert {each.ruling for each in found.singles} == {"not verified"}
    assert len(judge(down, smallest=0.0).verified) >= 3


def test_controls_step_down_so_that_heads_do_not_hide_one_another(evidence: Made) -> None:
    """Four of 32 heads make the 95th percentile their own: in the first round only the largest can pass."""
    found = judge(evidence(REAL))
    smallest = found.single("L3H4")
    assert smallest.with_verified.ceiling > smallest.effect
    assert smallest.against.ceiling < 0.5
    assert (smallest.with_verified.n, smallest.against.n) == (31, 28)
    assert smallest.with_verified.p > smallest.against.p
    assert smallest.ruling == "verified"


def test_noise_does_not_climb_over_the_smallest_effect_of_interest(evidence: Made) -> None:
    """A ladder of small effects, each far above those below it: each would pass once the ones above it are gone."""
    ladder = {f"L{i // 8}H{i % 8}": 0.4 * 0.55**i for i in range(10)}
    small = evidence(ladder, noise=1e-4)
    assert not judge(small).verified
    assert len(judge(small, smallest=0.0).verified) >= 3  # without the bound they do


def test_the_effect_must_be_above_the_smallest_of_interest(evidence: Made) -> None:
    small = evidence({"L0H0": 0.4}, noise=1e-3)
    assert judge(small).single("L0H0").reason.startswith("its effect, 0.4 logits, is not above the smallest")
    assert judge(small, smallest=0.02).verified == HeadSet.parse("L0H0")


def test_the_effect_must_be_above_the_95th_percentile_of_the_controls(evidence: Made) -> None:
    """Three heads of exactly the same effect among 31 others that are all alike but for two still larger ones that fail
    on another ground."""
    drops: dict[str, np.ndarray | float] = {f"L0H{i}": 4.0 for i in range(4)}
    found = judge(with_rows(evidence(noise=1e-3), drops))
    verdict = found.single("L0H0")
    assert verdict.effect <= verdict.against.ceiling
    assert verdict.ruling == "not verified"
    assert "95th percentile" in verdict.reason


def test_q_must_be_small_within_the_family(evidence: Made) -> None:
    """An effect that rests on two of 32 items is above both other bounds."""
    drop = np.zeros(32)
    drop[:2] = 16.0
    found = judge(with_rows(evidence(noise=1e-3), {"L2H2": drop}))
    verdict = found.single("L2H2")
    assert verdict.effect > found.smallest
    assert verdict.effect > verdict.against.ceiling
    assert verdict.q > 0.05
    assert verdict.ruling == "not verified"
    assert verdict.reason.startswith("q is")


def test_q_is_over_single_heads_and_sets_together(evidence: Made) -> None:
    alone = judge(evidence(REAL))
    together = judge(evidence(REAL, joints={"a": (["L0H1", "L1H2"], 9.0), "b": (["L0H5", "L1H5"], 0.0)}))
    assert (alone.size, together.size) == (32, 34)
    p = [each.against.p for each in (*together.singles, *together.joints)]
    smallest = min(p)
    ties = sum(each <= smallest for each in p)
    assert min(each.q for each in (*together.singles, *together.joints)) <= smallest * 34 / ties * (1 + 1e-9)


def test_controls_of_a_head_are_the_others_of_its_layer_where_it_has_enough(evidence: Made) -> None:
    wide = judge(evidence(layers=2, heads=24))
    assert {(each.match, each.against.n) for each in wide.singles} == {("layers", 23)}
    narrow = judge(evidence(layers=4, heads=8))
    assert {(each.match, each.against.n) for each in narrow.singles} == {("model", 31)}


def test_controls_come_from_the_same_stack(evidence: Made) -> None:
    made = evidence(layers=4, heads=8)
    renamed = HeadSet.parse(
        [label if label.startswith(("L0", "L1")) else f"encoder.{label}" for label in made.heads.labels]
    )
    assert {each.against.n for each in judge(replace(made, heads=renamed)).singles} == {15}


def test_too_few_controls_are_undecidable(evidence: Made) -> None:
    verdict = judge(evidence({"L0H0": 8.0}, layers=1, heads=6)).single("L0H0")
    assert verdict.ruling == "undecidable"
    assert math.isnan(verdict.q)
    assert verdict.against.p_floor == pytest.approx(1 / 6)
    assert verdict.reason == (
        "the model has too few heads to judge one alone: 5 others are left to compare it with, and a p takes 8"
    )
    # An effect that is too small is no matter of controls.
    assert judge(evidence({"L0H0": 8.0}, layers=1, heads=6)).single("L0H3").ruling == "not verified"


def test_too_few_control_sets_are_told_apart_from_too_few_heads(evidence: Made) -> None:
    made = evidence(joints={"given": (["L0H0", "L1H0"], 9.0)}, control_sets=30)
    assert judge(made).joint("given").reason.startswith("30 controls are too few for a p: a rank goes down to 0.032")


def test_controls_too_far_apart_are_undecidable(evidence: Made) -> None:
    rng = np.random.default_rng(0)
    scattered = {f"L{i // 8}H{i % 8}": float(each) for i, each in enumerate(rng.normal(0, 2, 31))}
    verdict = judge(evidence({**scattered, "L3H7": 9.0})).single("L3H7")
    assert verdict.effect > verdict.against.ceiling
    assert verdict.ruling == "undecidable"
    assert verdict.against.p_floor >= 0.05 / (2 * 32)
    assert f"{verdict.against.p_floor:.2g} can come out" in verdict.reason


def test_few_items_are_undecidable_not_negative(evidence: Made) -> None:
    verdict = judge(evidence({"L0H0": 9.0}, items=8, noise=1e-3)).single("L0H0")
    assert verdict.against.p == 2.0**-8
    assert verdict.ruling == "undecidable"
    assert "8 items" in verdict.reason


def test_a_rank_is_used_where_it_can_go_low_enough(evidence: Made) -> None:
    made = evidence(layers=1, heads=8, joints={"given": (["L0H0", "L0H1"], 8.0)}, control_sets=0)
    rng = np.random.default_rng(0)
    sets = tuple(HeadSet.parse([(1, i), (1, i + 1)]) for i in range(800))
    control_values = made.clean - rng.normal(0, 0.1, (800, 32))
    joint = replace(made.joints[0], controls=Controls(sets, "layers", False), control_values=control_values)
    found = judge(replace(made, joints=(joint,)))
    against = found.joint("given").against
    assert against.kind == "rank"
    assert against.p == against.p_floor == 1 / 801
    assert against.p == rank_p(found.joint("given").effect, found.joint("given").controls)
    assert found.joint("given").ruling == "verified"


def test_a_set_is_compared_with_its_control_sets(evidence: Made) -> None:
    made = evidence(joints={"hidden": (["L0H0", "L1H0"], 9.0), "nothing": (["L0H5", "L1H5"], 0.0)})
    found = judge(made)
    hidden, nothing = found.joint("hidden"), found.joint("nothing")
    assert (hidden.ruling, nothing.ruling) == ("verified", "not verified")
    assert not found.verified  # back-ups: neither does anything alone
    drops = made.drops(made.joints[0].values), made.drops(made.joints[0].control_values)
    assert hidden.against.p == studentised_p(*drops)
    assert hidden.against.excess == pytest.approx(drops[0].mean() - drops[1].mean())
    assert hidden.against.ci[0] < hidden.against.excess < hidden.against.ci[1]
    assert hidden.controls == pytest.approx(drops[1].mean(axis=1))
    with pytest.raises(KeyError):
        found.joint("no such set")


def test_control_sets_with_a_verified_head_are_left_out(evidence: Made) -> None:
    made = evidence({"L2H2": 9.0}, joints={"given": (["L0H0", "L1H0"], 5.0)}, control_sets=200)
    joint = judge(made).joint("given")
    guilty = sum("L2H2" in each for each in made.joints[0].controls.sets)
    assert guilty > 3
    assert (joint.with_verified.n, joint.against.n) == (200, 200 - guilty)
    assert joint.against.excess > joint.with_verified.excess
    assert joint.ruling == "verified"


def test_where_few_control_sets_are_without_a_verified_head_all_are_compared(evidence: Made) -> None:
    made = evidence({"L2H2": 9.0}, joints={"given": (["L0H0", "L1H0"], 5.0)}, control_sets=200)
    joint = made.joints[0]
    guilty = [i for i, each in enumerate(joint.controls.sets) if "L2H2" in each]
    others = [i for i in range(200) if i not in guilty][:8]
    kept = guilty + others
    sets = tuple(joint.controls.sets[i] for i in kept)
    fewer = replace(joint, controls=Controls(sets, "layers", True), control_values=joint.control_values[kept])
    found = judge(replace(made, joints=(fewer,))).joint("given")
    assert found.against.n == len(kept)
    assert f"only 8 of {len(kept)} control sets hold no verified head" in found.reason


@pytest.mark.parametrize(("drawn", "exhausted", "decided"), [(30, False, False), (30, True, True), (60, False, True)])
def test_few_control_sets_count_only_if_there_are_no_more(
    evidence: Made, drawn: int, exhausted: bool, decided: bool
) -> None:
    made = evidence(joints={"given": (["L0H0", "L1H0"], 9.0)}, control_sets=drawn, exhausted=exhausted)
    joint = judge(made).joint("given")
    assert joint.ruling == ("verified" if decided else "undecidable")


# -- refusal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"solved": 0.4}, "answers 40% of the items"),
        ({"chance": 10.2}, "not better than chance"),
        ({"better": "lower"}, "not better than chance"),
    ],
)
def test_a_probe_that_is_not_solved_is_refused(evidence: Made, changed: dict[str, object], reason: str) -> None:
    found = judge(evidence(REAL, joints={"given": (["L0H1"], 9.0)}, **changed))
    assert reason in found.refusal
    assert {each.ruling for each in (*found.singles, *found.joints)} == {"refused"}
    assert {each.reason for each in (*found.singles, *found.joints)} == {found.refusal}
    assert all(math.isnan(each.q) for each in (*found.singles, *found.joints))
    assert not found.verified


def test_fewer_than_eight_items_are_refused(evidence: Made) -> None:
    assert "7 items are left" in judge(evidence(REAL, items=7)).refusal
    assert not judge(evidence(REAL, items=8)).refusal


def test_a_model_without_answers_is_not_asked_how_many_it_has_right(evidence: Made) -> None:
    assert judge(evidence(REAL, solved=math.nan)).verified == HeadSet.parse(list(REAL))


def test_an_embedding_is_its_own_clean_one_on_every_item() -> None:
    assert not why_refused(np.ones(20), 0.0, 1, math.nan)
    assert why_refused(np.array([math.nan] * 20), 0.0, 1, math.nan)


def test_refused_evidence_without_numbers_is_judged_without_a_warning(evidence: Made) -> None:
    made = evidence(REAL, solved=0.0, joints={"given": (["L0H1"], 9.0)}, clean=np.full(32, math.nan))
    found = judge(made)
    assert math.isnan(found.single("L0H1").effect)
    json.dumps(found.to_json(), allow_nan=False)


# -- numbers that are none ---------------------------------------------------------------------------------------------


def test_an_item_without_a_clean_number_is_left_out(evidence: Made) -> None:
    made = evidence(REAL)
    clean = made.clean.copy()
    clean[3] = math.nan
    found = judge(replace(made, clean=clean))
    assert found.n_items == 31
    assert found.verified == HeadSet.parse(list(REAL))


def test_a_head_without_a_number_is_undecidable_and_nobodys_control(evidence: Made) -> None:
    made = evidence(REAL, joints={"given": (["L0H6", "L0H7"], 0.0)})
    values, joint = made.values.copy(), made.joints[0]
    values[made.heads.labels.index("L0H0"), 5] = math.nan
    control_values = joint.control_values.copy()
    control_values[2, 2] = math.inf
    found = judge(replace(made, values=values, joints=(replace(joint, control_values=control_values),)))
    assert found.single("L0H0").ruling == "undecidable"
    assert math.isnan(found.single("L0H0").q)
    assert found.size == 33
    assert found.single("L0H2").with_verified.n == 30
    assert found.joint("given").with_verified.n == 59
    assert found.verified == HeadSet.parse(list(REAL))


# -- the form of the answer --------------------------------------------------------------------------------------------


def test_the_json_form_holds_everything_and_no_nan(evidence: Made) -> None:
    found = judge(evidence({"L0H0": 8.0}, layers=1, heads=6, joints={"given": (["L0H0", "L0H1"], 8.0)}))
    form = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert form["family"] == "by-hand/logit-difference/zero/all"
    assert (form["items"], form["family_size"], form["units"]) == (32, 7, "logits")
    (joint,) = form["joint"]
    assert {"effect", "excess", "ci", "p", "q", "controls", "verdict", "reason"} <= joint.keys()
    assert form["single"][0]["head"] == "L0H0"
    assert form["single"][0]["p"] is None


def test_a_head_that_is_not_in_the_map_has_no_verdict(evidence: Made) -> None:
    with pytest.raises(KeyError):
        judge(evidence()).single("L9H9")


def test_evidence_that_does_not_fit_is_an_error(evidence: Made) -> None:
    made = evidence(REAL)
    with pytest.raises(InputError, match="expected"):
        replace(made, values=made.values[:, :-1])
    with pytest.raises(InputError, match="controls of x"):
        replace(made, joints=(Joint("x", made.heads, made.clean, Controls((), "layers", True), made.values),))


@pytest.mark.parametrize("bounds", [{"smallest": -0.1}, {"smallest": 1.0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_bounds_outside_0_to_1_are_errors(evidence: Made, bounds: dict[str, float]) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        judge(evidence(), **bounds)


@pytest.mark.slow
def test_stepping_down_adds_no_false_claims(evidence: Made) -> None:
    """Null families whose heads scatter with heavy tails, and no smallest effect to hold noise back: few of them have a
    false claim."""
    false = 0
    for seed in range(100):
        costs = 0.1 * np.random.default_rng(seed).standard_t(3, 32)
        named = {f"L{i // 8}H{i % 8}": float(each) for i, each in enumerate(costs)}
        false += bool(judge(evidence(named, noise=1e-3, seed=seed), smallest=0.0).verified)
    assert false <= 10
