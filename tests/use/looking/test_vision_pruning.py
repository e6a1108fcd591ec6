"""Vision tokens pruned per head: which are kept, by hand, and what a run without the others gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.item import Item
from headwise.probes.picture import Picture
from headwise.use.looking.vision_pruning import (
    VisionPruning,
    kept_tokens,
    vision_attention,
    vision_cache,
    vision_rates,
)
from headwise.zoo.tokens import IMAGE

FAMILIES = ("llava", "qwen2_vl", "gemma3")
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def built(family: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{family}")
    return hw.attach(organism.model, organism.tokenizer, example=organism.example, name=f"tiny-{family}")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with built(request.param) as attached:
        yield attached


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as attached:
        yield attached


def image_of(ids: Tensor) -> dict[str, list[list[int]]]:
    return {"image": [row.nonzero()[:, 0].tolist() for row in ids == IMAGE]}


def logits(model: AttachedModel, inputs: dict[str, Any]) -> Tensor:
    return torch.stack(model.generate(**inputs, **OPTIONS).logits, dim=1)


def items(n: int = 5) -> list[Item]:
    drawn = np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)
    return [
        Item(prompt=f"<image> What {'big ' * (k % 2)}thing?", answer=" x", id=f"i{k}", pictures=(Picture.drawn(each),))
        for k, each in enumerate(drawn)
    ]


def test_kept_tokens_are_the_top_of_the_groups_attention() -> None:
    row = torch.tensor([[[0.1, 0.3, 0.2, 0.05, 0.35], [0.4, 0.0, 0.1, 0.3, 0.2]]])
    image = torch.tensor([[False, True, True, True, False]])
    rate = torch.tensor([1 / 3], dtype=torch.float64)
    assert kept_tokens(row, image, rate).nonzero().tolist() == [[0, 0, 1], [0, 1, 3]]
    # Shared by both heads: 0.3, 0.3 and 0.35.
    assert kept_tokens(row, image, rate, 2).nonzero().tolist() == [[0, 0, 3]]
    assert kept_tokens(row, image, torch.tensor([0.34])).sum(-1).tolist() == [[2, 2]]
    assert kept_tokens(row, image, torch.tensor([1.0])).sum(-1).tolist() == [[3, 3]]
    assert kept_tokens(row, image, torch.tensor([0.0])).sum().item() == 0
    many = torch.rand(1, 1, 30, generator=torch.Generator().manual_seed(0))
    tenth = torch.tensor([0.1], dtype=torch.float64)
    assert int(kept_tokens(many, torch.ones(1, 30, dtype=torch.bool), tenth).sum()) == 3


def test_a_layer_keeps_by_its_attention_to_the_picture() -> None:
    row = torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.5, 0.0]]])
    image = torch.tensor([[False, True, True]])
    assert vision_attention(row, image).tolist() == pytest.approx([0.7])
    pruning = VisionPruning(0.5, 0.3, attentive=0.6, indifferent=0.2)
    gammas = torch.tensor([0.7, 0.6, 0.4, 0.2, 0.1])
    assert pruning.rate_at(gammas).tolist() == pytest.approx([0.8, 0.8, 0.5, 0.2, 0.2])
    assert VisionPruning(0.9, 0.3, attentive=0.6).rate_at(gammas).tolist() == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.9])


def test_decoding_rows_see_what_their_group_kept(model: AttachedModel) -> None:
    inputs = dict(model.example)
    width, full = inputs["input_ids"].shape[1], sees_all(model)
    image = inputs["input_ids"] == IMAGE
    pruning = VisionPruning(0.5)
    with torch.no_grad(), model.reading(hw.read.rows(full, queries=[-1], name="last")) as got:
        model(**inputs)
    group = model.site(full).group_size
    kept = kept_tokens(got.last[full][:, :, 0], image, torch.tensor([0.5, 0.5]), group)
    with (
        pruning(model, spans=image_of(inputs["input_ids"])),
        model.reading(hw.read.rows(full, queries="decode")) as got,
    ):
        model.generate(**inputs, **OPTIONS)
    rows = got.rows[full]
    hidden = image[:, None] & ~kept.repeat_interleave(group, dim=1)
    assert int(hidden.sum()) > 0
    assert float(rows[:, :, :, :width][hidden[:, :, None].expand(-1, -1, rows.shape[2], -1)].max()) == 0
    assert torch.allclose(rows.sum(-1), torch.ones_like(rows.sum(-1)), atol=1e-5)
    seen = inputs["attention_mask"].bool()[:, None] & ~hidden
    assert float(rows[:, :, :, :width][seen[:, :, None].expand(-1, -1, rows.shape[2], -1)].min()) > 0


def sees_all(model: AttachedModel) -> str:
    """A layer without a sliding window."""
    types = getattr(model.model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return f"L{types.index('full_attention')}"


def test_the_prompt_is_read_in_full(model: AttachedModel) -> None:
    inputs = dict(model.example)
    plain = logits(model, inputs)
    with VisionPruning(0.25)(model, spans=image_of(inputs["input_ids"])):
        pruned = logits(model, inputs)
    assert torch.equal(pruned[:, 0], plain[:, 0])
    assert not torch.allclose(pruned[:, 1], plain[:, 1], atol=1e-5)


def test_rate_1_makes_no_edit_and_rate_0_is_a_picture_that_is_gone(llava: AttachedModel) -> None:
    assert VisionPruning(1.0).edits(llava) == ()
    assert VisionPruning(1.0, 0.2, attentive=0.5).edits(llava) == ()
    inputs = dict(llava.example)
    spans = image_of(inputs["input_ids"])
    with VisionPruning(0.0)(llava, spans=spans):
        none = logits(llava, inputs)
    with llava.editing(hw.edit.block("L0, L1, L2", keys="span:image", scope="decode"), spans=spans):
        blocked = logits(llava, inputs)
    assert torch.allclose(none, blocked, atol=1e-6)


def test_tokens_that_no_head_looks_at_can_go(llava: AttachedModel) -> None:
    """With the second half of the picture hidden from the start, half of its tokens are kept at no loss."""
    inputs = dict(llava.example)
    spans = image_of(inputs["input_ids"])
    spans["half"] = [row[8:] for row in spans["image"]]
    with llava.editing(hw.edit.block(llava.heads("L0, L1, L2"), keys="span:half"), spans=spans):
        plain = logits(llava, inputs)
        with VisionPruning(0.5)(llava, spans=spans):
            assert torch.allclose(logits(llava, inputs), plain, atol=1e-6)
        with VisionPruning(0.4)(llava, spans=spans):
            assert not torch.allclose(logits(llava, inputs)[:, 1:], plain[:, 1:], atol=1e-6)


def test_step_by_step_is_all_at_once(model: AttachedModel) -> None:
    inputs = dict(model.example)
    width, spans, pruning = inputs["input_ids"].shape[1], image_of(inputs["input_ids"]), VisionPruning(0.3)
    with pruning(model, spans=spans):
        said = model.generate(**inputs, **OPTIONS)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    longer = {**inputs, "input_ids": said.sequences, "attention_mask": mask}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = (said.sequences == IMAGE).long()
    with torch.no_grad(), pruning(model, spans=spans, prompt_length=width):
        whole = model(**longer).logits
    assert torch.allclose(whole[:, width - 1 : -1], torch.stack(said.logits, dim=1), atol=5e-5)


def test_a_batch_with_padding_is_its_rows_one_by_one(llava: AttachedModel) -> None:
    inputs, pruning = dict(llava.example), VisionPruning(0.3, 0.2, attentive=0.35, indifferent=0.3)
    with pruning(llava, spans=image_of(inputs["input_ids"])):
        both = logits(llava, inputs)
    for row in range(2):
        kept = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, kept],
            "attention_mask": inputs["attention_mask"][row : row + 1, kept],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        with pruning(llava, spans=image_of(alone["input_ids"])):
            assert torch.allclose(logits(llava, alone)[0], both[row], atol=2e-5)


def test_what_a_cache_would_be_rid_of_per_group(llava: AttachedModel) -> None:
    encoded = hw.encode(items(), llava)
    found = vision_cache(llava, encoded, VisionPruning(0.5, intact=1))
    assert [each.group.label for each in found] == [f"L{layer}G{group}" for layer in range(3) for group in range(2)]
    site = llava.site("L1")
    width = (site.qk_dim + site.head_dim) * 4  # float32
    tokens = sum(len(each.prompt) for each in encoded) / len(encoded)
    for each in found:
        assert each.image_tokens == 16
        assert each.kept == (16 if each.group.layer == 0 else 8)
        assert each.bytes_held == pytest.approx(tokens * width)
        assert each.bytes_freed == pytest.approx((16 - each.kept) * width)
        assert 0 < each.vision_attention < 1


def test_thresholds_leave_a_share_of_the_layers_on_either_side(llava: AttachedModel) -> None:
    encoded = hw.encode(items(), llava)
    found = vision_rates(llava, encoded, 0.5, 0.2, share=0.25)
    gammas = [each.vision_attention for each in vision_cache(llava, encoded, found)][::2]
    rates = found.rate_at(torch.tensor(gammas, dtype=torch.float64)).tolist()
    assert sorted(rates) == pytest.approx([0.3, 0.5, 0.7])
    assert rates[gammas.index(max(gammas))] == pytest.approx(0.7)
    with pytest.raises(InputError, match="share"):
        vision_rates(llava, encoded, 0.5, 0.2, share=0.6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rate": 1.2}, "rate"),
        ({"rate": 0.5, "spread": 0.1}, "threshold"),
        ({"rate": 0.5, "attentive": 0.2, "indifferent": 0.3}, "below"),
        ({"rate": 0.5, "intact": -1}, "intact"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        VisionPruning(**settings)


def test_models_without_pictures_are_refused(llava: AttachedModel) -> None:
    with hw.load("zoo:tiny-llama") as attached, pytest.raises(Refusal, match="sees"):
        VisionPruning(0.5).edits(attached)
    with pytest.raises(InputError, match="no layer"):
        VisionPruning(0.5, intact=3).edits(llava)
