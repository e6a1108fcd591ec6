"""Keys that the prompt's last row chooses, and edits that bring their reads along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.operations import Here


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def inputs(model: AttachedModel) -> dict[str, Any]:
    return dict(model.tokenizer(["the cat sat on", "a dog"], padding=True, return_tensors="pt"))


def top_two(row: Tensor, here: Here) -> Tensor:
    return torch.zeros_like(row, dtype=torch.bool).scatter(-1, row.topk(2, dim=-1).indices, True)


def test_keys_are_chosen_by_the_last_row_of_the_prompt_for_each_head(model: AttachedModel) -> None:
    given = inputs(model)
    width = given["input_ids"].shape[1]
    with model.reading(hw.read.rows("L1", queries=[-1])) as got:
        model.generate(**given, max_new_tokens=1, do_sample=False)
    chosen = top_two(got.rows["L1"][:, :, 0], None)  # type: ignore[arg-type]
    decoded = hw.read.rows("L1", queries="decode")
    block = hw.edit.block("L1H1, L1H2", keys=hw.edit.last_row(top_two), scope="decode")
    with model.editing(block), model.reading(decoded) as got:
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    rows = got.rows["L1"][..., :width]
    seen = given["attention_mask"].bool()
    for row in range(2):
        for head in range(rows.shape[1]):
            own = rows[row, head]
            gone = chosen[row, head] if head in (1, 2) else torch.zeros_like(chosen[row, head])
            assert float(own[:, gone].sum()) == 0
            assert float(own[:, seen[row] & ~gone].min()) > 0


def test_the_prompt_is_left_alone_and_the_function_is_asked_once(model: AttachedModel) -> None:
    given, asked = inputs(model), []

    def choose(row: Tensor, here: Here) -> Tensor:
        asked.append((here.label, here.names, tuple(row.shape)))
        return top_two(row, here)

    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**given, **options).logits
    with model.editing(hw.edit.block("L0H0, L0H3", keys=hw.edit.last_row(choose), scope="decode")):
        edited = model.generate(**given, **options).logits
    width = given["input_ids"].shape[1]
    assert asked == [("L0", ("L0H0", "L0H3"), (2, 2, width))]
    assert torch.equal(edited[0], plain[0])
    assert not torch.allclose(edited[1], plain[1], atol=1e-5)


def test_edits_before_it_have_acted_on_the_row(model: AttachedModel) -> None:
    given, rows = inputs(model), []

    def choose(row: Tensor, here: Here) -> Tensor:
        rows.append(row)
        return row > 2

    flat = hw.edit.scale("L1H0", 0.0, "score")
    block = hw.edit.block("L1H0", keys=hw.edit.last_row(choose), scope="decode")
    with torch.no_grad(), model.editing(flat, block):
        model(**given)
    seen = given["attention_mask"].bool()
    expected = seen / seen.sum(-1, keepdim=True)
    assert torch.allclose(rows[0][:, 0], expected, atol=1e-6)


def test_what_is_no_choice_is_refused(model: AttachedModel) -> None:
    given = inputs(model)
    with pytest.raises(InputError, match="last_row takes a function"):
        hw.edit.last_row(None)  # type: ignore[arg-type]
    for wrong in (lambda row, here: row, lambda row, here: row[..., :1] > 0, lambda row, here: True):
        block = hw.edit.block("L0H0", keys=hw.edit.last_row(wrong), scope="decode")
        with pytest.raises(InputError, match="last_row"), torch.no_grad(), model.editing(block):
            model(**given)


def test_a_run_behind_its_prompt_is_refused(model: AttachedModel) -> None:
    given = inputs(model)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        block = hw.edit.block("L0H0", keys=hw.edit.last_row(top_two), scope="decode")
        with pytest.raises(Refusal, match="begins behind it"), model.editing(block):
            model(input_ids=torch.tensor([[9], [9]]), attention_mask=mask, past_key_values=cache)


def test_reads_of_an_edit_are_made_in_the_same_run(model: AttachedModel) -> None:
    """An edit of a later layer by what an earlier one showed of this very prompt."""
    given, shown = inputs(model), []

    def noted(z: Tensor) -> Tensor:
        shown.append(z.clone())
        return z

    def value(current: Tensor, here: Here) -> Tensor:
        return shown[-1][:, :, :1]

    asked = hw.read.z("L0H2", reduce=noted, name="noted")
    copied = replace(hw.edit.set("L1H0", value), reads=(asked,))
    with torch.no_grad(), model.editing(copied), model.reading(hw.read.z()) as got:
        model(**given)
    assert torch.equal(got.z["L1H0"], got.z["L0H2"])
    shown.clear()
    with torch.no_grad(), hw.use.Together((_Copying(copied),))(model), model.reading(hw.read.z()) as got:
        model(**{name: each.flip(1) for name, each in given.items()})
    assert torch.equal(got.z["L1H0"], got.z["L0H2"])


class _Copying(hw.use.Intervention):
    id = "copying"

    def __init__(self, made: hw.edit.Edit) -> None:
        self.__dict__["made"] = made

    def edits(self, model: AttachedModel) -> tuple[hw.edit.Edit, ...]:
        return (self.made,)
