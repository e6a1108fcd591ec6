"""Two streams of one model: the first is the run as the caller sees it, the second runs beside it with its own edits.

What the first stream can take from the second: its logits (`combine`, for contrastive decoding) and its activations
(edits with the value `hw.edit.OTHER`). Both streams are given the same tokens, so in `generate()` both continue with
what was chosen from the first stream's (combined) logits, whatever the search: greedy, sampling or beams.

    batch   both streams in one forward of 2B rows and one cache
    caches  the second stream runs first, on a cache of its own

The second stream may lack a span of the prompt (`without`), as if its tokens had never been there.

A cache that comes filled into the block is where both streams start. Inside it goes with both of them: in `batch` it
holds 2B rows, in `caches` it has a companion, and reordering, cropping or copying it does the same to the second
stream's part. When the block ends it is the first stream's cache and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from headwise.errors import InputError, Refusal
from headwise.model.capture import Fired, Opened
from headwise.model.edit import Edit
from headwise.model.positions import SpanRows
from headwise.model.running.caches import Caches
from headwise.model.running.plan import Layer
from headwise.model.running.requirements import require_span
from headwise.model.running.run import Run, parameter_names
from headwise.model.running.runner import Runner
from headwise.model.running.without import gapped, require_gaps

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Combine = Callable[[Tensor, Tensor], Tensor]
MODES = ("batch", "caches")

_ONE_FOR_ALL_ROWS = ("cache_position", "logits_to_keep")
_MAY_BROADCAST = ("attention_mask", "decoder_attention_mask", "position_ids")
_NESTED = ("attention_mask", "encoder_outputs")


class Dual:
    """An open dual run. `first` and `second` are the logits of the latest forward, before `combine`."""

    def __init__(
        self, runner: Runner, combine: Combine | None, mode: str, without: str | None, edits: tuple[Edit, ...]
    ) -> None:
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.shared_batch = mode == "batch"
        self._runner = runner
        self._combine = combine
        self._without = without
        self._from_the_first = any("first" in (edit.keys, getattr(edit.operation, "to", None)) for edit in edits)
        self.opened = Opened()
        self._caches = Caches()
        self._n_rows = 0
        self._second_output: Any = None

    @property
    def fired(self) -> tuple[Fired, ...]:
        """What the second stream's edits met in the latest run."""
        return self.opened.fired

    @property
    def combines(self) -> bool:
        """Whether the logits that a run returns are made of both streams'."""
        return self._combine is not None

    def enter(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], enter: Callable[..., None]) -> Arguments:
        """A forward of the whole model begins: widen its batch, or run the second stream first.

        `enter(args, kwargs)` tells the run that the forward has begun with these arguments.

        Raises:
            InputError, Refusal: an argument that two streams cannot have.
        """
        model = self._runner.model
        names = parameter_names(type(model).forward)[: len(args)]
        args, kwargs = args[len(names) :], {**dict(zip(names, args, strict=False)), **kwargs}
        _refuse(run, kwargs)
        cache = kwargs.get("past_key_values")
        if self.shared_batch:
            self._n_rows, args, kwargs = doubled(args, kwargs)
            self._caches.widen(cache, self._n_rows)
            run.stream = "both"
            enter(args, kwargs)
            return args, self._lacking(run, kwargs, beside=True)
        enter(args, kwargs)
        beside = self._lacking(run, kwargs, beside=False)
        if cache is not None:
            companion = self._caches.companion(cache)
            beside = {**beside, "past_key_values": companion}
            if (known := self._runner.known_prompt(cache)) is not None:
                self._runner.prompts.setdefault(companion, known)
        run.stream = "second"
        self._second_output = model.forward(*args, **beside)
        run.stream = "first"
        run.again()
        return args, kwargs

    def _lacking(self, run: Run, kwargs: dict[str, Any], *, beside: bool) -> dict[str, Any]:
        if self._without is None:
            return kwargs
        frame = run.open[-1].frame
        first = frame is not None and frame.span(self._without).gather(1, frame.first[:, None])
        if self._from_the_first and first is not False and bool(first.any()):
            raise Refusal(
                f"span {self._without!r} holds a row's first token, and an edit of the second stream is of it; "
                "leave one of both out"
            )
        return gapped(self._runner.model, kwargs, frame, self._without, beside=beside)

    def leave(self, run: Run, output: Any) -> Any:
        """The forward ends: part the streams, and give out the first one with the combined logits.

        Raises:
            InputError: nothing to combine, or `combine` returned something else than logits.
        """
        run.stream = "unparted"
        run.exchange.clear()
        if not isinstance(output, Mapping):
            raise InputError("a dual run needs outputs by name; leave return_dict at True")
        logits, cache = output.get("logits"), output.get("past_key_values")
        if self.shared_batch:
            self.first, self.second = (None, None) if logits is None else logits.chunk(2)
            output = first_half(output)
            self._caches.adopt(cache, self._n_rows)
        else:
            self.first, self.second = logits, self._second_output.get("logits")
            self._caches.couple(cache, self._second_output.get("past_key_values"))
            self._second_output = None
        if self._combine is None:
            return output
        if self.first is None or self.second is None:
            raise InputError(f"combine= needs logits, and the model returns only {', '.join(output)}")
        combined = self._combine(self.first, self.second)
        if not isinstance(combined, Tensor) or combined.shape != self.first.shape:
            gave = list(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
            raise InputError(f"combine() gave {gave}; expected logits of shape {list(self.first.shape)}")
        output["logits"] = combined
        return output

    def close(self) -> None:
        self._caches.close()


@contextmanager
def open_dual(
    runner: Runner,
    second: Sequence[Edit],
    combine: Combine | None,
    mode: str,
    without: str | None,
    spans: Mapping[str, SpanRows],
    prompt_length: int | None,
    strict: bool,
) -> Iterator[Dual]:
    """The block behind `AttachedModel.dual`.

    Raises:
        InputError: a mode that does not exist, a `combine` that cannot be called, a span that was not given.
        Refusal: a model of which no span can be left out.
        PlanConflict: a dual run is open already, or what a plan may conflict with.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if combine is not None and not callable(combine):
        raise InputError(f"combine= takes a function of two logits tensors, not {type(combine).__name__}")
    edits = tuple(dataclasses.replace(edit, stream="second") for edit in second)
    if without is not None:
        require_span(f"span:{without}", runner.named_spans(spans))
        with runner.unplanned():
            require_gaps(runner.model)
    dual = Dual(runner, combine, mode, without, edits)
    try:
        reads = tuple(each for edit in edits for each in edit.reads)
        with runner.open(Layer(reads, edits, dict(spans), prompt_length, strict, dual.opened, dual)):
            yield dual
    finally:
        dual.close()


def _refuse(run: Run, kwargs: Mapping[str, Any]) -> None:
    """Raises Refusal for what cannot be asked of a forward in a dual run."""
    if kwargs.get("labels") is not None:
        raise Refusal("a dual run has no loss of its own: leave labels= out and take the loss from the logits")
    if run.checkpointing and torch.is_grad_enabled():
        raise Refusal("gradient checkpointing recomputes layers after the two streams have parted; switch it off")
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise Refusal(f"past_key_values is a {type(cache).__name__}; a dual run takes a transformers Cache")


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """How many items there are, and arguments that hold each twice: all of the first stream, then all of the second.

    Raises:
        InputError: nothing has a batch axis.
        Refusal: an argument that is not laid out by items.
    """
    main = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tensors = (*map(kwargs.get, main), *args, *kwargs.values())
    first = next((value for value in tensors if isinstance(value, Tensor) and value.dim() > 1), None)
    if first is None:
        raise InputError("a dual run needs inputs with a batch axis")
    n_rows = len(first)

    def twice(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return twice_tensor(name, value)
        if isinstance(value, Mapping) and name == "mm_encoder_outputs":
            return {modality: _features_twice(f"{name}[{modality!r}]", part) for modality, part in value.items()}
        if isinstance(value, Mapping) and name in _NESTED:
            parts = {key: twice(name, part) for key, part in value.items()}
            return parts if type(value) is dict else type(value)(**parts)
        if isinstance(value, (tuple, list)) and name in _NESTED:
            return type(value)(twice(name, part) for part in value)
        if value is None or isinstance(value, (bool, int, float, str, Cache)) or not value:
            return value
        raise Refusal(f"{name} is a {type(value).__name__}, which cannot be doubled; use model.dual(mode='caches')")

    def twice_tensor(name: str, value: Tensor) -> Tensor:
        if value.dim() == 0 or name in _ONE_FOR_ALL_ROWS:
            return value
        if name == "position_ids" and value.dim() == 3:  # one set per axis of the rotary embedding, then rows
            return value if value.shape[1] == 1 else torch.cat([value, value], dim=1)
        if len(value) == n_rows:
            return torch.cat([value, value])
        if len(value) == 1 and name in _MAY_BROADCAST:
            return value
        raise Refusal(
            f"{name} has {len(value)} rows for {n_rows} items, so it cannot be doubled; use model.dual(mode='caches')"
        )

    values = tuple(twice(f"argument {place}", value) for place, value in enumerate(args))
    return n_rows, values, {name: twice(name, value) for name, value in kwargs.items()}


def _features_twice(name: str, encoded: Any) -> Any:
    """What `generate` encoded beforehand: features of each picture, in the order of the items."""
    features = encoded.pooler_output
    if features is None or getattr(encoded, "deepstack_features", None) is not None:
        raise Refusal(f"{name} has more than features by picture and cannot be doubled; use model.dual(mode='caches')")
    return type(encoded)(pooler_output=torch.cat([features] * 2) if isinstance(features, Tensor) else [*features] * 2)


def first_half(output: Any, name: str = "the output") -> Any:
    """The first stream's rows of everything in an output but its cache.

    Raises:
        Refusal: a number over all rows, such as a loss.
    """
    if isinstance(output, Tensor):
        if output.dim() == 0:
            raise Refusal(f"{name} is one number for both streams; leave it out, or use model.dual(mode='caches')")
        return output[: len(output) // 2]
    if isinstance(output, MutableMapping):
        for key, value in list(output.items()):
            output[key] = first_half(value, key)
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(first_half(part, name) for part in output)
    return output
