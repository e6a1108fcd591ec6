"""Statistics from a kernel's logsumexp against dense rows in fp64, and which calls go that way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from headwise.errors import Refusal
from headwise.model.attention import flash, swept
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.flash import flash_can
from headwise.model.attention.statistics import STATISTICS, RowStatistics, row_statistics

EAGER, SDPA = "eager_attention_forward", "sdpa_attention_forward"
SUMS = frozenset(STATISTICS)
N, WIDTH = 11, 8
LEFT = (0, 3)
"""Padding before each row's first token."""

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def draw_call(
    n_heads: int = 6, n_groups: int = 2, n_queries: int = N, n_keys: int = N, *, seed: int = 3, sharpness: float = 2.0
) -> AttentionCall:
    draw = torch.Generator().manual_seed(seed)
    q = sharpness * torch.randn(2, n_heads, n_queries, WIDTH, generator=draw)
    k, v = (torch.randn(2, n_groups, n_keys, WIDTH, generator=draw) for _ in range(2))
    return AttentionCall(nn.Identity(), q, k, v, None, {}, SDPA)


def causal(n_queries: int = N, n_keys: int = N, *, left: tuple[int, int] = (0, 0), window: int | None = None) -> Tensor:
    """`[2, 1, query, key]`: what may be seen."""
    ahead = torch.arange(n_queries)[:, None] - torch.arange(n_keys)
    seen = (ahead >= 0) & (ahead < (window or n_keys))
    return seen & (torch.arange(n_keys) >= torch.tensor(left)[:, None])[:, None, None, :]


def added(seen: Tensor, lowest: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, lowest)


