"""VAR: a matrix by hand, rows of a model against the formula, and sinks that are told once, in each row by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find.visual_sink import behind_pictures
from headwise.model.attached import AttachedModel
from headwise.use.looking.redistribution import VAR, redistributed
from headwise.zoo.tiny import build_tiny
from headwise.zoo.tokens import IMAGE
from headwise.zoo.vision import VLMS

HEADS = ", ".join(f"{layer}H{head}" for layer in ("L1", "L2") for head in range(4))
DIM = 3
SINKS = (0, 5)
"""Tokens of each prompt, counted from its first: the start token, and one of the picture."""


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as attached:
        yield attached


def columns(inputs: Any) -> list[list[int]]:
    """Where the planted sinks stand."""
    first = inputs["attention_mask"].int().argmax(1).tolist()
    return [[start + sink for sink in SINKS] for start in first]


@contextmanager
def massive(model: AttachedModel, at: list[list[int]]) -> Iterator[None]:
    vector = torch.zeros(model.model.config.get_text_config().hidden_size)
    vector[DIM] = 200.0
    with model.editing(hw.edit.add("L0", vector, variable="residual_pre", scope="span:large"), spans={"large": at}):
        yield


def rows(model: AttachedModel, how: VAR | None, label: str, inputs: Any) -> Tensor:
    with torch.no_grad(), massive(model, columns(inputs)), model.reading(hw.read.rows(label)) as got:
        if how is None:
            model(**inputs)
        else:
            with how(model):
                model(**inputs)
    return got.rows[label]


def easy(**settings: Any) -> VAR:
    """Random heads look everywhere a little: what counts as image-centric is put down to what they do."""
    return VAR(**{"dims": (DIM,), "heads": HEADS, "least": 0.3, "rho": 0.1, "tau": 4.0} | settings)


def test_a_matrix_by_hand() -> None:
    """Tokens: a text sink, a picture sink, two of the picture, two of text. The first head looks at the picture, the
    second does not, the third looks at its sink."""
    image, sinks = torch.tensor([[0, 1, 1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    pattern = torch.tensor(
        [[0.3, 0.1, 0.3, 0.1, 0.1, 0.1], [0.6, 0.05, 0.05, 0.0, 0.2, 0.1], [0.1, 0.6, 0.1, 0.1, 0.0, 0.1]]
    )
    wanted = pattern.clone()
    wanted[0] = torch.tensor([0.18, 0.06, 0.42, 0.14, 0.1, 0.1])  # 0.16 goes to the two, three parts and one
    changed = redistributed(pattern[None, :, None], image, sinks)[0, :, 0]
    assert torch.allclose(changed, wanted, atol=1e-7)
    assert torch.equal(changed[1:], pattern[1:])
    assert torch.allclose(changed.sum(-1), pattern.sum(-1))


def test_degenerate_rows_stay() -> None:
    image, sinks = torch.tensor([[0, 1, 1]]).bool(), torch.tensor([[1, 1, 1]]).bool()
    pattern = torch.tensor([0.2, 0.4, 0.4])[None, None, None]
    assert torch.equal(redistributed(pattern, image, sinks, rho=1.0), pattern)  # all of the picture are sinks
    assert torch.equal(redistributed(pattern, image, torch.tensor([[1, 0, 0]]).bool()), pattern)  # none of it is
    nothing = torch.tensor([0.5, 0.5, 0.0])[None, None, None]
    assert torch.equal(redistributed(nothing, image, torch.tensor([[0, 1, 0]]).bool(), rho=1.0), nothing)
    assert torch.equal(redistributed(pattern, ~image & image, sinks), pattern)  # there is no picture


@pytest.mark.parametrize("p", [0.6, 0.0])
def test_rows_of_a_model_are_the_formula(model: AttachedModel, p: float) -> None:
    inputs, label = model.example, "L1"
    plain, edited = rows(model, None, label, inputs), rows(model, easy(p=p), label, inputs)
    image = inputs["input_ids"] == IMAGE
    behind = behind_pictures(image)
    changed = 0
    for row in range(2):
        sinks = columns(inputs)[row]
        for query in inputs["attention_mask"][row].nonzero()[:, 0].tolist():
            for head in range(4):
                wanted = plain[row, head, query].clone()
                on_image = wanted[image[row]].sum()
                if behind[row, query] and on_image >= 0.3 and wanted[sinks[1]] <= 0.1 * on_image:
                    free = image[row].clone()
                    free[sinks[1]] = False
                    budget = (1 - p) * wanted[sinks].sum()
                    wanted[sinks] *= p
                    wanted[free] *= 1 + budget / wanted[free].sum()
                    changed += 1
                assert torch.allclose(edited[row, head, query], wanted, atol=1e-6), (row, query, head)
    assert 10 < changed < behind.sum() * 4
    real = inputs["attention_mask"].bool()
    sums = edited.sum(-1).transpose(1, 2)[real]
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_other_positions_keep_their_bits_and_p_of_one_all(model: AttachedModel) -> None:
    inputs = model.example
    read_z = hw.read.z("L1")
    with torch.no_grad(), massive(model, columns(inputs)):
        with model.reading(read_z) as plain:
            logits = model(**inputs).logits
        with easy()(model), model.reading(read_z) as edited:
            model(**inputs)
        with easy(p=1.0)(model):
            assert torch.equal(model(**inputs).logits, logits)
    assert easy(p=1.0).edits(model) == ()
    image = inputs["input_ids"] == IMAGE
    assert torch.equal(edited.z["L1"][image], plain.z["L1"][image])
    assert not torch.equal(edited.z["L1"][~image], plain.z["L1"][~image])


def test_a_padded_row_is_what_it_is_alone(llava: AttachedModel) -> None:
    inputs = llava.example
    together = rows(llava, easy(), "L2", inputs)
    for row in range(2):
        kept = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")}
        alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
        single = rows(llava, easy(), "L2", alone)
        # Positions are those of columns here, and rotary embeddings tell only distances.
        assert torch.allclose(together[row][:, kept][:, :, kept], single[0], atol=1e-5)


def test_queries_between_pictures_are_left_alone(llava: AttachedModel) -> None:
    """What is called a picture are two stretches of the first row, with five tokens between them."""
    inputs = {name: values[:1] for name, values in llava.example.items()}
    spans = {"image": [[*range(2, 7), *range(12, 16)]]}
    z = hw.read.z("L1")
    with torch.no_grad(), massive(llava, columns(inputs)):
        with llava.reading(z) as plain:
            llava(**inputs)
        with easy(least=0.0, rho=1.0)(llava, spans=spans), llava.reading(z) as edited:
            llava(**inputs)
    same = (edited.z["L1"] - plain.z["L1"]).abs().amax((0, 2, 3)) < 1e-6
    assert same[:16].all()
    assert not same[16:].any()


def test_what_is_written_has_the_sinks_of_the_prompt(llava: AttachedModel) -> None:
    """The first token that is written is massive, too, and is no sink."""
    inputs, n = llava.example, llava.example["input_ids"].shape[1]
    at = [[*row, n] for row in columns(inputs)]
    with massive(llava, at), easy()(llava), llava.reading(hw.read.rows("L1")) as step_by_step:
        written = llava.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with massive(llava, at), easy()(llava):
        again = llava.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(written, again)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    whole = dict(inputs) | {"input_ids": written[:, :-1], "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole_at_once = llava.reading(hw.read.rows("L1"))
    with torch.no_grad(), massive(llava, at), easy()(llava, prompt_length=n), whole_at_once as got:
        logits = llava(**whole, position_ids=positions).logits
    assert torch.equal(logits[:, n - 1 :].argmax(-1), written[:, n:])
    assert torch.allclose(got.rows["L1"][:, :, n:], step_by_step.rows["L1"][:, :, n:], atol=1e-5)
    with torch.no_grad(), massive(llava, at):
        plain = llava(**whole, position_ids=positions).logits
    assert (plain - logits)[:, n:].abs().max() > 1e-4


def test_the_first_two_layers_and_the_last_are_left_alone() -> None:
    (row,) = (each for each in VLMS if each.model_type == "llava")
    deep = replace(row, sizes=row.sizes | {"text_config": row.sizes["text_config"] | {"num_hidden_layers": 5}})
    organism = build_tiny(deep)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        for each in VAR((DIM,)).edits(model):
            assert {site.label for site in hw.heads.HeadSet.parse(each.heads).sites} == {"L2", "L3"}
        with pytest.raises(Refusal, match="has no other"), hw.load("zoo:tiny-llava") as llava:
            VAR((DIM,)).edits(llava)


def test_what_cannot_be_done_is_said(llava: AttachedModel) -> None:
    with pytest.raises(Refusal, match="no token for pictures"), hw.load("zoo:tiny-llama") as llama:
        VAR((DIM,)).edits(llama)
    with pytest.raises(InputError, match="no dimensions"):
        VAR((4096,), heads=HEADS).edits(llava)
    with pytest.raises(InputError, match="image"), easy()(llava), torch.no_grad():
        llava(input_ids=torch.tensor([[1, 20, 21]]))
    with torch.no_grad():
        cache = llava(**llava.example, use_cache=True).past_key_values
        with pytest.raises((InputError, Refusal)), easy()(llava):
            llava(input_ids=torch.full((2, 1), 20), past_key_values=cache)
    for wrong in ({"dims": ()}, {"dims": (-1,)}, {"p": 1.5}, {"rho": -1}, {"least": "0.2"}, {"tau": -1}):
        with pytest.raises(InputError):
            VAR(**{"dims": (1,)} | wrong)  # type: ignore[arg-type]


def test_it_is_found_by_its_id() -> None:
    assert hw.use.intervention("visual-attention-redistribution") is VAR
