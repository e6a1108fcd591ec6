"""The residual stream of a planted model: orthogonal subspaces, each with a name and a meaning.

A subspace of n dimensions is n orthonormal columns of a random rotation, so nothing is aligned with the coordinates.
What is written as a vector `f` appears in the stream as `amplitude * basis @ f`; `read` gives `f` back from the
normalised stream. A large constant direction and a filler give every embedding the norm sqrt(width), so that a norm
layer is close to the identity, and the circuits close to linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor

from headwise.errors import InputError

CODE = 56
"""Dimensions of a token code."""

MAX_COSINE = 0.45
"""Between the codes of two tokens."""

MAX_HALF_COSINE = 0.65
"""Between the first halves, and between the second halves, of the codes of two tokens."""

AMPLITUDE = 1.5
POSITION_AMPLITUDE = 0.5

FREQUENCIES: Float[np.ndarray, 16] = 10 ** (-np.arange(16) / 4)
"""Radians per position of the position features: the fastest rotary pairs of a head of 96 with theta 1e12."""

REACH = 1024
"""Positions up to which a fixed offset is told from every other."""


@dataclass(frozen=True)
class Stream:
    """Named subspaces of a residual stream of `width` dimensions, in float64."""

    width: int
    bases: Mapping[str, Float[Tensor, "width n"]]

    @classmethod
    def drawn(cls, width: int, sizes: Mapping[str, int], generator: torch.Generator, *, centred: bool) -> Stream:
        """Random subspaces of these sizes; what is left over is `background`. `centred`: orthogonal to (1, ..., 1),
        which LayerNorm subtracts.
        """
        columns = torch.randn(width, width, generator=generator, dtype=torch.float64)
        if centred:
            columns[:, 0] = 1.0
        rotation = torch.linalg.qr(columns).Q[:, int(centred) :]
        left = rotation.shape[1] - sum(sizes.values())
        if left < 16:
            raise InputError(f"a width of {width} is too small for these circuits; use {width + 16 - left} or more")
        names = [*sizes, "background"]
        return cls(width, dict(zip(names, rotation.split([*sizes.values(), left], dim=1), strict=True)))

    def size(self, name: str) -> int:
        return self.bases[name].shape[1]

    def amplitude(self, name: str) -> float:
        if name == "constant":
            # The rest of the squared norm is room for a code, flags, positions and background in the embedding.
            return float((self.width - 16 * AMPLITUDE**2) ** 0.5)
        return POSITION_AMPLITUDE if name == "position" else AMPLITUDE

    def read(self, name: str) -> Float[Tensor, "n width"]:
        """What takes the features of a subspace from the normalised stream, at the embedding's scale."""
        return self.bases[name].T / self.amplitude(name)

    def write(self, name: str) -> Float[Tensor, "width n"]:
        return self.bases[name] * self.amplitude(name)


def token_codes(count: int, generator: torch.Generator) -> Float[Tensor, "count code"]:
    """Random signs, scaled to unit length; no two with an absolute cosine above `MAX_COSINE`, or `MAX_HALF_COSINE` in
    one half of the dimensions. Raises InputError where there is no room for so many.
    """
    codes = torch.zeros(count, CODE, dtype=torch.float64)
    for index in range(count):
        for _ in range(1000):
            draw = (torch.randint(0, 2, (CODE,), generator=generator) * 2 - 1).to(torch.float64) / CODE**0.5
            products = codes[:index] * draw
            first, second = (half.sum(dim=1) for half in products.split(CODE // 2, dim=1))
            halves = 2 * torch.maximum(first.abs(), second.abs())
            if not index or ((first + second).abs().max() <= MAX_COSINE and halves.max() <= MAX_HALF_COSINE):
                break
        else:
            raise InputError(f"{count} tokens are too many for codes of {CODE} signs; use a smaller vocabulary")
        codes[index] = draw
    return codes


@dataclass(frozen=True)
class Peak:
    """A function of distance `K(d) = sum_f weights_f cos(FREQUENCIES_f d)` with its peak, 1, at 0.

    `runner_up` is its largest value at any other distance within `REACH`.
    """

    weights: tuple[float, ...]
    runner_up: float


def sharpest_peak() -> Peak:
    """The weights, not negative and of sum 1, that keep the runner-up lowest: a small linear program."""
    distances = np.r_[-8:0, 1:REACH]
    drops = 1 - np.cos(np.outer(distances, FREQUENCIES))
    n = len(FREQUENCIES)
    found = linprog(
        np.r_[np.zeros(n), -1.0],
        A_ub=np.c_[-drops, np.ones(len(distances))],
        b_ub=np.zeros(len(distances)),
        A_eq=np.r_[np.ones(n), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * (n + 1),
    )
    return Peak(tuple(float(weight) for weight in found.x[:n]), 1 + float(found.fun))
