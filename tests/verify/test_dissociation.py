"""Double dissociation: arrays with known answers, heads chosen by luck, and planted models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import stats

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet
from headwise.sweep import Controls, KnockOut, measure_sets
from headwise.verify.crossing import CrossedSet, fresh_again, fresh_items, heads_behind, measure_crossed
from headwise.verify.dissociation import Contrast, dissociation, together
from headwise.verify.evidence import Evidence, Family
from headwise.verify.gathering import Ground, ground
from headwise.verify.specialisation import specialisation
from headwise.verify.verdict import Against, FamilyVerdict, JointVerdict, SingleVerdict
from headwise.zoo.planted import Planted, planted

AGAINST = Against(n=20, excess=0.0, ci=(0.0, 0.0), p=1.0, p_floor=0.0, kind="rank", ceiling=0.0)


def evidence(
    probe: str,
    effects: Mapping[str, Sequence[float]],
    clean: Sequence[float],
    *,
    chance: float = 0.0,
    better: str = "higher",
) -> Evidence:
    """Of heads with these losses on each item; the items are called after the probe."""
    heads = HeadSet.parse(list(effects))
    losses = np.array([effects[label] for label in heads.labels]).reshape(len(heads), len(clean))
    ids = tuple(f"{probe}-{i}" for i in range(len(clean)))
    family = Family(probe, "m")
    values = np.array(clean, dtype=float)
    return Evidence(family, better, "logits", ids, values, chance, 1.0, heads, values - losses)  # type: ignore[arg-type]


def verdict(of: Evidence, verified: Sequence[str] = (), refusal: str = "") -> FamilyVerdict:
    singles = tuple(
        SingleVerdict(
            head, 0.0, AGAINST, AGAINST, "layers", 0.0, "verified" if head.label in verified else "refused", ""
        )
        for head in of.heads.heads
    )
    return FamilyVerdict(of.family, of.unit, len(of.item_ids), 1, 0.0, 0.0, 1.0, 0.0, refusal, (), singles)


def laid_out(
    name: str,
    clean: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    under: Mapping[str, np.ndarray],
    ids: str = "fresh",
) -> CrossedSet:
    n = len(next(iter(under.values())))
    return CrossedSet(
        name,
        HeadSet.parse("L0H0"),
        Controls(tuple(HeadSet.parse(f"L0H{i + 1}") for i in range(n)), "layers", False),
        {behaviour: tuple(f"{behaviour}-{ids}-{i}" for i in range(len(each))) for behaviour, each in clean.items()},
        clean,
        values,
        under,
    )


def crossed(
    name: str, losses: Mapping[str, np.ndarray], controls: Mapping[str, np.ndarray], **clean: float
) -> CrossedSet:
    """From losses of the heads, and of each control set, on the items of each behaviour; the clean metric is 10."""
    return laid_out(
        name,
        {behaviour: np.full(len(each), clean.get(behaviour, 10.0)) for behaviour, each in losses.items()},
        {behaviour: clean.get(behaviour, 10.0) - each for behaviour, each in losses.items()},
        {behaviour: clean.get(behaviour, 10.0) - controls[behaviour] for behaviour in losses},
    )


VERIFIED_ON = [99.0] * 5  # other items than the fresh ones, and another clean metric: nothing may come from it


def noise(seed: int, *shape: int, sd: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sd, shape)


def two(a_on_b: float = 1.0, b_on_b: float = 8.0, b_on_a: float = 1.0, control: float = 0.0) -> bool:
    """Whether two behaviours, of reach 10 each, dissociate; the heads of a cost a 8."""
    families = {name: evidence(name, {}, VERIFIED_ON) for name in "ab"}
    controls = {"a": control + noise(1, 20, 32), "b": noise(2, 20, 32)}
    first = crossed("a", {"a": 8 + noise(3, 32), "b": a_on_b + noise(4, 32)}, controls)
    second = crossed("b", {"a": b_on_a + noise(5, 32), "b": b_on_b + noise(6, 32)}, controls)
    return dissociation(first, second, families["a"], families["b"]).double


def test_two_behaviours_that_suffer_from_their_own_heads_dissociate() -> None:
    assert two()


@pytest.mark.parametrize(
    "case",
    [
        {"a_on_b": 8.0},  # the heads of a cost both the same
        {"b_on_b": 1.0},  # the heads of b cost neither much
        {"b_on_b": 9.5, "b_on_a": 8.5},  # b's heads cost a more than its own do, though b still more
        {"control": 9.0},  # random heads do as much to a
    ],
    ids=str,
)
def test_one_sided_cases_do_not(case: dict[str, float]) -> None:
    assert not two(**case)


def test_a_contrast_in_closed_form() -> None:
    families = {name: evidence(name, {}, VERIFIED_ON) for name in "ab"}
    on_a, on_b = 3 + noise(1, 8), 0.5 + noise(2, 8)
    under = {"a": noise(3, 5, 8), "b": noise(4, 5, 8)}
    first = crossed("a", {"a": on_a, "b": on_b}, under, a=4, b=2)
    second = crossed("b", {"a": on_a - 1 - noise(5, 8), "b": on_b}, under, a=4, b=2)
    found = dissociation(first, second, families["a"], families["b"])
    contrast = found.of_first
    assert contrast.own == pytest.approx(on_a.mean() / 4)
    assert contrast.other == pytest.approx(on_b.mean() / 2)
    of_controls = under["a"].mean(axis=1) / 4 - under["b"].mean(axis=1) / 2
    np.testing.assert_allclose(contrast.controls, of_controls)
    assert contrast.ceiling == pytest.approx(np.quantile(of_controls, 0.95))
    assert contrast.excess.value == pytest.approx(contrast.own - contrast.other - of_controls.mean())
    assert contrast.p == pytest.approx(1 / 6)
    # Where all items have the same reach the interval on the items of a is that of a paired t-test.
    paired = stats.ttest_1samp((1 + noise(5, 8)) / 4, 0).confidence_interval(0.95)
    assert (found.on_first.low, found.on_first.high) == pytest.approx((paired.low, paired.high))


def excess_of(share: float, controls: Sequence[float]) -> Contrast:
    """Heads that cost a this share of every item's reach and b nothing; control sets that cost a theirs."""
    cleans = {"a": np.array([2.0, 4.0, 6.0]), "b": np.array([3.0, 3.0, 3.0])}
    families = {name: evidence(name, {}, VERIFIED_ON) for name in cleans}
    values = {"a": (1 - share) * cleans["a"], "b": cleans["b"]}
    under = {"a": np.outer(1 - np.array(controls), cleans["a"]), "b": np.tile(cleans["b"], (len(controls), 1))}
    one, other = (laid_out(name, cleans, values, under) for name in "ab")
    return dissociation(one, other, families["a"], families["b"]).of_first


