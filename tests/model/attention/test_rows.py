"""Rows rebuilt from an attention call: against loops in fp64, and against transformers' own functions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.errors import InputError, Refusal
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import (
    PatternRows,
    ScoreRows,
    last_visible_key,
    mix_values,
    pattern_rows,
    row_chunks,
    score_rows,
    uniform_pattern,
    visible,
)

SHAPES = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


class Site(nn.Module):
    """The attributes of an attention module that transformers' functions read."""

    def __init__(self, groups: int, *, is_causal: bool = True, sinks: Tensor | None = None) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.sinks = groups, is_causal, sinks
        self.eval()


def make_call(
    kernel: str,
    mask: Any = None,
    *,
    shape: str = "gqa",
    batch: int = 2,
    queries: int = 5,
    keys: int = 5,
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float32,
    is_causal: bool = True,
    module_sinks: Tensor | None = None,
    **options: Any,
) -> AttentionCall:
    n_heads, n_kv = SHAPES[shape]
    draw = torch.Generator().manual_seed(7)
    q = torch.randn(batch, n_heads, queries, dims[0], generator=draw, dtype=torch.float64)
    k = torch.randn(batch, n_kv, keys, dims[0], generator=draw, dtype=torch.float64)
    v = torch.randn(batch, n_kv, keys, dims[1], generator=draw, dtype=torch.float64)
    module = Site(n_heads // n_kv, is_causal=is_causal, sinks=module_sinks)
    return AttentionCall(module, (2 * q).to(dtype), k.to(dtype), v.to(dtype), mask, options, kernel)


def every_row(call: AttentionCall) -> ScoreRows:
    return score_rows(call, None, torch.arange(call.query.shape[2]))


def every_z(call: AttentionCall) -> Tensor:
    return mix_values(pattern_rows(every_row(call)).weights, call, None)


def kernel_z(function: Callable[..., tuple[Tensor, Any]], call: AttentionCall) -> tuple[Tensor, Any]:
    return function(call.module, call.query, call.key, call.value, call.mask, **call.options)


def eager(model: str) -> Callable[..., tuple[Tensor, Any]]:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return module.eager_attention_forward  # type: ignore[no-any-return]


def causal_bool(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries


def additive(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def padded_bool(left: Sequence[int], queries: int, keys: int) -> Tensor:
    """`[batch, 1, query, key]` of causal rows whose first `left[b]` keys are padding."""
    padding = torch.arange(keys) >= torch.tensor(left)[:, None]
    return causal_bool(queries, keys) & padding[:, None, None, :]


def looped(call: AttentionCall, allowed: Callable[[int, int, int, int], bool], **terms: Any) -> PatternRows:
    """The formula, one number at a time, in Python floats."""
    batch, n_heads, n_queries, _ = call.query.shape
    n_keys, groups = call.key.shape[2], n_heads // call.key.shape[1]
    weights = torch.zeros(batch, n_heads, n_queries, n_keys, dtype=torch.float64)
    sinks = torch.zeros(batch, n_heads, n_queries, dtype=torch.float64)
    softcap, bias, sink = terms.get("softcap"), terms.get("bias"), terms.get("sink")
    for b in range(batch):
        for h in range(n_heads):
            for t in range(n_queries):
                exponentials = {}
                for j in range(n_keys):
                    if allowed(b, h, t, j):
                        query, key = call.query[b, h, t].tolist(), call.key[b, h // groups, j].tolist()
                        s = sum(x * y for x, y in zip(query, key, strict=True)) * terms["scale"]
                        s = softcap * math.tanh(s / softcap) if softcap else s
                        exponentials[j] = math.exp(s + (float(bias[b, h, t, j]) if bias is not None else 0.0))
                extra = math.exp(float(sink[h])) if sink is not None else 0.0
                total = sum(exponentials.values()) + extra
                for j, value in exponentials.items():
                    weights[b, h, t, j] = value / total
                sinks[b, h, t] = extra / total if total else 0.0
    return PatternRows(weights, sinks if sink is not None else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_term_of_the_formula_against_loops(shape: str) -> None:
    n_heads = SHAPES[shape][0]
    draw = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, n_heads, 5, 7, generator=draw) < 0.6
    bias = torch.randn(1, n_heads, 5, 7, generator=draw)
    sink = torch.randn(n_heads, generator=draw)
    mask = additive(allowed) + torch.where(allowed, torch.randn(2, n_heads, 5, 7, generator=draw), 0.0)
    options = {"scaling": 0.3, "softcap": 1.5, "position_bias": bias, "s_aux": sink}
    call = make_call("eager_attention_forward", mask, shape=shape, keys=7, **options)
    expected = looped(
        call,
        lambda b, h, t, j: bool(allowed[b, h, t, j]),
        scale=0.3,
        softcap=1.5,
        bias=bias + torch.where(allowed, mask, 0.0),
        sink=sink,
    )
    got = pattern_rows(every_row(call))
    torch.testing.assert_close(got.weights.double(), expected.weights, atol=1e-6, rtol=1e-5)
    assert got.sink is not None
    assert expected.sink is not None
    seen = allowed.any(-1)
    torch.testing.assert_close(got.sink.double()[seen], expected.sink[seen], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.weights.sum(-1) + got.sink, torch.ones(2, n_heads, 5))


SOFTCAP, SINKS = {"scaling": 0.4, "softcap": 2.0}, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
BIAS = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(3))
QUERY_SINKS = torch.randn(2, 6, 5, 1, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("model", "shape", "sinks", "options"),
    [
        ("llama", "gqa", None, {"scaling": 0.4}),
        ("llama", "mqa", None, {"scaling": 8**-0.5}),
        ("bart", "mha", None, {}),
        ("gpt2", "mha", None, {"scaling": 0.25}),
        ("gemma2", "gqa", None, SOFTCAP),
        ("gpt_oss", "gqa", SINKS, {"scaling": 0.4, "s_aux": SINKS}),
        ("gpt_oss", "gqa", SINKS, {"scaling": 0.4}),
        ("granite_swa", "gqa", SINKS, {"scaling": 0.4, "s_aux": SINKS}),
        ("mimo_v2_flash", "gqa", None, {"scaling": 0.4, "s_aux": None}),
        ("inkling2", "gqa", None, {"scaling": 0.4, "position_bias": BIAS, "sinks": QUERY_SINKS}),
        ("inkling", "gqa", None, {"scaling": 0.4, "position_bias": BIAS}),
        ("t5", "mha", None, {"scaling": 1.0, "position_bias": BIAS[:, :4]}),
        ("deepseek_v3", "gqa", None, {"scaling": 0.1}),
    ],
)
def test_eager_functions_of_transformers(model: str, shape: str, sinks: Tensor | None, options: dict[str, Any]) -> None:
    mask = additive(padded_bool([0, 2], 5, 5))
    call = make_call("eager_attention_forward", mask, shape=shape, module_sinks=sinks, **options)
    z, weights = kernel_z(eager(model), call)
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[1, :2] = False  # rows that see no key: spread evenly by eager, 0 here
    torch.testing.assert_close(every_z(call)[seen], z[seen], atol=2e-6, rtol=1e-5)
    if model != "granite_swa":  # it scales z and returns the weights without their sink
        rebuilt = pattern_rows(every_row(call)).weights.transpose(1, 2)[seen]
        torch.testing.assert_close(rebuilt, weights.transpose(1, 2)[seen], atol=2e-6, rtol=1e-5)
    assert (every_z(call)[~seen] == 0).all()


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal by default": dict,
    "empty static cache": lambda: {"keys": 9},
    "fewer keys than queries": lambda: {"keys": 3},
    "decode step": lambda: {"queries": 1, "keys": 6},
    "not causal by option": lambda: {"is_causal": True, "options": {"is_causal": False}, "keys": 7},
    "causal by option": lambda: {"is_causal": False, "options": {"is_causal": True}},
    "encoder": lambda: {"is_causal": False},
    "shared bool": lambda: {"mask": causal_bool(5, 8)[None, None], "keys": 8},
    "left padding": lambda: {"mask": padded_bool([0, 2], 5, 5)},
    "bool per head": lambda: {"mask": torch.rand(2, 6, 5, 5, generator=torch.Generator().manual_seed(5)) < 0.5},
    "key padding": lambda: {"mask": (torch.arange(5) < torch.tensor([[3], [5]]))[:, None, None, :]},
    "two axes": lambda: {"mask": causal_bool(5, 8), "keys": 8},
    "additive": lambda: {"mask": additive(padded_bool([0, 0], 5, 7)), "keys": 7},
    "additive bias": lambda: {"mask": BIAS, "options": {"scaling": 0.2}},
    "position bias, causal": lambda: {"options": {"position_bias": BIAS}},
    "position bias, static": lambda: {"keys": 9, "options": {"position_bias": torch.cat([BIAS, BIAS], -1)[..., :9]}},
    "position bias, bool": lambda: {"mask": padded_bool([0, 0], 5, 5), "options": {"position_bias": BIAS}},
    "sinks are dropped": lambda: {"options": {"s_aux": SINKS}},
}


@pytest.mark.parametrize("name", MASKS)
def test_sdpa_of_transformers(name: str) -> None:
    given = MASKS[name]()
    call = make_call("sdpa_attention_forward", **{k: v for k, v in given.items() if k != "options"})
    call = AttentionCall(
        call.module, call.query, call.key, call.value, call.mask, given.get("options", {}), call.kernel
    )
    torch.testing.assert_close(every_z(call), kernel_z(sdpa_attention_forward, call)[0], atol=2e-6, rtol=1e-5)


def test_one_row_of_learned_queries_for_the_whole_batch() -> None:
    call = make_call("sdpa_attention_forward", shape="mha", is_causal=False, keys=7)
    call = AttentionCall(call.module, call.query[:1], call.key, call.value, None, {}, call.kernel)
    torch.testing.assert_close(every_z(call), kernel_z(sdpa_attention_forward, call)[0], atol=2e-6, rtol=1e-5)


def test_eager_without_a_mask_sees_everything() -> None:
    call = make_call("eager_attention_forward", keys=7, scaling=0.4)
    assert visible(every_row(call)).all()
    torch.testing.assert_close(every_z(call), kernel_z(eager("llama"), call)[0], atol=2e-6, rtol=1e-5)


def test_eager_adds_a_boolean_mask_as_numbers() -> None:
    call = make_call("eager_attention_forward", causal_bool(5, 5)[None, None], scaling=0.4)
    torch.testing.assert_close(every_z(call), kernel_z(eager("llama"), call)[0], atol=2e-6, rtol=1e-5)


def test_a_mask_longer_than_the_keys_is_cropped() -> None:
    wide = torch.cat([causal_bool(5, 5), torch.zeros(5, 4, dtype=torch.bool)], dim=-1)[None, None]
    narrow = make_call("sdpa_attention_forward", wide[..., :5])
    torch.testing.assert_close(every_z(make_call("sdpa_attention_forward", wide)), every_z(narrow), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_minima_of_other_dtypes_and_minus_inf_are_masked(dtype: torch.dtype) -> None:
    allowed = padded_bool([0, 2], 5, 5)
    for low in (torch.finfo(dtype).min, -torch.inf, -1e9, torch.finfo(torch.float16).min):
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, low)
        seen = visible(every_row(make_call("eager_attention_forward", mask.to(torch.float32))))
        assert torch.equal(seen, allowed.expand_as(seen))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_models_get_fp32_rows(dtype: torch.dtype, tolerance: float) -> None:
    call = make_call("sdpa_attention_forward", padded_bool([0, 2], 5, 5), dtype=dtype)
    z = kernel_z(sdpa_attention_forward, call)[0]
    assert every_z(call).dtype == torch.float32
    torch.testing.assert_close(every_z(call), z.float(), atol=tolerance, rtol=tolerance)

    allowed = padded_bool([0, 2], 5, 5)
    expected = looped(call, lambda b, h, t, j: bool(allowed[b, 0, t, j]), scale=8**-0.5)
    torch.testing.assert_close(pattern_rows(every_row(call)).weights.double(), expected.weights, atol=1e-6, rtol=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    call = make_call("sdpa_attention_forward")
    with torch.autocast("cpu", torch.bfloat16):
        inside = every_z(call)
    assert torch.equal(inside, every_z(call))


def compressed(call: AttentionCall, kept: Tensor, window: int | None) -> Tensor:
    """What a varlen flash kernel does: drop padding, attend bottom-right aligned per row, put zeros back in."""
    batch, n_heads, n_queries, _ = call.query.shape
    groups = n_heads // call.key.shape[1]
    z = torch.zeros(batch, n_queries, n_heads, call.value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        columns = [c for c in range(kept.shape[1]) if kept[b, c]]
        own = [t for t in range(n_queries) if n_queries == 1 or kept[b, kept.shape[1] - n_queries + t]]
        for h in range(n_heads):
            for i, t in enumerate(own):
                last = len(columns) - len(own) + i
                seen = [c for r, c in enumerate(columns) if r <= last and (window is None or last - r < window)]
                s = call.key[b, h // groups, seen].double() @ call.query[b, h, t].double() * call.scale
                z[b, t, h] = s.softmax(0) @ call.value[b, h // groups, seen].double()
    return z


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    ("queries", "keys", "kept"),
    [
        (5, 5, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        (5, 5, [[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]),
        (2, 6, [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
        (1, 6, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        (3, 8, [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),  # a static cache of 8, 5 of them written
    ],
)
def test_flash_masks_against_unpadding(queries: int, keys: int, kept: list[list[int]], window: int | None) -> None:
    mask = torch.tensor(kept)
    call = make_call("flash_attention_forward", mask, queries=queries, keys=keys, sliding_window=window)
    torch.testing.assert_close(every_z(call).double(), compressed(call, mask, window), atol=2e-6, rtol=1e-5)


def test_flash_without_a_mask_is_causal_from_the_end() -> None:
    call = make_call("flash_attention_forward", queries=2, keys=6, sliding_window=3)
    seen = visible(every_row(call))[0, 0]
    assert seen.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    both_ways = make_call("flash_attention_forward", sliding_window=2, is_causal=False)
    assert visible(every_row(both_ways))[0, 0, 2].int().tolist() == [0, 1, 1, 1, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [5, 2])
def test_block_masks_against_flex_attention(queries: int) -> None:
    starts, offset = torch.tensor([0, 2]), 5 - queries

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + offset) & (k >= starts[b]) & ((k + h) % 3 > 0)

    mask = create_block_mask(rule, 2, 6, queries, 5, device="cpu")
    call = make_call("flex_attention_forward", mask, queries=queries, softcap=2.0, scaling=0.4, dims=(16, 16))
    z = flex_attention(
        call.query,
        call.key,
        call.value,
        score_mod=lambda s, *_: 2.0 * torch.tanh(s / 2.0),
        block_mask=mask,
        scale=0.4,
        enable_gqa=True,
    )
    assert isinstance(z, Tensor)
    torch.testing.assert_close(every_z(call), z.transpose(1, 2), atol=2e-6, rtol=1e-5)
    per_row = torch.tensor([[1, 0], [0, 1]])
    chosen = visible(score_rows(call, torch.tensor([3]), per_row))
    everything = visible(every_row(call))[:, 3:4]
    for b in range(2):
        assert torch.equal(chosen[b], everything[b][:, per_row[b]])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    kernel=st.sampled_from(["sdpa_attention_forward", "eager_attention_forward", "flash_attention_forward"]),
    seed=st.integers(0, 10_000),
    per_row=st.booleans(),
)
def test_a_choice_of_heads_and_queries_is_the_same_rows(shape: str, kernel: str, seed: int, per_row: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    n_heads = SHAPES[shape][0]
    heads = torch.randint(n_heads, (int(torch.randint(1, 8, (), generator=draw)),), generator=draw)
    queries = torch.randint(5, (2, 3) if per_row else (3,), generator=draw)
    mask = torch.rand(2, n_heads, 5, 7, generator=draw) < 0.5
    given_mask = {"sdpa": mask, "eager": additive(mask), "flash": mask[:, 0, 0]}[kernel.split("_")[0]]
    options = {} if kernel.startswith("flash") else {"position_bias": torch.randn(2, n_heads, 5, 7, generator=draw)}
    sinks = {} if kernel.startswith("sdpa") else {"s_aux": torch.randn(n_heads, generator=draw)}
    call = make_call(kernel, given_mask, shape=shape, keys=7, **options, **sinks)
    everything, chosen = every_row(call), score_rows(call, heads, queries)
    for b in range(2):
        expected = everything.scores[b][heads][:, queries[b] if per_row else queries]
        torch.testing.assert_close(chosen.scores[b], expected, atol=1e-5, rtol=1e-5)
        if sinks:
            assert everything.sink is not None
            assert chosen.sink is not None
            expected = everything.sink[b][heads][:, queries[b] if per_row else queries]
            assert torch.equal(chosen.sink[b], expected)
    z = mix_values(pattern_rows(chosen).weights, call, heads)
    for b in range(2):
        expected = every_z(call)[b][queries[b] if per_row else queries][:, heads]
        torch.testing.assert_close(z[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_rows_that_see_nothing_are_zero_and_give_no_nan(sinks: Tensor | None) -> None:
    allowed = padded_bool([0, 2], 5, 5)
    call = make_call("flex_attention_forward", additive(allowed).masked_fill(~allowed, -torch.inf), s_aux=sinks)
    tensors = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    call = AttentionCall(call.module, *tensors, call.mask, call.options, call.kernel)
    pattern = pattern_rows(every_row(call))
    assert (pattern.weights[1, :, :2] == 0).all()
    assert pattern.sink is None or (pattern.sink[1, :, :2] == 1).all()
    mix_values(pattern.weights, call, None).square().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert tensors[0].grad is not None
    assert (tensors[0].grad[1, :, :2] == 0).all()
    assert (tensors[0].grad[0, :, 1:] != 0).any()


@pytest.mark.parametrize("heads", [None, [0, 1, 2, 3, 4, 5], [5, 0, 1], [2, 3]])
def test_gradients(heads: list[int] | None) -> None:
    mask = additive(padded_bool([0, 2], 4, 4), torch.float64)
    call = make_call("eager_attention_forward", mask, queries=4, keys=4, dims=(3, 2), dtype=torch.float64)
    chosen, queries = None if heads is None else torch.tensor(heads), torch.tensor([3, 1])

    def z(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        options = {"softcap": 2.0, "position_bias": bias, "s_aux": sinks}
        inner = AttentionCall(call.module, q, k, v, mask, options, call.kernel)
        return mix_values(pattern_rows(score_rows(inner, chosen, queries)).weights, inner, chosen)

    tensors = (call.query, call.key, call.value, BIAS[..., :4, :4].double(), SINKS.double())
    assert torch.autograd.gradcheck(z, [tensor.clone().requires_grad_() for tensor in tensors])


def test_uniform_pattern_spreads_over_the_visible_keys() -> None:
    rows = every_row(make_call("sdpa_attention_forward", padded_bool([0, 2], 5, 5)))
    uniform = uniform_pattern(visible(rows), rows.scores.dtype)
    assert uniform[0, 3, 3].tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert uniform[1, 0, 3].tolist() == [0.0, 0.0, 0.5, 0.5, 0.0]
    assert (uniform[1, :, :2] == 0).all()


@pytest.mark.parametrize("per_row", [False, True])
def test_chunks_cover_the_queries_within_the_budget(per_row: bool) -> None:
    call = make_call("sdpa_attention_forward", queries=50, keys=64)
    queries = torch.stack([torch.arange(50), torch.arange(50).flip(0)]) if per_row else torch.arange(50)
    budget = 8 * 2 * 3 * 64 * 4  # 8 queries of 2 rows, 3 heads, 64 keys in fp32
    chunks = list(row_chunks(call, torch.tensor([0, 1, 5]), queries, budget))
    assert [chunk.shape[-1] for chunk in chunks] == [8, 8, 8, 8, 8, 8, 2]
    assert torch.equal(torch.cat(chunks, dim=-1), queries)
    scores = score_rows(call, torch.tensor([0, 1, 5]), chunks[0]).scores
    assert scores.numel() * scores.element_size() == budget
    assert len(list(row_chunks(call, None, queries, budget_bytes=1))) == 50


def test_the_last_visible_key_is_a_bound() -> None:
    queries = torch.tensor([1, 2])
    for call in (
        make_call("sdpa_attention_forward", keys=9),
        make_call("sdpa_attention_forward", is_causal=False, keys=9),
        make_call("sdpa_attention_forward", padded_bool([0, 2], 5, 9), keys=9),
        make_call("flash_attention_forward", keys=9),
    ):
        seen = visible(score_rows(call, None, queries)).nonzero()[:, -1].max()
        assert last_visible_key(call, queries) >= seen
    assert last_visible_key(make_call("sdpa_attention_forward", keys=9), queries) == 2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (make_call("sdpa_attention_forward", cache=object()), "paged"),
        (make_call("eager_paged_attention_forward"), "paged"),
        (make_call("flash_attention_forward", block_table=object()), "paged"),
        (make_call("msa_attention_forward", causal_bool(5, 5), block_indices=torch.ones(1)), "block_indices"),
        (make_call("my_kernel"), "NoneType"),
        (make_call("sdpa_attention_forward", "mask"), "str"),
        (make_call("sdpa_attention_forward", torch.ones(2, 1, 5, 4).bool()), "does not broadcast"),
        (make_call("sdpa_attention_forward", torch.ones(3, 1, 5, 5).bool()), "does not broadcast"),
        (make_call("eager_attention_forward", position_bias=torch.ones(1, 3, 5, 5)), "position_bias"),
        (make_call("eager_attention_forward", s_aux=torch.ones(5)), "sinks"),
        (make_call("flash_attention_forward", causal_bool(5, 5)[None, None]), "mask"),
        (make_call("flash_attention_forward", position_bias=BIAS), "position_bias"),
        (make_call("flash_attention_forward", cu_seq_lens_q=torch.tensor([0, 2, 5])), "packed"),
        (make_call("flash_attention_forward", batch=1, position_ids=torch.tensor([[0, 1, 2, 0, 1]])), "packed"),
        (make_call("flash_attention_forward", torch.ones(2, 9), keys=9, is_causal=False), "unpads"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_with_the_reason(call: AttentionCall, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        every_row(call)


@pytest.mark.parametrize(
    ("heads", "queries", "message"),
    [
        ([6], [0], "heads contains 6, expected some of 0 to 5"),
        ([0], [-1], "queries contains -1, expected some of 0 to 4"),
        ([], [0], "heads is empty"),
        ([0], [[0], [1], [2]], "queries has 3 rows"),
        ([[0]], [0], r"heads has shape \[1, 1\]"),
    ],
)
def test_heads_and_queries_that_do_not_exist(heads: list[Any], queries: list[Any], message: str) -> None:
    call = make_call("sdpa_attention_forward")
    with pytest.raises(InputError, match=message):
        score_rows(call, torch.tensor(heads), torch.tensor(queries))
