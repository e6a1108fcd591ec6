"""Models small enough that a bench of speed runs in a moment."""

from __future__ import annotations

import pytest

from headwise.benches.peers import Work
from headwise.benches.shapes import Shape, random_items

SMALL = {
    "gpt2": Shape("gpt2", 3, 4, 4, 32, 64, 97, 64),
    "llama": Shape("llama", 3, 4, 2, 32, 48, 97, 64),
}


@pytest.fixture(params=["gpt2", "llama"])
def work(request: pytest.FixtureRequest) -> Work:
    """Two items of 12 tokens on three layers of four heads."""
    shape = SMALL[request.param]
    return Work(shape, random_items(shape, n=2, tokens=12, seed=3), seed=1)
