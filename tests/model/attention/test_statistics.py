"""Row statistics against the dense pattern written out in fp64, and on rows whose statistics are known."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import ScoreRows, score_rows
from headwise.model.attention.statistics import STATISTICS, RowStatistics, row_statistics

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
LEFT = (0, 3)  # padding before each row's first token


def make_call(queries: int = 9, keys: int = 9, *, padded: bool = True, **options: Any) -> AttentionCall:
    draw = torch.Generator().manual_seed(11)
    q = 2 * torch.randn(2, 6, queries, 8, generator=draw)
    k, v = torch.randn(2, 2, keys, 8, generator=draw), torch.randn(2, 2, keys, 8, generator=draw)
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    seen = seen & (torch.arange(keys) >= torch.tensor(LEFT)[:, None])[:, None, None, :]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return AttentionCall(nn.Identity(), q, k, v, mask if padded else None, options, "eager_attention_forward")


def dense_pattern(call: AttentionCall, sinks: Tensor | None = None) -> Tensor:
    """`[batch, head, query, key]` in fp64, keys repeated for every query head that reads them."""
    keys = call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    exponentials = (call.query.double() @ keys.mT / call.query.shape[-1] ** 0.5 + call.mask.double()).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / (total if sinks is None else total + sinks.double().exp()[:, None, None])


def measure(call: AttentionCall, **given: Any) -> RowStatistics:
    queries, keys = call.query.shape[2], call.key.shape[2]
    frame: dict[str, Any] = {
        "heads": None,
        "query_columns": torch.arange(queries) + keys - queries,
        "key_columns": torch.arange(keys),
        "first_key": torch.tensor(LEFT),
    }
    return row_statistics(call, **{**frame, **given})


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("budget_bytes", [1, 2000, 2**23])
def test_every_statistic_against_the_dense_pattern(sinks: Tensor | None, budget_bytes: int) -> None:
    call = make_call(s_aux=sinks)
    spans = {"early": torch.arange(9).expand(2, 9) < 4, "odd": torch.arange(18).view(2, 9) % 2 > 0}
    valid = torch.arange(9) >= torch.tensor(LEFT)[:, None]
    got = measure(call, valid_queries=valid, spans=spans, budget_bytes=budget_bytes)

    p = dense_pattern(call, sinks)
    columns = torch.arange(9.0, dtype=torch.float64)
    first = torch.stack([p[b, :, :, start] for b, start in enumerate(LEFT)])
    expected = {
        "entropy": -(p * p.clamp(min=1e-300).log()).sum(-1),
        "max": p.amax(-1),
        "sink_mass": first,
        "learned_sink": 1 - p.sum(-1),
        "mean_distance": (p * (columns[:, None] - columns)).sum(-1) / p.sum(-1),
    }
    invalid = ~valid[:, None].expand(2, 6, 9)
    for name, values in expected.items():
        found = getattr(got, name)
        torch.testing.assert_close(found.double()[~invalid], values[~invalid], atol=2e-6, rtol=1e-5, msg=name)
        assert found[invalid].isnan().all(), name
    assert got.top1 is not None
    assert torch.equal(got.top1[~invalid], p.argmax(-1)[~invalid])
    assert (got.top1[invalid] == -1).all()
    for name, keys in spans.items():
        values = (p * keys[:, None, None]).sum(-1)
        torch.testing.assert_close(got.span_mass[name].double()[~invalid], values[~invalid], atol=2e-6, rtol=1e-5)
        assert got.span_mass[name][invalid].isnan().all()


def test_even_attention_and_attention_to_one_token() -> None:
    call = make_call(padded=False)
    even = AttentionCall(call.module, 0 * call.query, call.key, call.value, None, {}, "sdpa_attention_forward")
    got = measure(even, first_key=torch.tensor([0, 0]))
    n_seen = torch.arange(1.0, 10.0).expand(2, 6, 9)
    assert got.entropy is not None
    assert got.max is not None
    assert got.mean_distance is not None
    torch.testing.assert_close(got.entropy, n_seen.log())
    torch.testing.assert_close(got.max, 1 / n_seen)
    torch.testing.assert_close(got.mean_distance, ((n_seen - 1) / 2).double())

    previous = torch.full((9, 9), -1e9)
    previous[torch.arange(9), (torch.arange(9) - 1).clamp(min=0)] = 0
    got = measure(AttentionCall(call.module, call.query, call.key, call.value, previous, {}, call.kernel))
    assert got.entropy is not None
    assert got.top1 is not None
    assert got.mean_distance is not None
    assert (got.entropy < 1e-6).all()
    assert got.top1[0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert got.mean_distance[1, 5].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_scores_far_from_zero_keep_their_entropy() -> None:
    call = make_call()
    shifted = AttentionCall(
        call.module, call.query, call.key, call.value, call.mask + 80 * (call.mask == 0), {}, call.kernel
    )
    torch.testing.assert_close(measure(shifted).entropy, measure(call).entropy, atol=1e-4, rtol=0, equal_nan=True)


def test_columns_are_absolute_in_a_decode_step_over_a_sliding_cache() -> None:
    call = make_call(queries=1, keys=4, padded=False)
    call = AttentionCall(call.module, call.query, call.key, call.value, torch.zeros(1, 1, 1, 4), {}, call.kernel)
    got = measure(
        call, query_columns=torch.tensor([10]), key_columns=torch.arange(7, 11), first_key=torch.tensor([0, 8])
    )
    p = dense_pattern(call)
    assert got.sink_mass is not None
    assert got.mean_distance is not None
    assert got.top1 is not None
    assert (got.sink_mass[0] == 0).all()  # the first token has left the cache
    torch.testing.assert_close(got.sink_mass[1].double(), p[1, :, :, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.mean_distance, (p * torch.tensor([3.0, 2, 1, 0])).sum(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(got.top1, p.argmax(-1) + 7)


def test_a_query_that_sees_no_key_has_no_statistics() -> None:
    got = measure(make_call(s_aux=SINKS))  # row 1 begins with three tokens of padding, not declared invalid here
    for name in STATISTICS:
        values = getattr(got, name)[1, :, :3]
        assert (values == -1).all() if name == "top1" else values.isnan().all(), name


@pytest.mark.parametrize("kernel", ["eager_attention_forward", "sdpa_attention_forward"])
def test_chosen_heads_and_queries_are_the_same_statistics(kernel: str) -> None:
    call = make_call(padded=kernel.startswith("eager"))
    call = AttentionCall(call.module, call.query, call.key, call.value, call.mask, {}, kernel)
    spans, valid = {"late": torch.arange(9).expand(2, 9) > 5}, torch.arange(9) >= torch.tensor([[0], [5]])
    everything = measure(call, spans=spans, valid_queries=valid)
    heads, per_row = torch.tensor([4, 0, 1]), torch.tensor([[8, 2], [0, 7]])
    for queries in (torch.tensor([6, 3]), per_row):
        got = measure(call, heads=heads, queries=queries, spans=spans, valid_queries=valid)
        for name in STATISTICS:
            for b in range(2):
                chosen = queries if queries.ndim == 1 else queries[b]
                expected = getattr(everything, name)[b][heads][:, chosen]
                torch.testing.assert_close(getattr(got, name)[b], expected, atol=1e-6, rtol=1e-5, equal_nan=True)
                late = everything.span_mass["late"][b][heads][:, chosen]
                torch.testing.assert_close(got.span_mass["late"][b], late, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_edited_scores_take_the_place_of_the_calls() -> None:
    call = make_call(padded=False)
    call = AttentionCall(call.module, call.query, call.key, call.value, None, {}, "sdpa_attention_forward")

    def only_itself(queries: Tensor) -> ScoreRows:
        scores = score_rows(call, None, queries).scores
        return ScoreRows(scores.masked_fill(torch.arange(9) != queries[:, None], -torch.inf), None)

    got = measure(call, rows=only_itself, budget_bytes=2000)
    assert got.top1 is not None
    assert got.max is not None
    assert torch.equal(got.top1, torch.arange(9).expand(2, 6, 9))
    assert (got.max == 1).all()


def test_only_what_is_wanted_is_there() -> None:
    got = measure(make_call(), wanted=frozenset({"max"}))
    assert [name for name in STATISTICS if getattr(got, name) is not None] == ["max"]
    assert got.span_mass == {}
    assert measure(make_call(), wanted=frozenset(), spans={"a": torch.ones(2, 9).bool()}).span_mass["a"].shape == (
        2,
        6,
        9,
    )


def test_statistics_need_no_gradient() -> None:
    call = make_call()
    call.query.requires_grad_()
    entropy = measure(call).entropy
    assert entropy is not None
    assert not entropy.requires_grad


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0])
def test_mean_distance_over_4096_tokens_to_1e_4(sharpness: float) -> None:
    n, draw = 4096, torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, n, 64, generator=draw), torch.randn(1, 1, n, 64, generator=draw)
    call = AttentionCall(nn.Identity(), sharpness * q, k, k, None, {}, "sdpa_attention_forward")
    got = measure(call, first_key=torch.tensor([0]), wanted=frozenset({"mean_distance"})).mean_distance
    assert got is not None
    columns, worst = torch.arange(n, dtype=torch.float64), 0.0
    for start in range(0, n, 1024):
        chunk = slice(start, start + 1024)
        scores = (sharpness * q[0, 0, chunk]).double() @ k[0, 0].double().T / 8
        p = scores.masked_fill(columns > columns[chunk, None], -torch.inf).softmax(-1)
        expected = (p * (columns[chunk, None] - columns)).sum(-1)
        worst = max(worst, float((got[0, 0, chunk] - expected).abs().max()))
    assert worst < 1e-4


MEMORY = """
import resource, torch
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.statistics import row_statistics
torch.set_num_threads(1)
q, k = torch.randn(1, 16, 2048, 64), torch.randn(1, 4, 2048, 64)
call = AttentionCall(torch.nn.Identity(), q, k, k, None, {}, "sdpa_attention_forward")
frame = dict(query_columns=torch.arange(2048), key_columns=torch.arange(2048), first_key=torch.zeros(1).long())
row_statistics(call, heads=torch.arange(1), queries=torch.arange(64), **frame)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row_statistics(call, heads=None, **frame)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_memory_stays_at_a_few_chunks() -> None:
    """One pattern of this call is 268 MB; a chunk is 8 MiB and about four such buffers live at a time."""
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120)
    grown = float(ran.stdout) / (1024 if sys.platform == "darwin" else 1)  # ru_maxrss is in bytes there, KiB elsewhere
    assert grown < 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wanted": frozenset({"mean"})}, "no statistic named 'mean'; there are entropy, max"),
        ({"query_columns": torch.arange(8)}, r"query_columns has shape \[8\], this call needs \[9\]"),
        ({"key_columns": torch.arange(8)}, r"key_columns has shape \[8\], this call needs \[9\]"),
        ({"first_key": torch.tensor([0])}, r"first_key has shape \[1\], this call needs \[2\]"),
        ({"valid_queries": torch.ones(2, 8).bool()}, r"valid_queries has shape \[2, 8\], this call needs \[2, 9\]"),
        ({"spans": {"who": torch.ones(9).bool()}}, r"span 'who' has shape \[9\], this call needs \[2, 9\]"),
    ],
)
def test_what_does_not_fit_the_call(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(make_call(), **given)


def test_rows_that_cannot_be_rebuilt_are_refused() -> None:
    with pytest.raises(Refusal, match="paged"):
        measure(make_call(cache=object()))
