"""Items of your own, from a file of JSON lines or CSV; what is wrong in it is said with its line and field."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headwise.errors import InputError
from headwise.probes.item import Item, Message, Quote, Twin, occurrences
from headwise.probes.picture import Picture, Region

FIELDS = (
    "id",
    "prompt",
    "messages",
    "answer",
    "also",
    "foils",
    "corrupted",
    "corrupted_answer",
    "spans",
    "attributes",
    "images",
    "corrupted_images",
    "regions",
)
STRUCTURED = ("messages", "also", "foils", "spans", "attributes", "images", "corrupted_images", "regions")
"""Fields whose cell in a CSV file is JSON; so is `corrupted` in a row that has `messages`."""


def read_items(path: str | Path) -> tuple[Item, ...]:
    """The items of a probe file, ready for `encode`.

    A line of a `.jsonl` file is an object with the fields below; a `.csv` file names them in its first row, and an
    empty cell is a field that is not given. Blank lines, a byte-order mark and either line ending are fine.

    - `prompt` (text) or `messages` (list of `{"role": ..., "content": ...}`, for a model with a chat template)
    - `answer` (text): what comes next. It is put behind the prompt as it is written, with no blank added.
    - `also`, `foils` (lists of text): other right answers, wrong answers
    - `corrupted` (as `prompt` or `messages` is), `corrupted_answer` (text): the twin
    - `spans`: `{name: place}`; a place is a text of the prompt, `{"text": ..., "occurrence": ...}` (counted from 0) for
      one that occurs more than once, or a list of these. A place that the twin has too is a place there as well.
    - `id` (text): if absent, it is made of the text of the item.
    - `attributes`: `{name: text or number}`
    - `images`: paths of picture files, beside the probe file or from the root, one for each `<image>` in the prompt;
      `corrupted_images` are those of the twin, which has the item's own where they are left out
    - `regions`: `{name: [picture, left, top, right, bottom]}` in pixels of a picture counted from 0

    Raises:
        InputError: the file cannot be used. One line: file, line, field, what is wrong with the first wrong line and
            what to do, and how many more lines are wrong.
    """
    if not isinstance(path, (str, Path)):
        raise InputError(f"read_items takes the path of a probe file, not a {type(path).__name__}")
    path = Path(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"probe file {path} must end in .jsonl (one JSON object a line) or .csv; rename or convert it")
    items: list[Item] = []
    wrong: list[str] = []
    first_line: dict[str, int] = {}
    for row in kind(_text_of(path), path):
        try:
            item = _item(row.fields(), path.parent)
            if item.id in first_line:
                raise _Wrong("id", _twice(item.id, first_line[item.id]))
            first_line[item.id] = row.line
            items.append(item)
        except _Wrong as problem:
            wrong.append(f"probe file {path}, line {row.line}{problem.place}: {problem.what}")
    if wrong:
        more = len(wrong) - 1
        raise InputError(wrong[0] + (f" (and {more} more line{'s' if more > 1 else ''})" if more else ""))
    if not items:
        raise InputError(f"probe file {path} has no items; write one item a line, with `prompt` and `answer`")
    return tuple(items)


class _Wrong(Exception):
    """What is wrong in one line, and in which field."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.place, self.what = f", field {field!r}" if field else "", what


@dataclass(frozen=True, slots=True)
class _Row:
    """One item's place in the file; `fields` reads it, or raises `_Wrong`."""

    line: int
    fields: Callable[[], Mapping[str, Any]]


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"probe file {path} is a folder; name the .jsonl or .csv file in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"probe file {path} does not exist; check the name and the folder") from None
    except OSError as error:
        raise InputError(f"probe file {path} cannot be read ({error.strerror}); check its permissions") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"probe file {path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _json_rows(text: str, path: Path) -> Iterator[_Row]:
    # Not splitlines: the other line separators of Unicode may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _Row(number, lambda line=line: _json_fields(line))  # type: ignore[misc]


def _json_fields(line: str) -> Mapping[str, Any]:
    fields = _parsed("", line)
    if not isinstance(fields, dict):
        raise _Wrong("", f'a line must be a JSON object such as {{"prompt": ..., "answer": ...}}, not {_shown(fields)}')
    return fields


def _csv_rows(text: str, path: Path) -> Iterator[_Row]:
    header: list[str] | None = None
    start = 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(cells, path, line)
            else:
                yield _Row(line, lambda header=header, cells=cells: _csv_fields(header, cells))  # type: ignore[misc]
    except csv.Error as error:
        raise InputError(
            f"probe file {path}, line {start}: not CSV ({error}); put cells with commas, quotes or line breaks "
            "in double quotes and double the quotes in them, or write JSON lines"
        ) from None


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    if not set(header) & set(FIELDS):
        raise InputError(
            f"probe file {path}, line {line}: the first row must name the columns, such as prompt,answer; "
            f"it is {_shown(','.join(header))}"
        )
    for name in header:
        if name not in FIELDS:
            raise InputError(f"probe file {path}, line {line}, field {name!r}: {_unknown(name)}")
        if header.count(name) > 1:
            raise InputError(f"probe file {path}, line {line}, field {name!r}: two columns have this name; keep one")
    return header


