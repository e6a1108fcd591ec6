"""Random weights that leave nothing for a test to miss: attention far from uniform, biases and norms that matter.

What transformers initialises is nearly a no-op: weights of 0.02, biases of 0, norms of 1. A wrong scale, a forgotten
bias or a swapped head would then change little, and a test would pass on it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SCORE_GAIN = 1.2
"""Standard deviation of q and k for a normalised input: scores then spread by about 1.4, and patterns are uneven."""

MATRIX_GAIN = 0.7
EMBEDDING_STD = 0.2
VECTOR_STD = 0.1

_MAKES_QUERY_OR_KEY = re.compile(
    r"(^|\.)(q|k|qkv|query|key|query_key_value|wqkv|wk|wq_b|c_attn|[qk](_[ab])?_(proj|lin)|kv(_b)?_proj"
    r"|kv_a_proj_with_mqa|input_linear|to_[qk]|add_[qk]_proj)\.weight$",
    re.IGNORECASE,
)


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Redraw the spread of every weight in place, by the kind of module and the name of the parameter.

    Matrices are rescaled to a standard deviation of gain / sqrt(inputs), stacks of experts to gain / sqrt(mean of
    inputs and outputs), with `SCORE_GAIN` where they make queries or keys and `MATRIX_GAIN` elsewhere; embeddings
    to `EMBEDDING_STD`. Biases, norm weights and every other vector (sinks, layer scales, decay rates), and matrices
    that start as zeros, get normal noise of `VECTOR_STD` on top. Class tokens and bare position tables stay as they
    are. Draws from the global random state: the caller isolates it.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied weights and shared layers are rescaled once
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{own_name}" if module_name else own_name
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(VECTOR_STD * torch.randn_like(parameter))
            elif isinstance(module, nn.Embedding):
                _rescale(parameter, EMBEDDING_STD)
            elif (fan := _fan(module, own_name, parameter)) is not None:
                gain = SCORE_GAIN if _MAKES_QUERY_OR_KEY.search(name) else MATRIX_GAIN
                _rescale(parameter, gain * fan**-0.5)


def _fan(module: nn.Module, own_name: str, parameter: Tensor) -> float | None:
    """Inputs to one output of a linear map; None for a parameter that is not one."""
    if parameter.ndim == 3 and parameter.shape[0] > 1 and not isinstance(module, nn.Conv1d):
        # Some types stack experts as [expert, output, input] and some the other way round.
        return sum(parameter.shape[1:]) / 2
    if own_name != "weight":
        return None
    if isinstance(module, Conv1D):  # GPT-2's linear layer, stored [input, output]
        return int(module.weight.shape[0])
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.weight[0].numel()
    if parameter.ndim == 2:  # nn.Linear, and the routers that are laid out like one
        return int(parameter.shape[1])
    return None


def _rescale(parameter: Tensor, std: float) -> None:
    spread = parameter.std()
    if spread > 0:
        parameter.mul_(std / spread)
