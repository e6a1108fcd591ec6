"""`headwise bench calibration`: what counts as false, as found, as power; the figures; and small runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from headwise import catalogue
from headwise.benches import calibration
from headwise.benches.calibration import Outcome, Plan, crossing, measure, through, upper_bound
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.sweep import Controls
from headwise.verify.evidence import Evidence, Family, Joint
from headwise.verify.verdict import Against, FamilyVerdict, JointVerdict, Ruling, SingleVerdict
from headwise.zoo.planted import null, planted, random_net

AGAINST = Against(n=20, excess=0.0, ci=(0.0, 0.0), p=1.0, p_floor=0.0, kind="rank", ceiling=0.0)
SMALL = Plan(nulls=2, seeds=1, weakened=1, random=1, strengths=(0.5,), test_items=(8,), items=24, controls=50)
NOTHING = Outcome(False, 0, 0, 0, 0, 0, 0, 0)


def verdict(singles: dict[str, Ruling], joints: dict[str, Ruling], refusal: str = "") -> FamilyVerdict:
    return FamilyVerdict(
        Family("ioi", "m"),
        "logits",
        24,
        3,
        0.0,
        0.0,
        1.0,
        0.0,
        refusal,
        tuple(
            JointVerdict("m", HeadSet.parse(heads), 0.0, AGAINST, AGAINST, "layers", np.zeros(1), 0.0, ruling, "")
            for heads, ruling in joints.items()
        ),
        tuple(
            SingleVerdict(HeadSet.parse(head).heads[0], 0.0, AGAINST, AGAINST, "layers", 0.0, ruling, "")
            for head, ruling in singles.items()
        ),
    )


def test_what_is_false_and_what_is_found() -> None:
    """L0H0 and L0H1 have a total effect, of which that of L0H0 is large enough; L1H0 and L1H1 back one another up."""
    found = calibration._outcome(
        verdict(
            {"L0H0": "verified", "L0H1": "verified", "L2H2": "verified", "L1H0": "verified", "L3H3": "not verified"},
            {
                "L0H0, L3H3": "verified",  # holds a head that matters
                "L1H0, L1H1": "verified",  # a group that matters together
                "L1H0, L3H3": "verified",  # half of it does not
                "L0H1, L1H0, L1H1": "undecidable",
                "L3H4": "not verified",
            },
        ),
        candidates=HeadSet.parse("L0H0, L0H1"),
        groups=[HeadSet.parse("L1H0, L1H1")],
        real=HeadSet.parse("L0H0"),
        real_groups=[HeadSet.parse("L1H0, L1H1")],
    )
    assert found == Outcome(
        refused=False, verified=7, false=3, real=1, found=1, real_sets=3, found_sets=2, undecidable=1
    )


def test_shares_of_models_and_claims() -> None:
    wrong = replace(NOTHING, verified=5, false=2)
    right = replace(NOTHING, verified=4)
    refused = replace(NOTHING, refused=True)
    rates = calibration._false_rates([wrong, right, right, right, refused])
    assert rates["false_rate"] == 0.25
    assert rates["false_rate_upper"] == pytest.approx(upper_bound(1, 4))
    assert (rates["null.models"], rates["null.refused"]) == (4, 1)
    assert (rates["null.false_claims"], rates["null.true_claims"]) == (2, 15)
    full = [replace(right, real=4, found=3, real_sets=1, found_sets=1), replace(wrong, real=1, found=1), refused]
    found = calibration._discoveries(full)
    assert found["false_discovery_rate"] == pytest.approx(2 / 9)
    assert found["power"] == pytest.approx(4 / 5)
    assert found["power_sets"] == 1
    assert (found["planted.families"], found["planted.refused"]) == (2, 1)


def test_refused_families_are_apart_in_the_curve_and_lost_in_its_crossing() -> None:
    seen, missed = replace(NOTHING, real=4, found=4), replace(NOTHING, real=4, found=0)
    refused = replace(missed, refused=True)
    curve = {1.0: [[missed, seen]], 0.5: [[missed, seen], [refused, refused]]}
    found = calibration._curve(curve, (8, 24))
    assert found["power.strength_0.5.items_8"] == 0
    assert found["power.strength_0.5.items_24"] == 1
    assert found["refused.strength_0.5.items_24"] == 0.5
    assert found["power.strength_1.items_24"] == 1
    assert found["strength_at_80"] == pytest.approx(0.8)  # between 4 of 8 at 0.5 and 4 of 4 at 1


@pytest.mark.parametrize(
    ("points", "at"),
    [
        ([(0.2, 0.0), (0.4, 1.0)], 0.36),
        ([(0.2, 0.9), (0.4, 1.0)], 0.2),
        ([(0.4, 0.6), (0.2, 0.9), (0.8, 1.0)], 0.6),  # above, below, above for good
        ([(0.2, 0.0), (0.4, 0.7)], math.nan),
        ([(0.2, math.nan), (0.4, 1.0)], 0.4),
        ([], math.nan),
    ],
)
def test_where_a_curve_crosses(points: list[tuple[float, float]], at: float) -> None:
    assert crossing(points, 0.8) == pytest.approx(at, nan_ok=True)


def test_the_bound_of_clopper_and_pearson() -> None:
    assert upper_bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200))
    assert upper_bound(9, 200) < 0.08 < upper_bound(10, 200) + 0.005
    with pytest.raises(InputError, match="at least one model"):
        upper_bound(0, 0)


def test_evidence_on_fewer_items_is_that_of_the_first_ones() -> None:
    values = np.arange(6.0).reshape(2, 3)
    joint = Joint("m", HeadSet.parse("L0H0"), values[0], Controls((HeadSet.parse("L0H1"),), "layers", True), values[:1])
    heads = HeadSet.parse("L0H0, L0H1")
    whole = Evidence(Family("p", "m"), "higher", "u", ("a", "b", "c"), values[0], 0.0, 1.0, heads, values, (joint,))
    part = calibration._first(whole, 2)
    assert part.item_ids == ("a", "b")
    assert part.values.tolist() == [[0, 1], [3, 4]]
    assert part.joints[0].control_values.tolist() == [[0, 1]]


def test_it_is_a_bench() -> None:
    entry = catalogue.entry("benches", "calibration")
    assert isinstance(entry, catalogue.BenchEntry)
    assert entry.options == ("seed",)


@pytest.mark.slow
def test_a_planted_model_is_found_out_whole() -> None:
    few, all_of_them = through(planted(circuits=("indirect-object",), seed=4), "ioi", SMALL, seed=0)
    assert (all_of_them.refused, all_of_them.false) == (False, 0)
    assert all_of_them.real == all_of_them.found == 3
    assert few.real == 3


@pytest.mark.slow
def test_a_null_and_a_random_net_have_no_false_claim() -> None:
    (*_, found) = through(null("ioi", "mlp", seed=5), "ioi", SMALL, seed=0)
    assert (found.refused, found.false) == (False, 0)
    (*_, nothing) = through(random_net(seed=5), "ioi", SMALL, seed=0)
    assert (nothing.refused, nothing.verified) == (True, 0)


@pytest.mark.slow
def test_a_small_run_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stand_in(organism: object, behaviour: str, sizes: Plan, seed: int) -> list[Outcome]:
        seen.append(behaviour)
        return [replace(NOTHING, verified=2, real=2, found=2)] * 2

    monkeypatch.setattr(calibration, "through", stand_in)
    found = measure(plan=SMALL, workers=1)
    assert len(seen) == 2 + 1 + 3 + 1
    wanted = {"false_rate", "false_rate_upper", "power", "false_discovery_rate", "strength_at_80", "seconds"}
    assert wanted <= found.keys()
    assert {"power.strength_0.5.items_8", "power.strength_1.items_8", "random.refused"} <= found.keys()
    assert found["power"] == 1


@pytest.mark.prove
def test_verdicts_are_calibrated() -> None:
    """At least 200 nulls that solve their probe, and planted models at full strength."""
    found = measure()
    assert found["null.models"] >= 200
    assert found["false_rate"] <= 0.05
    assert found["false_rate_upper"] <= 0.08
    assert found["random.refused"] == found["random.models"]
    assert found["false_discovery_rate"] <= 0.05
    assert found["power"] >= 0.95