def test_a_loss_in_proportion_to_reach_is_known_exactly() -> None:
    """The items differ in what there is to lose, and not in the share that is lost."""
    found = excess_of(0.5, [0.0, 0.0]).excess
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_control_sets_that_differ_widen_the_interval() -> None:
    controls = [0.0, 0.1, 0.2, 0.3]
    expected = stats.ttest_1samp(0.8 - np.array(controls), 0).confidence_interval(0.95)
    found = excess_of(0.8, controls).excess
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_heads_that_a_few_random_sets_reach_do_not_stand_out() -> None:
    """More than the mean of the controls, and not more than their 95th percentile."""
    found = excess_of(0.5, [0.0] * 18 + [0.9, 0.9])
    assert found.excess.low > 0
    assert not found.holds
    assert excess_of(0.5, [0.0] * 18 + [0.1, 0.1]).holds


def test_the_interval_of_an_excess_covers_it() -> None:
    """95 percent of the time, over items whose losses go with their reach, and over control sets."""
    rng = np.random.default_rng(0)
    hits, rounds = 0, 400
    for _ in range(rounds):
        cleans = {name: rng.normal(5, 2, 24) for name in "ab"}
        families = {name: evidence(name, {}, VERIFIED_ON) for name in cleans}
        spread = {name: rng.normal(0, 0.3, (20, 1)) for name in "ab"}
        values, under = {}, {}
        for name, share in (("a", 0.6), ("b", 0.2)):
            clean = cleans[name]
            values[name] = clean - (share * clean + rng.normal(0, 1, 24))
            under[name] = clean - (0.1 * clean + spread[name] + rng.normal(0, 0.2, (20, 24)))
        one, other = (laid_out(name, cleans, values, under) for name in "ab")
        excess = dissociation(one, other, families["a"], families["b"]).of_first.excess
        hits += excess.low <= 0.4 <= excess.high
    assert 0.92 <= hits / rounds <= 0.98


