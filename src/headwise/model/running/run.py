"""One run of a model under a plan: which forward and tower we are in, and where its tokens stand."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.heads import SiteId
from headwise.model.capture import Captured
from headwise.model.positions import Frame, SpanRows, Window
from headwise.model.running.plan import Plan
from headwise.model.running.spans import IMAGE, TEXT, own_spans
from headwise.model.site import Site

Stream = Literal["first", "second", "both", "unparted"]
Place = tuple[SiteId, str, str, tuple[int, int, int]]  # site, variable and point, and which call of the run

PROJECTION = ":projection"  # projections are counted apart from the attention modules of their tower
SEQUENCE_NAMES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states")


class Exchange:
    """What the first stream of a dual run can ask of the second, whose part of every call comes before its own.

    A place holds a function of heads and queries (None for values), so that nothing is copied or computed unless asked.
    """

    def __init__(self) -> None:
        self._sources: dict[Place, Callable[..., Tensor]] = {}

    def keep(self, place: Place, source: Callable[..., Tensor]) -> None:
        self._sources[place] = source

    def source(self, place: Place) -> Callable[..., Tensor] | None:
        return self._sources.get(place)

    def clear(self) -> None:
        self._sources.clear()


@dataclass(eq=False)
class Opening:
    """A tower that is running: its arguments by name, and the frame of its tokens if they can be placed."""

    module: nn.Module
    arguments: Mapping[str, Any]
    frame: Frame | None


@dataclass(eq=False)
class Run:
    """From the entry into the outermost forward or `generate` to its return.

    Attributes:
        received: by edit, site and stream, the keys that took much of the prompt's attention (see `received.py`).
        lacking: z at the prompt's last token in runs of the prompt without a span; `decided`: by edit, site and stream,
            the numbers that were chosen from it (see `decided.py`); `settled`: of sites that are multiplied by such
            numbers and by nothing else from now on, the factors of all heads.
        prompt: length of the prompt where it is known beforehand (`generate`, or given with the plan).
        attended: the 2-D attention mask that `generate` was given.
        stream: in a dual run, whose rows a forward holds; `unparted` outside the model's own forward. Else None.
        exchange: what the streams of a dual run show each other.
        rows: rows of the batch before beams were expanded, where known.
        checkpointing: whether layers are recomputed in backward.
        open: towers being run, outermost first.
        frames: the latest frame of each tower, by qualified name.
        passes: how often each tower ran within the current forward of the outermost module.
        shapes: rows and positions of the latest call of each site, for hooks further down.
        lengths: of joint attention, how many tokens of each kind its latest call was given.
        calls: by tower, how often each of its modules attended in the tower's current pass.
        replays: the same for a recomputed forward (gradient checkpointing), which overwrites what the first one left.
        pictures: the columns of `image`, where the tokens of the run hold pictures; `shown`: how many columns were
            looked through for them.
    """

    plan: Plan
    thread: int = field(default_factory=threading.get_ident)
    generating: bool = False
    prompt: int | None = None
    attended: Tensor | None = None
    stream: Stream | None = None
    exchange: Exchange = field(default_factory=lambda: Exchange())
    rows: int | None = None
    checkpointing: bool = False
    outermost: nn.Module | None = None
    step: int = -1
    prompts: dict[str, int] = field(default_factory=dict)
    open: list[Opening] = field(default_factory=list)
    frames: dict[str, Frame | None] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    shapes: dict[SiteId, tuple[int, int]] = field(default_factory=dict)
    lengths: dict[SiteId, Mapping[str, int]] = field(default_factory=dict)
    calls: dict[str, dict[int, int]] = field(default_factory=dict)
    received: dict[Any, Tensor] = field(default_factory=dict)
    lacking: dict[Any, Captured] = field(default_factory=dict)
    decided: dict[Any, Tensor] = field(default_factory=dict)
    settled: dict[SiteId, Tensor] = field(default_factory=dict)
    replays: dict[int, int] = field(default_factory=dict)
    pictures: dict[str, list[list[int]]] = field(default_factory=dict)
    shown: int = 0

    @property
    def spans(self) -> dict[str, SpanRows]:
        """The columns of pictures as they were met, and the spans given with the plan, which may say otherwise."""
        return {**self.pictures, **self.plan.spans}

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Any) -> None:
        """A tower starts. `known(cache)` is the prompt length recorded for a cache, or None."""
        if not self.open:
            self.step += 1
            self.passes.clear()
        arguments = named_arguments(module, args, kwargs)
        if not self.open:
            self._find_pictures(module, arguments)
        self.passes[name] = self.passes.get(name, -1) + 1
        frame = self._frame(name, arguments, known)
        self.frames[name] = frame
        self.open.append(Opening(module, arguments, frame))
        self.calls[name], self.calls[name + PROJECTION] = {}, {}

    def foreseen(self, module: nn.Module, arguments: Mapping[str, Any], known: Any) -> Frame | None:
        """Where the tokens of a forward of the whole model will stand, before it is entered."""
        self._find_pictures(module, arguments)
        return self._frame("", arguments, known)

    def _find_pictures(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Where the prompt of a run holds pictures, as the model's configuration marks them; it may come in pieces."""
        ids, token = arguments.get("input_ids"), picture_token(module)
        if token is None or not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        past = cached_length(arguments.get("past_key_values"))
        if past and not (self.generating and past == self.shown < (self.prompt or 0)):
            return  # a step, or behind columns that this run did not see
        self.shown = past + ids.shape[1]
        rows = ids[: len(ids) // self.streams]
        items = self.items(len(rows))
        seen = (rows[:: len(rows) // items] if items else rows) == token
        found = [(past + each.nonzero()[:, 0]).tolist() for each in seen.cpu()]
        before = self.pictures.get(IMAGE) if past else None
        if before is not None:
            found = [[*earlier, *now] for earlier, now in zip(before, found, strict=True)]
        self.pictures = {IMAGE: found} if any(found) else {}

    def again(self) -> None:
        """The forward that was entered runs once more, for the other stream."""
        self.passes = dict.fromkeys(self.passes.keys() & {""}, 0)
        self.calls.clear()

    @property
    def streams(self) -> int:
        """How many streams share the batch; frames are of one of them, both hold the same tokens."""
        return 2 if self.stream == "both" else 1

    def leave(self, module: nn.Module) -> Opening | None:
        if self.open and self.open[-1].module is module:
            return self.open.pop()
        return None

    def window(self, site: Site, n_rows: int, n_queries: int, n_keys: int, device: torch.device) -> Window | None:
        """Where a call's queries and keys stand; None if the tower lays its tokens out in another way."""
        if site.spans:
            return self._window_of_its_own(site, n_rows, n_queries, n_keys, device)
        frame = self.frames.get(site.tower)
        if frame is None or site.chunked or (frame.batch * self.streams, frame.length) != (n_rows, n_queries):
            return None
        if site.kind == "self" and n_keys < frame.length:
            return None
        joined = site.kind == "self" and not self._all_its_own(site.tower, frame, n_keys)
        return Window.of_call(frame, n_queries, n_keys, cross=site.kind == "cross", joined=joined)

    def _all_its_own(self, tower: str, frame: Frame, n_keys: int) -> bool:
        """Whether a self-attention call sees columns of its tower and nothing else, by how many keys there are."""
        if n_keys == frame.total:
            return True
        opening = next((o for o in reversed(self.open) if o.frame is frame), None)
        cache = None if opening is None else opening.arguments.get("past_key_values")
        return n_keys in windowed_lengths(cache, frame.past, frame.length)

    def _window_of_its_own(
        self, site: Site, n_rows: int, n_queries: int, n_keys: int, device: torch.device
    ) -> Window | None:
        """In a denoiser every site counts its positions for itself: resolutions differ, and kinds of tokens join."""
        n_rows, cross = n_rows // self.streams, site.kind == "cross"

        def framed(names: tuple[str, ...], length: int, source: Frame | None) -> Frame | None:
            lengths = {names[0]: length} if len(names) == 1 else self.lengths.get(site.id)
            if lengths is None or sum(lengths.values()) != length:
                return None
            attended = None
            if names == (TEXT,) and self.open:
                attended = attended_columns(self.open[0].arguments.get("encoder_attention_mask"), n_rows, length)
            spans = own_spans(names, lengths, self.plan.spans)
            return Frame(
                0, length, n_rows, device, attended, length, spans=spans, items=self.items(n_rows), source=source
            )

        source = framed(site.key_spans, n_keys, None) if cross else None
        frame = framed(site.kinds, n_queries, source)
        return None if frame is None else Window.of_call(frame, n_queries, n_keys, cross)

    def count(self, tower: str, module: nn.Module, replay: bool) -> int:
        """How many calls of `module` came before this one in the current pass of its tower."""
        counts = self.calls.setdefault(tower, {})
        if not replay:
            counts[id(module)] = counts.get(id(module), 0) + 1
            return counts[id(module)] - 1
        self.replays[id(module)] = self.replays.get(id(module), 0) + 1
        return (self.replays[id(module)] - 1) % max(counts.get(id(module), 1), 1)

    def moment(self, site: Site, chunk: int) -> tuple[int, int, int]:
        return self.step, self.passes.get(site.tower, 0), chunk

    def _frame(self, name: str, arguments: Mapping[str, Any], known: Any) -> Frame | None:
        sequence = next((arguments[key] for key in SEQUENCE_NAMES if isinstance(arguments.get(key), Tensor)), None)
        if sequence is None or sequence.dim() < 2 or (sequence.is_floating_point() and sequence.dim() != 3):
            return None
        batch, length = int(sequence.shape[0]) // self.streams, int(sequence.shape[1])
        cache = arguments.get("past_key_values")
        past = cached_length(cache)
        total = past + length
        caches = "past_key_values" in arguments or cache is not None
        # Of the arguments nothing but masks, or a frame would keep all of them alive.
        masks = _masks(arguments, [opening.arguments for opening in reversed(self.open)])
        if self.prompt is not None and caches:
            prompt = self.prompt
        elif past == 0:
            prompt = self.prompts.setdefault(name, total) if self.generating else total
        else:
            prompt = self.prompts.get(name) or known(cache) or past
        return Frame(
            past=past,
            length=length,
            batch=batch,
            device=sequence.device,
            attended=partial(self._attended, masks, int(sequence.shape[0]), batch, total, caches),
            prompt=prompt,
            # A text given whole, with the place where its prompt ends, is edited as if it were being generated.
            generating=self.generating or past > 0 or prompt < total,
            spans=self.spans,
            items=self.items(batch),
            source=self._source(arguments, batch),
        )

    def items(self, batch: int) -> int | None:
        """Rows before beams were expanded, if a batch of this many rows comes from such."""
        return self.rows if self.rows and batch % self.rows == 0 else None

    def _attended(self, masks: Sequence[Any], rows: int, batch: int, total: int, caches: bool) -> Tensor | None:
        """From the first mask that fits; `rows` are of all streams."""
        for mask in masks:
            found = attended_columns(mask, rows, total)
            if found is not None:
                return found[:batch]
        given = self.attended if caches else None  # the mask of generate() is the decoder's, not another tower's
        if given is None or batch % len(given):
            return None
        given = given.bool().repeat_interleave(batch // len(given), dim=0)
        return torch.nn.functional.pad(given, (0, max(0, total - given.shape[1])), value=True)[:, :total]

    def _source(self, arguments: Mapping[str, Any], batch: int) -> Frame | None:
        """Frame of the encoder states that a decoder cross-attends to."""
        states = arguments.get("encoder_hidden_states")
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        length = int(states.shape[1])
        attended = attended_columns(arguments.get("encoder_attention_mask"), batch * self.streams, length)
        attended = None if attended is None else attended[:batch]
        return Frame(
            0, length, batch, states.device, attended, prompt=length, spans=self.plan.spans, items=self.items(batch)
        )


def _masks(arguments: Mapping[str, Any], around: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The attention masks that a tower and those around it were given, innermost first."""
    decodes = isinstance(arguments.get("encoder_hidden_states"), Tensor)
    masks = []
    for given in (arguments, *around):
        # Around a decoder stands a model whose `attention_mask` is the encoder's.
        outer = decodes and "decoder_attention_mask" in given
        mask = given.get("decoder_attention_mask" if outer else "attention_mask")
        masks.append(mask.get("full_attention") if isinstance(mask, Mapping) else mask)
    return masks


def picture_token(model: nn.Module) -> int | None:
    """The id that stands for a part of a picture in what a model reads, as its configuration says; None if it has none.

    Around a model may stand a wrapper, which knows its configuration too.
    """
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return None


def attended_columns(mask: Any, batch: int, total: int) -> Tensor | None:
    """`[batch, total]` attended columns from a 2-D mask, or those that any query of a 4-D one sees."""
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[-1] >= total:
        grid = mask[:, 0, :, :total]
        visible = grid if grid.dtype == torch.bool else grid > torch.finfo(grid.dtype).min / 2
        return visible.any(dim=1).expand(batch, -1)
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= total:
        return mask[:, :total].bool()
    return None


def cached_length(cache: Any) -> int:
    """Columns already in a transformers cache (0 for None)."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length())


def windowed_lengths(cache: Any, past: int, length: int) -> set[int]:
    """How many keys the layers of a cache that are not plain (sliding, or of fixed size) hand to a call."""
    cache = getattr(cache, "self_attention_cache", cache)
    found = set()
    for layer in getattr(cache, "layers", ()):
        ask = getattr(layer, "get_max_length", None) or getattr(layer, "get_max_cache_shape", None)
        longest = None if ask is None else ask()
        if longest is None or longest < 0:
            continue
        if getattr(layer, "is_sliding", False):
            found.add(min(past + length, longest - 1 + length))
        found.add(longest)
    return found


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name; names that were not passed but exist are there as None."""
    names = parameter_names(type(module).forward)
    wrapped = getattr(module, "get_base_model", None)
    if not names and callable(wrapped):  # PEFT's plainest wrapper names none and hands all of them on
        names = parameter_names(type(wrapped()).forward)
    named: dict[str, Any] = dict.fromkeys(names)
    named.update(zip(names, args, strict=False))
    named.update(kwargs)
    return named


@lru_cache(maxsize=512)
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
