"""What every test module leaves behind: nothing. A model that stays attached would be seen by the tests of the seam."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def caches_of_the_module_are_let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attached models in `@cache` functions of a test module are detached when the last handle goes."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == request.module.__name__:
            value.cache_clear()
    gc.collect()
