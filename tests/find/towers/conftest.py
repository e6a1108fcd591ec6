"""Towers that look at tiny pictures, and pictures to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import headwise as hw
from headwise.model.attached import AttachedModel


@pytest.fixture(scope="module")
def vit() -> Iterator[AttachedModel]:
    """Three layers of four heads; 36 patches behind CLS."""
    with hw.load("zoo:tiny-vit") as model:
        yield model


@pytest.fixture(scope="module")
def classifier() -> Iterator[AttachedModel]:
    """Two layers of four heads, 16 patches behind CLS, three classes that its pictures are well apart in."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
        initializer_range=0.2,
    )
    with hw.attach(ViTForImageClassification(config).eval()) as model:
        yield model


@pytest.fixture(scope="session")
def pictures() -> Callable[[int, int], Tensor]:
    """`pictures(n, side)`: pixel values `[n, 3, side, side]`."""
    return lambda n, side: torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def looking() -> Callable[..., Any]:
    """`with looking(model, heads, pattern)`: these heads have that pattern `[query, key]`, whatever they are shown."""

    def force(model: AttachedModel, heads: Any, pattern: Tensor) -> Any:
        return model.editing(hw.edit.rewrite(heads, lambda current, here: pattern.to(current).expand(current.shape)))

    return force