def _csv_fields(header: list[str], cells: list[str]) -> Mapping[str, Any]:
    if len(cells) != len(header):
        raise _Wrong(
            "", f"{len(cells)} cells where the first row has {len(header)}; put cells with commas in double quotes"
        )
    given = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    structured = (*STRUCTURED, "corrupted") if "messages" in given else STRUCTURED
    return {name: _parsed(name, cell) if name in structured else cell for name, cell in given.items()}


_KINDS: Mapping[str, Callable[[str, Path], Iterable[_Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
}


def _parsed(field: str, text: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise _Wrong(field or name, f"{name!r} stands twice in one object; keep one")
        return dict(pairs)

    def constant(name: str) -> None:
        raise _Wrong(field, f"{name} is not JSON; write a number or a text")

    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise _Wrong(
            field, f"not JSON ({error.msg} at character {error.pos + 1}); write strict JSON, texts in double quotes"
        ) from None
    except ValueError:  # Python reads no integer of thousands of digits
        raise _Wrong(field, "a number in it is too long; write it as a text") from None
    except RecursionError:
        raise _Wrong(field, "nested too deeply; write the fields that the documentation names") from None


def _item(fields: Mapping[str, Any], folder: Path) -> Item:
    for name in fields:
        if name not in FIELDS:
            raise _Wrong(name, _unknown(name))
    prompt = _prompt(fields)
    answer = _filled("answer", _needed(fields, "answer"))
    foils, also = _answers("foils", fields), _answers("also", fields)
    for wrong in foils:
        if wrong == answer or wrong in also:
            raise _Wrong("foils", f"{_shown(wrong)} is a right answer as well; leave it out of one of the two")
    spans = _spans(fields, prompt)
    pictures, regions = _pictures("images", fields, folder), _regions(fields)
    try:
        item = Item(
            prompt=prompt,
            answer=answer,
            also=also,
            foils=foils,
            spans=spans,
            twin=_twin(fields, prompt, spans, _pictures("corrupted_images", fields, folder)),
            attributes=_attributes(fields),
            pictures=pictures,
            regions=regions,
        ).named("item")
    except InputError as error:
        raise _Wrong("images" if pictures else "regions", str(error)) from None
    if "id" not in fields:
        return item
    return replace(item, id=_filled("id", fields["id"]))


def _prompt(fields: Mapping[str, Any]) -> str | tuple[Message, ...]:
    if "prompt" in fields and "messages" in fields:
        raise _Wrong("messages", "an item has `prompt` or `messages`, not both; remove one")
    if "messages" in fields:
        return _messages("messages", fields["messages"])
    return _filled("prompt", _needed(fields, "prompt", "prompt` or `messages"))


def _messages(field: str, value: Any) -> tuple[Message, ...]:
    form = 'a list of {"role": "user", "content": "..."}'
    if not isinstance(value, list) or not value:
        raise _Wrong(field, f"must be {form}, with one turn or more; it is {_shown(value)}")
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise _Wrong(field, f"must be {form}, each turn with these two fields only; one is {_shown(turn)}")
    turns = tuple(
        Message(_filled(field, turn["role"], "role"), _text(field, turn["content"], "content")) for turn in value
    )
    if turns[-1].role == "assistant":
        raise _Wrong(field, "the last turn is the assistant's, which is where the answer stands; end with the user's")
    return turns


def _spans(fields: Mapping[str, Any], prompt: str | tuple[Message, ...]) -> dict[str, tuple[Quote, ...]]:
    given = _object("spans", fields.get("spans", {}), "{name: text of the prompt}")
    spans = {}
    for name, places in given.items():
        if not name:
            raise _Wrong("spans", "a span has no name; name it")
        listed = places if isinstance(places, list) else [places]
        if not listed:
            raise _Wrong("spans", f"span {name!r} has no place; quote a text of the prompt, or remove the span")
        spans[name] = tuple(_quote(name, place) for place in listed)
        for quote in spans[name]:
            _find(quote, prompt, "spans")
    return spans


def _quote(name: str, place: Any) -> Quote:
    if isinstance(place, str):
        return Quote(_filled("spans", place, name))
    if not isinstance(place, dict) or "text" not in place or set(place) - {"text", "occurrence"}:
        raise _Wrong(
            "spans", f'{name!r} must be a text of the prompt or {{"text": ..., "occurrence": 0}}, not {_shown(place)}'
        )
    occurrence = place.get("occurrence")
    if occurrence is not None and (type(occurrence) is not int or occurrence < 0):
        raise _Wrong("spans", f"the occurrence of {name!r} must be a whole number from 0, not {_shown(occurrence)}")
    return Quote(_filled("spans", place["text"], name), occurrence)


def _find(quote: Quote, prompt: str | tuple[Message, ...], field: str) -> None:
    if isinstance(prompt, str):
        text = prompt
    else:  # a template may say a text once more, so a later occurrence is left to `encode`
        text = _whole(prompt)
        if quote.occurrence is not None:
            quote = Quote(quote.text, 0)
    try:
        quote.find(text)
    except InputError as error:
        raise _Wrong(field, str(error)) from None


def _whole(prompt: str | tuple[Message, ...]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)


def _twin(
    fields: Mapping[str, Any],
    prompt: str | tuple[Message, ...],
    spans: Mapping[str, tuple[Quote, ...]],
    pictures: tuple[Picture, ...],
) -> Twin | None:
    if "corrupted" not in fields:
        for name in ("corrupted_answer", "corrupted_images"):
            if name in fields:
                raise _Wrong(name, "there is no `corrupted` that it belongs to; add it, or remove this field")
        return None
    value = fields["corrupted"]
    corrupted = _filled("corrupted", value) if isinstance(prompt, str) else _messages("corrupted", value)
    if corrupted == prompt and not pictures:
        raise _Wrong("corrupted", "it is the prompt itself; change what the answer depends on, or remove it")
    text, own = _whole(corrupted), _whole(prompt)
    kept: dict[str, tuple[Quote, ...]] = {}
    for name, quotes in spans.items():
        # Counted anew, the third place of a text may be another one: it is kept where both have it equally often.
        there = tuple(q for q in quotes if len(occurrences(q.text, text)) == len(occurrences(q.text, own)))
        if there:
            kept[name] = there
    answer = _filled("corrupted_answer", fields["corrupted_answer"]) if "corrupted_answer" in fields else ""
    if answer == fields.get("answer"):
        raise _Wrong("corrupted_answer", "it is the answer itself, so nothing was corrupted; change it, or remove it")
    return Twin(prompt=corrupted, answer=answer, spans=kept, pictures=pictures)


def _pictures(field: str, fields: Mapping[str, Any], folder: Path) -> tuple[Picture, ...]:
    paths = fields.get(field, [])
    if not isinstance(paths, list):
        raise _Wrong(field, f'must be a list of picture files such as ["a.png"], not {_shown(paths)}')
    found = []
    for path in paths:
        try:
            found.append(Picture.of_file(folder / _filled(field, path, "a picture")))
        except InputError as error:
            raise _Wrong(field, str(error)) from None
    return tuple(found)


def _regions(fields: Mapping[str, Any]) -> dict[str, Region]:
    form = "{name: [picture, left, top, right, bottom]}"
    regions = {}
    for name, place in _object("regions", fields.get("regions", {}), form).items():
        if not isinstance(place, list) or len(place) != 5 or any(type(number) is not int for number in place):
            raise _Wrong(
                "regions", f"{name!r} must be [picture, left, top, right, bottom] in pixels, not {_shown(place)}"
            )
        try:
            regions[name] = Region(place[0], (place[1], place[2], place[3], place[4]))
        except InputError as error:
            raise _Wrong("regions", f"{name!r}: {error}") from None
    return regions


def _attributes(fields: Mapping[str, Any]) -> dict[str, str | int | float]:
    given = _object("attributes", fields.get("attributes", {}), "{name: text or number}")
    for name, value in given.items():
        if type(value) not in (str, int, float):
            raise _Wrong("attributes", f"{name!r} must be a text or a number, not {_shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong("attributes", f"{name!r} is too large a number; write it as a text")
    return given


def _answers(field: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get(field, [])
    if not isinstance(value, list):
        raise _Wrong(field, f'must be a list of answers such as [" Rome", " Oslo"], not {_shown(value)}')
    answers = tuple(_filled(field, each, "an answer") for each in value)
    if len(set(answers)) < len(answers):
        raise _Wrong(field, "an answer stands there twice; keep one")
    return answers


def _filled(field: str, value: Any, part: str = "") -> str:
    if not _text(field, value, part):
        raise _Wrong(field, f"{f'{part!r} is' if part else 'it is'} empty; write a text")
    return str(value)


def _text(field: str, value: Any, part: str = "") -> str:
    whose = repr(part) if part else "it"
    if not isinstance(value, str):
        raise _Wrong(field, f"{whose} must be a text, not {_shown(value)}; put it in double quotes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Wrong(field, f"{whose} holds half of a surrogate pair; write the whole character") from None
    return value


def _object(field: str, value: Any, form: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(field, f"must be an object {form}, not {_shown(value)}")
    return value


def _needed(fields: Mapping[str, Any], field: str, names: str = "") -> Any:
    if field not in fields:
        raise _Wrong(field, f"there is none; every item needs `{names or field}`")
    return fields[field]


def _unknown(name: str) -> str:
    close = get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(FIELDS)}"
    return f"not a field of a probe file; {hint}"


def _twice(id: str, line: int) -> str:
    return f"{id!r} is the id of line {line} too (without ids: the same text); change one, or remove the line"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
