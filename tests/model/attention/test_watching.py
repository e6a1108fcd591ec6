"""Watching torch's functions: every way to write attention down, against the same sums written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack as modes_on

from headwise.model.attention.watching import Running, Watch, Watching, unheard

ROWS, POSITIONS, HEADS, DIM = 2, 5, 4, 3


def by_head(x: Tensor) -> Tensor:
    return x.view(ROWS, -1, HEADS, DIM).transpose(1, 2)


def joined(z: Tensor) -> Tensor:
    return z.transpose(1, 2).reshape(ROWS, -1, HEADS * DIM)


def fused(x: Tensor) -> Tensor:
    return joined(functional.scaled_dot_product_attention(by_head(x), by_head(x), by_head(x)))


def fused_folded(x: Tensor) -> Tensor:
    q = by_head(x).reshape(ROWS * HEADS, -1, DIM)
    return joined(functional.scaled_dot_product_attention(q, q, q).view(ROWS, HEADS, -1, DIM))


def own_scores(x: Tensor) -> Tensor:
    return by_head(x) @ by_head(x).transpose(-1, -2) * DIM**-0.5


def operator(x: Tensor) -> Tensor:
    return joined(functional.softmax(own_scores(x), dim=-1) @ by_head(x))


def after_dropout_and_cast(x: Tensor) -> Tensor:
    pattern = nn.Softmax(dim=3)(own_scores(x).double())
    return joined(torch.matmul(functional.dropout(pattern, 0.5, training=False).to(x.dtype), by_head(x)))


def folded(x: Tensor) -> Tensor:
    q = by_head(x).reshape(ROWS * HEADS, -1, DIM)
    pattern = torch.softmax(torch.bmm(q, q.transpose(1, 2)) * DIM**-0.5, dim=2)
    return joined(torch.bmm(pattern, q).view(ROWS, HEADS, -1, DIM))


def copied(x: Tensor) -> Tensor:
    return joined(own_scores(x).softmax(-1).clone().matmul(by_head(x)))


def by_equation(x: Tensor) -> Tensor:
    heads = x.view(ROWS, -1, HEADS, DIM)
    pattern = (torch.einsum("bind,bjnd->bnij", heads, heads) * DIM**-0.5).softmax(dim=-1)
    return torch.einsum("b n i j, b j n d -> b i n d", pattern, heads).reshape(ROWS, -1, HEADS * DIM)


def positions_first(x: Tensor) -> Tensor:
    """Heads of a row side by side, in tensors that have positions before rows."""
    q = x.transpose(0, 1).reshape(-1, ROWS * HEADS, DIM).transpose(0, 1)
    z = torch.bmm(torch.bmm(q, q.transpose(1, 2)).mul(DIM**-0.5).softmax(-1), q)
    return z.transpose(0, 1).reshape(-1, ROWS, HEADS * DIM).transpose(0, 1)


FORMS = [
    *(fused, fused_folded, operator, after_dropout_and_cast),
    *(folded, copied, by_equation, positions_first),
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


def some_input() -> Tensor:
    return torch.randn(ROWS, POSITIONS, HEADS * DIM, generator=torch.Generator().manual_seed(0))


def pass_on(base: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> Any:
    return base(module, *args, **options)


@contextmanager
def watched(modules: list[nn.Module], handler: Callable[..., Any]) -> Iterator[None]:
    watching = Watching(modules, handler)
    try:
        yield
    finally:
        watching.remove()
    assert not any("forward" in module.__dict__ for module in modules)
    assert modes_on() == []


@forms
def test_a_call_is_seen_once_with_its_geometry_and_left_alone_bit_for_bit(form: Callable[..., Tensor]) -> None:
    module, x, seen = Attention(form), some_input(), []
    plain = module(x)

    def note(
        base: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        z = base(module, query, key, value, *args, **options)
        seen.append((module, query.shape[:3], key.shape[:3], value, z[0], options))
        return z

    with watched([module], note):
        assert torch.equal(module(x), plain)
    ((at, query, key, value, z, options),) = seen
    assert at is module
    assert query == key == (ROWS, HEADS, POSITIONS)
    assert torch.equal(value, by_head(x))
    torch.testing.assert_close(z.flatten(2), plain)
    if "own_scores" in options:
        torch.testing.assert_close(options["own_scores"].to(x.dtype), own_scores(x))


@forms
def test_what_the_handler_returns_is_what_the_module_goes_on_with(form: Callable[..., Tensor]) -> None:
    module, x = Attention(form), some_input()
    expected = module(x).view(ROWS, POSITIONS, HEADS, DIM).index_fill(2, torch.tensor([1]), 0.0).flatten(2)

    def zero_z(base: Any, module: nn.Module, *args: Any, **options: Any) -> Any:
        return (base(module, *args, **options)[0].index_fill(2, torch.tensor([1]), 0.0),)

    def zero_v(base: Any, module: nn.Module, q: Tensor, k: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        return base(module, q, k, value.index_fill(1, torch.tensor([1]), 0.0), *args, **options)

    for handler in (zero_z, zero_v):
        with watched([module], handler):
            torch.testing.assert_close(module(x), expected)
    assert not torch.equal(module(x), expected)


def test_masks_and_options_of_a_fused_call_are_handed_over() -> None:
    x, mask, seen = some_input(), torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril(1), []

    def attend(x: Tensor) -> Tensor:
        q = by_head(x)
        functional.scaled_dot_product_attention(q, q, q, mask, 0.0, scale=0.5)
        return functional.scaled_dot_product_attention(query=q[:, :, :1], key=q, value=q, is_causal=True)

    def note(base: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        seen.append((mask, options))
        return base(module, q, k, v, mask, **options)

    module = Attention(attend)
    with watched([module], note):
        output = module(x)
    assert torch.equal(output, by_head(x)[:, :, :1])  # by torch's rule a lone query sees the first key alone
    assert seen[0] == (mask, {"is_causal": False, "scaling": 0.5, "dropout": 0.0})
    assert torch.equal(seen[1][0], torch.tensor([True, False, False, False, False])[None, None, None])


def multi_head(**options: Any) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    own = nn.MultiheadAttention(HEADS * DIM, HEADS)
    nn.init.normal_(own.in_proj_bias)
    nn.init.normal_(own.out_proj.bias)
    module = Attention(lambda x: own(x, x + 1, x - 1, **options)[0])
    module.own = own
    return module, torch.randn(POSITIONS, ROWS, HEADS * DIM)


HIDDEN = torch.zeros(ROWS, POSITIONS, dtype=torch.bool).index_fill(1, torch.tensor([POSITIONS - 1]), True)
FUTURE = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("needs", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_padding_mask": HIDDEN, "attn_mask": FUTURE},
        {"attn_mask": torch.randn(ROWS * HEADS, POSITIONS, POSITIONS, generator=torch.Generator().manual_seed(1))},
    ],
    ids=["plain", "bool masks", "bias"],
)
def test_torchs_own_multi_head_attention(options: dict[str, Any], needs: bool) -> None:
    module, x = multi_head(need_weights=needs, **options)
    plain, seen = module(x), []

    def by_hand(base: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **more: Any) -> Any:
        z = base(module, q, k, v, mask, **more)[0]
        pattern = (q @ k.transpose(-1, -2) * DIM**-0.5 + mask).softmax(-1)
        torch.testing.assert_close(z, (pattern @ v).transpose(1, 2))
        seen.append(z)
        return (z,)

    with watched([module.own], by_hand):
        assert torch.equal(module(x), plain)
    weights = module.own.out_proj.weight.detach().clone()
    cut = weights.clone()
    cut[:, DIM : 2 * DIM] = 0
    module.own.out_proj.weight.data = cut
    expected = module(x)
    module.own.out_proj.weight.data = weights
    for place in ("z", "v"):

        def zero(
            base: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, place: str = place, **o: Any
        ) -> Any:
            if place == "v":
                return base(module, q, k, v.index_fill(1, torch.tensor([1]), 0.0), mask, **o)
            return (base(module, q, k, v, mask, **o)[0].index_fill(2, torch.tensor([1]), 0.0),)

        with watched([module.own], zero):
            torch.testing.assert_close(module(x), expected)
    assert len(seen) == 1


# -- what is no attention, and whose it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.softmax(-1)[..., :POSITIONS].mean() * x,  # no product
        lambda x: own_scores(x).softmax(dim=2) @ by_head(x),  # over queries, not keys
        lambda x: (own_scores(x).softmax(-1) * 2) @ by_head(x),  # another matrix by then
        lambda x: x @ x.transpose(1, 2),
        lambda x: by_head(x).transpose(-1, -2) @ own_scores(x).softmax(-1),  # the other way round
    ],
)
def test_what_only_looks_like_attention_is_left_alone(other: Callable[..., Tensor]) -> None:
    module, x = Attention(other), some_input()
    plain = module(x)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError

    with watched([module], refuse):
        assert torch.equal(module(x), plain)


def test_a_module_inside_another_is_watched_on_its_own_and_what_is_unheard_not_at_all() -> None:
    inner = Attention(fused)
    outer = Attention(lambda x: operator(inner(x)))
    quiet = Attention(lambda x: operator(x))
    seen: list[nn.Module] = []

    def note(base: Any, module: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(module)
        functional.scaled_dot_product_attention(*[torch.randn(1, 1, 2, 2)] * 3)  # a handler's own is nobody's
        return base(module, *args, **options)

    def silent(x: Tensor) -> Tensor:
        with unheard():
            return fused(x)

    quiet.attend = lambda x: operator(silent(x))
    with watched([outer, inner, quiet], note):
        outer(some_input())
        assert seen == [inner, outer]
        operator(some_input())  # outside of every module
        quiet(some_input())
    assert seen == [inner, outer, quiet]


def test_one_watch_over_a_whole_model_tells_the_innermost_module_around_both_steps() -> None:
    softmax = Attention(lambda s: s.softmax(-1))
    attention = Attention(lambda x: joined(softmax(own_scores(x)) @ by_head(x)))
    x, seen, running = some_input(), [], []

    def note(base: Any, module: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(module)
        return base(module, *args, **options)

    for module in (attention, softmax):
        module.register_forward_pre_hook(lambda m, args: running.append(Running.of(m, args, {})))
        module.register_forward_hook(lambda *_: running.pop() and None)
    with Watch(running, note) as watch:
        attention(x)
        softmax(own_scores(x))
    assert seen == [attention]
    assert [(lost.module, lost.n_axes) for lost in watch.lost] == [(softmax, 4)]


# -- what it leaves behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_or_ctrl_c_leaves_no_mode_on(error: type[BaseException]) -> None:
    def fails(x: Tensor) -> Tensor:
        operator(x)
        raise error

    module = Attention(fails)
    with watched([module], pass_on), pytest.raises(error):
        module(some_input())

    def handler(*args: Any, **options: Any) -> Any:
        raise error

    module = Attention(fused)
    with watched([module], handler):
        with pytest.raises(error):
            module(some_input())
        assert modes_on() == []


def test_threads_are_watched_apart() -> None:
    module, x, seen = Attention(operator), some_input(), []

    def note(base: Any, module: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(threading.get_ident())
        return base(module, *args, **options)

    with watched([module], note):
        threads = [threading.Thread(target=module, args=(x,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 2
        assert threading.get_ident() not in seen


def test_a_forward_of_the_modules_own_comes_back() -> None:
    module = Attention(operator)
    own = module.forward
    module.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    mine, x = module.forward, some_input()
    plain = module(x)
    watching = Watching([module], pass_on)
    assert torch.equal(module(x), plain)
    watching.remove()
    assert module.forward is mine
