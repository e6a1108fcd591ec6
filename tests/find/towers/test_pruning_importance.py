"""What is lost with each head, against heads that write nothing and projections cut by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find.towers import pruning_importance
from headwise.find.towers.pruning_importance import MEASURES, jensen_shannon
from headwise.model.attached import AttachedModel

Pictures = Callable[[int, int], Tensor]
LABELS = (0, 1, 2, 0)


@contextmanager
def cut(model: AttachedModel, layer: int, *heads: int) -> Iterator[None]:
    """The columns of the output projection that take these heads in are 0."""
    projection: Any = model.model.get_submodule(model.sites[layer].projection or "")
    before = projection.weight.detach().clone()
    with torch.no_grad():
        for head in heads:
            projection.weight[:, 8 * head : 8 * head + 8] = 0
    yield
    with torch.no_grad():
        projection.weight.copy_(before)


def probabilities(model: AttachedModel, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(pixel_values=pictures).logits.double(), dim=-1)


def test_a_head_that_writes_nothing_is_worth_nothing(classifier: AttachedModel, pictures: Pictures) -> None:
    with cut(classifier, 1, 2):
        for leave in ("one-out", "one-in"):
            found = pruning_importance(classifier, pictures(4, 16), LABELS, leave=leave)
            for measure in MEASURES:
                assert getattr(found, measure).of("L1H2").tolist() == pytest.approx([0] * 4, abs=1e-6)
            assert found.feature.of("L1H1").min() > 1e-4


def test_one_head_out_is_its_projection_cut(classifier: AttachedModel, pictures: Pictures) -> None:
    shown = pictures(4, 16)
    found = pruning_importance(classifier, shown, LABELS)
    clean = probabilities(classifier, shown)
    with cut(classifier, 0, 3):
        without = probabilities(classifier, shown)
    true = torch.tensor(LABELS)[:, None]
    middle = (clean + without) / 2
    divergence = ((clean * (clean / middle).log()).sum(1) + (without * (without / middle).log()).sum(1)) / 2
    wanted = {
        "probability": (clean - without).gather(1, true)[:, 0],
        "accuracy": (clean.argmax(1) == true[:, 0]).double() - (without.argmax(1) == true[:, 0]).double(),
        "divergence": divergence,
    }
    for measure, values in wanted.items():
        assert getattr(found, measure).of("L0H3") == pytest.approx(values.numpy(), abs=1e-6), measure
    assert found.divergence is not None
    assert found.divergence.of("L0H3").max() > 1e-4
    assert found.divergence.provenance.settings == {"leave": "one-out", "stack": "main", "measure": "divergence"}


def test_one_head_in_is_what_it_brings_back(classifier: AttachedModel, pictures: Pictures) -> None:
    shown = pictures(3, 16)
    found = pruning_importance(classifier, shown, LABELS[:3], leave="one-in")
    true = torch.tensor(LABELS[:3])[:, None]
    with cut(classifier, 1, 0, 1, 2, 3):
        none = probabilities(classifier, shown).gather(1, true)[:, 0]
    with cut(classifier, 1, 0, 2, 3):
        alone = probabilities(classifier, shown).gather(1, true)[:, 0]
    assert found.probability is not None
    assert found.probability.of("L1H1") == pytest.approx((alone - none).numpy(), abs=1e-6)
    assert float((alone - none).abs().max()) > 1e-4


def test_the_feature_is_cls_behind_the_last_block(vit: AttachedModel, pictures: Pictures) -> None:
    shown = pictures(2, 24)
    found = pruning_importance(vit, shown)
    assert (found.divergence, found.probability, found.accuracy) == (None, None, None)
    with torch.no_grad(), vit.reading(hw.read.residual("L2")) as clean:
        vit(pixel_values=shown)
    with torch.no_grad(), vit.reading(hw.read.residual("L2")) as got, vit.editing(hw.edit.zero("L2H1")):
        vit(pixel_values=shown)
    one, two = (run.residual_post["L2"][:, 0].double() for run in (clean, got))
    wanted = 1 - torch.cosine_similarity(one, two, dim=-1)
    assert found.feature.of("L2H1") == pytest.approx(wanted.numpy(), abs=1e-7)


def test_together_and_one_by_one(classifier: AttachedModel, pictures: Pictures) -> None:
    shown = pictures(4, 16)
    together = pruning_importance(classifier, shown, LABELS)
    alone = pruning_importance(classifier, shown, LABELS, rows=1)
    for measure in MEASURES:
        one, two = getattr(together, measure), getattr(alone, measure)
        assert one.values["main"] == pytest.approx(two.values["main"], abs=1e-5), measure
        assert one.item_ids == ("item-0", "item-1", "item-2", "item-3")


def test_pictures_are_sorted_by_the_texts_of_a_clip(pictures: Pictures) -> None:
    with hw.load("zoo:tiny-clip") as clip:
        shown = pictures(3, 24)
        found = pruning_importance(clip, shown, [0, 1, 0], rows=7)
        texts = {name: clip.example[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            clean = clip(pixel_values=shown, **texts).logits_per_image.double().softmax(-1)
            with clip.editing(hw.edit.zero("vision.L1H2")):
                without = clip(pixel_values=shown, **texts).logits_per_image.double().softmax(-1)
    assert found.probability is not None
    assert [site.label for site in found.probability.sites["vision"]] == ["vision.L0", "vision.L1"]
    true = torch.tensor([[0], [1], [0]])
    wanted = (clean - without).gather(1, true)[:, 0]
    assert found.probability.of("vision.L1H2") == pytest.approx(wanted.numpy(), abs=1e-6)


def test_a_language_model_has_words_and_no_classes(pictures: Pictures) -> None:
    with hw.load("zoo:tiny-llava") as llava:
        found = pruning_importance(llava, pictures(2, 16))
    assert found.divergence is None
    assert found.feature.of("vision.L0H0").min() > 0


def test_divergence_is_between_0_and_ln_2() -> None:
    one, two = torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[0.0, 1.0], [0.3, 0.7]])
    assert jensen_shannon(one, two).tolist() == pytest.approx([math.log(2), 0])


def test_what_cannot_be_is_one_line(classifier: AttachedModel, pictures: Pictures) -> None:
    shown = pictures(2, 16)
    with pytest.raises(InputError, match=r"labels go up to 3, and .* gives 3 classes"):
        pruning_importance(classifier, shown, [0, 3])
    for labels in ([0], [0.0, 1.0], [0, -1]):
        with pytest.raises(InputError, match="give 2 class numbers"):
            pruning_importance(classifier, shown, labels)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choose one of one-out, one-in"):
        pruning_importance(classifier, shown, leave="two-out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows=0"):
        pruning_importance(classifier, shown, rows=0)
