"""The low-rank bottleneck: any positive pattern at size n - 1, and the exact error below."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.errors import InputError
from headwise.zoo.theory import bottleneck_error, head_for_pattern


def tokens_and_pattern(n: int = 6, d: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, (2 * torch.randn(n, n, generator=generator, dtype=torch.float64)).softmax(1)


@pytest.mark.parametrize("size", [5, 6, 20])
def test_a_large_enough_head_shows_any_pattern(size: int) -> None:
    x, pattern = tokens_and_pattern()
    assert torch.allclose((x @ head_for_pattern(x, pattern, size) @ x.T).softmax(1), pattern, atol=1e-12)
    assert bottleneck_error(pattern, size) < 1e-12


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_smaller_head_misses_it_by_the_predicted_error(size: int) -> None:
    x, pattern = tokens_and_pattern()
    kq = head_for_pattern(x, pattern, size)
    assert int(torch.linalg.matrix_rank(kq, atol=1e-9)) == size
    missed = x @ kq @ x.T - pattern.log()
    missed = missed - missed.mean(1, keepdim=True)
    assert float(missed.norm()) == pytest.approx(bottleneck_error(pattern, size), abs=1e-12)
    assert bottleneck_error(pattern, size) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_no_trained_head_of_that_size_gets_below_the_error(seed: int) -> None:
    """Gradient descent on the factors comes down to the bound and not below it."""
    _, pattern = tokens_and_pattern()
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(6, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimiser = torch.optim.LBFGS([q, k], max_iter=300, line_search_fn="strong_wolfe")

    def missed() -> Tensor:
        scores = q @ k.T - pattern.log()
        return (scores - scores.mean(1, keepdim=True)).square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = missed()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert missed().sqrt().item() >= bottleneck_error(pattern, 2) - 1e-9
    assert missed().sqrt().item() == pytest.approx(bottleneck_error(pattern, 2), rel=1e-3)


def test_what_cannot_be_shown_is_refused() -> None:
    x, pattern = tokens_and_pattern()
    with pytest.raises(InputError, match="choose independent ones"):
        head_for_pattern(x[:, :4], pattern, 3)
    with pytest.raises(InputError, match="rows that sum to 1"):
        head_for_pattern(x, torch.eye(6, dtype=torch.float64), 3)
    with pytest.raises(InputError, match="rows that sum to 1"):
        bottleneck_error(2 * pattern, 3)
    with pytest.raises(InputError, match="choose 0 or more"):
        bottleneck_error(pattern, -1)