def dense(
    call: AttentionCall, seen: Tensor, bias: Tensor | float = 0.0, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and weights `[batch, head, query, key]` in fp64, written out."""
    keys = call.key.double().repeat_interleave(call.n_heads // call.n_kv_heads, dim=1)
    scores = (call.query.double() @ keys.mT * call.scale + bias).masked_fill(~seen, -math.inf)
    whole = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        whole = torch.logaddexp(whole, sinks.double().view(1, -1, 1, 1).expand(*whole.shape))
    return scores, (scores - whole).exp().nan_to_num(0.0)


def expected(p: Tensor, query_columns: Tensor, spans: dict[str, Tensor], pairs: dict[str, Tensor]) -> dict[str, Tensor]:
    columns = torch.arange(p.shape[-1], dtype=torch.float64)
    first = torch.tensor(LEFT[: len(p)]).view(-1, 1, 1, 1).expand(*p.shape[:3], 1)
    values = {
        "entropy": torch.special.entr(p).sum(-1),
        "max": p.amax(-1),
        "top1": p.argmax(-1),
        "sink_mass": p.gather(-1, first).squeeze(-1),
        "learned_sink": 1 - p.sum(-1),
        "mean_distance": query_columns - (p * columns).sum(-1) / p.sum(-1),
    }
    values |= {f"span {name}": (p * marked[:, None, None]).sum(-1) for name, marked in spans.items()}
    for name, chosen in pairs.items():
        there = (chosen >= 0) & (chosen < p.shape[-1])
        index = chosen.where(there, 0)[:, None].expand(-1, p.shape[1], -1, -1)
        values[f"pair {name}"] = (p.gather(-1, index) * there[:, None]).sum(-1)
    return values


def measure(call: AttentionCall, **given: Any) -> RowStatistics:
    n_queries, n_keys = call.query.shape[2], call.key.shape[2]
    frame: dict[str, Any] = {
        "heads": None,
        "query_columns": torch.arange(n_queries),
        "key_columns": torch.arange(n_keys),
        "first_key": torch.tensor(LEFT),
    }
    return row_statistics(call, **{**frame, **given})


def named(got: RowStatistics) -> dict[str, Tensor]:
    found = {name: getattr(got, name) for name in STATISTICS if getattr(got, name) is not None}
    found |= {f"span {name}": mass for name, mass in got.span_mass.items()}
    return found | {f"pair {name}": mass for name, mass in got.pair_mass.items()}


def asked_of(call: AttentionCall) -> dict[str, Any]:
    """Spans and pairs: the token before, and up to three keys a query, some of them hidden, some none, some far off."""
    n_queries, n_keys = call.query.shape[2], call.key.shape[2]
    draw = torch.Generator().manual_seed(5)
    several = torch.stack([torch.randperm(n_keys + 2, generator=draw)[:3] - 1 for _ in range(2 * n_queries)])
    before = torch.arange(-1, n_queries - 1).expand(2, n_queries).unsqueeze(-1)
    spans = {"early": torch.arange(n_keys).expand(2, n_keys) < 4, "odd": torch.arange(2 * n_keys).view(2, -1) % 2 > 0}
    return {"spans": spans, "pairs": {"before": before, "several": several.view(2, n_queries, 3)}}


def compare(call: AttentionCall, p: Tensor, *, tolerance: float = 3e-6, **given: Any) -> None:
    """Everything but invisible rows, which are NaN; mean distances to 1e-9."""
    asked = asked_of(call)
    got = named(measure(call, **asked, **given))
    wanted = given.get("wanted", SUMS)
    values = expected(p, torch.arange(p.shape[2])[:, None].squeeze(-1), **asked)
    values = {name: value for name, value in values.items() if name not in STATISTICS or name in wanted}
    assert set(got) == set(values)
    blind = p.sum(-1) == 0
    for name, value in values.items():
        found = got[name]
        if name == "top1":
            assert torch.equal(found[~blind], value[~blind])
            assert (found[blind] == -1).all()
            continue
        close = 1e-9 if name == "mean_distance" else tolerance
        torch.testing.assert_close(found.double()[~blind], value[~blind], atol=close, rtol=close, msg=name)
        assert found[blind].isnan().all(), name


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])


def cases() -> dict[str, tuple[AttentionCall, Tensor]]:
    """Calls that the kernel takes, and the weights they have."""
    plain, padded, windowed = draw_call(), causal(left=LEFT), causal(left=LEFT, window=4)
    more = draw_call(n_keys=15)
    cross = replace(draw_call(n_queries=7), options={"is_causal": False})
    step = draw_call(n_queries=1)
    by_head = causal() & (torch.arange(N) % torch.tensor([1, 2, 3, 1, 2, 3])[:, None, None] == 0)
    block = create_block_mask(lambda b, h, q, k: (k <= q) & (k >= 3 * b), 2, None, N, N, device="cpu")
    found = {
        f"causal {name}": (draw_call(*heads), dense(draw_call(*heads), causal())[1]) for name, heads in HEADS.items()
    }
    found |= {
        "bool mask": (replace(plain, mask=padded), dense(plain, padded)[1]),
        "lowest float": (replace(plain, mask=added(padded), kernel=EAGER), dense(plain, padded)[1]),
        "minus infinity": (replace(plain, mask=added(padded, -math.inf)), dense(plain, padded)[1]),
        "mask by head": (replace(plain, mask=by_head), dense(plain, by_head)[1]),
        "window": (replace(plain, mask=windowed), dense(plain, windowed)[1]),
        "flash mask": (
            replace(plain, mask=torch.arange(N) >= torch.tensor(LEFT)[:, None], kernel="flash_attention_forward"),
            dense(plain, padded & padded.diagonal(dim1=2, dim2=3).unsqueeze(-1))[1],
        ),
        "block mask": (replace(plain, mask=block, kernel="flex_attention_forward"), dense(plain, padded)[1]),
        "more keys than queries": (more, dense(more, causal(N, 15))[1]),
        "no mask": (cross, dense(cross, torch.ones(7, N).bool())[1]),
        "one query": (step, dense(step, torch.ones(1, N).bool())[1]),
        "learned sinks": (
            replace(plain, mask=added(padded), options={"s_aux": SINKS}, kernel=EAGER),
            dense(plain, padded, sinks=SINKS)[1],
        ),
        "own scale": (
            replace(plain, options={"scaling": 0.7}),
            dense(replace(plain, options={"scaling": 0.7}), causal())[1],
        ),
    }
    return found


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_every_statistic_is_that_of_the_dense_rows(case: str) -> None:
    call, p = CASES[case]
    assert flash_can(call, SUMS)
    with mock.patch.object(flash, "_kernel", wraps=flash._kernel) as kernel:
        compare(call, p, tolerance=1e-6)
        assert kernel.called
        compare(call, p, tolerance=1e-5, wanted=SUMS - {"mean_distance"})  # in fp32


@every_case
def test_swept_they_are_the_same(case: str) -> None:
    call, p = CASES[case]
    with mock.patch.object(flash, "_kernel") as kernel:
        compare(replace(call, options={**call.options, "softcap": 1e8}), p, tolerance=1e-5)  # a cap that caps nothing
    assert not kernel.called


@every_case
def test_in_small_pieces_they_are_the_same(case: str) -> None:
    call, p = CASES[case]
    with mock.patch.multiple(flash, MASK_BYTES=500, SLAB=1, LARGE_SLAB=1):
        compare(call, p)


@pytest.mark.parametrize("case", ["causal gqa", "bool mask", "no mask", "learned sinks", "mask by head"])
def test_chosen_heads_and_queries(case: str) -> None:
    call, p = CASES[case]
    n = call.query.shape[2]
    asked, heads, columns = asked_of(call), torch.tensor([4, 0, 1, 5, 4]), torch.arange(n)
    blind = p.sum(-1) == 0
    values = expected(p, columns, **asked)
    values = {name: value.masked_fill(blind, swept.no_value(name)) for name, value in values.items()}
    for queries in (torch.tensor([6, 3, n - 1]), torch.tensor([[n - 1, 4], [5, 6]]), columns.flip(0)):
        got = named(measure(call, heads=heads, queries=queries, **asked))
        for name, value in values.items():
            for row in range(2):
                chosen = queries if queries.ndim == 1 else queries[row]
                wanted = value[row][heads][:, chosen]
                found = got[name][row].double()
                torch.testing.assert_close(found, wanted.double(), atol=3e-6, rtol=3e-6, equal_nan=True, msg=name)


def test_a_padded_row_has_the_statistics_that_it_has_alone() -> None:
    call, left = draw_call(), LEFT[1]
    padded = named(measure(replace(call, mask=causal(left=LEFT)), spans={"late": torch.arange(N).expand(2, N) > 6}))
    alone = replace(call, query=call.query[1:, :, left:], key=call.key[1:, :, left:], value=call.value[1:, :, left:])
    columns = torch.arange(left, N)
    got = named(
        row_statistics(
            alone,
            heads=None,
            query_columns=columns,
            key_columns=columns,
            first_key=torch.tensor([left]),
            spans={"late": columns[None] > 6},
        )
    )
    for name, values in got.items():
        torch.testing.assert_close(values, padded[name][1:, :, left:], atol=2e-6, rtol=1e-5, msg=name)


def test_soft_biases_leave_only_the_entropy_to_the_sweep() -> None:
    soft = torch.randn(1, 6, N, N, generator=torch.Generator().manual_seed(1))
    call, seen = draw_call(), causal()
    p = dense(call, seen, soft.double())[1]
    for given in (
        replace(call, mask=soft + added(seen)),
        replace(call, mask=added(seen), options={"position_bias": soft}),
        replace(call, options={"position_bias": soft}),
    ):
        without = SUMS - {"entropy"}
        assert flash_can(given, without)
        assert "bias" in flash_can(given, SUMS).reason
        compare(given, p, wanted=without)
        with mock.patch.object(flash, "_kernel") as kernel:
            compare(given, p, tolerance=1e-5)
        assert not kernel.called


@pytest.mark.parametrize(
    ("changed", "wanted", "reason"),
    [
        ({"options": {"softcap": 20.0}}, SUMS, "no kernel caps scores"),
        ({"options": {"own_scores": torch.zeros(2, 6, N, N)}}, SUMS, "makes its scores itself"),
        ({}, frozenset({"max", "top1"}), "no sum over keys"),
        ({"mask": torch.ones(N, N).bool(), "kernel": EAGER}, SUMS, "a bias"),  # which eager functions add as 1
    ],
)
def test_what_is_swept_and_why(changed: dict[str, Any], wanted: frozenset[str], reason: str) -> None:
    can = flash_can(replace(draw_call(), **changed), wanted)
    assert not can
    assert reason in can.reason


def test_devices_without_such_a_kernel_are_swept() -> None:
    call = draw_call()
    on_meta = replace(call, query=call.query.to("meta"), key=call.key.to("meta"), value=call.value.to("meta"))
    assert "meta" in flash_can(on_meta, SUMS).reason


def test_rows_that_cannot_be_rebuilt_are_refused() -> None:
    with pytest.raises(Refusal, match="paged"):
        flash_can(replace(draw_call(), options={"cache": object()}), SUMS)


def test_the_kernel_of_cuda_is_called_by_its_signature() -> None:
    """Shapes only: nothing runs. Where CUDA is there, the numbers are compared below."""
    with FakeTensorMode():
        q, k = torch.empty(2, 6, N, 16, device="cuda"), torch.empty(2, 2, N, 16, device="cuda")
        call = AttentionCall(nn.Identity(), q, k, k, None, {}, SDPA)
        assert "fp64" in flash_can(call, SUMS).reason
        assert flash_can(call, SUMS - {"mean_distance"})
    q, k = torch.empty(2, 6, N, 16, device="meta"), torch.empty(2, 2, N, 16, device="meta")
    with mock.patch.dict(flash.KERNELS, meta=flash.KERNELS["cuda"]):
        for bias in (None, torch.empty(2, 1, N, N, device="meta")):
            means, logsumexp = flash._kernel(q, k, k, bias, bias is None, 0.25)
            assert means.shape == (2, 6, N, 16)
            assert logsumexp.shape == (2, 6, N)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_on_cuda_they_are_the_same(case: str) -> None:
    call, p = CASES[case]
    if case == "block mask":
        pytest.skip("its rule is made for the CPU")
    move = {name: getattr(call, name).cuda() for name in ("query", "key", "value")}
    mask = call.mask.cuda() if isinstance(call.mask, Tensor) else call.mask
    options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in call.options.items()}
    on_gpu, wanted = replace(call, **move, mask=mask, options=options), frozenset({"entropy", "sink_mass"})
    got = row_statistics(
        on_gpu,
        heads=None,
        query_columns=torch.arange(call.query.shape[2]).cuda(),
        key_columns=torch.arange(call.key.shape[2]).cuda(),
        first_key=torch.tensor(LEFT).cuda(),
        wanted=wanted,
    )
    values = expected(p, torch.arange(p.shape[2]), {}, {})
    for name in wanted:
        alive = p.sum(-1) > 0
        torch.testing.assert_close(getattr(got, name).cpu().double()[alive], values[name][alive], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["kernel", "swept"])
def test_error_bounds_at_512_tokens(dtype: torch.dtype, way: str) -> None:
    """Against fp64 rows of the same (rounded) queries and keys, scores up to 27.

    Found at 512 and at 2048 tokens, at most: entropy 1.4e-5 nats, masses 2.6e-6, mean distance 4e-12 tokens.
    """
    n, draw = 512, torch.Generator().manual_seed(0)
    q, k = 2.2 * torch.randn(1, 4, n, 64, generator=draw), 2.2 * torch.randn(1, 2, n, 64, generator=draw)
    call = AttentionCall(nn.Identity(), q.to(dtype), k.to(dtype), k.to(dtype), None, {}, SDPA)
    p = dense(call, causal(n, n)[:1])[1]
    before = torch.arange(-1, n - 1).view(1, n, 1)
    given = replace(call, options={"softcap": 1e9} if way == "swept" else {})
    assert bool(flash_can(given, SUMS)) == (way == "kernel")
    values = expected(p, torch.arange(n), {}, {"before": before})
    bounds = {"entropy": 5e-5, "sink_mass": 1e-5, "pair before": 1e-5, "max": 1e-5}
    asked = {"first_key": torch.tensor([0]), "pairs": {"before": before}}
    got = named(measure(given, wanted=frozenset({"entropy", "sink_mass", "max"}), **asked))
    for name, bound in bounds.items():
        assert float((got[name].double() - values[name]).abs().max()) < bound, name
    distance = measure(given, wanted=frozenset({"mean_distance"}), **asked).mean_distance
    assert distance is not None
    assert float((distance - values["mean_distance"]).abs().max()) < 1e-9


@pytest.mark.parametrize("way", ["kernel", "swept"])
def test_mean_distance_over_4096_tokens_between_far_keys(way: str) -> None:
    """Scores up to 27: in fp32 the worst row is off by 4e-3 tokens, however its positions are summed."""
    n, draw = 4096, torch.Generator().manual_seed(0)
    q, k = 2.2 * torch.randn(1, 1, n, 64, generator=draw), 2.2 * torch.randn(1, 1, n, 64, generator=draw)
    call = AttentionCall(nn.Identity(), q, k, k, None, {"softcap": 1e9} if way == "swept" else {}, SDPA)
    queries, columns = torch.arange(n - 400, n), torch.arange(n, dtype=torch.float64)
    frame = {"heads": None, "query_columns": torch.arange(n), "key_columns": torch.arange(n)}
    got = row_statistics(
        call, **frame, first_key=torch.tensor([0]), queries=queries, wanted=frozenset({"mean_distance"})
    ).mean_distance
    assert got is not None
    hidden = columns > queries[:, None]
    scores = (q[0, 0, queries].double() @ k[0, 0].double().T / 8).masked_fill(hidden, -math.inf)
    found = (queries - got[0, 0] - scores.softmax(-1) @ columns).abs().max()
    assert found < 1e-8
    in_fp32 = scores.softmax(-1) - ((q[0, 0, queries] @ k[0, 0].T) / 8).masked_fill(hidden, -math.inf).double().softmax(
        -1
    )
    assert (in_fp32 @ columns).abs().max() > 1e-3  # so the rows are hard ones


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.tuples(st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.integers(1, 40), st.integers(1, 4)),
    seed=st.integers(0, 1000),
    hidden=st.floats(0.0, 0.9),
)
def test_any_mask_any_pairs(shape: tuple[tuple[int, int], int, int], seed: int, hidden: float) -> None:
    heads, n, slots = shape
    draw = torch.Generator().manual_seed(seed)
    call = draw_call(*heads, n, n, seed=seed)
    seen = torch.rand(2, 1, n, n, generator=draw) >= hidden
    chosen = torch.stack([torch.randperm(n + slots, generator=draw)[:slots] for _ in range(2 * n)]).view(2, n, slots)
    chosen = chosen.masked_fill(chosen >= n, -1)
    given = replace(call, mask=seen)
    wanted = frozenset({"entropy", "mean_distance"})
    assert flash_can(given, wanted)
    got = named(measure(given, wanted=wanted, pairs={"chosen": chosen}, first_key=torch.tensor([0, 0])))
    p = dense(call, seen)[1]
    # p.gather needs the first attended token of `LEFT`, which a row of few keys lacks
    there = chosen >= 0
    mass = (p.gather(-1, chosen.where(there, 0)[:, None].expand(-1, heads[0], -1, -1)) * there[:, None]).sum(-1)
    values = {
        "entropy": torch.special.entr(p).sum(-1),
        "mean_distance": torch.arange(n) - p @ torch.arange(n, dtype=torch.float64),
        "pair chosen": mass,
    }
    blind = ~seen.any(-1).expand(-1, heads[0], -1)
    for name, value in values.items():
        torch.testing.assert_close(
            got[name].double(), value.masked_fill(blind, torch.nan), atol=5e-6, rtol=5e-6, equal_nan=True
        )


def test_only_the_keys_that_are_seen_are_gone_through() -> None:
    """Under a window of 4 of 64 keys, eight queries at a time, the kernel is given no more than 11 of them."""
    call = draw_call(n_queries=64, n_keys=64)
    given = replace(call, mask=causal(64, 64, window=4))
    with (
        mock.patch.object(flash, "MASK_BYTES", 8 * 2 * 64 * 4),
        mock.patch.object(flash, "_kernel", wraps=flash._kernel) as kernel,
    ):
        measure(given, wanted=frozenset({"entropy"}))
    assert kernel.call_count == 8
    assert max(each.args[1].shape[2] for each in kernel.call_args_list) == 11


def test_one_call_of_the_kernel_answers_everything() -> None:
    call = draw_call()
    with (
        mock.patch.object(flash, "_kernel", wraps=flash._kernel) as kernel,
        mock.patch.object(swept, "score_rows") as scores,
    ):
        measure(call, wanted=SUMS - {"max", "top1"}, **asked_of(call))
    assert kernel.call_count == 1
    assert not scores.called
