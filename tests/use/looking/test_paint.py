"""PAINT: the choice of tokens by hand, and the rows that it changes against their closed form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import HeadwiseError, InputError, NotFired, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.item import Item
from headwise.probes.picture import Picture
from headwise.use.looking.paint import PAINT, informed_tokens, of_tokens, outliers, visual_sensitivity
from headwise.zoo.tokens import BOS, IMAGE, IMAGE_END, IMAGE_START

FAMILIES = ("llava", "qwen2_vl", "gemma3", "smolvlm")
PATCHES_PER_TOKEN = {"llava": 1, "qwen2_vl": 4, "gemma3": 4, "smolvlm": 4}


def built(family: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{family}")
    return hw.attach(organism.model, organism.tokenizer, example=organism.example, name=f"tiny-{family}")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with built(request.param) as attached:
        yield attached


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    with built("llava") as attached:
        yield attached


def image_of(ids: Tensor) -> dict[str, list[list[int]]]:
    return {"image": [row.nonzero()[:, 0].tolist() for row in ids == IMAGE]}


def marks_by_hand(model: AttachedModel, inputs: dict[str, Any]) -> Tensor:
    """1 at local and 2 at summary tokens of each row, from the tower's own rows and numpy's percentiles."""
    family = model.name.removeprefix("tiny-")
    with torch.no_grad(), model.reading(hw.read.rows("vision", name="tower")) as got:
        model(**inputs)
    layers = sorted({site.id for site in model.sites if site.id.stack == "vision"})
    attention = []
    for site in (layers[0], layers[-2]):
        pictures = []
        for rows in got.tower.pieces(site):
            for picture in rows.double().sum(1):
                values = picture[0, 1:] if family == "llava" else picture.mean(0)
                pictures.append(pooled(values.numpy(), family))
        attention.append(pictures)
    marked = []
    for first, later in zip(*attention, strict=True):
        low, high = np.percentile(later, 25), np.percentile(later, 75)
        summary = later > high + 1.5 * (high - low)
        chosen = np.zeros(len(first), bool)
        chosen[np.argsort(-first)[: int(len(first) * 0.25)]] = True
        marked.append(np.where(summary, 2, np.where(chosen, 1, 0)))
    marks = torch.zeros(inputs["input_ids"].shape, dtype=torch.long)
    marks[inputs["input_ids"] == IMAGE] = torch.tensor(np.concatenate(marked))
    return marks


def pooled(values: np.ndarray, family: str) -> np.ndarray:
    each = PATCHES_PER_TOKEN[family]
    if each == 1:
        return values
    if family == "qwen2_vl":  # its patches come block by block
        return values.reshape(-1, each).mean(1)
    side = int(len(values) ** 0.5)
    return np.array(
        [
            np.mean([values[(2 * row + i) * side + 2 * column + j] for i in (0, 1) for j in (0, 1)])
            for row in range(side // 2)
            for column in range(side // 2)
        ]
    )


def scores_and_rows(model: AttachedModel, inputs: dict[str, Any], label: str = "L0") -> tuple[Tensor, Tensor]:
    with torch.no_grad(), model.reading(hw.read.scores(label), hw.read.rows(label)) as got:
        model(**inputs)
    return got.scores[label], got.rows[label]


def sees_all(model: AttachedModel) -> str:
    """A layer without a sliding window."""
    types = getattr(model.model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return f"L{types.index('full_attention')}"


def test_outliers_are_what_lies_beyond_the_quartiles_by_more_than_one_and_a_half_ranges() -> None:
    values = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 13.0, 13.1])  # quartiles 3.25 and 7.75: the bound is 14.5
    assert not outliers(values).any()
    values[9] = 30.0
    assert outliers(values).tolist() == [False] * 9 + [True]
    few = torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 12.7])  # quartiles 2.75 and 6.75: the bound is 12.75
    assert not outliers(few).any()
    few[7] = 12.8
    assert outliers(few).tolist() == [False] * 7 + [True]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, generator=generator, dtype=torch.float64).exp()
    low, high = np.percentile(drawn, [25, 75])
    assert outliers(drawn).tolist() == (drawn.numpy() > high + 1.5 * (high - low)).tolist()


def test_local_tokens_are_the_first_layers_top_quarter_less_the_summary() -> None:
    first = torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4])
    later = torch.tensor([1.0, 1.1, 9.0, 1.2, 1.3, 1.0, 1.1, 1.2])
    assert informed_tokens(first, later).tolist() == [0, 0, 2, 0, 1, 0, 0, 0]
    assert informed_tokens(first, torch.ones(8)).tolist() == [0, 0, 1, 0, 1, 0, 0, 0]
    assert informed_tokens(first, later, 0.5).tolist() == [1, 0, 2, 0, 1, 0, 1, 0]
    assert informed_tokens(first, later, 0.0).tolist() == [0, 0, 2, 0, 0, 0, 0, 0]


def test_a_token_has_the_mean_of_its_patches() -> None:
    patches = torch.arange(16.0)
    assert of_tokens(patches, 4, "grid").tolist() == [2.5, 4.5, 10.5, 12.5]
    assert of_tokens(patches, 4, "runs").tolist() == [1.5, 5.5, 9.5, 13.5]
    assert of_tokens(patches, 16, "grid").tolist() == patches.tolist()
    with pytest.raises(Refusal, match="do not make"):
        of_tokens(patches, 5, "grid")
    with pytest.raises(Refusal, match="no squares"):
        of_tokens(torch.arange(24.0), 6, "grid")


def test_the_last_row_is_the_softmax_of_raised_scores_and_no_other_row_changes(model: AttachedModel) -> None:
    inputs = dict(model.example)
    marks = marks_by_hand(model, inputs)
    assert set(marks.unique().tolist()) >= {0, 1}
    scores, rows = scores_and_rows(model, inputs, sees_all(model))
    raised = scores[:, :, -1].double()
    amount = 0.7 * (marks == 1) + 0.3 * (marks == 2)
    raised = raised + amount[:, None] * raised.masked_fill(raised == -torch.inf, 0).abs()
    with PAINT(model.heads(sees_all(model)))(model, spans=image_of(inputs["input_ids"])):
        _, painted = scores_and_rows(model, inputs, sees_all(model))
    assert torch.allclose(painted[:, :, -1].double(), raised.softmax(-1), atol=1e-6)
    assert torch.equal(painted[:, :, :-1], rows[:, :, :-1])
    assert not torch.allclose(painted[:, :, -1], rows[:, :, -1], atol=1e-4)


def test_what_stands_before_the_last_token_keeps_its_bits(model: AttachedModel) -> None:
    inputs = dict(model.example)
    with torch.no_grad():
        plain = model(**inputs).logits
        with PAINT(first_layer=0)(model, spans=image_of(inputs["input_ids"])):
            painted = model(**inputs).logits
    assert torch.equal(painted[:, :-1], plain[:, :-1])
    assert not torch.allclose(painted[:, -1], plain[:, -1])


def test_of_alpha_and_beta_0_nothing_is_left(llava: AttachedModel) -> None:
    assert PAINT(alpha=0.0, beta=0.0).edits(llava) == ()


def test_beta_is_for_the_summary_alone(llava: AttachedModel) -> None:
    """With [CLS] looking at one patch, that one is the summary and the others can be local."""
    inputs = dict(llava.example)
    marks = marks_by_hand(llava, inputs)
    spans = image_of(inputs["input_ids"])
    _, rows = scores_and_rows(llava, inputs)
    with PAINT(alpha=0.0, beta=5.0, first_layer=0)(llava, spans=spans):
        _, painted = scores_and_rows(llava, inputs)
    for row in range(2):
        ratio = painted[row, :, -1] / rows[row, :, -1].clamp(min=1e-30)
        other = ratio[:, (marks[row] != 2) & inputs["attention_mask"][row].bool()]
        assert torch.allclose(other, other[:, :1].expand_as(other), rtol=1e-4)


def test_heads_have_the_sensitivity_that_they_are_given(llava: AttachedModel) -> None:
    inputs = dict(llava.example)
    spans = image_of(inputs["input_ids"])
    _, rows = scores_and_rows(llava, inputs)
    with PAINT({"L0H1": 2.0, "L0H3": 0.0})(llava, spans=spans):
        _, painted = scores_and_rows(llava, inputs)
    with PAINT("L0H1", 1.4, 0.6)(llava, spans=spans):
        _, twice = scores_and_rows(llava, inputs)
    assert torch.allclose(painted[:, 1], twice[:, 1], atol=1e-7)
    assert not torch.allclose(painted[:, 1], rows[:, 1], atol=1e-4)
    for head in (0, 2, 3):
        assert torch.allclose(painted[:, head], rows[:, head], atol=1e-7)


def test_without_heads_the_layers_from_the_third_on_are_changed(llava: AttachedModel) -> None:
    (made,) = PAINT().edits(llava)
    assert {site.label for site in llava.heads(made.heads).sites} == {"L2"}
    with pytest.raises(InputError, match="no layer 3"):
        PAINT(first_layer=3).edits(llava)


def test_a_batch_with_padding_is_its_rows_one_by_one(model: AttachedModel) -> None:
    inputs = dict(model.example)
    with torch.no_grad(), PAINT(first_layer=0)(model, spans=image_of(inputs["input_ids"])):
        both = model(**inputs).logits[:, -1]
    for row in range(2):
        alone = one_row(model, inputs, row)
        with torch.no_grad(), PAINT(first_layer=0)(model, spans=image_of(alone["input_ids"])):
            assert torch.allclose(model(**alone).logits[0, -1], both[row], atol=2e-5)


def one_row(model: AttachedModel, inputs: dict[str, Any], row: int) -> dict[str, Any]:
    kept = inputs["attention_mask"][row].bool()
    alone = {
        name: value[row : row + 1, kept] if value.shape == kept.expand(2, -1).shape else value[row : row + 1]
        for name, value in inputs.items()
    }
    if "image_grid_thw" in inputs:
        start, stop = (int(inputs["image_grid_thw"][:n].prod(1).sum()) for n in (row, row + 1))
        alone["pixel_values"] = inputs["pixel_values"][start:stop]
    return alone


def test_two_pictures_in_a_row_are_marked_each_by_itself(model: AttachedModel) -> None:
    inputs = in_one_row(model, dict(model.example))
    marks = marks_by_hand(model, inputs)
    image = image_of(inputs["input_ids"])
    scores, _ = scores_and_rows(model, inputs, sees_all(model))
    with PAINT(model.heads(sees_all(model)))(model, spans=image):
        _, painted = scores_and_rows(model, inputs, sees_all(model))
    raised = scores[:, :, -1].double()
    amount = 0.7 * (marks == 1) + 0.3 * (marks == 2)
    raised = raised + amount[:, None] * raised.masked_fill(raised == -torch.inf, 0).abs()
    assert torch.allclose(painted[:, :, -1].double(), raised.softmax(-1), atol=1e-6)


def in_one_row(model: AttachedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Both pictures of the example in one prompt."""
    counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    pictures = [id for count in counts for id in (IMAGE_START, *[IMAGE] * count, IMAGE_END, 90, 91)]
    ids = torch.tensor([[BOS, *pictures, 88, 72, 91]])
    made = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            made[name] = (ids == IMAGE).long()
    if inputs["pixel_values"].dim() == 5:  # [row, picture, ...]
        made["pixel_values"] = inputs["pixel_values"].transpose(0, 1)
    return made


