"""The tiny model of one row."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import model_type_to_module_name

from headwise.benches.coverage.particulars import PARTICULARS
from headwise.benches.coverage.rows import Row
from headwise.benches.coverage.shrinking import shrunk
from headwise.zoo.weights import roughen

LARGEST = 40_000_000
"""Parameters; a model with more was not made small."""


class TooLarge(Exception):
    """The rule did not make this model small."""


def build(row: Row) -> nn.Module:
    """The tiny model of a row, in evaluation mode, its weights random and the same every time."""
    model_class = class_of(row)
    special = PARTICULARS.get(row.key, PARTICULARS.get(row.model_type, {}))
    config = shrunk(model_class.config_class, special)
    with torch.device("meta"):
        outline = model_class._from_config(config)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if parameters > LARGEST:
        largest = sorted(outline.named_parameters(), key=lambda each: -each[1].numel())[:8]
        raise TooLarge(f"{parameters:,} parameters: " + ", ".join(f"{name} {tuple(p.shape)}" for name, p in largest))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = model_class._from_config(config)
        roughen(model)
    return model.eval()


def class_of(row: Row) -> Any:
    """The model class of a row, also one that transformers names for its auto-classes and does not export."""
    if hasattr(transformers, row.class_name):
        return getattr(transformers, row.class_name)
    package = model_type_to_module_name(row.model_type)
    return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), row.class_name)