def test_chance_and_direction_are_those_of_the_evidence() -> None:
    """Where less is better, 1 lost of a reach of 8 - 6; chance 6."""
    families = {name: evidence(name, {}, VERIFIED_ON, chance=8, better="lower") for name in "ab"}
    losses, under = {"a": np.full(4, -1.0), "b": np.zeros(4)}, {"a": np.zeros((3, 4)), "b": np.zeros((3, 4))}
    one, other = (crossed(name, losses, under, a=6, b=6) for name in "ab")
    assert dissociation(one, other, families["a"], families["b"]).of_first.own == pytest.approx(0.5)


def chosen_by_luck(seed: int) -> tuple[Mapping[str, Evidence], list[CrossedSet], list[CrossedSet]]:
    """No head does anything, and each costs each item some noise. The three of 300 that happen to cost a behaviour most
    are taken for its heads. Evidence, and these heads crossed on its own items and on fresh ones."""
    rng = np.random.default_rng(seed)
    drawn = {what: {name: rng.normal(0, 1, (300, 24)) for name in "ab"} for what in ("verified", "fresh")}
    clean = {name: np.full(24, 10.0) for name in "ab"}
    families = {name: evidence(name, {}, clean[name].tolist()) for name in "ab"}
    best = {name: np.argsort(each.mean(axis=1))[-3:] for name, each in drawn["verified"].items()}
    others = rng.permutation([i for i in range(300) if i not in {*best["a"], *best["b"]}])[:60].reshape(20, 3)

    def on(what: str) -> list[CrossedSet]:
        under = {name: clean[name] - each[others].sum(axis=1) for name, each in drawn[what].items()}
        return [
            laid_out(
                name, clean, {at: clean[at] - each[best[name]].sum(axis=0) for at, each in drawn[what].items()}, under
            )
            for name in "ab"
        ]

    own = [replace(each, item_ids={name: families[name].item_ids for name in "ab"}) for each in on("verified")]
    return families, own, on("fresh")


def test_heads_chosen_by_luck_dissociate_on_the_items_that_chose_them_and_not_on_others() -> None:
    elsewhere = {name: evidence(name, {}, VERIFIED_ON) for name in "ab"}
    circular = fresh = 0
    for seed in range(40):
        families, on_own, on_others = chosen_by_luck(seed)
        with pytest.raises(InputError, match="24 of the 24 items given for a are among those"):
            dissociation(*on_own, families["a"], families["b"])
        # Were the same items taken for others:
        renamed = [replace(each, item_ids=on_others[0].item_ids) for each in on_own]
        circular += dissociation(*renamed, elsewhere["a"], elsewhere["b"]).double
        fresh += dissociation(*on_others, families["a"], families["b"]).double
    assert circular > 30
    assert fresh == 0


def test_behaviours_that_were_not_crossed_cannot_be_compared() -> None:
    families = {name: evidence(name, {}, [10.0] * 8) for name in "ab"}
    under = {name: noise(2, 5, 8) for name in "abc"}
    alone = crossed("a", {"a": noise(1, 8)}, under)
    both = crossed("b", {"a": noise(1, 8), "b": noise(1, 8)}, under)
    with pytest.raises(InputError, match="heads of a were not tried on the items of b"):
        dissociation(alone, both, families["a"], families["b"])
    elsewhere = replace(both, behaviour="a", item_ids=both.item_ids | {"b": tuple("stuvwxyz")})
    with pytest.raises(InputError, match="tried on different items of b"):
        dissociation(elsewhere, both, families["a"], families["b"])
    stranger = crossed("c", {"a": noise(1, 8)}, under)
    with pytest.raises(InputError, match="heads of c were crossed, which is none of a"):
        specialisation([(families["a"], verdict(families["a"]))], [stranger])


def test_heads_behind_a_behaviour_that_hide_one_another_are_those_verified_together() -> None:
    of = evidence("a", {"L0H0": [0, 0], "L0H1": [0, 0]}, [2, 2])
    assert not heads_behind(verdict(of))

    def joint_of(heads: str, ruling: str) -> JointVerdict:
        return JointVerdict("m", HeadSet.parse(heads), 1.0, AGAINST, AGAINST, "layers", np.zeros(1), 0.0, ruling, "")  # type: ignore[arg-type]

    joints = (joint_of("L0H0, L0H1, L0H2", "verified"), joint_of("L0H0, L0H1", "verified"), joint_of("L0H1", "refused"))
    assert heads_behind(replace(verdict(of), joints=joints)).labels == ("L0H0", "L0H1")
    assert heads_behind(verdict(of, ["L0H1"])).labels == ("L0H1",)


