"""What the ways of decoding have in common that contrast one set of logits with another.

    s = log p + alpha (log p - log q),      p = softmax(trusted logits), q = softmax(the other logits)

in fp32 (fp64 if the model is). Where both agree s is log p to the last bit. A plausibility filter takes tokens out that
p itself finds far less likely than its first (Li et al. 2022, "Contrastive Decoding", their alpha).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.use.intervention import finite

Logits = Float[Tensor, "*position vocab"]


def log_probabilities(logits: Logits) -> Logits:
    """Natural logarithms, in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def contrasted(first: Logits, second: Logits, alpha: float | Float[Tensor, "*position 1"]) -> Logits:
    """log p + alpha (log p - log q); a token that p rules out stays out."""
    trusted, other = log_probabilities(first), log_probabilities(second)
    ruled_out = trusted == -math.inf
    apart = (trusted - other).masked_fill(ruled_out | (trusted == other), 0.0)
    return trusted + alpha * apart


def entropy(logits: Logits) -> Float[Tensor, "*position 1"]:
    """Of softmax(logits), in nats."""
    logs = log_probabilities(logits)
    return -(logs.exp() * logs.masked_fill(logs == -math.inf, 0.0)).sum(-1, keepdim=True)


def plausible(scores: Logits, first: Logits, relative_top: float, otherwise: float = -math.inf) -> Logits:
    """`scores`, with `otherwise` for tokens whose p is below `relative_top` times that of the likeliest."""
    if relative_top == 0:
        return scores
    logs = log_probabilities(first)
    least = logs.max(-1, keepdim=True).values + math.log(relative_top)
    return scores.masked_fill(logs < least, otherwise)


def checked_share(value: float, what: str) -> float:
    """`relative_top`: from 0 (no filter) to 1 (greedy). Raises InputError."""
    return finite(value, what, 0.0, 1.0)


__all__ = ["checked_share", "contrasted", "entropy", "log_probabilities", "plausible"]
