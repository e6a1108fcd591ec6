"""`verify` on planted models: what matters is verified, what only looks like it is not."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.reference import Reference
from headwise.probes import ItemSet, encode, probe, read_items
from headwise.scores import HeadScores, Provenance, ScoredHead
from headwise.sweep import KnockOut
from headwise.sweep.knockout import reference_of
from headwise.verify import verifying
from headwise.verify.gathering import gather, ground, joint_of, map_of
from headwise.verify.judging import judge
from headwise.verify.verifying import half_for_finding, half_for_testing, unseen_items, verify
from headwise.zoo.planted import Planted, null, planted, random_net

CIRCUIT = {"repeat": "induction", "ioi": "indirect-object", "hash": "key"}
BEHAVIOUR = {"repeat": "repeat", "ioi": "ioi", "hash": "keys"}


@cache
def built(probe: str) -> tuple[Planted, hw.AttachedModel]:
    return attached(planted(circuits=(CIRCUIT[probe],), seed=1))


def attached(organism: Planted) -> tuple[Planted, hw.AttachedModel]:
    return organism, hw.attach(organism.model, organism.tokenizer, example=organism.example)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repeat", "ioi"])
def test_heads_with_an_effect_are_verified_and_decoys_are_not(name: str) -> None:
    organism, model = built(name)
    real = organism.truth.with_effect(BEHAVIOUR[name], "total")
    verdict = verify(model, real, name, items=16, n_controls=50)
    assert verdict.ruling == "verified"
    assert verdict.family.verified == real
    assert not verdict.family.verified & organism.truth.decoys()
    assert {each.head for each in verdict.singles} == set(real.heads)
    assert verdict.joint.effect == pytest.approx(verdict.family.clean, rel=0.15)
    assert verdict.kept_only is not None
    assert verdict.kept_only.left > 0.8
    assert verdict.off_target is not None
    assert verdict.off_target.probe == "text"
    first, *_, last = [each.value for each in verdict.doses]
    assert first > last
    assert last == pytest.approx(float(verdict.evidence.joints[0].values.mean()), abs=1e-3)


@pytest.mark.slow
def test_backups_are_verified_together_and_not_alone() -> None:
    organism, model = built("hash")
    (group,) = organism.truth.backups
    verdict = verify(model, list(group), "hash", items=24, n_controls=50, off_target=None)
    assert verdict.ruling == "verified"
    assert {each.ruling for each in verdict.singles} == {"not verified"}
    assert verdict.off_target is None


@pytest.mark.slow
def test_decoys_and_a_random_set_are_not_verified() -> None:
    organism, model = built("repeat")
    known = HeadSet.parse([each.head for each in organism.truth.heads_known])
    random = HeadSet((model.heads() - known).heads[:3])
    for heads in (organism.truth.decoys("induction"), random):
        verdict = verify(model, heads, "repeat", items=16, n_controls=50, off_target=None)
        assert verdict.ruling == "not verified"
        assert "not above the smallest of interest" in verdict.reason
        assert not verdict.family.verified & heads


@pytest.mark.slow
@pytest.mark.parametrize("way", ["heads", "mlp"])
def test_of_a_null_only_what_does_it_otherwise_is_verified(way: str) -> None:
    organism, model = attached(null("ioi", way, seed=2))  # type: ignore[arg-type]
    evidence = gather(model, encode(probe("ioi"), model.tokenizer, n=16), KnockOut(), joints={})
    found = judge(evidence)
    assert not found.refusal
    assert found.verified <= organism.truth.with_effect("ioi", "total")
    assert not found.verified & organism.truth.decoys()


def test_a_model_that_does_not_solve_the_probe_is_refused() -> None:
    _, model = attached(random_net(layers=2, heads=4))
    verdict = verify(model, "L0H1, L1H2", "ioi", items=16, n_controls=10)
    assert verdict.ruling == "refused"
    assert "rightly" in verdict.reason
    assert (verdict.doses, verdict.kept_only, verdict.off_target) == ((), None, None)
    form = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert form["verdict"] == "refused"
    assert form["joint"]["p"] is None
    assert "refused" in str(verdict)


@cache
def small() -> hw.AttachedModel:
    return attached(planted(layers=2, heads=4, circuits=("induction",), seed=0))[1]


def test_the_json_form_has_the_keys_that_are_promised() -> None:
    verdict = verify(small(), ["L0H0"], "repeat", items=8, n_controls=5)
    form = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert form.keys() == {
        "joint", "single", "verdict", "units", "mode", "scope", "items", "family_size", "off_target",
    }  # fmt: skip
    assert form["joint"].keys() == {"effect", "excess", "ci", "p", "q", "controls"}
    assert [each.keys() for each in form["single"]] == [{"head", "effect", "p", "q"}]
    assert (form["mode"], form["scope"], form["items"], form["family_size"]) == ("zero", "all", 8, 9)
    assert "<b>L0H0 on repeat/logit-difference/zero/all" in verdict._repr_html_()


def test_the_effects_are_those_of_measure() -> None:
    """A second way to every number."""
    model = small()
    items = encode(probe("repeat"), model.tokenizer, n=8)
    found = ground(model, items, KnockOut())
    clean = hw.measure(model, found.items)
    heads = HeadSet.parse("L0H0, L1H2, L1H3")
    values = map_of(model, found, heads)
    joint = joint_of(model, found, "given", heads, n_controls=4)
    np.testing.assert_allclose(found.clean, clean, atol=1e-4)
    for row, head in zip(values, heads, strict=True):
        expected = hw.measure(model, found.items, edits=[hw.edit.zero(head)])
        np.testing.assert_allclose(row, expected, atol=1e-4)
    for row, each in zip((joint.values, *joint.control_values), (heads, *joint.controls.sets), strict=True):
        np.testing.assert_allclose(row, hw.measure(model, found.items, edits=[hw.edit.zero(each)]), atol=1e-4)
    evidence = found.evidence(heads, values, (joint,))
    np.testing.assert_allclose(judge(evidence).single("L1H2").effect, (clean.numpy() - values[1]).mean(), rtol=1e-5)


def test_items_that_the_model_gets_wrong_do_not_count() -> None:
    model = small()
    items = encode(probe("repeat"), model.tokenizer, n=8)
    wrong = encode(probe("ioi"), model.tokenizer, n=4)
    mixed = type(items)("mixed", items.items + wrong.items, {}, "logit-difference", items.pad)
    right = hw.measure(model, mixed, "exact-match") == 1
    found = ground(model, mixed, KnockOut())
    assert found.solved == pytest.approx(float(right.double().mean()))
    assert len(found.items) == int(right.sum()) < 12


def test_the_items_that_found_the_heads_do_not_test_them() -> None:
    model = small()
    finding = encode(probe("repeat"), model.tokenizer, n=8, seed="verify/0")  # the very ones that would be drawn
    for given in (finding, list(finding.ids), scores_on(finding.ids)):
        tested = unseen_items(model, "repeat", 6, given, 0)
        assert len(tested) >= 6
        assert not set(tested.ids) & set(finding.ids)
    with pytest.raises(InputError, match="were used to find the heads"):
        unseen_items(model, finding, 8, finding, 0)


@pytest.mark.parametrize("n", [20, 90])
def test_what_find_uses_by_default_tests_nothing(n: int) -> None:
    """Of a probe with an end every stream has the same items."""
    model, facts = small(), probe("facts")
    found = encode(facts, model.tokenizer, n=max(n, 64), seed=5)
    own = encode(facts, model.tokenizer, n=n, seed="verify/5")
    assert set(own.ids) & set(found.ids), "the streams share items, or nothing is shown"
    tested = unseen_items(model, facts, n, None, 5)
    assert len(tested) >= n
    assert not set(tested.ids) & set(found.ids)
    assert unseen_items(model, facts, n, [], 5).ids == own.ids
    with pytest.raises(InputError, match="facts has too few items for 100 that did not choose the heads") as error:
        unseen_items(model, facts, 100, None, 5)
    assert "\n" not in str(error.value)


def scores_on(ids: tuple[str, ...]) -> HeadScores:
    sites = {"main": (small().sites[0].id,)}
    return HeadScores({"main": np.zeros((len(ids), 1, 4))}, sites, ids, Provenance("test"))


def test_a_probe_file_is_a_probe(tmp_path: Path) -> None:
    file = own_file(tmp_path, 40)
    tested = unseen_items(small(), file, 8, [], 0)
    assert (tested.probe, len(tested), tested.metric) == ("own", 40, "answer-log-probability")
    assert unseen_items(small(), str(file), 64, tested.ids[:30], 0).ids == tested.ids[30:]


def own_file(folder: Path, n: int) -> Path:
    rows = [each.item for each in encode(probe("repeat"), small().tokenizer, n=n)]
    file = folder / "own.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": each.prompt, "answer": each.answer}) for each in rows))
    return file


def test_of_a_file_one_half_finds_heads_and_the_other_tests_them(tmp_path: Path) -> None:
    file = own_file(tmp_path, 40)
    every = [each.id for each in read_items(file)]
    finding, testing = [each.id for each in half_for_finding(file)], [each.id for each in half_for_testing(file)]
    assert sorted(finding + testing) == sorted(every)
    assert min(len(finding), len(testing)) >= 10
    assert unseen_items(small(), file, 64, None, 0).ids == tuple(testing)
    # An item's half is its own: it stays there whatever else is in the file.
    file.write_text("\n".join(file.read_text().splitlines()[:25]))
    assert [each.id for each in half_for_testing(file)] == [id for id in testing if id in every[:25]]


def test_a_half_with_too_few_items_is_one_line(tmp_path: Path) -> None:
    file = own_file(tmp_path, 5)
    for wrong in (half_for_testing, lambda file: unseen_items(small(), file, 64, None, 0)):
        with pytest.raises(InputError, match=r"of its 5 items are in the testing half .* and 8 are needed") as error:
            wrong(file)
        assert "\n" not in str(error.value)
    only = next(each for each in half_for_testing(own_file(tmp_path, 40)))
    file.write_text(json.dumps({"id": only.id, "prompt": only.prompt, "answer": only.answer}))
    with pytest.raises(InputError, match=r"0 of its 1 items are in the finding half .* and 1 are needed"):
        half_for_finding(file)


def references(monkeypatch: pytest.MonkeyPatch) -> list[ItemSet]:
    """The items that reference sets are made from, as they are made."""
    seen: list[ItemSet] = []

    def noted(model: hw.AttachedModel, items: ItemSet) -> Reference:
        seen.append(items)
        return reference_of(model, items)

    monkeypatch.setattr(verifying, "reference_of", noted)
    return seen


def test_what_is_put_in_place_is_of_items_that_are_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = own_file(tmp_path, 40), references(monkeypatch)
    ask: dict[str, Any] = {"mode": "mean", "n_controls": 2, "off_target": None}
    verdict = verify(small(), "L0H0", file, **ask)
    assert set(seen[-1].ids) == {each.id for each in half_for_finding(file)}
    assert verdict.reference == f"{len(seen[-1])} items of own that are not tested"
    assert f"mean over {verdict.reference}" in str(verdict)
    finding = encode(probe("repeat"), small().tokenizer, n=4)
    assert verify(small(), "L0H0", file, finding=finding, **ask).reference == "4 items that found the heads"
    assert seen[-1] is finding
    facts = verify(small(), "L0H0", "facts", items=64, **ask)
    assert facts.reference == f"{len(seen[-1])} items of facts that are not tested"
    assert 0 < len(seen[-1]) < 32
    assert not set(seen[-1].ids) & set(unseen_items(small(), "facts", 64, None, 0).ids)
    with pytest.raises(InputError, match=r"mode 'mean' puts in place .* all 4 of repeat are"):
        verify(small(), "L0H0", finding, **ask)
    assert verify(small(), "L0H0", "repeat", items=8, n_controls=2, off_target=None).reference == ""


def test_a_scope_that_meets_nothing_is_refused_and_not_a_verdict() -> None:
    with pytest.raises(Refusal, match="scope 'decode' has no position in any of the 8 items of repeat"):
        verify(small(), "L0H0", "repeat", scope="decode", items=8, n_controls=2, off_target=None)


def test_a_ranking_grows() -> None:
    ranking = [ScoredHead(head, 1.0, 0.0) for head in HeadSet.parse("L1H2, L0H0").heads][::-1]
    verdict = verify(small(), ranking, "repeat", items=8, n_controls=5, off_target=None)
    assert [each.heads for each in verdict.growing] == [HeadSet.parse("L1H2"), HeadSet.parse("L0H0, L1H2")]
    assert verdict.growing[-1].value == pytest.approx(verdict.doses[-1].value, abs=1e-4)
    assert not verify(small(), "L0H0", "repeat", items=8, n_controls=5, off_target=None).growing


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_modes_with_a_reference_set_bring_their_own(mode: str) -> None:
    verdict = verify(small(), "L0H0", "repeat", mode=mode, items=8, n_controls=3, off_target=None)  # type: ignore[arg-type]
    assert verdict.family.family.key == f"repeat/logit-difference/{mode}/all"
    assert np.isfinite(verdict.joint.effect)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": "L0H0"}, "needs the behaviour"),
        ({"heads": HeadSet(), "probe": "repeat"}, "no heads were given"),
        ({"heads": "L9H9", "probe": "repeat"}, "no attention at L9"),
        ({"heads": "L0H0", "probe": "repeet"}, "repeat"),
        ({"heads": "L0H0", "probe": "repeat", "metric": "logit-diff"}, "logit-difference"),
        ({"heads": "L0H0", "probe": "repeat", "mode": "gone"}, "no knock-out mode"),
        ({"heads": "L0H0", "probe": "repeat", "finding": "item-1"}, "items that chose the heads"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        verify(small(), items=4, n_controls=2, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="attached model"):
        verify(torch.nn.Linear(1, 1), "L0H0", "repeat")  # type: ignore[arg-type]


def test_a_metric_without_a_chance_level_is_refused() -> None:
    with pytest.raises(Refusal, match="kl-to-clean"):
        verify(small(), "L0H0", "repeat", metric="kl-to-clean", items=4, n_controls=2)
