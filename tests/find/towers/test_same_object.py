"""The probe on streams that are made of a feature and an object, and heads that go by objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find.towers import (
    SameObject,
    binding_heads,
    fit_same_object,
    object_scenes,
    patch_stream,
)
from headwise.find.towers.same_object import pairs_of
from headwise.model.attached import AttachedModel

Pictures = Callable[[int, int], Tensor]
QUICK: dict[str, Any] = {"epochs": 150, "learning_rate": 0.05, "patches": 12}


@pytest.fixture(scope="module")
def bound() -> tuple[Tensor, Tensor]:
    """x = f + e_object: a feature of every patch, and one of eight codes that the objects of a picture draw anew."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(1, 4, (160, 12), generator=generator)
    codes = torch.rand(160, 8, generator=generator).argsort(1)
    of_objects = 3 * torch.eye(24)[codes.gather(1, objects)]
    return 0.2 * torch.randn(160, 12, 24, generator=generator) + of_objects, objects


def test_only_a_form_that_compares_can_say_same(bound: tuple[Tensor, Tensor]) -> None:
    stream, objects = bound
    assert fit_same_object(stream, objects, **QUICK).accuracy == 1
    assert fit_same_object(stream, objects, form="diagonal", **QUICK).accuracy == 1
    linear = fit_same_object(stream, objects, form="linear", **QUICK)
    assert linear.accuracy == pytest.approx(linear.majority, abs=0.03)
    assert 0.6 < linear.majority < 0.72  # two of three objects are others


def test_what_stands_across_its_axes_needs_the_whole_form(bound: tuple[Tensor, Tensor]) -> None:
    """Every second patch has its object's code on other axes: no diagonal form compares the two kinds."""
    stream, objects = bound
    shifted = torch.where((torch.arange(12) % 2 == 0)[None, :, None], stream, stream.roll(8, dims=-1))
    assert fit_same_object(shifted, objects, **QUICK).accuracy > 0.99
    assert fit_same_object(shifted, objects, form="diagonal", **QUICK).accuracy < 0.9


def test_the_three_logits() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    weight, bias = torch.tensor([1.0, 10.0]), torch.tensor(0.5)
    linear = SameObject("linear", weight, bias, 0, 0)(x)
    assert linear.tolist() == [[42.5, 14.5], [14.5, -13.5]]
    diagonal = SameObject("diagonal", weight, bias, 0, 0)(x)
    assert diagonal.tolist() == [[41.5, -16.5], [-16.5, 19.5]]
    matrix = torch.tensor([[1.0, 4.0], [0.0, 2.0]])
    quadratic = SameObject("quadratic", matrix, bias, 0, 0)(x)
    symmetric = (matrix + matrix.T) / 2
    assert torch.allclose(quadratic, x @ symmetric @ x.T / 2**0.5 + 0.5)


def test_a_patch_of_nothing_and_a_patch_with_itself_are_no_pairs() -> None:
    same, counted = pairs_of(torch.tensor([[1, 0, 1, 2]]))
    assert counted[0].nonzero().tolist() == [[0, 2], [0, 3], [2, 0], [2, 3], [3, 0], [3, 2]]
    assert (same & counted)[0].nonzero().tolist() == [[0, 2], [2, 0]]