# -- planted models ---------------------------------------------------------------------------------------------------


@cache
def model() -> tuple[Planted, AttachedModel]:
    organism = planted("llama", circuits=("indirect-object", "memory"), seed=3)
    return organism, hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example)


@cache
def items(probe: str, seed: int = 0) -> ItemSet:
    return hw.encode(hw.probe(probe), model()[1].tokenizer, n=24, seed=seed)


@cache
def planted_evidence(probe: str) -> Evidence:
    attached, given = model()[1], items(probe)
    singles = [HeadSet((head,)) for head in attached.heads()]
    values = measure_sets(attached, given, [HeadSet(), *singles], KnockOut()).numpy()
    family = Family(probe, "logit-difference")
    return Evidence(family, "higher", "logits", given.ids, values[0], 0.0, 1.0, attached.heads(), values[1:])


@cache
def fresh(probe: str) -> ItemSet:
    return fresh_items(model()[1], planted_evidence(probe), 24, finding=items(probe, 1).ids)


def test_heads_of_a_planted_model_dissociate() -> None:
    organism, attached = model()
    families = {probe: planted_evidence(probe) for probe in ("ioi", "facts")}
    truth = {probe: organism.truth.with_effect(probe, "total") for probe in ("ioi", "facts")}  # type: ignore[arg-type]
    given = {probe: fresh(probe) for probe in families}
    both = [
        measure_crossed(attached, name, truth[name], given, families, others=truth[other])
        for name, other in (("ioi", "facts"), ("facts", "ioi"))
    ]
    # What is measured on the other's items is what a knock-out by itself gives.
    np.testing.assert_allclose(both[0].clean["facts"], hw.measure(attached, given["facts"]).numpy(), atol=1e-3)
    assert both[0].item_ids["facts"] == given["facts"].ids
    alone = hw.measure(attached, given["facts"], edits=[hw.edit.zero(truth["ioi"])])
    np.testing.assert_allclose(both[0].values["facts"], alone.numpy(), atol=1e-3)
    assert all(not set(each) & set(truth["ioi"] | truth["facts"]) for each in both[0].controls.sets)
    verdicts = {name: verdict(each, truth[name].labels) for name, each in families.items()}
    found = specialisation([(families[name], verdicts[name]) for name in families], both)
    (pair,) = found.pairs
    assert pair.double
    assert pair.of_first.own > 0.9
    assert abs(pair.of_first.other) < 0.05
    shared = truth["ioi"] & truth["facts"]
    assert not shared
    rows = {head: row for row, head in enumerate(found.heads.heads)}
    for name in families:
        for head in truth[name].heads:
            assert found.preferred[rows[head]] == name
            assert found.selectivity[rows[head]] > 0.9
    assert found.similarity[0].cosine < 0.1
    assert found.similarity[0].shared == 0
    assert list(found.pairs_to_pandas()["double"]) == [True, True]


def test_a_behaviour_does_not_dissociate_from_itself() -> None:
    organism, attached = model()
    families, given = {"ioi": planted_evidence("ioi")}, {"ioi": fresh("ioi")}
    one = measure_crossed(attached, "ioi", organism.truth.with_effect("ioi", "total"), given, families)
    assert not dissociation(one, one, families["ioi"], families["ioi"]).double


def test_fresh_items_neither_found_nor_tested_heads_and_are_answered_rightly() -> None:
    attached, of = model()[1], planted_evidence("facts")
    finding = items("facts", 1)
    drawn = fresh_items(attached, of, 24, finding=finding.ids)
    assert len(drawn) == 24
    assert not set(drawn.ids) & {*finding.ids, *of.item_ids}
    assert (hw.measure(attached, drawn, "exact-match") == 1).all()
    assert drawn.ids == fresh_items(attached, of, 24, finding=finding.ids).ids
    # Of the first of the stream, exactly those are passed over that were used: the stream is the same, and goes on.
    used = drawn.ids[:4]
    again = fresh_items(attached, of, 24, finding=[*finding.ids, *used])
    assert again.ids[:20] == drawn.ids[4:]
    assert fresh_items(attached, of, 24, finding=finding.ids, seed=1).ids != drawn.ids