def test_decoding_steps_are_painted_by_the_prompts_pictures(model: AttachedModel) -> None:
    """Step by step with a cache, against prompt and answer in one forward."""
    inputs = dict(model.example)
    paint, spans = PAINT(first_layer=0), image_of(inputs["input_ids"])
    width = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with paint(model, spans=spans):
        said = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    ids = said.sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": mask}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = (ids == IMAGE).long()
    with torch.no_grad(), paint(model, spans=spans, prompt_length=width):
        whole = model(**longer).logits
    steps = torch.stack(said.logits, dim=1)
    assert torch.allclose(whole[:, width - 1 : -1], steps, atol=5e-5)


def test_the_pictures_of_the_run_before_are_forgotten(llava: AttachedModel) -> None:
    inputs = dict(llava.example)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    spans = image_of(inputs["input_ids"])
    with torch.no_grad():
        with PAINT(first_layer=0)(llava, spans=spans):
            alone = llava(**other).logits
        with PAINT(first_layer=0)(llava, spans=spans):
            llava(**inputs)
            again = llava(**other).logits
    assert torch.equal(alone, again)
    text = {"input_ids": torch.tensor([[1, 90, 91, 92]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises((NotFired, Refusal)), torch.no_grad(), PAINT()(llava, spans={"image": [[1]]}):
        llava(**text)


def test_it_stands_beside_other_interventions(llava: AttachedModel) -> None:
    inputs, paint = dict(llava.example), PAINT(first_layer=0)
    spans, scaled = image_of(inputs["input_ids"]), hw.use.HeadScaling("L1H0", 2.0)
    with torch.no_grad():
        with paint(llava, spans=spans), scaled(llava):
            nested = llava(**inputs).logits
        with hw.use.Together((paint, scaled))(llava, spans=spans):
            together = llava(**inputs).logits
    assert torch.equal(nested, together)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -0.1}, {"beta": float("nan")}, {"local": 1.5}, {"first_layer": -1}, {"sensitivity": {"L1H0": 1.0}}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="paint"):
        PAINT(**settings)


def test_negative_sensitivity_is_refused() -> None:
    with pytest.raises(InputError, match="sensitivity"):
        PAINT({"L1H0": -1.0})


@pytest.mark.parametrize("family", ["llama", "vit", "qwen2_5_vl"])
def test_models_that_it_is_not_for_are_refused(family: str) -> None:
    with built(family) as attached, pytest.raises(HeadwiseError, match="paint"):
        PAINT("L1H0").edits(attached)


def test_tokens_that_no_picture_stands_for_are_refused(llava: AttachedModel) -> None:
    inputs = dict(llava.example)
    few = {"image": [row[:7] for row in image_of(inputs["input_ids"])["image"]]}
    with pytest.raises(Refusal, match="patches"), torch.no_grad(), PAINT(first_layer=0)(llava, spans=few):
        llava(**inputs)


def test_sensitivity_is_the_mass_on_the_picture_over_that_of_the_mean_head() -> None:
    with hw.load("zoo:tiny-llava") as model:
        items = hw.encode([asked(number) for number in range(3)], model)
        found = visual_sensitivity(model, items, first_layer=1)
        masses: dict[str, float] = {}
        for each in items:
            (image,) = each.spans["image"]
            with torch.no_grad(), model.reading(hw.read.rows("L1, L2", queries=[-1])) as got:
                model(input_ids=torch.tensor([each.prompt]), **each.pixels)
            for label in model.heads("L1, L2").labels:
                masses[label] = masses.get(label, 0.0) + float(got.rows[label][0, 0, list(image)].sum())
        mean = sum(masses.values()) / len(masses)
        assert found == pytest.approx({label: mass / mean for label, mass in masses.items()}, rel=1e-5)
        assert PAINT(found).edits(model)[0].heads == model.heads("L1, L2")
        with pytest.raises(InputError, match="no layer"):
            visual_sensitivity(model, items, first_layer=7)


def asked(number: int) -> Item:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Item(prompt="<image> What is it?", answer=" x", id=f"i{number}", pictures=(Picture.drawn(pixels),))


def test_pictures_are_found_by_themselves(model: AttachedModel) -> None:
    inputs, paint = dict(model.example), PAINT(first_layer=0)
    with torch.no_grad():
        with paint(model, spans=image_of(inputs["input_ids"])):
            named = model(**inputs).logits
        with paint(model):
            found = model(**inputs).logits
    assert torch.equal(named, found)


def test_it_is_kept_on_disk(llava: AttachedModel, tmp_path: Path) -> None:
    paint = PAINT({"L1H0": 1.5, "L2H3": 0.5}, alpha=0.4)
    kept = hw.use.load(hw.use.save(paint, tmp_path / "paint", model=llava), model=llava)
    inputs = dict(llava.example)
    with torch.no_grad():
        with paint(llava):
            before = llava(**inputs).logits
        with kept(llava):
            assert torch.equal(llava(**inputs).logits, before)
    assert kept.settings["alpha"] == 0.4
