"""What inputs are made of: noise, tokens, and the settings of a model that say how much of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.model.running.run import named_arguments

LENGTH = 24
Inputs = dict[str, Any]


def noise(*shape: int) -> Tensor:
    """Standard normal values, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(model: nn.Module, length: int = LENGTH, seed: int = 0) -> Tensor:
    """`[2, length]` ordinary tokens: neither special ones nor placeholders."""
    vocabulary = setting(model, "vocab_size") or 64
    low, high = min(8, int(vocabulary) - 1), min(int(vocabulary), 90)
    return torch.randint(low, max(high, low + 1), (2, length), generator=torch.Generator().manual_seed(seed))


def setting(model: nn.Module, name: str) -> Any:
    """A setting of the configuration or of the first of its parts that has it."""
    waiting = [getattr(model, "config", None)]
    while waiting:
        config = waiting.pop(0)
        try:
            value = getattr(config, name, None)
        except Exception:  # configurations with settings by layer refuse to be asked as a whole
            value = None
        if value is not None:
            return value
        waiting += [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    return None


def text(model: nn.Module) -> Inputs:
    inputs: Inputs = {"input_ids": tokens(model)}
    if "attention_mask" in named_arguments(model, (), {}):
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, :5] = 0
        inputs["attention_mask"] = mask
    return with_decoder(model, inputs)


def with_decoder(model: nn.Module, inputs: Mapping[str, Any]) -> Inputs:
    if "decoder_input_ids" in named_arguments(model, (), {}):
        return {**inputs, "decoder_input_ids": tokens(model, 7, seed=1)}
    return dict(inputs)
