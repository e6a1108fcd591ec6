"""A loss that is taken back early has the value and the gradient that it would have had."""

from __future__ import annotations

import torch
from torch import nn

from headwise.fit.taken_back import taken_back


def test_value_and_gradient_are_those_of_the_loss() -> None:
    x, y, unused = (nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(s))) for s in range(3))

    def loss() -> torch.Tensor:
        return (x.sin() * y).sum() ** 2

    loss().backward()
    wanted = [x.grad.clone(), y.grad.clone()]
    x.grad = y.grad = None
    taken = taken_back(loss(), (x, y, unused))
    assert taken.item() == loss().item()
    assert x.grad is None
    (2 * taken + taken).backward()
    torch.testing.assert_close([x.grad, y.grad], [3 * each for each in wanted])
    assert unused.grad is None


def test_nothing_of_the_loss_is_run_again_in_backward() -> None:
    x, calls = nn.Parameter(torch.ones(2)), []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient

    taken = taken_back(Noted.apply(x).sum(), [x])
    assert calls == [1]
    taken.backward()
    assert calls == [1]
    assert torch.equal(x.grad, torch.ones(2))
