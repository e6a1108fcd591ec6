"""The visual organism's training: what it is asked, and that a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from headwise.probes.item import Item
from headwise.probes.picture import PICTURE_MARK, Picture
from headwise.probes.scenes import GRID, PARTNER, STRIP
from headwise.probes.split import held_out

TRAINING = Path(__file__).parents[2] / "training" / "visual"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """The trainer with a model of a few thousand weights and short steps."""
    import teach

    monkeypatch.setattr(teach, "CURVE_STEPS", 1)
    shape = teach.Shape(
        seed=0,
        tower_layers=1,
        tower_width=16,
        tower_heads=2,
        tower_steps=2,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        width=16,
        feed_forward=16,
        steps=4,
    )
    return lambda folder, **other: teach.Trainer("small", replace(shape, **other), folder)


def parts_of(small, folder: Path, stage: int, number: int, tokens: int = 512):
    from lessons import LESSONS, step_parts

    shares = [each.share * (each.stage <= stage <= each.until) for each in LESSONS]
    return step_parts(small(folder).tokenizer, 0, number, shares, tokens)


def test_the_same_step_twice_is_the_same(tmp_path: Path, small) -> None:
    first, second, other = (parts_of(small, tmp_path, 2, number) for number in (3, 3, 4))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.pictures, b.pictures)
    assert [each.ids.shape for each in first] != [each.ids.shape for each in other]


def test_every_mark_has_its_patches_and_every_picture_its_mark(tmp_path: Path, small) -> None:
    from lessons import PATCHES

    mark = small(tmp_path).model.config.image_token_id
    for batch in parts_of(small, tmp_path, 2, 0, 2048):
        assert int((batch.ids == mark).sum()) == PATCHES * len(batch.pictures)


def test_no_picture_is_held_out(tmp_path: Path, small) -> None:
    shown = [each for number in range(3) for batch in parts_of(small, tmp_path, 2, number) for each in batch.pictures]
    assert len(shown) >= 20
    for each in shown:
        picture = Picture.drawn(each.permute(1, 2, 0).numpy().copy())
        assert not held_out(Item(prompt=PICTURE_MARK, answer="", pictures=(picture,)))


def test_only_answers_and_the_end_are_learnt(tmp_path: Path, small) -> None:
    from lessons import LESSONS, encoded

    tokenizer = small(tmp_path).tokenizer
    for each in LESSONS:
        row = each.make(Random(each.name))
        ids, labels = encoded(tokenizer, row)
        learnt = [label for label in labels if label != -100]
        answers = "".join(text for text, learnt in row.pieces if learnt)
        assert tokenizer.decode(learnt[:-1]) == answers
        assert learnt[-1] == ids[-1] == tokenizer.eos_token_id
        assert len(row.pictures) == "".join(text for text, _ in row.pieces).count(PICTURE_MARK)
        # Every word of an answer is one token.
        assert len(learnt) - 1 == len(re.findall(r" ?\w+|[^\w\s]", answers))


def test_the_pairs_in_words_are_those_of_the_pictures() -> None:
    from lessons import pairs_in_words

    pieces = pairs_in_words(Random(0)).pieces
    for (told, _), (answer, _) in zip(pieces[::2], pieces[1::2], strict=True):
        named = [each for each in PARTNER if each in told.split()]
        assert answer == f" {PARTNER[named[0]]}"


def test_a_patch_is_told_what_stands_in_its_place() -> None:
    from tower import told

    from headwise.probes.scenes import COLORS, SHAPES, Scene, Thing

    things = [None] * 9
    things[5] = Thing("ring", "blue")  # row 2, column 3: rows 2 and 3, columns 4 and 5 of the patches
    labels = told(Scene(GRID, tuple(things)), 8).reshape(6, 6, 3)
    here = [SHAPES.index("ring"), [*COLORS].index("blue"), 5]
    assert (labels[2:4, 4:6] == here).all()
    assert (labels[:2, :, 0] == len(SHAPES)).all()
    strip = told(Scene(STRIP, (None, None, None, None, Thing("star", "red"), None)), 8).reshape(6, 6, 3)
    assert (strip[3:, 2:4] == [SHAPES.index("star"), 0, 9 + 4]).all()
    assert (strip[:3, :, 1] == len(COLORS)).all()


def test_the_tower_stays_as_it_is_when_the_rest_is_taught(tmp_path: Path, small) -> None:
    trainer = small(tmp_path)
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.stage = 2
    trainer.train_step()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "vision_tower" in name]


def test_what_is_taught_is_what_the_whole_model_makes_of_it(tmp_path: Path, small) -> None:
    from teach import scaled

    trainer = small(tmp_path)
    model = trainer.model.eval()
    batch = next(each for each in parts_of(small, tmp_path, 2, 0) if len(each.pictures))
    with torch.no_grad():
        whole = model(input_ids=batch.ids, pixel_values=scaled(batch.pictures)).logits
        inside = model.model
        embedded = inside.get_input_embeddings()(batch.ids)
        shown = (batch.ids == model.config.image_token_id)[:, :, None]
        seen = inside.multi_modal_projector(trainer._patches(batch.pictures))
        taught = model.lm_head(
            inside.language_model(inputs_embeds=embedded.masked_scatter(shown, seen)).last_hidden_state
        )
    torch.testing.assert_close(taught, whole)


def test_a_run_that_was_stopped_goes_on_the_same(tmp_path: Path, small) -> None:
    trainers = []
    for name in ("whole", "stopped"):
        trainers.append(small(tmp_path / name))
        trainers[-1].teach_tower()
        trainers[-1].train_step()
    whole, stopped = trainers
    stopped.save()
    resumed = small(tmp_path / "stopped")
    assert resumed.resume()
    for trainer in (whole, resumed):
        trainer.train_step()
    for name, each in whole.model.state_dict().items():
        assert torch.equal(each, resumed.model.state_dict()[name]), name
    assert whole.right == resumed.right


def test_the_rate_falls_twice_and_the_last_stage_is_the_second_time(tmp_path: Path, small, monkeypatch) -> None:
    import teach

    monkeypatch.setattr(teach, "WARM_UP", 1)
    trainer = small(tmp_path, steps=3, again=2)
    paces = []
    for _ in range(5):
        paces.append(trainer._pace())
        assert (trainer.stage == teach.LAST) == (trainer.steps >= 3)
        trainer.train_step()
    assert paces == pytest.approx([1.02, 1.02 - 1 / 3, 1.02 - 2 / 3, teach.AGAIN, teach.AGAIN / 2])


def test_stages_follow_when_all_is_mastered_or_patience_ends(tmp_path: Path, small, monkeypatch) -> None:
    import teach

    trainer = small(tmp_path, steps=1000)
    trainer.train_step()
    assert trainer.stage == 0
    trainer.right = [1.0] * len(trainer.right)
    trainer.train_step()
    assert (trainer.stage, trainer.stages) == (1, [2])
    monkeypatch.setattr(teach, "PATIENCE", 2)
    trainer.right = [0.0] * len(trainer.right)
    trainer.train_step()
    trainer.train_step()
    assert (trainer.stage, trainer.stages) == (2, [2, 4])


@pytest.mark.parametrize("name", ["main", "visual-sibling-siglip"])
def test_what_is_exported_loads_and_reads_pictures(tmp_path: Path, name: str) -> None:
    import teach

    import headwise as hw

    folder = teach.Trainer(name, replace(teach.SHAPES[name], layers=1, tower_layers=1), tmp_path).export()
    with hw.load(folder) as model:
        items = hw.encode(hw.probe("picture-needle"), model, n=2)
        assert all(len(each.spans["image"]) == len(each.item.pictures) for each in items)
        assert hw.measure(model, items).isfinite().all()