def test_the_draw_is_of_the_seed(bound: tuple[Tensor, Tensor]) -> None:
    stream, objects = bound
    one, two, other = (fit_same_object(stream, objects, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(one.weight, one.weight.T)


def test_a_head_that_goes_by_objects_is_found(vit: AttachedModel, looking: Any) -> None:
    """One head looks at the patches of its object, one at CLS alone; the probe is right by construction."""
    scenes = object_scenes(3, objects=3, seed=2)
    objects = scenes.objects
    same = (objects[:, :, None] == objects[:, None, :]).float()
    pattern = torch.zeros(3, 37, 37)
    pattern[:, 0, 0] = 1
    pattern[:, 1:, 1:] = same / same.sum(-1, keepdim=True)
    cls = torch.zeros(37, 37)
    cls[:, 0] = 1

    class Knows(SameObject):
        def __call__(self, stream: Tensor) -> Tensor:
            return same

    probe = Knows("linear", torch.zeros(48), torch.tensor(0.0), 1, 0.5)
    by_object = hw.edit.rewrite("L1H3", lambda current, here: pattern[:, None].to(current))
    with vit.editing(by_object), looking(vit, "L0H0", cls):
        found = binding_heads(vit, scenes.pixel_values, probe, "L1")
    assert found.top(1).heads[0].label == "L1H3"
    apart = ~torch.eye(36, dtype=torch.bool)
    wanted = [
        torch.corrcoef(torch.stack([p[1:, 1:][apart], s[apart]]))[0, 1] for p, s in zip(pattern, same, strict=True)
    ]
    assert found.of("L1H3") == pytest.approx(torch.stack(wanted).numpy(), abs=1e-5)
    assert "L0H0" not in found.heads  # nothing between patches


def test_pictures_in_batches_keep_their_own_logits(vit: AttachedModel) -> None:
    scenes = object_scenes(3, seed=4)
    stream = patch_stream(vit, scenes.pixel_values, "L1", batch=2)
    probe = fit_same_object(stream, scenes.objects, form="diagonal", epochs=2)
    whole = binding_heads(vit, scenes.pixel_values, probe, "L1")
    parts = binding_heads(vit, scenes.pixel_values, probe, "L1", batch=1)
    assert whole.values["main"] == pytest.approx(parts.values["main"], abs=1e-5)
    with torch.no_grad(), vit.reading(hw.read.residual("L1"), hw.read.rows("L2H1")) as got:
        vit(pixel_values=scenes.pixel_values[2:])
    assert torch.allclose(stream[2], got.residual_post["L1"][0, 1:], atol=1e-5)
    apart = ~torch.eye(36, dtype=torch.bool)
    pairs = torch.stack([got.rows["L2"][0, 0, 1:, 1:][apart], probe(stream)[2][apart]])
    assert whole.of("L2H1")[2] == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), abs=1e-4)


def test_scenes_show_what_their_masks_say() -> None:
    scenes = object_scenes(20, cells=(6, 8), patch=4, objects=3, colors=1, seed=0)
    assert scenes.pixel_values.shape == (20, 3, 24, 32)
    masks = scenes.objects.reshape(20, 6, 8)
    assert int(masks.max()) <= 3
    assert float((masks > 0).float().mean()) > 0.05
    patches = scenes.pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    assert float(patches.movedim(1, -1)[masks == 0].abs().max()) < 0.1
    # Objects do not touch: two neighbours are of one object, or one of them is ground.
    for one, two in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        assert bool(((one == two) | (one == 0) | (two == 0)).all())
    assert torch.equal(scenes.objects, object_scenes(20, cells=(6, 8), colors=1, seed=0).objects)


def test_what_cannot_be_is_one_line(vit: AttachedModel, bound: tuple[Tensor, Tensor]) -> None:
    stream, objects = bound
    with pytest.raises(InputError, match="do not fit"):
        fit_same_object(stream, objects[:, :4])
    with pytest.raises(InputError, match="choose one of linear, diagonal, quadratic"):
        fit_same_object(stream, objects, form="cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="patches=1"):
        fit_same_object(stream, objects, patches=1)
    with pytest.raises(Refusal, match="no held-out picture has two patches"):
        fit_same_object(stream, torch.zeros_like(objects), epochs=1)
    probe = fit_same_object(stream, objects, form="diagonal", epochs=1)
    with pytest.raises(InputError, match="takes 24 numbers of a patch, L1 has 48"):
        binding_heads(vit, object_scenes(2).pixel_values, probe, "L1")
    with pytest.raises(InputError, match="objects=0"):
        object_scenes(2, objects=0)
