"""Gaze redirection against its closed form on random patterns, in all modes and layouts, row by row, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import use, zoo
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.item import Item
from headwise.probes.outcome import observe, places
from headwise.probes.picture import Picture, Region
from headwise.scores import HeadScores, Provenance
from headwise.use.looking.gaze import (
    MODES,
    GazeRedirection,
    crossed,
    followed,
    from_the_bottom,
    success_rate,
)
from headwise.zoo.tokens import IMAGE

HEADS = "L0H1, L0H2, L2H3"
FAMILIES = ("llava", "qwen3_vl", "gemma3", "smolvlm")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


@pytest.fixture(scope="module")
def qwen() -> Iterator[AttachedModel]:
    organism = zoo.build("tiny-qwen3_vl")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


def spans_of(model: AttachedModel) -> dict[str, list[list[int]]]:
    """The picture tokens of both rows, and two regions of them, in other columns of each row and not as many (in Qwen's
    layout the pictures differ in size, too)."""
    image = [row.nonzero()[:, 0].tolist() for row in model.example["input_ids"] == IMAGE]
    return {
        "image": image,
        "region:left": [row[:2] if n == 0 else row[1:2] for n, row in enumerate(image)],
        "region:right": [row[-1:] if n == 0 else row[-2:] for n, row in enumerate(image)],
    }


def regions_of(model: AttachedModel) -> dict[str, list[list[int]]]:
    """What is given with a block: a run finds its picture tokens by itself."""
    return {name: rows for name, rows in spans_of(model).items() if name != "image"}


def prompt_of(model: AttachedModel) -> int:
    """The last six tokens are what was written."""
    return int(model.example["input_ids"].shape[1]) - 6


def marked(model: AttachedModel, rows: list[list[int]]) -> Tensor:
    found = torch.zeros(model.example["input_ids"].shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        found[number, row] = True
    return found


def patterns(model: AttachedModel, redirection: GazeRedirection | None, layer: str = "L0") -> Tensor:
    with torch.no_grad(), model.reading(hw.read.rows(layer)) as got:
        if redirection is None:
            model(**model.example)
        else:
            with redirection(model, spans=regions_of(model), prompt_length=prompt_of(model)):
                model(**model.example)
    return got.rows[layer]


def expected(model: AttachedModel, clean: Tensor, mode: str, target: str, bias: float) -> Tensor:
    """The pattern when every score has its bias, from the pattern without: `clean * exp(bias)` over its sum."""
    spans = spans_of(model)
    chosen, image = marked(model, spans[target]), marked(model, spans["image"])
    prompt = torch.arange(clean.shape[-1]) < prompt_of(model)
    signs = {
        "boost-suppress": chosen.double() - (image & ~chosen).double(),
        "suppress-image": -(image & ~chosen).double(),
        "suppress-all": -(prompt & ~chosen).double(),
        "max-suppress-all": -(~chosen).double(),
    }[mode]
    weighed = clean.double() * (bias * signs).exp()[:, None, None]
    return weighed / weighed.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_of_two_is_the_closed_form(model: AttachedModel, mode: Any) -> None:
    clean = patterns(model, None)
    edited = patterns(model, GazeRedirection(HEADS, "region:left", bias=2.0, mode=mode))
    assert edited[:, [1, 2]] == pytest.approx(expected(model, clean, mode, "region:left", 2.0)[:, [1, 2]], abs=1e-5)
    assert torch.equal(edited[:, [0, 3]], clean[:, [0, 3]])
    assert (edited[:, [1, 2]] - clean[:, [1, 2]]).abs().max() > 0.05


def test_the_papers_bias_takes_all_of_the_mass(model: AttachedModel) -> None:
    chosen = marked(model, spans_of(model)["region:left"])
    edited = patterns(model, GazeRedirection(HEADS, "region:left"))
    mass = edited.masked_fill(~chosen[:, None, None], 0.0).sum(-1)
    sees = torch.arange(edited.shape[2]) >= chosen.double().argmax(1)[:, None]  # from the target's first token on
    if int(spans_of(model)["region:left"][0][-1]) not in (edited[0, 1, -1].nonzero()[:, 0].tolist()):
        sees &= (edited * chosen[:, None, None]).sum((1, 3)) > 0  # a sliding window has left it behind
    assert mass[:, [1, 2]].masked_select(sees[:, None].expand(-1, 2, -1)) == pytest.approx(1.0, abs=1e-6)
    assert (edited >= 0).all()


def test_other_heads_keep_their_bits(model: AttachedModel) -> None:
    with torch.no_grad(), model.reading(hw.read.z("L0")) as clean:
        model(**model.example)
    redirection = GazeRedirection(HEADS, "region:left")
    with torch.no_grad(), model.reading(hw.read.z("L0")) as got, redirection(model, spans=regions_of(model)):
        model(**model.example)
    assert torch.equal(got.z["L0"][:, :, [0, 3]], clean.z["L0"][:, :, [0, 3]])
    assert not torch.equal(got.z["L0"][:, :, 1], clean.z["L0"][:, :, 1])


def test_no_bias_is_no_edit(model: AttachedModel) -> None:
    with torch.no_grad():
        clean = model(**model.example).logits
        none = GazeRedirection(HEADS, "region:left", bias=0.0)
        assert none.edits(model) == ()
        with none(model, spans=regions_of(model)):
            assert torch.equal(model(**model.example).logits, clean)


def test_rows_of_decoding_alone(qwen: AttachedModel) -> None:
    clean, edited = (
        patterns(qwen, None),
        patterns(qwen, GazeRedirection(HEADS, "region:left", bias=2.0, scope="decode")),
    )
    end = prompt_of(qwen)
    assert torch.equal(edited[:, :, :end], clean[:, :, :end])
    wanted = expected(qwen, clean, "boost-suppress", "region:left", 2.0)
    assert edited[:, [1, 2], end:] == pytest.approx(wanted[:, [1, 2], end:], abs=1e-5)


@pytest.mark.parametrize("mode", ["boost-suppress", "max-suppress-all"])
def test_the_target_changes_with_the_step(qwen: AttachedModel, mode: Any) -> None:
    clean, end = patterns(qwen, None), prompt_of(qwen)
    there_and_back = GazeRedirection(
        HEADS, "region:left", ((2, "region:right"), (4, "region:left")), bias=2.0, mode=mode
    )
    assert [there_and_back.at(step).removeprefix("region:") for step in range(5)] == [
        "left",
        "left",
        "right",
        "right",
        "left",
    ]
    edited = patterns(qwen, there_and_back)
    left, right = (expected(qwen, clean, mode, name, 2.0) for name in ("region:left", "region:right"))
    wanted = left.clone()
    wanted[:, :, end + 2 : end + 4] = right[:, :, end + 2 : end + 4]  # the rows that write tokens 3 and 4
    assert edited[:, [1, 2]] == pytest.approx(wanted[:, [1, 2]], abs=1e-5)
    assert (left - right)[:, [1, 2], end + 2 :].abs().max() > 0.05


def test_decoding_step_by_step_is_the_whole_text(model: AttachedModel) -> None:
    redirection = GazeRedirection(HEADS, "region:left", ((2, "region:right"),), bias=3.0)
    inputs, spans = model.example, regions_of(model)
    start = inputs["input_ids"].shape[1]
    with redirection(model, spans=spans):
        written = model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = written.sequences[:, : start + 5]
    more = torch.ones(2, ids.shape[1] - start, dtype=torch.long)
    whole = dict(inputs) | {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1)}
    for name in whole.keys() & {"mm_token_type_ids", "token_type_ids"}:
        whole[name] = torch.cat([whole[name], 0 * more], dim=1)
    with torch.no_grad(), redirection(model, spans=spans, prompt_length=start):
        logits = model(**whole).logits[:, start - 1 :]
    assert torch.stack(written.logits, dim=1) == pytest.approx(logits, abs=1e-4)
    with torch.no_grad():
        plain = model(**whole).logits[:, start - 1 :]
    assert (plain - logits).abs().max() > 1e-3


def test_a_row_alone_is_the_row_in_a_batch(model: AttachedModel) -> None:
    redirection, spans = GazeRedirection(HEADS, "region:right", bias=3.0), regions_of(model)
    example = model.example
    with torch.no_grad(), redirection(model, spans=spans):
        both = model(**example).logits[:, -1]
    padding = int((example["attention_mask"][1] == 0).sum())
    assert padding > 5
    alone = {name: value[1:, padding:] for name, value in example.items() if "pixel" not in name and "grid" not in name}
    if "image_grid_thw" in example:
        first = int(example["image_grid_thw"][0].prod())
        alone |= {"pixel_values": example["pixel_values"][first:], "image_grid_thw": example["image_grid_thw"][1:]}
    else:
        alone["pixel_values"] = example["pixel_values"][1:]
    moved = {name: [column - padding for column in rows[1]] for name, rows in spans.items()}
    with torch.no_grad(), redirection(model, spans=moved):
        assert model(**alone).logits[0, -1] == pytest.approx(both[1], abs=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "smolvlm"])
def test_items_with_pictures_bring_their_regions(family: str) -> None:
    """One picture, and two of other sizes in a longer prompt; the target is another place in each."""
    with hw.load(f"zoo:tiny-{family}") as model:
        boxes = {"target": Region(0, (16, 0, 32, 32))}, {"target": Region(1, (0, 0, 20, 24))}
        small, wide = (Picture.drawn(np.full((*size, 3), 99, np.uint8)) for size in ((32, 32), (24, 40)))
        one = Item(id="one", prompt="<image> Which?", answer=" a", pictures=(small,), regions=boxes[0])
        two = "<image> and <image>: Where is it?"
        items = hw.encode(
            [one, Item(id="two", prompt=two, answer=" a", pictures=(small, wide), regions=boxes[1])], model
        )
        kinds = getattr(model.model.config.get_text_config(), "layer_types", None) or ["full_attention"]
        layer = f"L{kinds.index('full_attention')}"  # in Gemma's others the question is longer than the window
        redirection = GazeRedirection(f"{layer}H1, {layer}H2")
        (batch,) = items.batches(2)
        at = places(model, batch)
        last = hw.read.rows(layer, queries=[batch.prompt_length - 1])
        with redirection(model, spans=at.spans, prompt_length=at.prompt_length), model.reading(last) as got:
            observe(model, batch, wants={"logits"})
        for row, columns in enumerate(at.spans["region:target"]):
            assert got.rows[layer][row, [1, 2], 0][:, columns].sum(-1) == pytest.approx(1.0, abs=1e-6)
            assert got.rows[layer][row, 0, 0][columns].sum() < 0.9
        together = hw.measure(model, items, "cross-entropy", under=redirection)
        for row in range(2):
            alone = items.only([row == each for each in range(2)], "one")
            assert hw.measure(model, alone, "cross-entropy", under=redirection) == pytest.approx(
                together[[row]], abs=1e-4
            )
        assert (hw.measure(model, items, "cross-entropy") - together).abs().min() > 1e-4


def test_it_comes_back_as_it_was_saved(qwen: AttachedModel, tmp_path: Path) -> None:
    given = GazeRedirection(HEADS, "region:left", ((2, "region:right"),), 3.0, "suppress-image", "decode")
    found = use.load(use.save(given, tmp_path / "it", model=qwen), qwen)
    assert repr(found) == repr(given)
    assert found.settings == given.settings
    assert repr(found.edits(qwen)) == repr(given.edits(qwen))
    assert given.named_spans == ("region:left", "region:right")
    assert given.on("L0H0, L0H3, L2H0").heads == HeadSet.parse("L0H0, L0H3, L2H0")


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": -1.0}, "bias"),
        ({"bias": float("inf")}, "bias"),
        ({"mode": "boost"}, "boost-suppress"),
        ({"target": ""}, "region"),
        ({"then": ((0, "region:left"),)}, "from 1 on"),
        ({"then": ((3, "region:left"), (3, "region:right"))}, "later"),
        ({"then": (3,)}, "schedule"),
        ({"then": ((3, 4),)}, "region"),
        ({"scope": "sometimes"}, "sometimes"),
        ({"heads": "nonsense"}, "nonsense"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        GazeRedirection(**{"heads": HEADS, "target": "region:left", **settings})


def test_runs_that_cannot_be_redirected(qwen: AttachedModel) -> None:
    redirection, spans = GazeRedirection(HEADS, "region:left"), spans_of(qwen)
    with pytest.raises(InputError, match="vision"):
        GazeRedirection("vision.L0H1", "region:left").edits(qwen)
    with pytest.raises(InputError, match="L7"):
        GazeRedirection("L7H0", "region:left").edits(qwen)
    with pytest.raises(InputError, match="region:left"), redirection(qwen, spans={"image": spans["image"]}):
        qwen(**qwen.example)
    with hw.load("zoo:tiny-llama") as blind, pytest.raises(Refusal, match="no pictures"):
        redirection.edits(blind)
    text = qwen.tokenizer("No picture.", return_tensors="pt")
    with (
        torch.no_grad(),
        pytest.raises(InputError, match="hold no picture"),
        redirection(qwen, spans={"region:left": [1]}),
    ):
        qwen(**text)
    empty = spans | {"region:left": [spans["region:left"][0], []]}
    with torch.no_grad(), pytest.raises(InputError, match="row 1"), redirection(qwen, spans=empty):
        qwen(**qwen.example)


# -- controls, items, numbers ------------------------------------------------------------------------------------------


def test_random_heads_from_the_bottom() -> None:
    values = np.arange(40, dtype=float).reshape(1, 4, 10)
    sites = tuple(SiteId(layer=layer) for layer in range(4))
    scores = HeadScores({"main": values}, {"main": sites}, ("one",), Provenance("gaze"))
    lowest = HeadSet.parse([f"L0H{each}" for each in range(8)])
    drawn = [from_the_bottom(scores, 3, share=0.19, seed=seed) for seed in range(30)]
    assert all(len(each) == 3 and set(each) <= set(lowest) for each in drawn)
    assert set().union(*drawn) == set(lowest)
    assert drawn[4] == from_the_bottom(scores, 3, share=0.19, seed=4)
    with pytest.raises(InputError, match="lowest"):
        from_the_bottom(scores, 3)  # 5 percent of 40 are two


def test_questions_about_one_picture_cross() -> None:
    picture = Picture.drawn(np.zeros((4, 6, 3), np.uint8))
    boxes = [Region(0, (2 * each, 0, 2 * each + 2, 4)) for each in range(3)]
    asked = [
        Item(
            id=f"q{each}",
            prompt=f"<image> {each}?",
            answer=answer,
            pictures=(picture,),
            regions={"whole": Region(0, (0, 0, 6, 4)), "target": boxes[each]},
        )
        for each, answer in enumerate((" red", " blue", " red"))
    ]
    items = crossed(asked)
    assert [each.id for each in items] == ["q0>q1", "q1>q0", "q1>q2", "q2>q1"]
    first = items[0]
    assert (first.prompt, first.answer, first.foils) == ("<image> 0?", " blue", (" red",))
    assert first.regions == {"whole": Region(0, (0, 0, 6, 4)), "target": boxes[1]}
    other = replace(asked[1], pictures=(Picture.drawn(np.ones((4, 6, 3), np.uint8)),))
    for wrong, said in [
        ([asked[0], other], "same pictures"),
        ([asked[0], asked[2]], "one answer"),
        ([asked[0], replace(asked[1], regions={})], "target"),
    ]:
        with pytest.raises(InputError, match=said):
            crossed(wrong)


def test_how_often_and_how_surely() -> None:
    found = success_rate(torch.tensor([1.0] * 75 + [0.0] * 25))
    assert found.rate == 0.75
    assert found.low == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 100) ** 0.5, abs=0.015)
    assert found.high == pytest.approx(0.75 + 1.96 * (0.75 * 0.25 / 100) ** 0.5, abs=0.015)
    assert str(success_rate([1, 1])) == "1.000 (1.000 to 1.000)"
    with pytest.raises(InputError):
        success_rate([])


def test_how_far_a_schedule_was_followed() -> None:
    assert followed([1, 1, 4, 4, 2], [1, 1, 4, 4, 2]) == pytest.approx(1.0)
    assert followed([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert followed([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert np.isnan(followed([1, 2], [5, 5]))
    with pytest.raises(InputError):
        followed([1, 2], [1])
