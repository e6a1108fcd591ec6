"""Mutual nearest neighbours: what is known of them, and heads whose space is that of the encoder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.alignment import (
    METHODS,
    encoder_features,
    mutual_knn,
    nearest_items,
    neighbour_loss,
    vision_alignment,
)
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.probes.picture import Picture


def drawn(n: int, *, prompt: str = "<image> What is it?", seed: int = 0) -> list[Item]:
    pixels = np.random.default_rng(seed).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)
    return [
        Item(prompt=prompt, answer=" x", id=f"i{k}", pictures=(Picture.drawn(each),)) for k, each in enumerate(pixels)
    ]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "smolvlm"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


@pytest.fixture(scope="module")
def items(model: AttachedModel) -> ItemSet:
    return hw.encode(drawn(9), model)


def test_a_rotation_keeps_all_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    assert mutual_knn(space, space @ rotation, 5).tolist() == [1.0] * 30
    assert mutual_knn(space, 3 * space, 5).tolist() == [1.0] * 30


def test_unrelated_spaces_share_as_many_as_chance() -> None:
    """k / (n - 1) in the mean, over many draws."""
    generator = torch.Generator().manual_seed(1)
    n, k = 25, 6
    shares = [
        float(mutual_knn(*torch.randn(2, n, 8, generator=generator, dtype=torch.float64).unbind(), k).mean())
        for _ in range(200)
    ]
    assert np.mean(shares) == pytest.approx(k / (n - 1), abs=3 * np.std(shares) / len(shares) ** 0.5)


def test_neighbours_are_others_by_cosine() -> None:
    space = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 5.0]])
    assert nearest_items(space, 1).nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    other = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0]])
    assert mutual_knn(space, other, 1).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert mutual_knn(space, other, 3).tolist() == [1.0] * 4
    with pytest.raises(InputError, match="more than neighbours"):
        mutual_knn(space, other, 4)
    with pytest.raises(InputError, match="as many items"):
        mutual_knn(space, other[:3], 1)


def test_a_step_down_the_loss_brings_the_neighbours_nearer() -> None:
    generator = torch.Generator().manual_seed(2)
    encoder = torch.randn(40, 5, generator=generator)
    space = torch.randn(40, 5, generator=generator, requires_grad=True)
    before = float(mutual_knn(space.detach(), encoder, 5).mean())
    for _ in range(60):
        loss = neighbour_loss(space, encoder, 5)
        (gradient,) = torch.autograd.grad(loss, space)
        space = (space.detach() - 2 * gradient).requires_grad_()
    assert float(mutual_knn(space.detach(), encoder, 5).mean()) > before + 0.2


def test_the_loss_by_hand() -> None:
    space = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    cosine = space @ space.T
    total = 0.0
    for item, near in ((0, 1), (1, 2), (2, 1)):
        others = [other for other in range(3) if other != item]
        total -= float(cosine[item, near] / 0.5 - torch.logsumexp(cosine[item, others] / 0.5, 0)) / 3
    assert float(neighbour_loss(space, space, 1, temperature=0.5)) == pytest.approx(total)


def test_scores_are_of_z_over_the_picture(model: AttachedModel, items: ItemSet) -> None:
    """Against z of one item at a time, and neighbours by sorting."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(len(items), 4, generator=generator)
    scores = find(METHODS[0], model, items, neighbours=3, features=features)
    pooled = []
    for each in items:
        (image,) = each.spans["image"]
        with torch.no_grad(), model.reading(hw.read.z("L1")) as got:
            model(**one(model, each))
        pooled.append(got.z["L1"][0, list(image)].double().mean(0))
    of_heads = torch.stack(pooled, dim=1)
    for head, space in enumerate(of_heads):
        expected = [shared(space, features.double(), item, 3) for item in range(len(items))]
        assert scores.of(f"L1H{head}").tolist() == pytest.approx(expected)


