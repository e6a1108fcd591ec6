"""The organism's training: what it learns from, and that a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """The trainer with a model of a few thousand weights and pools of a few rows."""
    import mixture
    import train

    monkeypatch.setattr(mixture, "POOL", 24)
    monkeypatch.setattr(train, "CURVE_STEPS", 1)
    shape = train.Shape(seed=0, layers=1, heads=2, kv_heads=1, head_dim=8, width=16, feed_forward=16, tokens=10**6)
    return lambda folder, **other: train.Trainer("small", replace(shape, **other), folder)


def test_the_same_pool_twice_is_the_same(tmp_path: Path, small) -> None:
    from mixture import COURSES, pool

    trainer = small(tmp_path)
    shares = [course.share for course in COURSES]
    first, second, other = (pool(trainer.tokenizer, 0, number, shares) for number in (3, 3, 4))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))
    assert any(a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=False))


def test_only_answers_and_what_can_be_foretold_are_learnt(tmp_path: Path, small) -> None:
    from mixture import COURSES, pool

    tokenizer = small(tmp_path).tokenizer
    for number, course in enumerate(COURSES):
        batch = pool(tokenizer, 0, 0, [float(number == other) for other in range(len(COURSES))])[0]
        for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            text = [token for token in ids if token != tokenizer.pad_token_id]
            learnt = [place for place, label in enumerate(labels) if label != -100]
            assert all(labels[place] == ids[place] for place in learnt)
            assert text[-1] == tokenizer.eos_token_id
            assert learnt[-1] == len(text) - (1 if course.ends else 2), course.probe
            if not course.foretold and course.more is None:
                assert learnt == list(range(learnt[0], learnt[-1] + 1)), course.probe  # the answer, in one piece
            assert learnt[0] > 1


def test_further_questions_have_the_answers_of_the_text() -> None:
    from random import Random

    from mixture import COURSES, _draw

    from headwise.probes import probe

    asked = {course.probe: course for course in COURSES if course.more}
    assert asked.keys() == {"hash", "colored-objects", "needle"}
    for name, course in asked.items():
        for seed in range(30):
            item = _draw(course, probe(name), Random(seed))
            more = course.more(item, Random(seed))
            assert more
            for question, answer in more:
                key = question.rstrip(":").split()[-1] if name == "hash" else question.split("the ")[-1].split()[0]
                told = {"hash": f"{key}:{answer}", "needle": f"of the {key} is{answer}."}
                assert told.get(name, f"{answer} {key.rstrip('?')}") in item.prompt


def test_no_held_out_item_is_ever_drawn(tmp_path: Path, small) -> None:
    from random import Random

    from mixture import COURSES, _draw

    from headwise.probes import held_out, probe

    for course in COURSES:
        of, random = probe(course.probe), Random(0)
        drawn = [of.make(random, **random.choice(course.settings)).named(of.id) for _ in range(60)]
        assert sum(map(held_out, drawn)) > 0, course.probe  # or the next line says nothing
        assert not any(held_out(_draw(course, of, random)) for _ in range(60))


@pytest.mark.parametrize("kv_heads", [1, 0])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, small, kv_heads: int) -> None:
    whole = small(tmp_path / "whole", kv_heads=kv_heads)
    for _ in range(4):
        whole.train_pool()
    stopped = small(tmp_path / "stopped", kv_heads=kv_heads)
    for _ in range(2):
        stopped.train_pool()
    stopped.save()
    resumed = small(tmp_path / "stopped", kv_heads=kv_heads)
    assert resumed.resume()
    for _ in range(2):
        resumed.train_pool()
    assert (resumed.tokens, resumed.steps, resumed.right) == (whole.tokens, whole.steps, whole.right)
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path, small) -> None:
    small(tmp_path).save()
    with pytest.raises(SystemExit, match="other settings"):
        small(tmp_path, seed=1).resume()


def test_the_loss_falls(tmp_path: Path, small) -> None:
    trainer = small(tmp_path)
    trainer.train_pool()
    untrained = trainer.curve[0]["loss"]
    for _ in range(40):
        trainer.train_pool()
    assert untrained > 6.5  # the log of the vocabulary is 6.8
    assert min(point["loss"] for point in trainer.curve) < untrained - 0.1


def test_the_export_is_an_ordinary_checkpoint(tmp_path: Path, small) -> None:
    import headwise as hw

    trainer = small(tmp_path)
    trainer.train_pool()
    with hw.load(trainer.export()) as model:
        assert model.dtype == torch.bfloat16
        ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
        assert ids[0, 0] == model.tokenizer.bos_token_id
        assert model(input_ids=ids).logits.shape == (1, 6, len(model.tokenizer))


@pytest.mark.parametrize("shape", [(5, 16, 16), (3, 24, 8), (3, 8, 24)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    from muon import orthogonalized

    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_the_tokenizer_in_the_package_is_the_one_that_training_builds() -> None:
    from tokenizer import build_tokenizer
    from train import CONTEXT

    from headwise.zoo.planted.lexicon import own_tokenizer

    built, shipped = build_tokenizer(CONTEXT), own_tokenizer()
    assert built.get_vocab() == shipped.get_vocab()
