"""How one item becomes ids: its answers behind it, its spans as token positions, its pictures in their places."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem, EncodedTwin, Places
from headwise.probes.item import Item, Message, Quote, Range, Spans, occurrences
from headwise.probes.layout import Ids, PictureReader, Written, named_places, picture_reader
from headwise.probes.picture import PICTURE_MARK, Picture, Regions


class Dropped(Exception):
    """An item that this tokenizer cannot express: why, for counting, and what it is in this one."""

    def __init__(self, why: str, detail: str) -> None:
        super().__init__(why)
        self.why, self.detail = why, detail


@dataclass(frozen=True, slots=True)
class Writer:
    """A tokenizer, what is asked of it, and the processor for pictures, where there is one."""

    tokenizer: Any
    prefix: Ids
    suffix: Ids
    pad: int
    max_tokens: int | None
    one_token: bool
    processor: Any = None

    @staticmethod
    def of(given: Any, max_tokens: int | None, one_token: bool) -> Writer:
        """Of a tokenizer, a processor or an attached model."""
        tokenizer, processor = _parts(given)
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise InputError("a probe needs the model's tokenizer; load the model with one, or pass tokenizer=")
        prefix, suffix = _around(tokenizer)
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # masked, so any id will do
        limit = getattr(tokenizer, "model_max_length", None)
        if max_tokens is None and isinstance(limit, int) and limit < 10**9:
            max_tokens = limit
        return Writer(tokenizer, prefix, suffix, pad, max_tokens, one_token, processor)

    @property
    def reader(self) -> PictureReader | None:
        """How pictures are written. Raises `Refusal` for a processor that writes none."""
        return None if self.processor is None else picture_reader(self.processor)

    def write(self, item: Item) -> EncodedItem:
        """Raises `Dropped` for an item that cannot be expressed; InputError, Refusal for one that is wrong."""
        prefix = self._prefix(item.prompt)
        prompt_text = self._text(item.prompt, item.pictures)
        prompt = self._ids(prompt_text)
        if not prompt:
            raise Dropped("the prompt is empty", repr(prompt_text))
        for text in (prompt_text, item.answer, *item.also, *item.foils):
            self._require_known(text)
        self._make_sure_it_fits(len(prefix) + len(prompt) + 1)  # here too, as what follows takes its time
        answer = self._continuation(prompt_text, prompt, item.answer)
        also = tuple(self._continuation(prompt_text, prompt, text) for text in item.also)
        foils = tuple(self._continuation(prompt_text, prompt, text) for text in item.foils)
        if self.one_token:
            for text, ids in zip((item.answer, *item.also, *item.foils), (answer, *also, *foils), strict=True):
                if len(ids) != 1:
                    raise Dropped("an answer has several tokens where one is needed", f"{text!r} has {len(ids)} tokens")
        for text, ids in zip(item.foils, foils, strict=True):
            if not differ(answer, ids):
                raise Dropped("a wrong answer differs from the right one in no token", f"{item.answer!r} and {text!r}")
        written = self._written(prompt_text, prompt, item.pictures)
        twin = self._twin(item, prefix, prompt, written)
        answers = (answer, *also, *foils, *((twin.answer,) if twin else ()))
        self._make_sure_it_fits(len(prefix) + len(written.ids) + max(len(each) for each in answers))
        spans = self._all_places(item.spans, item.prompt, prompt_text, prefix, prompt, written)
        spans |= self._of_pictures(spans, written, item.pictures, item.regions, len(prefix))
        return EncodedItem(item, prefix + written.ids, answer, also, foils, spans, twin, written.pixels)

    def _written(self, text: str, ids: Ids, pictures: Sequence[Picture]) -> Written:
        if not pictures:
            if self.processor is not None and getattr(self.processor, "image_token_id", None) in ids:
                raise InputError(
                    "the prompt has the token of a picture and the item no picture; add pictures (images, in a file)"
                )
            return Written(ids, {}, tuple(range(len(ids))), (), ())
        assert self.reader is not None
        return self.reader.write(text, pictures)

    def _of_pictures(
        self, own: Mapping[str, object], written: Written, pictures: Sequence[Picture], regions: Regions, front: int
    ) -> Mapping[str, tuple[Ids, ...]]:
        if not pictures:
            return {}
        assert self.reader is not None
        named = named_places(self.reader, written, pictures, regions, front)
        if taken := sorted(own.keys() & named.keys()):
            raise InputError(f"span {taken[0]!r} is the name of tokens beside or of the pictures; name it otherwise")
        return named

    def _all_places(
        self, spans: Spans, prompt: str | tuple[Message, ...], text: str, prefix: Ids, ids: Ids, written: Written
    ) -> dict[str, tuple[Ids, ...]]:
        """The item's own spans, in the ids as the model takes them."""
        found: dict[str, tuple[Ids, ...]] = {}
        for name, places in self._places(
            self._moved(spans, prompt) if written.pictures else spans, text, (), ids
        ).items():
            moved = [[written.origin[at] for at in place] for place in places]
            if any(at is None for place in moved for at in place):
                raise Dropped(f"span {name!r} shares a token with a picture's surroundings", repr(text[-60:]))
            found[name] = tuple(tuple(len(prefix) + at for at in place if at is not None) for place in moved)
        return found

    def _moved(self, spans: Spans, prompt: str | tuple[Message, ...]) -> Spans:
        """Ranges of characters where a processor's marks are longer than `<image>`."""
        if self.processor is None or not isinstance(prompt, str) or PICTURE_MARK not in prompt:
            return spans
        assert self.reader is not None
        longer = len(self.reader.mark) - len(PICTURE_MARK)

        def at(character: int) -> int:
            return character + longer * prompt.count(PICTURE_MARK, 0, character)

        return {
            name: tuple(Range(at(each.start), at(each.stop)) if isinstance(each, Range) else each for each in places)
            for name, places in spans.items()
        }

    def _make_sure_it_fits(self, tokens: int) -> None:
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise Dropped(f"longer than {self.max_tokens} tokens", f"it has {tokens}")

    def _twin(self, item: Item, prefix: Ids, prompt: Ids, beside: Written) -> EncodedTwin | None:
        twin = item.twin
        if twin is None:
            return None
        pictures = twin.pictures or item.pictures
        text = self._text(twin.prompt, pictures)
        ids = self._ids(text)
        self._require_known(text + twin.answer)
        if ids == prompt and pictures == item.pictures:
            raise Dropped("its twin is the same to this tokenizer", repr(text[-40:]))
        written = self._written(text, ids, pictures)
        if len(written.ids) != len(beside.ids):
            raise Dropped("its twin has another number of tokens", f"{len(beside.ids)} and {len(written.ids)}")
        own = self._text(item.prompt, item.pictures)
        if len(own.split()) == len(text.split()) and self._words(own, prompt) != self._words(text, ids):
            raise Dropped("its twin is shifted against it inside", "words in one place are other numbers of tokens")
        answer = self._continuation(text, ids, twin.answer) if twin.answer else ()
        spans = self._all_places(twin.spans, twin.prompt, text, prefix, ids, written)
        spans |= self._of_pictures(spans, written, pictures, item.regions, len(prefix))
        return EncodedTwin(prefix + written.ids, answer, spans, written.pixels)

    def _prefix(self, prompt: str | tuple[Message, ...]) -> Ids:
        return self.prefix if isinstance(prompt, str) else ()  # a chat template writes the special tokens itself

    def _text(self, prompt: str | tuple[Message, ...], pictures: Sequence[Picture]) -> str:
        if not pictures:
            return prompt if isinstance(prompt, str) else _chat_text(self.tokenizer, prompt)
        if self.reader is None:
            raise Refusal(
                "it has pictures, and the model has no processor for them; load a model that sees, with its processor"
            )
        return self.reader.text(prompt) if isinstance(prompt, str) else _chat_text(self.processor, prompt, self.reader)

    def _ids(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _require_known(self, text: str) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in self._ids(text):
            raise Dropped("a word is unknown to this tokenizer", repr(text[-60:]))

    def _continuation(self, text: str, ids: Ids, more: str) -> Ids:
        """The ids that `more` adds behind `text`, whose own ids must stay as they are."""
        both = self._ids(text + more)
        if both[: len(ids)] != ids or len(both) == len(ids):
            raise Dropped("prompt and answer melt into one token", f"...{text[-20:]!r} + {more!r}")
        return both[len(ids) :]

    def _places(self, spans: Spans, text: str, prefix: Ids, ids: Ids) -> Places:
        if not spans:
            return {}
        offsets = self._offsets(text, ids)
        found = {}
        for name, places in spans.items():
            ranges = [place.find(text) if isinstance(place, Quote) else place for place in places]
            places_in_ids = [self._place(name, each, text, ids, offsets) for each in ranges]
            found[name] = tuple(tuple(len(prefix) + index for index in each) for each in places_in_ids)
        return found

    def _offsets(self, text: str, ids: Ids) -> list[tuple[int, int]] | None:
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [tuple(pair) for pair in encoding["offset_mapping"]]

    def _words(self, text: str, ids: Ids) -> list[int]:
        """Index of the word that each token is of; for a tokenizer that does not tell the characters, the number of
        tokens up to the end of each word."""
        found = list(re.finditer(r"\S+", text))
        offsets = self._offsets(text, ids)
        if offsets is None:
            return [len(self._ids(text[: match.end()])) for match in found]
        ends = [start + len(text[start:stop].rstrip()) for start, stop in offsets]
        return [bisect_left([match.start() for match in found], end) for end in ends]

    def _place(self, name: str, place: Range, text: str, ids: Ids, offsets: list[tuple[int, int]] | None) -> Ids:
        """Indices into `ids` of a range of characters: by its own ids where they are found as often as its text, else
        by the characters each token covers."""
        if not 0 <= place.start < place.stop <= len(text):
            raise InputError(
                f"span {name!r} is characters {place.start} to {place.stop} of a prompt of {len(text)}; "
                "give a range inside it"
            )
        quoted = text[place.start : place.stop]
        places = occurrences(quoted, text)
        covering = [
            i for i, (start, stop) in enumerate(offsets or ()) if max(start, place.start) < min(stop, place.stop)
        ]
        for form in (f" {quoted}", quoted):
            wanted = self._ids(form)
            starts = [i for i in range(len(ids) - len(wanted) + 1) if wanted and ids[i : i + len(wanted)] == wanted]
            if len(starts) == len(places):
                start = starts[places.index(place)]
                found = range(start, start + len(wanted))
                if offsets is None:
                    return tuple(found)
                # Where a tokenizer forgets case, as many ids may be found in other places.
                if set(found) & set(covering):
                    return tuple(found[max(covering[0] - start, 0) :])  # without the blank, where it is a token
        if offsets is None:
            raise Dropped(f"span {name!r} is not found in the tokens", repr(quoted))
        covered = text[offsets[covering[0]][0] : offsets[covering[-1]][1]] if covering else ""
        if not covering or covered.strip() != quoted.strip():
            raise Dropped(f"span {name!r} shares a token with its surroundings", f"{quoted!r} in {covered!r}")
        return tuple(covering)


def _around(tokenizer: Any) -> tuple[Ids, Ids]:
    """What the tokenizer puts in front of a text and behind it."""
    bare = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = tuple(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError(
        "this tokenizer writes a text differently with and without its special tokens; probes cannot use it"
    )


def _parts(given: Any) -> tuple[Any, Any]:
    """Tokenizer and processor of what `encode` was given."""
    if isinstance(given, AttachedModel):
        tokenizer = given.tokenizer if given.tokenizer is not None else getattr(given.processor, "tokenizer", None)
        seeing = getattr(given.processor, "image_processor", None) is not None
        return tokenizer, given.processor if seeing else None
    inner = getattr(given, "tokenizer", None)
    return (given, None) if inner is None else (inner, given)


def _chat_text(writes: Any, messages: tuple[Message, ...], reader: PictureReader | None = None) -> str:
    """The text that the chat template of a tokenizer, or of the processor of `reader`, makes of messages."""
    if not getattr(writes, "chat_template", None):
        who = "tokenizer" if reader is None else "processor"
        raise InputError(f"it has messages, and this {who} has no chat template; give a prompt instead of messages")
    turns = [{"role": each.role, "content": each.content} for each in messages]
    try:
        if reader is not None:
            return reader.chat(turns)
        return str(writes.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise InputError(f"the chat template refuses its messages ({error}); change the roles or their order") from None


def differ(one: Ids, other: Ids) -> bool:
    """Whether they differ in a token that both have."""
    return any(a != b for a, b in zip(one, other, strict=False))
