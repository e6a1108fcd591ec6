"""Items as one tokenizer writes them: ids, spans as token positions, twins of equal length, and what was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from headwise.errors import InputError, Refusal
from headwise.probes.encoded import EncodedItem
from headwise.probes.item import Item
from headwise.probes.layout import Ids, PictureReader
from headwise.probes.stream import Probe
from headwise.probes.writing import Dropped, Writer, differ

if TYPE_CHECKING:
    from headwise.probes.batch import Batch

ITEMS = 64
"""Of a probe, where no number is given."""

PATIENCE = 50
"""An endless stream is given up when so many items per wanted item, and 200, could not be expressed; when none of the
first 200 could, at once."""


@dataclass(frozen=True, slots=True)
class ItemSet:
    """The first items of a probe that a tokenizer can express.

    Attributes:
        probe: id of the probe, or name of the file.
        items: what is used.
        dropped: how many items were passed over, by reason.
        metric: id of the probe's default metric.
        pad: id that fills rows up.
        suffix: ids the tokenizer puts behind a text (encoders); not part of a prompt that is to be continued.
        reader: how the processor writes pictures, where items have some.
    """

    probe: str
    items: tuple[EncodedItem, ...]
    dropped: Mapping[str, int]
    metric: str
    pad: int
    suffix: Ids = ()
    seed: int | str = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    reader: PictureReader | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[EncodedItem]:
        return iter(self.items)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(each.id for each in self.items)

    @property
    def n_dropped(self) -> int:
        return sum(self.dropped.values())

    def only(self, keep: Sequence[bool], reason: str) -> ItemSet:
        """The items where `keep` is true; the others are counted as dropped for `reason`."""
        if len(keep) != len(self.items):
            raise InputError(f"keep has {len(keep)} entries for {len(self.items)} items; give one per item")
        kept = tuple(each for each, wanted in zip(self.items, keep, strict=True) if wanted)
        gone = len(self.items) - len(kept)
        dropped = Counter(self.dropped)
        if gone:
            dropped[reason] += gone
        return replace(self, items=kept, dropped=dict(dropped))

    def twins(self) -> ItemSet:
        """The corrupted partners in place of the items, under the same ids.

        A partner's foils are the item's answer and its foils but for what the partner itself answers; it has no other
        right answers, and no foils where it has no answer.

        Raises `InputError` if an item has no partner.
        """
        missing = next((each.id for each in self.items if each.twin is None), None)
        if missing is not None:
            raise InputError(f"item {missing} has no twin; use a probe whose items have one, or add `corrupted`")
        return replace(self, items=tuple(_swapped(each) for each in self.items))

    def batches(self, size: int = 16, *, answers: bool = True) -> Iterator[Batch]:
        """Rows for the model, padded on the left, `size` at a time; with `answers`, behind each prompt its answer."""
        if not isinstance(size, int) or size < 1:
            raise InputError(f"a batch has at least one item; size is {size!r}")
        for start in range(0, len(self.items), size):
            yield self.batch(self.items[start : start + size], answers=answers)

    def batch(self, items: Sequence[EncodedItem], *, answers: bool = True) -> Batch:
        """Some of the items, each as often as it is given, as the rows of one batch."""
        from headwise.probes.batch import pad

        return pad(items, self.pad, self.suffix, answers=answers, reader=self.reader)


def encode(
    items: Probe | Iterable[Item],
    tokenizer: Any,
    *,
    n: int | None = None,
    seed: int | str = 0,
    max_tokens: int | None = None,
    one_token: bool = False,
    name: str = "",
) -> ItemSet:
    """The first `n` items that `tokenizer` can express, in ids.

    Args:
        items: a probe, or items of your own (`read_items`).
        n: how many (default: 64 of a probe, all of your own).
        tokenizer: an attached model, a transformers tokenizer, or the processor that items with pictures need.
        seed: of the probe's stream.
        max_tokens: most ids of a prompt and any of its answers together, right or wrong, the twin's too (default: what
            the tokenizer says the model takes).
        one_token: whether every right and wrong answer must be a single token (probes that need it always ask for it).
        name: what to call items of your own.

    An item is dropped, and counted, if a span shares a token with its surroundings, if prompt and answer melt into one
    token, if a wrong answer nowhere differs from the right one in a token (one only goes on where the other ends), if
    its twin has another number of tokens or (word for word the same length) other tokens to a word, or if it is too
    long.

    Raises:
        InputError: not enough items can be expressed; duplicate ids; a tokenizer without what is needed; a prompt that
            the processor does not take.
        Refusal: items with pictures, and no processor that writes them.
    """
    if isinstance(items, str):
        raise InputError(f"encode takes a probe or items, not a text; write probe({items!r}) or read_items({items!r})")
    if not isinstance(items, Iterable) and not isinstance(items, Probe):
        raise InputError(f"encode takes a probe or items, not a {type(items).__name__}; see probe() and read_items()")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise InputError(f"max_tokens={max_tokens!r} must be a whole number of tokens, at least 1")
    probe = items if isinstance(items, Probe) else None
    stream: Iterable[Item] = probe.items(seed) if probe is not None else items  # type: ignore[assignment]
    label = probe.id if probe is not None else name or "items"
    if n is not None and (not isinstance(n, int) or n < 1):
        raise InputError(f"{label}: n must be a whole number of items, at least 1, or None for all; it is {n!r}")
    if n is None and probe is not None:
        n = ITEMS
    writer = Writer.of(tokenizer, max_tokens, one_token or (probe is not None and probe.one_token))
    kept: list[EncodedItem] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    examples: dict[str, str] = {}
    for item in stream:
        if not isinstance(item, Item):
            raise InputError(f"{label}: encode takes a probe or items, and one is a {type(item).__name__}")
        if item.id in seen:
            raise InputError(f"{label}: two items have the id {item.id!r}; give every item an id of its own")
        seen.add(item.id)
        try:
            kept.append(writer.write(item))
        except Dropped as reason:
            dropped[reason.why] += 1
            examples.setdefault(reason.why, f"{item.id}: {reason.detail}")
        except (InputError, Refusal) as error:
            raise type(error)(f"{label}, item {item.id}: {error}") from None
        if n is not None and len(kept) == n:
            break
        if n is not None and probe is not None and sum(dropped.values()) >= 200 + (PATIENCE * n if kept else 0):
            break
    if not kept or (n is not None and len(kept) < n):
        why = "; ".join(f"{count} x {reason} ({examples[reason]})" for reason, count in dropped.most_common(3))
        wanted = f"{len(kept)} of {n}" if n is not None else "none of its"
        raise InputError(
            f"{label}: this tokenizer and length can express {wanted} items"
            + (f": {why}" if why else "; there are no more")
            + "; ask for fewer items, other settings, or another probe"
        )
    return ItemSet(
        probe=label,
        items=tuple(kept),
        dropped=dict(dropped),
        metric=probe.metric if probe is not None else "answer-log-probability",
        pad=writer.pad,
        suffix=writer.suffix,
        reader=writer.reader if any(each.pixels for each in kept) else None,
        seed=seed,
        settings=dict(probe.grid) if probe is not None else {},
    )


def _swapped(each: EncodedItem) -> EncodedItem:
    twin, source = each.twin, each.item.twin
    assert twin is not None
    assert source is not None
    answers = zip((each.item.answer, *each.item.foils), (each.answer, *each.foils), strict=True)
    # A foil that shares all its tokens with the answer cannot be told from it.
    foils = [(text, ids) for text, ids in answers if twin.answer and differ(twin.answer, ids)]
    item = replace(
        each.item,
        prompt=source.prompt,
        answer=source.answer,
        also=(),
        foils=tuple(text for text, _ in foils),
        spans=source.spans,
        twin=None,
        pictures=source.pictures or each.item.pictures,
    )
    ids_of_foils = tuple(ids for _, ids in foils)
    return EncodedItem(item, twin.prompt, twin.answer, (), ids_of_foils, twin.spans, None, twin.pixels)