def test_fresh_items_that_a_model_gets_wrong_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the facts of one frame only: half of the items of both."""
    attached, of = model()[1], planted_evidence("facts")
    first = fresh_items(attached, of, 12, finding=())

    def ground_of_half(model: AttachedModel, given: ItemSet, *rest: object, **named: object) -> Ground:
        found = ground(model, given, *rest, **named)  # type: ignore[arg-type]
        right = [each.item.attributes["frame"] == 0 for each in given]
        return replace(found, items=given.only(right, "wrong"), solved=sum(right) / len(right))

    monkeypatch.setattr("headwise.verify.crossing.ground", ground_of_half)
    half = fresh_items(attached, of, 8, finding=())
    assert len(half) == 8
    assert {each.item.attributes["frame"] for each in half} == {0}
    assert half.ids[0] in first.ids


def test_a_behaviour_without_fresh_items_is_refused() -> None:
    attached, of = model()[1], planted_evidence("facts")
    with pytest.raises(InputError, match="5000 fresh items are wanted, beside those that found or tested heads: facts"):
        fresh_items(attached, of, 5000, finding=())
    with pytest.raises(Refusal, match="answers 0 of 16 fresh items of arithmetic rightly, and 8 are wanted"):
        fresh_items(attached, replace(of, family=Family("arithmetic", "exact-match")), 8, finding=())
    with pytest.raises(InputError, match="finding takes the ids"):
        fresh_items(attached, of, 8, finding=of.item_ids[0])


def test_items_that_verified_heads_cannot_test_them() -> None:
    """All of them or one; under another name of the same probe, too."""
    organism, attached = model()
    heads, of = organism.truth.with_effect("ioi", "total"), planted_evidence("ioi")
    with pytest.raises(InputError, match="24 of the 24 items given for ioi are among those its heads were verified on"):
        measure_crossed(attached, "ioi", heads, {"ioi": items("ioi")}, {"ioi": of})
    one = replace(fresh("ioi"), items=(*fresh("ioi").items[:9], items("ioi").items[0]))
    with pytest.raises(InputError, match="1 of the 10 items given for ioi"):
        measure_crossed(attached, "ioi", heads, {"ioi": one}, {"ioi": of})
    other = evidence("ioi", {}, [1.0] * 8)
    with pytest.raises(InputError, match="1 of the 10 items given for second"):
        measure_crossed(
            attached, "second", heads, {"first": fresh("ioi"), "second": one}, {"first": of, "second": other}
        )


def test_items_that_found_heads_cannot_test_them() -> None:
    """The evidence names them; `fresh_items` passes over them by itself."""
    organism, attached = model()
    heads, used = organism.truth.with_effect("ioi", "total"), fresh("ioi").ids[:3]
    of = replace(planted_evidence("ioi"), finding_ids=used)
    with pytest.raises(InputError, match=r"3 of the .* items given for ioi are among those its heads were found with"):
        measure_crossed(attached, "ioi", heads, {"ioi": fresh("ioi")}, {"ioi": of})
    free = fresh_items(attached, planted_evidence("ioi"), 8)
    assert not set(fresh_items(attached, replace(of, finding_ids=free.ids[:3]), 8).ids) & set(free.ids[:3])


def test_fresh_items_come_again_by_their_ids() -> None:
    attached, of = model()[1], planted_evidence("ioi")
    first = fresh_items(attached, of, 8, seed=3)
    drawn = fresh_items(attached, replace(of, finding_ids=first.ids[:5]), 8, seed=3)
    again = fresh_again(attached, hw.probe("ioi"), drawn.ids, seed=3)
    assert again.ids == drawn.ids
    assert [each.prompt for each in again] == [each.prompt for each in drawn]


def test_the_heads_behind_a_behaviour_together_in_closed_form() -> None:
    """Reach 10; losses of 2, 4, 6 and 8 on the items, and control sets that cost 0.1 k on all of them."""
    of = evidence("a", {}, VERIFIED_ON)
    losses, controls = np.array([2.0, 4.0, 6.0, 8.0]), np.repeat(0.1 * np.arange(20)[:, None], 4, axis=1)
    found = together(crossed("a", {"a": losses}, {"a": controls}), of)
    assert found.share.value == pytest.approx(0.5)
    half = stats.t.ppf(0.975, 3) * losses.std(ddof=1) / 10 / 2
    assert (found.share.low, found.share.high) == pytest.approx((0.5 - half, 0.5 + half))
    np.testing.assert_allclose(found.controls, 0.01 * np.arange(20), atol=1e-12)
    assert found.ceiling == pytest.approx(np.quantile(0.01 * np.arange(20), 0.95))
    assert (found.p, found.n_items, found.holds) == (pytest.approx(1 / 21), 4, True)
    above = together(crossed("a", {"a": losses}, {"a": controls + 4.5}), of)
    assert above.p == pytest.approx(16 / 21)
    assert not above.holds  # the control sets cost as much
    uneven = together(crossed("a", {"a": np.array([0.0, 0.0, 0.0, 20.0])}, {"a": controls}), of)
    assert not uneven.holds  # one item alone


def test_the_heads_together_where_lower_is_better() -> None:
    of = evidence("a", {}, VERIFIED_ON, chance=20.0, better="lower")
    worse = crossed("a", {"a": np.full(8, -5.0)}, {"a": np.zeros((20, 8))})  # the metric rises from 10 to 15 of 20
    assert together(worse, of).share.value == pytest.approx(0.5)


def test_the_heads_together_need_fresh_items_of_their_own_behaviour() -> None:
    of, controls = evidence("a", {}, VERIFIED_ON), np.zeros((20, 4))
    tried = crossed("a", {"a": np.ones(4)}, {"a": controls})
    with pytest.raises(InputError, match="not tried on its own items"):
        together(crossed("a", {"b": np.ones(4)}, {"b": controls}), of)
    with pytest.raises(InputError, match="1 of the 4 items given for a are among those its heads were found with"):
        together(tried, replace(of, finding_ids=tried.item_ids["a"][:1]))


def test_pairs_that_were_not_tried_on_each_other_are_no_pairs() -> None:
    families = {name: evidence(name, {}, VERIFIED_ON) for name in "ab"}
    verdicts = [(each, verdict(each)) for each in families.values()]
    controls = {"a": noise(1, 20, 32), "b": noise(2, 20, 32)}
    first = crossed("a", {"a": 8 + noise(3, 32), "b": 1 + noise(4, 32)}, controls)
    second = crossed("b", {"b": 8 + noise(6, 32)}, {"b": controls["b"]})
    assert specialisation(verdicts, [first, second]).pairs == ()
    whole = crossed("b", {"a": 1 + noise(5, 32), "b": 8 + noise(6, 32)}, controls)
    assert len(specialisation(verdicts, [first, whole]).pairs) == 1


def test_what_cannot_be_crossed_is_refused() -> None:
    organism, attached = model()
    heads, of = organism.truth.with_effect("ioi", "total"), planted_evidence("ioi")
    with pytest.raises(InputError, match="no items were given for ioi; draw some with fresh_items"):
        measure_crossed(attached, "ioi", heads, {}, {"ioi": of})
    with pytest.raises(Refusal, match="nothing can be lost on the fresh items of ioi: the clean metric"):
        measure_crossed(attached, "ioi", heads, {"ioi": fresh("ioi")}, {"ioi": replace(of, chance=1e6)})
    meant = replace(planted_evidence("facts"), family=Family("facts", "logit-difference", "mean"))
    given = {name: fresh(name) for name in ("ioi", "facts")}
    with pytest.raises(InputError, match="knocked out in 2 ways by the evidence"):
        measure_crossed(attached, "ioi", heads, given, {"ioi": of, "facts": meant})


def test_heads_are_crossed_in_the_way_in_which_they_were_verified() -> None:
    organism, attached = model()
    heads, of = organism.truth.with_effect("ioi", "total"), planted_evidence("ioi")
    uniform = replace(of, family=Family("ioi", "logit-difference", "uniform"))
    found = measure_crossed(attached, "ioi", heads, {"ioi": fresh("ioi")}, {"ioi": uniform}, n_controls=2)
    expected = measure_sets(attached, fresh("ioi"), [heads], KnockOut("uniform"))[0]
    zeroed = measure_sets(attached, fresh("ioi"), [heads], KnockOut("zero"))[0]
    np.testing.assert_allclose(found.values["ioi"], expected.numpy(), atol=1e-3)
    assert (expected - zeroed).abs().max() > 0.1
