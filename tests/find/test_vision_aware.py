"""Vision-aware heads: two runs by hand, planted heads first and blind heads 0, one item alone, pictures of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find.vision_aware import (
    divergence,
    picture_markers,
    token_divergence,
    vision_aware,
    without_pictures,
)
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.zoo.tokens import IMAGE


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3", "smolvlm"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as attached:
        yield attached


def drawn(model: AttachedModel, n: int = 3) -> ItemSet:
    """Questions about a grid, a strip, and several pictures at once; pictures are of different size."""
    album = hw.probe("picture-needle").over(pictures=2)
    streams = (probe.items(0) for probe in (hw.probe("existence"), hw.probe("panel"), album))
    mixed = islice((each for pair in zip(*streams, strict=False) for each in pair), n)
    # Pictures of four tokens have too few for the regions.
    return hw.encode([replace(each, regions={}, twin=None) for each in mixed], model.processor, name="mixed")


def test_an_item_without_its_picture_is_the_text_around_it(model: AttachedModel) -> None:
    (each,) = drawn(model, 1)
    assert isinstance(each.item.prompt, str)
    bare = without_pictures(each, picture_markers(model))
    said = model.tokenizer(each.item.prompt.replace("<image>", "")).input_ids
    if type(model.processor).__name__ in ("Gemma3Processor", "Idefics3Processor"):  # they put lines around pictures
        assert len(bare.prompt) <= len(said) + 4
        assert model.tokenizer.decode(bare.prompt).split() == model.tokenizer.decode(said).split()
    else:
        assert list(bare.prompt) == said
    assert IMAGE not in bare.prompt
    assert not bare.pixels


def test_scores_are_distances_of_two_runs_by_hand(model: AttachedModel) -> None:
    items = drawn(model)
    scores, markers = vision_aware(model, items), picture_markers(model)
    main = [site.id.label for site in model.sites if site.id.stack == model.table.stacks[0]]
    z = hw.read.z(main, queries=[-1])
    for row, each in enumerate(items):
        with torch.no_grad(), model.reading(z) as seeing:
            ids = torch.tensor([each.prompt])
            types = {"mm_token_type_ids": (ids == IMAGE).long()} if "image_grid_thw" in each.pixels else {}
            types |= {"token_type_ids": (ids == IMAGE).long()} if "Gemma3" in type(model.model).__name__ else {}
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **each.pixels, **types)
        with torch.no_grad(), model.reading(z) as lacking:
            model(input_ids=torch.tensor([without_pictures(each, markers).prompt]))
        for label in main:
            wanted = (seeing.z[label] - lacking.z[label])[0, 0].norm(dim=-1)
            assert torch.allclose(scores[SiteId.parse(label)][row].float(), wanted, atol=2e-5), (row, label)
    assert max(float(values.max()) for values in scores.values()) > 1e-2


def test_planted_heads_come_first_and_blind_ones_have_zero() -> None:
    """Only one group of one layer has values at all: no other head gives anything, with or without the picture."""
    with hw.load("zoo:tiny-llava") as model:
        items = drawn(model)
        layers = model.model.get_decoder().layers
        with torch.no_grad():
            for number, layer in enumerate(layers):
                kept = layer.self_attn.v_proj.weight[12:24].clone()
                layer.self_attn.v_proj.weight.zero_()
                if number == 1:
                    layer.self_attn.v_proj.weight[12:24] = kept
        scores = hw.find("vision-aware", model, items)
        assert set(scores.top(2).labels) == {"L1H2", "L1H3"}
        values = scores.values["main"].copy()
        assert (values[:, 1, 2:] > 1e-3).all()
        values[:, 1, 2:] = 0
        assert (values == 0).all()


def test_what_a_head_writes_is_z_times_its_part_of_the_projection(llava: AttachedModel) -> None:
    items = drawn(llava, 2)
    z, written = (vision_aware(llava, items, of=of) for of in ("z", "write"))  # type: ignore[arg-type]
    site = SiteId.parse("L1")
    weight = llava.model.get_decoder().layers[1].self_attn.o_proj.weight
    assert written[site].shape == z[site].shape
    for head in range(4):
        largest = torch.linalg.matrix_norm(weight[:, 12 * head : 12 * head + 12], 2)
        assert (written[site][:, head] <= z[site][:, head] * largest + 1e-5).all()
    assert not torch.allclose(written[site], z[site], rtol=0.05)
    with torch.no_grad():
        weight[:, 12:24] = 0
        blind = vision_aware(llava, items, of="write")[site]
        assert (blind[:, 1] == 0).all()
        assert torch.allclose(blind[:, [0, 2, 3]], written[site][:, [0, 2, 3]])
        weight[:, 12:24] = 0.1


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_batch_of_padded_rows_scores_as_each_alone(name: str) -> None:
    with hw.load(f"zoo:tiny-{name}") as model:
        items = drawn(model)
        assert len({len(each.prompt) for each in items}) > 1
        together = vision_aware(model, items)
        for row, each in enumerate(items):
            alone = vision_aware(model, replace(items, items=(each,)))
            for site in together:
                assert torch.allclose(together[site][row], alone[site][0], atol=2e-5)


def test_the_distances_by_hand() -> None:
    seeing, lacking = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(divergence(seeing, lacking), torch.tensor([5.0, 5**0.5]).double())
    assert torch.allclose(divergence(seeing, lacking, "relative"), torch.tensor([1.0, 5**0.5 / 3]).double())
    assert float(divergence(seeing, lacking, "cosine")[1]) == pytest.approx(1.0)
    assert float(divergence(seeing, 2 * seeing, "cosine").abs().max()) < 1e-12


def test_token_divergence_sums_the_largest(llava: AttachedModel) -> None:
    scores = hw.find("vision-aware", llava, drawn(llava, 2))
    values = scores.values["main"]
    assert token_divergence(scores, 3) == pytest.approx([sum(sorted(row.ravel())[-3:]) for row in values])
    by_layer = [sum(sum(sorted(layer)[-2:]) for layer in row) for row in values]
    assert token_divergence(scores, 2, over="layer") == pytest.approx(by_layer)
    assert token_divergence(scores, 12) == pytest.approx(np.nansum(values, axis=(1, 2)))
    with pytest.raises(InputError, match="no number of heads"):
        token_divergence(scores, 0)


def test_what_cannot_be_scored_is_said(llava: AttachedModel) -> None:
    items = drawn(llava, 1)
    (each,) = items
    ends = replace(each, prompt=each.prompt[: max(each.spans["image"][0]) + 1], answer=(20,))
    with pytest.raises(InputError, match="ends in a picture"):
        vision_aware(llava, replace(items, items=(ends,)))
    with pytest.raises(InputError, match="distance"):
        vision_aware(llava, items, distance="l1")  # type: ignore[arg-type]
    with hw.load("zoo:tiny-llama") as llama, pytest.raises(Refusal, match="no token for pictures"):
        vision_aware(llama, items)
    text = hw.encode(hw.probe("facts"), llava.tokenizer, n=1)
    with pytest.raises(Refusal, match="no span 'image'"):
        hw.find("vision-aware", llava, text)


def test_a_head_that_is_silent_both_times_has_not_moved() -> None:
    silent = torch.zeros(2, 3)
    for distance in ("l2", "relative", "cosine"):
        assert divergence(silent, silent, distance).tolist() == [0, 0]
    turned = divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), "cosine")
    assert turned.tolist() == [1]
