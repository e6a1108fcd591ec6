"""Logistic regressions, many at once: those of all heads of a site, on the labels and on permutations of them.

    minimise over w, b:   |w|^2 / 2 + C * sum_i log(1 + exp(-y_i (w . x_i + b)))

with y_i = -1 or 1: what `sklearn.linear_model.LogisticRegression` minimises with its defaults (C = 1, the intercept not
penalised). The function is convex and smooth, so Newton's method with a halved step where it overshoots is exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

STEPS = 100
HALVINGS = 30
CLOSE = 1e-9
"""Largest entry of the gradient at the end, as a share of the number of items."""


def fitted(
    x: Float[Tensor, "head item dim"], labels: Bool[Tensor, "fit item"], c: float
) -> tuple[Float[Tensor, "fit head dim"], Float[Tensor, "fit head"]]:
    """Weights and intercepts of every fit and head, in the dtype of x (fp64)."""
    n_heads, n_items, dim = x.shape
    ones = torch.cat([x, x.new_ones(n_heads, n_items, 1)], dim=-1)
    y = labels.to(x) * 2 - 1
    penalty = torch.ones(dim + 1, dtype=x.dtype)
    penalty[-1] = 0
    wb = x.new_zeros(len(labels), n_heads, dim + 1)
    value = _loss(wb, ones, y, penalty, c)
    for _ in range(STEPS):
        margin = torch.einsum("fhd,hnd->fhn", wb, ones) * y[:, None]
        miss = torch.sigmoid(-margin)
        gradient = penalty * wb - c * torch.einsum("fhn,hnd->fhd", miss * y[:, None], ones)
        if float(gradient.abs().max()) <= CLOSE * n_items * c:
            break
        hessian = c * torch.einsum("fhn,hnd,hne->fhde", miss * (1 - miss), ones, ones)
        # The intercept's own entry vanishes where every item is told apart: a grain keeps the solution finite.
        hessian += torch.diag(penalty + 1e-10)
        step = torch.linalg.solve(hessian, gradient)
        size = x.new_ones(len(labels), n_heads)
        for _ in range(HALVINGS):
            moved = wb - size[..., None] * step
            after = _loss(moved, ones, y, penalty, c)
            worse = after > value + 1e-12 * value.abs()
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        wb, value = moved, after
    return wb[..., :-1], wb[..., -1]


def accuracy(
    x: Float[Tensor, "head item dim"],
    labels: Bool[Tensor, "fit item"],
    w: Float[Tensor, "fit head dim"],
    b: Float[Tensor, "fit head"],
) -> Float[Tensor, "fit head"]:
    """Share of items on the side of their label."""
    side = torch.einsum("fhd,hnd->fhn", w, x) + b[..., None] > 0
    return (side == labels[:, None]).to(x).mean(-1)


def _loss(wb: Tensor, ones: Tensor, y: Tensor, penalty: Tensor, c: float) -> Float[Tensor, "fit head"]:
    margin = torch.einsum("fhd,hnd->fhn", wb, ones) * y[:, None]
    return (penalty * wb.square()).sum(-1) / 2 + c * softplus(-margin).sum(-1)


__all__ = ["accuracy", "fitted"]
