"""ZeroTuning against the paper's closed form; what its profile and its tuning say, on a model made to need them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.use.attention import zero_tuning
from headwise.use.attention.zero_tuning import ZeroTuning, parted, profile, tune, units_of


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def tiny(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.load("zoo:organism") as attached:
        yield attached


@pytest.fixture(scope="module")
def items(model: AttachedModel) -> ItemSet:
    return hw.encode(hw.probe("conflict"), model.tokenizer, n=12)


def test_rows_are_the_closed_form(tiny: AttachedModel) -> None:
    mask = tiny.example["attention_mask"].bool()
    gammas = {"L0H0": 3.0, "L0H3": 0.2}
    with torch.no_grad(), tiny.reading(hw.read.rows("L0")) as clean:
        tiny(**tiny.example)
    with torch.no_grad(), ZeroTuning(gammas)(tiny), tiny.reading(hw.read.rows("L0")) as got:
        tiny(**tiny.example)
    changed = 0.0
    for row, real in enumerate(mask):
        first = int(real.int().argmax())
        for head, gamma in {0: 3.0, 3: 0.2, 1: 1.0}.items():
            before, after = clean.rows["L0"][row, head, real], got.rows["L0"][row, head, real]
            share = (gamma - 1) * before[:, [first]] + 1
            expected = before / share
            expected[:, first] = gamma * before[:, first] / share[:, 0]
            # Queries of a sliding window that have left the first token behind have nothing there, and stay.
            assert (after - expected).abs().max() < 1e-5
            changed = max(changed, float((after - before).abs().max()))
    assert changed > 1e-2


def test_a_unit_is_a_head_an_index_or_a_layer(tiny: AttachedModel) -> None:
    heads = tiny.heads()
    assert [len(each) for each in units_of(heads, "head")] == [1] * len(heads)
    by_index = units_of(heads, "index")
    assert len(by_index) == tiny.sites[0].n_heads
    assert by_index[1].labels == tuple(f"{site.label}H1" for site in tiny.sites)
    assert [each.labels for each in units_of(heads, "layer")] == [site.heads.labels for site in tiny.sites]
    with pytest.raises(InputError, match="head, index, layer"):
        units_of(heads, "group")  # type: ignore[arg-type]


def test_the_profile_has_the_metric_of_each_unit_edited_alone(model: AttachedModel, items: ItemSet) -> None:
    found = profile(model, items, "L2, L3", unit="layer", measured="logit-difference")
    for place, unit in enumerate(found.units):
        for gamma, means in ((2.0, found.raised), (0.5, found.lowered)):
            edits = ZeroTuning(unit, gamma).edits(model)
            one = hw.measure(model, items, "logit-difference", edits=edits).double().mean()
            assert float(means[place]) == pytest.approx(float(one), abs=1e-4)
    assert found.plain == pytest.approx(float(hw.measure(model, items, "logit-difference").double().mean()))
    assert float((found.raised - found.plain).abs().max()) > 1e-3


def test_a_metric_of_which_less_is_better_is_turned_around(model: AttachedModel, items: ItemSet) -> None:
    up = profile(model, items, "L3", unit="layer", measured="answer-log-probability")
    down = profile(model, items, "L3", unit="layer", measured="cross-entropy")
    assert torch.allclose(up.raised, down.raised, atol=1e-6)  # answers of one token
    assert up.up == down.up
    assert up.down == down.down


def test_the_dominant_kind_is_that_of_more_heads() -> None:
    units = tuple(HeadSet.parse(f"L0H{index}") for index in range(6))
    # The last two: both directions help, and raising is the lesser harm.
    raised, lowered = [0.6, 0.7, 0.4, 0.5, 0.6, 0.45], [0.5, 0.65, 0.9, 0.5, 0.65, 0.4]
    found = zero_tuning.Profile(units, 0.5, torch.tensor(raised), torch.tensor(lowered))
    assert found.up.labels == ("L0H0", "L0H1")
    assert found.down.labels == ("L0H2", "L0H4")
    assert found.dominant == found.down  # as many, and they gain more
    more = zero_tuning.Profile(units[:4], 0.5, torch.tensor(raised[:4]), torch.tensor(lowered[:4]))
    assert more.dominant == more.up
    tie = zero_tuning.Profile(units[:2], 0.5, torch.tensor([0.6, 0.1]), torch.tensor([0.2, 0.9]))
    assert tie.dominant.labels == ("L0H1",)


def test_parts_share_no_prompt(items: ItemSet) -> None:
    tuning, judging = parted(items)
    assert len(tuning) + len(judging) == len(items)
    assert not {each.prompt for each in tuning} & {each.prompt for each in judging}
    assert abs(len(tuning) - len(judging)) <= 1
    with pytest.raises(InputError, match="two different prompts"):
        parted(items.only([place == 0 for place in range(len(items))], "one is enough"))


def test_tuning_undoes_what_was_done_to_the_first_token(model: AttachedModel, items: ItemSet) -> None:
    """Layer 3 is made to look at the first token ten million times as much; a factor that small is the best one."""
    harmed = math.log(1e7)
    with model.editing(hw.edit.bias("L3", harmed, keys="first")):
        found = tune(model, items, "L3", measured="answer-log-probability", grid=(1e-7, 0.5, 2.0))
        assert found.intervention.gamma == 1e-7
        assert found.tuned.mean() > found.plain.mean() + 1
        assert float(found.curve[1e-7]) == max(found.curve.values())
    healthy = hw.measure(model, found.judging, "answer-log-probability")
    assert torch.allclose(found.tuned, healthy, atol=1e-3)
    assert {*found.tuning.ids}.isdisjoint(found.judging.ids)


def test_without_labels_the_lowest_entropy_is_taken(model: AttachedModel, items: ItemSet) -> None:
    found = tune(model, items, "L3", by="entropy", grid=(0.5, 1000.0), measured="logit-difference")
    tuning, _ = parted(items)
    for gamma, mean in found.curve.items():
        entropies = []
        for batch in tuning.batches(4):
            ids, mask = batch.input_ids[:, : batch.prompt_length], batch.attention_mask[:, : batch.prompt_length]
            positions = batch.position_ids[:, : batch.prompt_length]
            with torch.no_grad(), ExitStack() as blocks:
                if gamma != 1:
                    blocks.enter_context(ZeroTuning(model.heads("L3"), gamma)(model))
                logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            p = logits.softmax(-1)
            entropies += (-(p * p.clamp(min=1e-30).log()).sum(-1)).tolist()
        assert mean == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert found.curve[found.intervention.gamma] == min(found.curve.values())
    assert found.by == "entropy"


def test_where_nothing_helps_nothing_is_done(model: AttachedModel, items: ItemSet) -> None:
    found = tune(model, items, "L3", measured="exact-match", grid=(0.9, 1.1))
    assert found.intervention.gamma == 1  # of equals the one that changes least
    assert found.intervention.edits(model) == ()
    assert torch.equal(found.plain, found.tuned)
    with pytest.raises(Refusal, match="helps"):
        tune(model, items, unit="layer", measured="exact-match")  # all items are right as they are


@pytest.mark.parametrize("gammas", [(0.5, 2.0), (2.0, 0.0), (1.0, 0.5)])
def test_a_profile_needs_a_factor_up_and_one_down(
    model: AttachedModel, items: ItemSet, gammas: tuple[float, float]
) -> None:
    with pytest.raises(InputError, match="above 1"):
        profile(model, items, "L3", gammas=gammas)
