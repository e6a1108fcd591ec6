"""The edge of random heads, for one matrix and for the product that KQ is."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.errors import InputError
from headwise.zoo.theory import gaussian_edge, kq_edge


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_of_kq(d_model: int, head_size: int) -> float:
    """Of W_Q^T W_K, without writing out [d_model, d_model]: W^T = Q R, and Q changes no singular value."""
    r_q, r_k = (torch.linalg.qr(gaussian(seed, d_model, head_size)).R for seed in (1, 2))
    return float(torch.linalg.matrix_norm(r_q @ r_k.T, 2))


@pytest.mark.parametrize(("rows", "columns"), [(600, 600), (100, 800)])
def test_one_random_matrix_ends_at_its_edge(rows: int, columns: int) -> None:
    largest = float(torch.linalg.matrix_norm(gaussian(0, rows, columns), 2))
    assert largest == pytest.approx(gaussian_edge(rows, columns, std=0.02), rel=0.02)


@pytest.mark.parametrize(("d_model", "head_size"), [(600, 600), (2400, 300), (6400, 160)])
def test_a_random_head_ends_at_the_edge_of_the_product(d_model: int, head_size: int) -> None:
    largest = largest_of_kq(d_model, head_size)
    assert largest == pytest.approx(kq_edge(d_model, head_size, std=0.02), rel=0.02)
    # The edge for independent entries as large as those of KQ calls that head an outlier.
    entries = 0.02**2 * math.sqrt(head_size)
    assert largest > 1.2 * gaussian_edge(d_model, d_model, std=entries)


def test_known_values() -> None:
    assert kq_edge(1, 1, std=1.0) ** 2 == pytest.approx(27 / 4)
    assert kq_edge(100, 100, std=0.5) == pytest.approx(0.25 * 100 * math.sqrt(27 / 4))
    # A head far smaller than the model: the factors have nearly orthogonal rows, W_Q^T W_K nearly std^2 d_model.
    assert kq_edge(10**8, 1, std=1.0) == pytest.approx(10**8, rel=1e-3)
    with pytest.raises(InputError, match="choose sizes >= 1"):
        kq_edge(0, 1, std=1.0)
    with pytest.raises(InputError, match="std >= 0"):
        gaussian_edge(1, 1, std=-1.0)
