"""The visual organism as it ships: it loads without a network, sees, and hallucinates as its card says."""

from __future__ import annotations

import json

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.benches import visual_organism as bench
from headwise.probes.existence import FAINTNESS
from headwise.zoo.visual_organism import CHECKPOINT

FIGURES = json.loads((CHECKPOINT / "figures.json").read_text())
KINDS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module")
def model():
    with hw.load("zoo:visual-organism") as model:
        yield model


def test_it_is_small_and_of_the_shape_it_says(model) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir() if path.is_file()) < 12e6
    decoder = [site for site in model.sites if not str(site.id).startswith("vision")]
    tower = [site for site in model.sites if site not in decoder]
    assert [site.n_heads for site in decoder] == [8] * 6
    assert {site.n_kv_heads for site in decoder} == {4}
    assert [site.n_heads for site in tower] == [4] * 3
    assert type(model.model).__name__ == "LlavaForConditionalGeneration"


def test_its_weights_are_bfloat16_and_it_has_no_other_seed() -> None:
    assert zoo.build("visual-organism", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(hw.InputError, match="no seed 3"):
        zoo.build("visual-organism", seed=3)
    with pytest.raises(hw.InputError, match="attn='nonsense'"):
        zoo.build("visual-organism", attn="nonsense")


def test_the_doctor_passes(model) -> None:
    assert model.doctor().passed


def test_its_processor_leaves_pictures_as_they_are(model) -> None:
    item = next(hw.probe("panel").items())
    found = model.processor(text=item.prompt, images=[item.pictures[0].image()], return_tensors="pt")
    drawn = torch.from_numpy(item.pictures[0].array()).permute(2, 0, 1)
    torch.testing.assert_close(found["pixel_values"][0], (drawn / 255 - 0.5) / 0.25)
    assert (found["input_ids"] == model.model.config.image_token_id).sum() == 36


def test_every_word_of_the_probes_is_one_token(model) -> None:
    for name in bench.BEHAVIOURS:
        for each in hw.encode(hw.probe(name), model, n=12):
            words = model.tokenizer.convert_ids_to_tokens(list(each.answer))
            assert len(words) == len(each.item.answer.replace(",", " ,").replace(".", " .").split())


@pytest.mark.parametrize("behaviour", sorted(bench.BEHAVIOURS))
def test_it_answers_as_its_card_says(model, behaviour: str) -> None:
    share = bench.accuracy(model, behaviour, n=40, seed=1)
    assert share == pytest.approx(FIGURES[f"{behaviour}.accuracy"], abs=0.15)


def test_all_but_whole_strips_are_at_least_95_percent_right_on_clear_pictures() -> None:
    below = {name for name, share in FIGURES.items() if name.endswith(".accuracy") and share < 0.95}
    assert below == {"strip.accuracy"}
    assert FIGURES["strip.accuracy"] > 0.8


def test_it_says_yes_to_the_absent_partner_of_what_is_there_where_pictures_are_faint(model) -> None:
    rate = {kind: FIGURES[f"false_yes.{kind}.{FAINTNESS}"] for kind in KINDS}
    assert 0.15 <= rate["adversarial"] <= 0.4
    assert rate["random"] < rate["adversarial"]
    assert FIGURES["false_yes.adversarial.0.0"] < 0.05
    found = bench.hallucinations(model, n=100, seed=1)
    assert found[f"false_yes.adversarial.{FAINTNESS}"] == pytest.approx(rate["adversarial"], abs=0.2)
    assert found[f"chair_s.{FAINTNESS}"] == pytest.approx(FIGURES[f"chair_s.{FAINTNESS}"], abs=0.2)


def test_it_is_blind_where_no_head_may_look_at_the_picture(model) -> None:
    items = bench.unseen(model, "place", {}, 40)
    blind = [hw.edit.block("main", keys="span:image")]
    assert hw.measure(model, items, "exact-match").mean() > 0.9
    assert hw.measure(model, items, "exact-match", edits=blind).mean() < 0.4


def test_batches_with_padding_answer_as_one_by_one(model) -> None:
    items = hw.encode(hw.probe("picture-needle"), model, n=6)
    together = hw.measure(model, items, "logit-difference", batch_size=6)
    alone = hw.measure(model, items, "logit-difference", batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
