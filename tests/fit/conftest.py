"""Small models and items for what is fitted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import headwise as hw
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet


@pytest.fixture(scope="module")
def organism() -> Iterator[AttachedModel]:
    with hw.load("zoo:organism") as model:
        yield model


@pytest.fixture(scope="module")
def tiny() -> Iterator[AttachedModel]:
    """Llama of random weights, 4 heads on 2 KV groups in each of its layers."""
    with hw.load("zoo:tiny-llama") as model:
        yield model


@pytest.fixture(scope="module")
def questions(tiny: AttachedModel) -> ItemSet:
    """Prompts of several lengths, with foils."""
    return hw.encode(hw.probe("ioi"), tiny.tokenizer, n=24)
