"""Patterns that go elsewhere than into their product with values, noticed while a model is probed.

An edited pattern is put into the product alone. Where the model takes the same softmax in once more (relative
embeddings of values, for one), that second use would keep the pattern as it was, so that no edit of it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from headwise.model.attention.layouts import LaidOut, Product, holds_values_of
from headwise.model.attention.watching import WAITING, Handler, Running, Softmax, Watch


class PatternUses(Watch):
    """A watch that also notes every use of a pattern beside its product, as long as the module that attends runs.

    `elsewhere` gives the names of the functions that took a pattern in, by the number of the call that was handed over
    for it. Views and copies are no uses; what is done with them is.
    """

    def __init__(self, running: list[Running], handler: Handler) -> None:
        super().__init__(running, handler)
        self.elsewhere: dict[int, str] = {}
        self._n_calls = 0
        self._followed: list[_Followed] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        products = [followed.call for followed in self._followed]
        output = super().__torch_function__(func, types, args, kwargs)
        if not self.hears:
            return output
        for followed, call in zip(tuple(self._followed), products, strict=False):
            if followed.call == call and followed.running_in(self.running) and followed.used(args, kwargs, output):
                followed.uses.append(getattr(func, "__name__", str(func)))
            if followed.call is not None and followed.uses:
                self.elsewhere.setdefault(followed.call, followed.uses[0])
        return output

    def _after_softmax(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        pattern = super()._after_softmax(func, args, kwargs)
        if self._waiting and self._waiting[-1].pattern is pattern:
            self._followed = [*self._followed[1 - WAITING :], _Followed(self._waiting[-1])]
        return pattern

    def _multiplied(self, product: Product, softmax: Softmax) -> Any:
        before = self._n_calls
        output = super()._multiplied(product, softmax)
        for followed in self._followed:
            if followed.softmax is softmax and self._n_calls > before:
                followed.call = before
        return output

    def _handed_over(self, call: LaidOut, module: Any) -> Any:
        self._n_calls += 1
        return super()._handed_over(call, module)


class _Followed:
    """One pattern with all of its copies, which are kept so that no other tensor takes their place in memory."""

    def __init__(self, softmax: Softmax) -> None:
        self.softmax = softmax
        self.call: int | None = None  # number of the call that its product was handed over as
        self.uses: list[str] = []
        self._copies = [softmax.pattern]

    def running_in(self, running: list[Running]) -> bool:
        return bool(running) and any(now is self.softmax.running[-1] for now in running)

    def used(self, args: Any, kwargs: Mapping[str, Any] | None, output: Any) -> bool:
        """Whether a function that was given these arguments made something else of the pattern."""
        if not any(self._holds(tensor) for tensor in _tensors((args, kwargs or {}))):
            return False
        made = [tensor for tensor in _tensors(output) if not self._holds(tensor)]
        return bool(made)

    def _holds(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        if any(copy.untyped_storage().data_ptr() == storage for copy in self._copies):
            return True
        if not holds_values_of(tensor, self.softmax.pattern):
            return False
        self._copies.append(tensor)
        return True


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in arguments or results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
