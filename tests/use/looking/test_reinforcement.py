"""VHR: the choice by hand, the edits it comes down to, prompt by prompt, and nothing where nothing is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.use import load, save
from headwise.use.looking.reinforcement import VHR, chosen_heads, fixed_heads, reinforced
from headwise.zoo.tokens import IMAGE


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llava") as attached:
        yield attached


@pytest.fixture(scope="module")
def items(model: AttachedModel) -> ItemSet:
    return hw.encode(hw.probe("existence"), model.processor, n=4)


def z(*norms: float, like: float = 0.0) -> Tensor:
    """One row of heads of two dimensions, each with a norm of its own."""
    return torch.tensor([[[norm, like] for norm in norms]])


def test_the_heads_above_the_median_are_chosen() -> None:
    assert reinforced(z(1, 2, 3, 4), z(0, 0, 0, 0)).tolist() == [[False, False, True, True]]
    assert reinforced(z(5, 1, 2), z(0, 0, 0)).tolist() == [[True, False, False]]
    assert reinforced(z(4, 3, 3, 3), z(4, 4, 2, 3)).tolist() == [[False, True, True, False]]


def test_a_head_that_surges_without_the_picture_is_left_out() -> None:
    seeing, lacking = z(0.2, 1.0, 1.1, 1.2, 1.3, 1.4), z(9.0, 0, 0, 0, 0, 0)
    assert reinforced(seeing, lacking).tolist() == [[False, False, False, True, True, True]]
    assert reinforced(seeing, lacking, None).tolist() == [[True, False, False, False, True, True]]
    assert reinforced(seeing, lacking, 9.0).tolist() == [[True, False, False, False, True, True]]
    surging_with_it = reinforced(lacking, seeing)  # as far, but the picture is what moves it
    assert surging_with_it.tolist() == [[True, False, False, False, True, True]]


def test_what_rounding_makes_is_no_divergence() -> None:
    seen = z(1.0, 2.0, 3.0, 4.0)
    assert not reinforced(seen, seen * (1 + 1e-6)).any()
    assert reinforced(seen, seen * (1 + 1e-3)).any()


def by_hand(model: AttachedModel, alpha: float) -> tuple[Tensor, list[str]]:
    """Layer by layer: read both runs, choose, scale those heads in these rows, and go on under these edits."""
    given = model.example
    main = [site.id.label for site in model.sites if site.id.stack == "main"]
    lacking = []
    for row in range(2):
        ids = given["input_ids"][row][given["attention_mask"][row].bool()]
        ids = ids[ids != IMAGE]
        with torch.no_grad(), model.reading(hw.read.z(main, queries=[-1])) as got:
            model(input_ids=ids[None])
        lacking.append({label: got.z[label][0, 0] for label in main})
    edits: list[hw.edit.Edit] = []
    labels = []
    for label in main:
        with torch.no_grad(), model.reading(hw.read.z(label, queries=[-1])) as got:
            if edits:
                with model.editing(*edits):
                    model(**given)
            else:
                model(**given)
        seeing = got.z[label][:, 0]
        for row in range(2):
            moved = (seeing[row] - lacking[row][label]).norm(dim=-1)
            over = moved > moved.mean() + moved.std(correction=0)
            moved[over & (lacking[row][label].norm(dim=-1) > seeing[row].norm(dim=-1))] = 0
            heads = [f"{label}H{head}" for head in range(4) if moved[head] > moved.quantile(0.5)]
            labels.append(" ".join(heads))
            edits.append(hw.edit.scale(", ".join(heads), alpha, rows=[row], scope="last"))
    with torch.no_grad(), model.editing(*edits):
        return model(**given).logits[:, -1], labels


def test_it_is_what_a_loop_over_layers_and_rows_does(model: AttachedModel) -> None:
    wanted, labels = by_hand(model, 3.0)
    with torch.no_grad(), VHR(3.0)(model):
        found = model(**model.example).logits[:, -1]
    chosen = chosen_heads(model, model.example, VHR(3.0))
    assert torch.allclose(found, wanted, atol=1e-5)
    for row in range(2):
        assert sorted(chosen.rows[row].labels) == sorted(" ".join(labels[row::2]).split())
    with torch.no_grad():
        assert (model(**model.example).logits[:, -1] - wanted).abs().max() > 1e-3


def test_alpha_of_one_and_text_alone(model: AttachedModel) -> None:
    assert VHR(1.0).edits(model) == ()
    with pytest.raises(Refusal, match="no token for pictures"), hw.load("zoo:tiny-llama") as llama:
        VHR().edits(llama)
    with pytest.raises(InputError, match="no span named 'image'"), VHR()(model):
        model(input_ids=torch.tensor([[1, 20, 21]]))


def test_every_item_has_heads_of_its_own_whatever_runs_beside_it(model: AttachedModel, items: ItemSet) -> None:
    together = chosen_heads(model, items)
    for each, row in zip(items, together.rows, strict=True):
        alone = chosen_heads(model, replace(items, items=(each,)))
        assert alone.rows[0] == row
        assert all(len(row.at(site)) <= 2 for site in row.sites)
    assert together.shares[next(iter(together.shares))] == max(together.shares.values())
    measured = hw.measure(model, items, "answer-log-probability", under=VHR())
    one = hw.measure(model, items, "answer-log-probability", under=VHR(), batch_size=1)
    assert torch.allclose(measured, one, atol=1e-4)
    assert (measured - hw.measure(model, items, "answer-log-probability")).abs().max() > 1e-3


def test_layers_and_outliers_are_settings(model: AttachedModel, items: ItemSet) -> None:
    first = chosen_heads(model, items, VHR(layers=1))
    assert {site.label for row in first.rows for site in row.sites} == {"L0"}
    with pytest.raises(InputError, match="layers=9"):
        VHR(layers=9).edits(model)
    for wrong in ({"layers": 0}, {"layers": True}, {"alpha": -1}, {"outlier": "1"}, {"scope": "decode"}):
        with pytest.raises(InputError):
            VHR(**wrong)  # type: ignore[arg-type]


def test_the_fixed_form_is_the_same_heads_for_every_prompt(model: AttachedModel, items: ItemSet) -> None:
    fixed = fixed_heads(model, items)
    shares = chosen_heads(model, items).shares
    assert set(fixed.heads.labels) == {label for label, share in shares.items() if share > 0.5}
    assert fixed.factor == 2.0
    assert fixed.scope == "last"
    with pytest.raises(InputError, match="alpha=1"):
        chosen_heads(model, items, VHR(1.0))


def test_it_is_saved_and_goes_with_others(model: AttachedModel, tmp_path: Path) -> None:
    save(VHR(1.5, layers=2), tmp_path / "vhr", model=model)
    again = load(tmp_path / "vhr", model=model)
    assert isinstance(again, VHR)
    assert again.settings == VHR(1.5, layers=2).settings
    both = hw.use.Together((again, hw.use.HeadScaling("L0H0", 0.5)))
    with both(model):
        written = model.generate(**model.example, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with again(model), hw.use.HeadScaling("L0H0", 0.5)(model):
        assert torch.equal(
            model.generate(**model.example, max_new_tokens=3, min_new_tokens=3, do_sample=False), written
        )
