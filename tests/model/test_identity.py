"""The hash of a model's weights: the same for the same weights, another for any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import headwise as hw
from headwise import zoo
from headwise.model.identity import weights_hash


def test_one_changed_number_changes_the_hash() -> None:
    model = zoo.build("tiny-gpt2").model
    before = weights_hash(model)
    assert before == weights_hash(zoo.build("tiny-gpt2").model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_hash(model) != before


def test_names_shapes_and_dtypes_count() -> None:
    plain = nn.Linear(4, 2, bias=False)
    turned, narrow = nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False).bfloat16()
    with torch.no_grad():
        turned.weight.copy_(plain.weight.reshape(4, 2))
        narrow.weight.copy_(plain.weight)
    assert (
        len({weights_hash(plain), weights_hash(turned), weights_hash(narrow), weights_hash(nn.Sequential(plain))}) == 4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_it(dtype: torch.dtype, tmp_path: Path) -> None:
    organism = zoo.build("tiny-llama", dtype=dtype)
    organism.model.save_pretrained(tmp_path)
    with hw.load(str(tmp_path)) as loaded:
        provenance = loaded.provenance("retrieval", {"items": 4}, probe="needle", seed=3)
    assert provenance.weights_hash == weights_hash(organism.model)
    assert (provenance.method, provenance.model, provenance.probe, provenance.seed) == (
        "retrieval",
        str(tmp_path),
        "needle",
        3,
    )
    assert "torch" in provenance.versions


def test_weights_that_are_elsewhere_are_refused() -> None:
    with pytest.raises(hw.Refusal, match="on the meta device"):
        weights_hash(nn.Linear(2, 2, device="meta"))
