"""Small models and items for what is fitted."""

from __future__ import annotations

import pytest

import headwise as hw
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


@pytest.fixture(scope="session")
def organism() -> AttachedModel:
    return hw.load("zoo:organism")


@pytest.fixture(scope="session")
def tiny() -> AttachedModel:
    """Llama of random weights, 4 heads on 2 KV groups in each of its layers."""
    return hw.load("zoo:tiny-llama")


@pytest.fixture(scope="session")
def questions(tiny: AttachedModel) -> ItemSet:
    """Prompts of several lengths, with foils."""
    return hw.encode(hw.probe("ioi"), tiny.tokenizer, n=24)
