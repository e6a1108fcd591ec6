"""The edge of random heads: how large the singular values of KQ are before anything is learned.

A singular value of W_Q^T W_K beyond the edge is something the head has learned; below it, it may be chance. The edge of
one Gaussian matrix is Marchenko and Pastur's (1967). KQ is a PRODUCT of two, whose edge is higher: measured against the
Marchenko-Pastur edge for a matrix with KQ's entries, random heads seem to have outliers.
"""

from __future__ import annotations

import math

from headwise.errors import InputError


def gaussian_edge(rows: int, columns: int, *, std: float) -> float:
    """The largest singular value of a [rows, columns] matrix of independent entries: std (sqrt(rows) + sqrt(columns)).

    The limit of large sizes. At finite ones the largest value scatters around a point a little below it.
    Raises InputError for sizes below 1 or a negative std.
    """
    _check(rows, columns, std)
    return std * (math.sqrt(rows) + math.sqrt(columns))


def kq_edge(d_model: int, head_size: int, *, std: float) -> float:
    """The largest singular value of W_Q^T W_K, both [head_size, d_model] with independent entries of `std`.

    With c = head_size / d_model, std^2 d_model sqrt(min_{t > 0} (1 + t) (1 + c t)^2 / t), the minimum at
    t = (sqrt(c^2 + 8 c) - c) / (4 c). From free probability (derived here): the squared singular values are the
    eigenvalues of a product of two free Marchenko-Pastur matrices, S-transform 1 / (1 + c t)^2. At c = 1 the square is
    27/4. The limit of large sizes: heads of size 20 and 100 in a width of 800, drawn once each, ended 4 percent
    below it. Raises InputError for sizes below 1 or a negative std.
    """
    _check(d_model, head_size, std)
    c = head_size / d_model
    t = (math.sqrt(c * c + 8 * c) - c) / (4 * c)
    return std**2 * d_model * math.sqrt((1 + t) * (1 + c * t) ** 2 / t)


def _check(one: int, other: int, std: float) -> None:
    if one < 1 or other < 1 or std < 0:
        raise InputError(f"no edge for sizes {one} and {other} with std={std}: choose sizes >= 1 and std >= 0")