def one(model: AttachedModel, each: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([each.prompt])
    inputs = {"input_ids": ids, **each.pixels}
    if "image_grid_thw" in each.pixels:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
        inputs["mm_token_type_ids"][0, list(each.spans["image"][0])] = 1
    return inputs


def shared(space: torch.Tensor, other: torch.Tensor, item: int, k: int) -> float:
    def near(x: torch.Tensor) -> set[int]:
        cosine = torch.nn.functional.cosine_similarity(x, x[item : item + 1])
        ranked = sorted((n for n in range(len(x)) if n != item), key=lambda n: -float(cosine[n]))
        return {*ranked[:k]}

    return len(near(space) & near(other)) / k


def test_a_head_whose_space_is_the_encoders_has_the_score_1(model: AttachedModel, items: ItemSet) -> None:
    pooled = []
    for each in items:
        (image,) = each.spans["image"]
        with torch.no_grad(), model.reading(hw.read.z("L2")) as got:
            model(**one(model, each))
        pooled.append(got.z["L2H3"][0, list(image)].double().mean(0))
    scores = find(METHODS[0], model, items, neighbours=3, features=2 * torch.stack(pooled))
    assert scores.of("L2H3").tolist() == [1.0] * len(items)
    assert scores.top(1).labels == ("L2H3",)


def test_without_features_the_encoder_is_what_the_model_is_given(model: AttachedModel, items: ItemSet) -> None:
    given = []
    for each in items:
        (image,) = each.spans["image"]
        with torch.no_grad(), model.reading(hw.read.residual("L0", where="pre")) as got:
            model(**one(model, each))
        given.append(got.residual_pre["L0"][0, list(image)].double().mean(0))
    own = vision_alignment(model, items, neighbours=3)
    named = vision_alignment(model, items, neighbours=3, features=torch.stack(given))
    for site, values in own.items():
        assert torch.equal(values, named[site])


def test_an_encoder_of_its_own() -> None:
    with hw.load("zoo:tiny-vit") as encoder, hw.load("zoo:tiny-llava") as model:
        items = hw.encode(drawn(4), model)

        def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
            pixels = torch.tensor(np.stack([np.asarray(each.resize((24, 24))) for each in images])).permute(0, 3, 1, 2)
            return {"pixel_values": pixels / 255}

        features = encoder_features(encoder, processor, items)
        pixels = processor([each.item.pictures[0].image() for each in items], "pt")
        with torch.no_grad():
            expected = encoder.model(**pixels).last_hidden_state.mean(1)
        assert torch.allclose(features.float(), expected, atol=1e-6)


def test_the_order_of_items_and_their_number_to_a_batch_change_nothing(model: AttachedModel, items: ItemSet) -> None:
    turned = ItemSet(items.probe, items.items[::-1], {}, items.metric, items.pad, reader=items.reader)
    own, other = (vision_alignment(model, each, neighbours=2) for each in (items, turned))
    for site, values in own.items():
        assert torch.allclose(values, other[site].flip(0))


def test_what_has_no_neighbourhoods_is_refused(model: AttachedModel, items: ItemSet) -> None:
    with pytest.raises(InputError, match="more items"):
        vision_alignment(model, items, neighbours=9)
    with pytest.raises(InputError, match="8 rows"):
        vision_alignment(model, items, neighbours=3, features=torch.ones(8, 2))
    mixed = [*drawn(3), *[Item(prompt="<image> Why?", answer=" x", id="w", pictures=drawn(4)[3].pictures)]]
    with pytest.raises(InputError, match="2 different prompts"):
        vision_alignment(model, hw.encode(mixed, model), neighbours=1)
    two = [Item(prompt="<image><image> Which?", answer=" x", id=f"t{k}", pictures=pair) for k, pair in pairs()]
    with pytest.raises(InputError, match="2 pictures"):
        vision_alignment(model, hw.encode(two, model), neighbours=1)


def pairs() -> Iterator[tuple[int, tuple[Picture, Picture]]]:
    for number, (one_, other) in enumerate(combinations(drawn(3), 2)):
        yield number, (one_.pictures[0], other.pictures[0])


def test_items_without_pictures_are_refused() -> None:
    with hw.load("zoo:tiny-llama") as model, pytest.raises(Refusal, match="image"):
        find(METHODS[0], model, hw.encode([Item(prompt="a", answer=" b", id="x")], model))
