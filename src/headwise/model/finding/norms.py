"""Norms by measurement: which kind a module is, its eps, gain and bias, and the factor it puts on each position."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, slots=True)
class NormAffine:
    """What a norm does after standardising: `output = gain * standardised + bias`, one number per channel."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A norm that reads a stack's last block: `output = gain * (x - centre) * scale + bias`.

    `kind` "rms": centre 0, scale 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019). "layer": centre mean(x), scale
    1 / sqrt(var(x) + eps) with the biased variance (Ba et al. 2016). Kind and `eps` are measured on the module.
    """

    module: str
    kind: NormKind
    eps: float
    d_model: int

    def scale(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position"]:
        """The factor on the (centred) stream at each position, in fp32 (fp64 if `x` is fp64)."""
        return _scale(x, self.kind, self.eps).squeeze(-1)

    def affine(self, model: nn.Module) -> NormAffine:
        """Gain and bias as the module applies them now (Gemma's gain is 1 + weight), in at least fp32.

        Raises InputError if `model` has no such module, or its weights are not in memory (offloaded).
        """
        norm = submodule(model, self.module, "final norm")
        if not may_be_norm(norm):
            raise InputError(f"final norm {self.module!r}: its weights are not in memory; load it without offload")
        like = next(norm.parameters(), torch.empty(0))
        return _affine(_in_float(norm), self.kind, _alternating(self.d_model, like)[None, None])


def submodule(model: nn.Module, name: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(f"{what}: {type(model).__name__} has no module {name!r}; see its named_modules()") from None


def float_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _scale(x: Tensor, kind: NormKind, eps: float) -> Tensor:
    x = x.to(float_dtype(x))
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return (centred.square().mean(-1, keepdim=True) + eps).rsqrt()


def _standardise(x: Tensor, kind: NormKind, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return centred * _scale(x, kind, eps)


def may_be_norm(module: nn.Module) -> bool:
    """A norm has no parts, holds vectors only, and must have them in memory to be measured (not offloaded)."""
    parameters = list(module.parameters(recurse=False))
    return not list(module.children()) and all(p.ndim <= 1 and not p.is_meta for p in parameters)


def measure_norm(name: str, module: nn.Module, x: Tensor, output: Tensor | None) -> FinalNorm | None:
    """The module, which returned `output` for x alone, as a norm of the last axis, if that is what it computes."""
    d_model = x.shape[-1]
    if output is None or output.shape != x.shape or d_model < 3 or not may_be_norm(module):
        return None
    norm = _in_float(module)
    generator = torch.Generator().manual_seed(0)
    # Off centre, so that the two kinds differ.
    probe = (1 + 2 * torch.randn(x.shape, generator=generator)).to(x.device, float_dtype(x))
    signs = _alternating(d_model, x).view([1] * (x.ndim - 1) + [d_model])
    kinds: tuple[NormKind, ...] = ("rms", "layer")
    with torch.no_grad():
        for kind in kinds:
            try:
                affine = _affine(norm, kind, signs)
            except (RuntimeError, ValueError):  # it does not take one position alone, as a norm of groups does not
                return None
            eps = _eps(norm, kind, signs, affine.gain)
            if eps is not None:
                expected = affine.gain * _standardise(probe, kind, eps) + affine.bias
                if torch.allclose(norm(probe), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                    return FinalNorm(name, kind, eps, d_model)
    return None


def _in_float(module: nn.Module) -> Callable[[Tensor], Any]:
    """The forward of the module's class with its vectors in at least fp32, without anyone's hooks on the module."""
    twin = copy.copy(module)
    for store in ("_parameters", "_buffers"):
        held: dict[str, Tensor | None] = getattr(module, store)
        twin.__dict__[store] = {
            name: value.detach().to(float_dtype(value)) if value is not None and value.is_floating_point() else value
            for name, value in held.items()
        }
    return partial(type(module).forward, twin)


def _alternating(d_model: int, like: Tensor) -> Tensor:
    signs = torch.ones(d_model, dtype=float_dtype(like), device=like.device)
    signs[1::2] = -1
    return signs


def _affine(norm: Callable[[Tensor], Any], kind: NormKind, signs: Tensor) -> NormAffine:
    """Standardising is odd, so the odd part of norm(x) is gain * standardised(x), and the even part is the bias."""
    with torch.no_grad():
        # 1e3: eps, a fraction of one in every norm, drops out against a variance of 1e6.
        up, down = norm(1e3 * signs), norm(-1e3 * signs)
    gain = (up - down) / 2 / _standardise(signs, kind, 0.0)
    return NormAffine(gain=gain.flatten(), bias=((up + down) / 2).flatten())


def _eps(norm: Callable[[Tensor], Any], kind: NormKind, signs: Tensor, gain: Tensor) -> float | None:
    """Solved from how the response to an input of size s falls short of gain, at the first s where it does by half."""
    channel = int(gain.abs().argmax())
    if not bool(gain.isfinite().all()) or gain[channel] == 0:
        return None
    wanted = float(gain[channel] * _standardise(signs, kind, 0.0).flatten()[channel])
    variance = float(_scale(signs, kind, 0.0)) ** -2
    for exponent in range(8):
        s = 10.0**-exponent
        response = float((norm(s * signs) - norm(-s * signs)).flatten()[channel]) / 2
        if response == 0:
            return None
        shortfall = (wanted / response) ** 2 - 1
        if shortfall > 0.5:
            # Already at size 1: the response grows with its input as a plain gain does, an identity for one.
            return shortfall * s * s * variance if exponent > 0 else None
    return 0.0
