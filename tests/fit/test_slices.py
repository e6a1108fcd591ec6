"""Rows and columns of heads: whose they are is checked by changing the weights and looking at the heads."""

from __future__ import annotations

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.fit.slices import Slice, head_slices


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def disturbed(model: hw.AttachedModel, part: Slice) -> None:
    with torch.no_grad():
        for name, axis in part.parameters.items():
            parameter = model.model.get_parameter(name)
            parameter.index_add_(axis, part.indices, torch.ones_like(parameter.index_select(axis, part.indices)))


@pytest.mark.parametrize(
    "name", ["tiny-gpt2", "tiny-llama", "tiny-gpt_neox", "tiny-falcon", "tiny-qwen3_next", "tiny-bert"]
)
@pytest.mark.parametrize("variable", list("qkvo"))
def test_the_slice_of_a_head_changes_that_head_alone(name: str, variable: str) -> None:
    with attached(name) as model:
        site = model.sites[-1]
        label, size = site.label, site.group_size
        reads = {"q": hw.read.q, "k": hw.read.k, "v": hw.read.v, "o": hw.read.write}[variable](label)

        def seen() -> torch.Tensor:
            with model.reading(reads) as got:
                model(**model.example)
            return getattr(got, "write" if variable == "o" else variable)[label].clone()

        chosen = f"{label}H{site.n_heads - 1}"
        (part,) = head_slices(model, model.heads(chosen), variable)
        before = seen()
        disturbed(model, part)
        changed = (seen() != before).any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
        assert changed == [(site.n_heads - 1) // (1 if variable in "qo" else size)]
        assert part.variables == variable
        assert part.biased == (variable != "o" and model.model.get_submodule(part.module).bias is not None)


def test_what_is_fused_is_one_slice_and_heads_of_a_layer_are_together() -> None:
    with attached("tiny-gpt2") as model:
        fused, out = head_slices(model, model.heads("L1H0,L1H2"))
        assert (fused.module, fused.variables, fused.axis) == ("transformer.h.1.attn.c_attn", "qkv", 1)
        rows = [*range(12), *range(24, 36)]
        assert fused.indices.tolist() == [48 * block + row for block in range(3) for row in rows]
        assert (out.module, out.variables, out.axis, out.indices.tolist()) == (
            "transformer.h.1.attn.c_proj",
            "o",
            0,
            rows,
        )
        assert list(fused.parameters) == ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"]
        assert list(out.parameters) == ["transformer.h.1.attn.c_proj.weight"]


def test_heads_of_one_group_share_its_rows() -> None:
    with attached("tiny-llama") as model:  # 4 heads in 2 groups
        one = {each.variables: each.indices.tolist() for each in head_slices(model, model.heads("L0H2"))}
        both = {each.variables: each.indices.tolist() for each in head_slices(model, model.heads("L0H2,L0H3"))}
        assert one["k"] == both["k"] == one["v"] == both["v"] == list(range(12, 24))
        assert (one["q"], both["q"]) == (list(range(24, 36)), list(range(24, 48)))
        assert [each.variables for each in head_slices(model, model.heads("L0H2"), "qo")] == ["q", "o"]


def test_all_heads_together_are_the_whole_projection() -> None:
    with hw.load("zoo:organism") as model:
        parts = head_slices(model, model.heads())
        assert len(parts) == 4 * 6
        for part in parts:
            weight = model.model.get_submodule(part.module).weight
            assert part.indices.tolist() == list(range(weight.shape[part.axis]))


@pytest.mark.parametrize(
    ("name", "variables", "line"),
    [
        ("tiny-olmo2", "q", "moves the queries of several heads"),
        ("tiny-albert", "v", "serves L0 and L0@1, so no part of it belongs to one head"),
        ("tiny-bitnet", "o", "no columns of an output projection for each head: a head reaches 48 columns"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(name: str, variables: str, line: str) -> None:
    with attached(name) as model, pytest.raises(Refusal, match=line) as raised:
        head_slices(model, model.heads("L0H0"), variables)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("variables", ["", "z", "qq", "q,o"])
def test_letters_that_name_nothing_are_refused(variables: str) -> None:
    with attached("tiny-llama") as model, pytest.raises(InputError, match="give letters of 'qkvo'"):
        head_slices(model, model.heads("L0H0"), variables)
