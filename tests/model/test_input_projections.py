"""Which rows make each head's q, k and v: what is measured by derivatives, checked by changing the weights."""

from __future__ import annotations

import copy

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import Refusal
from headwise.model.input_projections import VARIABLES, InputProjection, input_projections

SPLIT = ("tiny-llama", "tiny-opt", "tiny-bert", "tiny-t5")
FUSED = ("tiny-gpt2", "tiny-gpt_neox", "tiny-modernbert", "tiny-falcon", "tiny-deepseek_v3")


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def moved(model: hw.AttachedModel, label: str, variable: str, where: InputProjection, member: int) -> list[int]:
    """Heads (groups) of the variable that change when the rows of one of them do."""

    def seen() -> torch.Tensor:
        with model.reading(getattr(hw.read, variable)(label)) as got:
            model(**model.example)
        return getattr(got, variable)[label].clone()

    weight = model.model.get_submodule(where.module).weight
    before, kept = seen(), weight.detach().clone()
    with torch.no_grad():
        (weight.T if where.transposed else weight)[where.rows[member]] += 0.1
    after = seen()
    with torch.no_grad():
        weight.copy_(kept)
    changed = (after != before).any(-1).flatten(0, 1).any(0)
    return changed.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", [*SPLIT, *FUSED, "tiny-qwen3", "organism"])
def test_the_rows_of_a_head_move_that_head_alone(name: str) -> None:
    with hw.load("zoo:organism") if name == "organism" else attached(name) as model:
        site = model.sites[-1]
        found = input_projections(model, site)
        for variable in VARIABLES:
            where = getattr(found, variable)
            if where is None:
                assert name == "tiny-deepseek_v3"
                assert variable == "k"
                continue
            n = site.n_heads if variable == "q" else site.n_kv_heads
            assert where.rows.shape == (n, site.head_dim if variable == "v" else site.qk_dim)
            assert len(where.rows.unique()) == where.rows.numel()
            for member in (0, n - 1):
                assert moved(model, site.label, variable, where, member) == [member]


def test_fused_projections_are_told_apart() -> None:
    with attached("tiny-gpt2") as model:
        found = input_projections(model, model.site("L1"))
        assert {found.q.module, found.k.module, found.v.module} == {"transformer.h.1.attn.c_attn"}
        assert found.q.transposed
        assert found.q.plain
        assert torch.equal(torch.cat([found.q.rows, found.k.rows, found.v.rows]).flatten(), torch.arange(144))


def test_groups_have_rows_where_keys_are_shared() -> None:
    with attached("tiny-falcon") as model:  # [group 0: two queries, key, value; group 1: ...]
        found = input_projections(model, model.site("L0"))
        assert found.q.rows[:, 0].tolist() == [0, 12, 48, 60]
        assert (found.k.rows[:, 0].tolist(), found.v.rows[:, 0].tolist()) == ([24, 72], [36, 84])


@pytest.mark.parametrize(
    ("name", "plain", "linear"),
    [
        ("tiny-gpt2", True, True),
        ("tiny-llama", False, True),  # a rotary embedding stands in between
        ("tiny-opt", False, True),  # a factor
        ("tiny-qwen3", False, False),  # a norm
    ],
)
def test_what_stands_between_a_layer_and_the_queries(name: str, plain: bool, linear: bool) -> None:
    with attached(name) as model:
        for site in model.sites:
            q = input_projections(model, site).require("q")
            assert (q.plain, q.linear) == (plain, linear)
            v = input_projections(model, site).require("v")
            assert (v.plain, v.linear) == (True, True)


def test_a_value_row_is_the_dimension_that_it_stands_for() -> None:
    with attached("tiny-gpt_neox") as model:
        v = input_projections(model, model.site("L1")).require("v")
        with model.reading(hw.read.v("L1")) as before:
            model(**model.example)
        bias = model.model.get_submodule(v.module).bias
        with torch.no_grad():
            bias[v.rows[2, 5]] += 1.0
        with model.reading(hw.read.v("L1")) as after:
            model(**model.example)
        assert (after.v["L1"] != before.v["L1"]).flatten(0, 1).any(0).nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize(
    ("name", "variable", "reason"),
    [
        ("tiny-olmo2", "q", "moves the queries of several heads"),
        ("tiny-deepseek_v3", "k", "several layers make them together"),
        ("tiny-gptj", "q", "scores in code of its own"),
    ],
)
def test_heads_without_rows_of_their_own_are_refused(name: str, variable: str, reason: str) -> None:
    with attached(name) as model:
        found = input_projections(model, model.sites[-1])
        with pytest.raises(Refusal, match=f"{model.sites[-1].label}: .* of a head are no rows of a layer: .*{reason}"):
            found.require(variable)
        found.require("v")


def test_nothing_is_left_behind() -> None:
    with attached("tiny-llama") as model:
        weights = copy.deepcopy(model.model.state_dict())
        asked = [parameter.requires_grad for parameter in model.model.parameters()]
        before = model(**model.example).logits
        input_projections(model, model.site("L0"))
        assert torch.equal(model(**model.example).logits, before)
        assert [parameter.requires_grad for parameter in model.model.parameters()] == asked
        assert all(parameter.grad is None for parameter in model.model.parameters())
        assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())
        assert not any(module._forward_hooks for module in model.model.modules())


def test_it_is_measured_once_and_as_if_no_plan_was_open() -> None:
    with attached("tiny-llama") as model, attached("tiny-llama") as other:
        with model.editing(hw.edit.zero("L0H0")) as run:
            first = input_projections(model, model.site("L0"))
            model(**model.example)
        assert run.fired
        assert input_projections(model, model.site("L0")) is first
        rows = input_projections(other, other.site("L0")).require("q").rows
        assert torch.equal(first.require("q").rows, rows)
