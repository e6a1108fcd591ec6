"""Logits made anew in the forward they are of, from streams that were read on its way.

What contrasts layers (DoLa) needs no second run: the streams before some blocks are kept while the forward goes by, and
at its end a function makes of them and of the logits those that the run returns. Nothing is kept from one forward to
the next, so a cache, beams and what is drafted ahead are served as in a plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.model import read
from headwise.model.capture import Opened
from headwise.model.running.plan import Layer
from headwise.model.running.runner import Runner

Streams = Mapping[str, Float[Tensor, "batch position d_model"]]
Rescore = Callable[[Float[Tensor, "batch position vocab"], Streams], Float[Tensor, "batch position vocab"]]


class Rescoring:
    """An open rescoring. `logits` are those of the latest forward, before they were made anew."""

    def __init__(self, rescore: Rescore) -> None:
        self.logits: Tensor | None = None
        self._rescore = rescore
        self._streams: dict[str, Tensor] = {}

    def keep(self, label: str, stream: Tensor) -> None:
        self._streams[label] = stream

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """A forward of the whole model begins. Raises Refusal for what it cannot be asked."""
        self._streams.clear()
        if arguments.get("labels") is not None:
            raise Refusal("these logits are made anew and have no loss: leave labels= out and take it from the logits")

    def leave(self, arguments: Mapping[str, Any], output: Any) -> Any:
        """The forward ends.

        Raises:
            InputError: there are no logits by name, or the function gave something else than logits.
        """
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor):
            raise InputError("logits can only be made anew where they are returned by name; leave return_dict at True")
        chosen = arguments.get("logits_to_keep")
        self.logits = logits
        made = self._rescore(logits, {label: _kept(each, logits, chosen) for label, each in self._streams.items()})
        if not isinstance(made, Tensor) or made.shape != logits.shape:
            gave = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InputError(f"the function of rescoring() gave {gave}; expected logits {list(logits.shape)}")
        self._streams.clear()
        output["logits"] = made
        return output


@contextmanager
def open_rescoring(runner: Runner, blocks: Sequence[str], rescore: Rescore) -> Iterator[Rescoring]:
    """The block behind `AttachedModel.rescoring`.

    Raises:
        InputError: no such blocks, or a function that cannot be called.
        PlanConflict: a plan that this conflicts with.
    """
    if not callable(rescore):
        raise InputError(f"rescoring() takes a function of logits and streams, not a {type(rescore).__name__}")
    opened = Rescoring(rescore)
    reads = tuple(
        read.residual([label], where="pre", name=f"stream_{place}", reduce=partial(opened.keep, label))
        for place, label in enumerate(blocks)
    )
    with runner.open(Layer(reads, (), {}, None, False, Opened(), rescoring=opened)):
        yield opened


def _kept(stream: Tensor, logits: Tensor, chosen: Any) -> Tensor:
    """The positions of the stream that there are logits of."""
    return stream[:, chosen if isinstance(chosen, (Tensor, slice)) else slice(-logits.shape[1], None)]
