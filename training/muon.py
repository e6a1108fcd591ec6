"""Muon: momentum whose update of each matrix is made nearly orthogonal (Jordan and others, 2024).

torch's own takes the Newton-Schulz steps in bfloat16, which many processors are slower at than at float32, and one
matrix at a time; here all matrices of one shape go through them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each matrix of `[n, rows, columns]` with its singular values brought near 1."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weight matrices inside the blocks; embeddings, norms and the read-out belong to AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                wanted = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    assert parameter.grad is not None
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    wanted.append(parameter.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
                scale = max(1.0, shape[0] / shape[1]) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, orthogonalized(torch.stack(wanted)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=scale)
