"""A package that is also a function: `hw.find(...)` runs a method, and `headwise.find` is the room it lives in.

Python binds a package to its name in `headwise` when it is first imported, over any function of that name. So the
package itself is what can be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any


def callable_as(name: str, function: Callable[..., Any]) -> None:
    """Let the package `name` be called as `function`; its signature is the function's."""

    class Room(ModuleType):
        __call__ = staticmethod(function)
        __signature__ = signature(function)

    sys.modules[name].__class__ = Room
