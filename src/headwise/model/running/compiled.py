"""Models that `torch.compile` has been at: what a compiled graph does not notice, and how that is said.

A graph that was compiled notices neither hooks that are put on afterwards nor, in all cases, the seam. Nothing here
imports the compiler; where a program does not use it, there is nothing to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

INSTEAD = "with a compiled model use model.lowered(...), whose edits are part of the graph"


def forget_graphs() -> None:
    """Have what is compiled already, in the whole process, compiled anew on its next run."""
    dynamo = _dynamo()
    if dynamo is not None:
        dynamo.reset()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block compiled models run as if they were not."""
    if _dynamo() is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def leave_graph() -> None:
    """To be called first by hooks that no graph can hold: the compiler runs them, and what is around them, as Python.

    Under `fullgraph=True` it stops with an error instead, which then says what to use.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=f"headwise: a plan of reads and edits is open; {INSTEAD}")


def hint() -> str:
    """What to say besides, where something did not happen that a compiled graph may have left out."""
    dynamo = _dynamo()
    if dynamo is None or not dynamo.utils.counters["stats"]["unique_graphs"]:
        return ""
    return f"; something was compiled in this process: {INSTEAD}, and do not compile before hw.attach()"


def _dynamo() -> Any:
    return sys.modules.get("torch._dynamo")
