"""Probe files: what is read from them, and one line with the place and the remedy for each thing that can be wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.probes import Item, Message, Quote, Twin, read_items
from headwise.probes.picture import Picture, Region

FULL: dict[str, Any] = {
    "id": "rome-1",
    "prompt": "Rome is old. The capital of Italy is",
    "answer": " Rome",
    "also": [" Roma"],
    "foils": [" Paris", " Oslo"],
    "corrupted": "Rome is old. The capital of France is",
    "corrupted_answer": " Paris",
    "spans": {
        "country": "Italy",
        "said": {"text": "Rome", "occurrence": 0},
        "verbs": [{"text": "is", "occurrence": 1}],
    },
    "attributes": {"frame": 0, "share": 0.5, "kind": "capital"},
}


def written(folder: Path, *lines: object, name: str = "own.jsonl") -> Path:
    """A file with these lines; what is no text becomes JSON."""
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def as_csv(*items: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(name for item in items for name in item))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    for item in items:
        writer.writerow({name: v if isinstance(v, str) else json.dumps(v) for name, v in item.items()})
    return out.getvalue()


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_items(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), path.name)


def test_every_field_is_read(tmp_path: Path) -> None:
    (item,) = read_items(written(tmp_path, FULL))
    said, country, verb = Quote("Rome", 0), Quote("Italy"), Quote("is", 1)
    assert item == Item(
        id="rome-1",
        prompt="Rome is old. The capital of Italy is",
        answer=" Rome",
        also=(" Roma",),
        foils=(" Paris", " Oslo"),
        spans={"country": (country,), "said": (said,), "verbs": (verb,)},
        twin=Twin(
            prompt="Rome is old. The capital of France is", answer=" Paris", spans={"said": (said,), "verbs": (verb,)}
        ),
        attributes={"frame": 0, "share": 0.5, "kind": "capital"},
    )


def test_a_csv_file_says_the_same_as_json_lines(tmp_path: Path) -> None:
    short = {"prompt": 'He said "a, b"\nand', "answer": " left"}
    chat = {
        "messages": [{"role": "user", "content": "Name the capital of Italy."}],
        "answer": "Rome",
        "corrupted": [{"role": "user", "content": "Name the capital of France."}],
        "spans": {"country": "Italy"},
    }
    lines = read_items(written(tmp_path, FULL, short, chat))
    assert read_items(written(tmp_path, as_csv(FULL, short, chat), name="own.csv")) == lines
    assert lines[2].prompt == (Message("user", "Name the capital of Italy."),)
    assert lines[2].twin == Twin(prompt=(Message("user", "Name the capital of France."),))


def test_an_id_is_made_of_the_text_wherever_the_item_stands(tmp_path: Path) -> None:
    one, other = {"prompt": "a b", "answer": " c"}, {"prompt": "a b", "answer": " d"}
    first = read_items(written(tmp_path, one, other))
    turned = read_items(written(tmp_path, other, one, name="renamed.jsonl"))
    assert [each.id for each in first] == [each.id for each in turned][::-1]
    assert first[0].id != first[1].id
    assert first[0].id.startswith("item-")


def test_byte_order_mark_line_ends_and_blank_lines_are_fine(tmp_path: Path) -> None:
    plain = json.dumps({"prompt": "a\u2028b", "answer": " c"}, ensure_ascii=False)
    path = tmp_path / "own.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{plain}\r\n  \r\n".encode())
    (item,) = read_items(path)
    assert (item.prompt, item.answer) == ("a\u2028b", " c")
    path = tmp_path / "own.csv"
    path.write_bytes(b"\xef\xbb\xbf\r\nprompt,answer\r\n\r\na b, c\r\n")
    (item,) = read_items(str(path))
    assert (item.prompt, item.answer) == ("a b", " c")


def test_the_answer_is_taken_as_it_is_written(tmp_path: Path) -> None:
    items = read_items(
        written(
            tmp_path, {"prompt": "a", "answer": "b"}, {"prompt": "a ", "answer": " b"}, {"prompt": "a", "answer": " "}
        )
    )
    assert [each.answer for each in items] == ["b", " b", " "]


def test_the_text_of_a_span_is_looked_for_in_the_twin(tmp_path: Path) -> None:
    spans = {"both": "Box", "gone": "red", "one of two": ["red", "ball"]}
    (item,) = read_items(
        written(tmp_path, {"prompt": "Box: red ball", "corrupted": "Box: old ball", "answer": ".", "spans": spans})
    )
    assert item.twin is not None
    assert item.twin.spans == {"both": (Quote("Box"),), "one of two": (Quote("ball"),)}


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
@settings(deadline=None, max_examples=60)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str, answer: str) -> None:
    path = tmp_path_factory.mktemp("any") / "own.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False), "utf-8", newline="")
    (item,) = read_items(path)
    assert (item.prompt, item.answer) == (prompt, answer)


OK = {"prompt": "a b a", "answer": " c"}
CHAT = [{"role": "user", "content": "say a"}]
WRONG: list[tuple[object, str, str]] = [  # a line, what is named, what is told to do
    ("{prompt: 1}", "line 2: not JSON", "write strict JSON"),
    ('{"prompt": "a", "answer": NaN}', "NaN is not JSON", "write a number or a text"),
    ('{"prompt": "a", "answer": " b", "answer": " c"}', "field 'answer': 'answer' stands twice", "keep one"),
    ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "too long", "write it as a text"),
    ("[" * 100_000, "line 2: ", "; "),
    ('{"prompt": "\\ud800", "answer": " b"}', "field 'prompt': it holds half of a surrogate", "write the whole"),
    (["a", "b"], "line 2: a line must be a JSON object", 'such as {"prompt": ..., "answer": ...}'),
    (OK | {"promt": "a"}, "field 'promt': not a field", "did you mean 'prompt'?"),
    (OK | {"zzz": 1}, "field 'zzz': not a field", "the fields are id, prompt"),
    ({"answer": " c"}, "field 'prompt': there is none", "needs `prompt` or `messages`"),
    ({"prompt": "a"}, "field 'answer': there is none", "needs `answer`"),
    (OK | {"messages": CHAT}, "field 'messages': an item has `prompt` or `messages`, not both", "remove one"),
    (OK | {"prompt": 7}, "field 'prompt': it must be a text, not 7", "double quotes"),
    (OK | {"prompt": ""}, "field 'prompt': it is empty", "write a text"),
    (OK | {"answer": ""}, "field 'answer': it is empty", "write a text"),
    (OK | {"answer": None}, "field 'answer': it must be a text, not null", "double quotes"),
    (OK | {"answer": [" c"]}, "field 'answer': it must be a text", "double quotes"),
    (OK | {"id": 3}, "field 'id': it must be a text, not 3", "double quotes"),
    (OK | {"id": ""}, "field 'id': it is empty", "write a text"),
    (OK | {"foils": " d"}, "field 'foils': must be a list", '[" Rome", " Oslo"]'),
    (OK | {"also": [""]}, "field 'also': 'an answer' is empty", "write a text"),
    (OK | {"foils": [" c"]}, "field 'foils': \" c\" is a right answer as well", "leave it out"),
    (OK | {"also": [" d"], "foils": [" d"]}, "field 'foils': \" d\" is a right answer as well", "leave it out"),
    (OK | {"corrupted": ["x"]}, "field 'corrupted': it must be a text", "double quotes"),
    (OK | {"corrupted": "a b a"}, "field 'corrupted': it is the prompt itself", "change what the answer depends on"),
    (OK | {"corrupted_answer": " d"}, "field 'corrupted_answer': there is no `corrupted`", "add it"),
    (OK | {"spans": ["a"]}, "field 'spans': must be an object", "{name: text of the prompt}"),
    (OK | {"spans": {"": "b"}}, "field 'spans': a span has no name", "name it"),
    (OK | {"spans": {"x": []}}, "field 'spans': span 'x' has no place", "quote a text"),
    (OK | {"spans": {"x": 1}}, "field 'spans': 'x' must be a text of the prompt", '"occurrence": 0'),
    (OK | {"spans": {"x": {"text": "a", "index": 0}}}, "field 'spans': 'x' must be a text", '"occurrence": 0'),
    (OK | {"spans": {"x": ""}}, "field 'spans': 'x' is empty", "write a text"),
    (OK | {"spans": {"x": "z"}}, "field 'spans': span text 'z' is not in the prompt", "letter by letter"),
    (OK | {"spans": {"x": "a"}}, "field 'spans': span text 'a' occurs 2 times", '{"text": "a", "occurrence": 0}'),
    (OK | {"spans": {"x": {"text": "a", "occurrence": 2}}}, "span text 'a' is 2 times in the prompt", "from 0, to 1"),
    (OK | {"spans": {"x": {"text": "a", "occurrence": -1}}}, "occurrence of 'x' must be a whole number", "from 0"),
    (OK | {"spans": {"x": {"text": "a", "occurrence": True}}}, "occurrence of 'x' must be a whole number", "from 0"),
    (
        OK | {"corrupted": "x", "corrupted_answer": OK["answer"]},
        "field 'corrupted_answer': it is the answer",
        "change it",
    ),
    (OK | {"foils": [" z", " z"]}, "field 'foils': an answer stands there twice", "keep one"),
    ('{"prompt": "q", "answer": "a", "attributes": {"n": 1e999}}', "'n' is too large a number", "write it as a text"),
    (OK | {"attributes": {"x": [1]}}, "field 'attributes': 'x' must be a text or a number", "not [1]"),
    (OK | {"attributes": {"x": True}}, "field 'attributes': 'x' must be a text or a number", "not true"),
    (OK | {"attributes": 1}, "field 'attributes': must be an object", "{name: text or number}"),
    ({"messages": "hi", "answer": "a"}, "field 'messages': must be a list", '{"role": "user"'),
    ({"messages": [], "answer": "a"}, "field 'messages': must be a list", "one turn or more"),
    ({"messages": [{"role": "user"}], "answer": "a"}, "field 'messages': must be a list", "these two fields only"),
    ({"messages": [{"role": 1, "content": "a"}], "answer": "a"}, "field 'messages': 'role' must be a text", "quotes"),
    ({"messages": [{"role": "user", "content": 1}], "answer": "a"}, "'content' must be a text, not 1", "quotes"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "a"}], "answer": "b"}, "the last turn is", "end with the"),
    ({"messages": CHAT, "answer": "a", "corrupted": "say b"}, "field 'corrupted': must be a list", '{"role": "user"'),
    ({"messages": CHAT, "answer": "a", "spans": {"x": "z"}}, "field 'spans': span text 'z' is not in", "letter by"),
    ({"messages": CHAT, "answer": "a", "spans": {"x": "a"}}, "field 'spans': span text 'a' occurs 2 times", "which"),
    (OK | {"prompt": "first"}, "field 'id': 'item-", "is the id of line 1 too"),
]


@pytest.mark.parametrize(("line", "named", "remedy"), WRONG, ids=[named for _, named, _ in WRONG])
def test_what_is_wrong_is_said_with_place_and_remedy(tmp_path: Path, line: object, named: str, remedy: str) -> None:
    path = written(tmp_path, {"prompt": "first", "answer": " c"}, line, {"prompt": "last", "answer": " c"})
    message = complaint(path)
    assert message.startswith("probe file own.jsonl, line 2")
    assert named in message
    assert remedy in message
    assert "more line" not in message


def test_each_wrong_line_of_the_list_is_right_without_its_fault(tmp_path: Path) -> None:
    assert len(read_items(written(tmp_path, OK, {"messages": CHAT, "answer": "a"}))) == 2


def test_two_ids_that_are_given_twice(tmp_path: Path) -> None:
    path = written(tmp_path, OK | {"id": "x"}, "", {"prompt": "b", "answer": " c", "id": "x"})
    assert "line 3, field 'id': 'x' is the id of line 1 too" in complaint(path)


def test_the_first_of_many_faults_is_shown_and_the_others_counted(tmp_path: Path) -> None:
    three = written(tmp_path, OK, "{", OK | {"id": "x"}, "[]", "7")
    assert complaint(three).endswith("double quotes (and 2 more lines)")
    assert complaint(written(tmp_path, "{", "[]")).endswith("double quotes (and 1 more line)")


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    message = complaint(written(tmp_path, OK | {"answer": ["x" * 5000]}))
    assert len(message) < 250


@pytest.mark.parametrize(
    ("content", "named", "remedy"),
    [
        ("", "own.csv has no items", "write one item a line"),
        ("prompt,answer\n", "own.csv has no items", "write one item a line"),
        ("a b, c\nd, e\n", "line 1: the first row must name the columns", "prompt,answer"),
        ("prompt,answr\na,b\n", "line 1, field 'answr': not a field", "did you mean 'answer'?"),
        ("prompt,answer,answer\na,b,c\n", "line 1, field 'answer': two columns", "keep one"),
        ("prompt,answer\na, b\na, b, c\n", "line 3: 3 cells where the first row has 2", "double quotes"),
        ("prompt,answer\na\n", "line 2: 1 cells where the first row has 2", "double quotes"),
        ('prompt,answer\n"a\nb", c\nd,\n', "line 4, field 'answer': there is none", "every item needs `answer`"),
        ('prompt,answer\n"a\nb",\n', "line 2, field 'answer': there is none", "every item needs `answer`"),
        ('prompt,answer\n"a"b, c\n', "line 2: not CSV", "double the quotes"),
        ('prompt,answer\n"a, c\n', "line 2: not CSV", "double the quotes"),
        ("prompt,answer,spans\na, b,x\n", "line 2, field 'spans': not JSON", "strict JSON"),
        ("prompt,answer,foils\na, b, c\n", "line 2, field 'foils': not JSON", "strict JSON"),
    ],
)
def test_what_is_wrong_in_csv(tmp_path: Path, content: str, named: str, remedy: str) -> None:
    message = complaint(written(tmp_path, content, name="own.csv"))
    assert named in message
    assert remedy in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.jsonl") == "probe file no.jsonl does not exist; check the name and the folder"
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder; name the .jsonl or .csv file" in complaint(tmp_path / "folder.csv")
    assert "must end in .jsonl" in complaint(written(tmp_path, OK, name="own.json"))
    assert "must end in .jsonl" in complaint(written(tmp_path, OK, name="own"))
    assert "has no items" in complaint(written(tmp_path, "  ", ""))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": " b"}\n{"prompt": "caf\xe9", "answer": " b"}')
    assert complaint(path) == "probe file latin.jsonl, line 2: not UTF-8; save the file as UTF-8"
    path.write_text(json.dumps(OK), "utf-16")
    assert "line 1: not UTF-8" in complaint(path)


def test_a_place_of_the_twin_is_the_same_place_or_none(tmp_path: Path) -> None:
    """Where one of several places of a text was corrupted away, counting would name another one."""
    ring = {
        "prompt": "The ring is here. The key is in the ring",
        "corrupted": "The coat is here. The key is in the ring",
    }
    spans = {"first": {"text": "ring", "occurrence": 0}, "key": "key"}
    (item,) = read_items(written(tmp_path, ring | {"answer": " box", "spans": spans}))
    assert item.twin is not None
    assert item.twin.spans.keys() == {"key"}


# -- pictures ---


def drawn(folder: Path, name: str = "a.png", width: int = 8, height: int = 6) -> str:
    Picture.drawn(np.full((height, width, 3), len(name), np.uint8)).image().save(folder / name)
    return name


def test_pictures_lie_beside_the_file(tmp_path: Path) -> None:
    line = {
        "prompt": "<image> and <image>: same?",
        "answer": " no",
        "images": [drawn(tmp_path), drawn(tmp_path, "bb.png")],
        "corrupted": "<image> and <image>: same?",
        "corrupted_answer": " yes",
        "corrupted_images": [drawn(tmp_path), drawn(tmp_path)],
        "regions": {"corner": [1, 0, 0, 4, 3]},
    }
    (item,) = read_items(written(tmp_path, line))
    assert item.pictures == (Picture.of_file(tmp_path / "a.png"), Picture.of_file(tmp_path / "bb.png"))
    assert item.twin is not None
    assert item.twin.pictures == (item.pictures[0],) * 2
    assert item.regions == {"corner": Region(1, (0, 0, 4, 3))}
    # In a table the cells are JSON.
    cells = {name: json.dumps(value) if not isinstance(value, str) else value for name, value in line.items()}
    assert read_items(written(tmp_path, as_csv(cells), name="own.csv")) == (item,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": ["none.png"]}, "field 'images': picture .*none.png does not exist"),
        ({"images": "a.png"}, "must be a list of picture files"),
        ({"images": []}, "field 'regions': the prompt has 1 marks <image> and the item 0 pictures"),
        ({"images": ["a.png", "a.png"]}, "the prompt has 1 marks <image> and the item 2 pictures"),
        ({"regions": {"r": [0, 0, 0, 4]}}, r"'r' must be \[picture, left, top, right, bottom\]"),
        ({"regions": {"r": [0, 4, 0, 4, 2]}}, "left below right"),
        ({"regions": {"r": [0, 0, 0, 9, 2]}}, "reaches out of its picture of 8 x 6 pixels"),
        ({"corrupted_images": ["a.png"]}, "there is no `corrupted` that it belongs to"),
    ],
)
def test_what_is_wrong_with_pictures(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    line = {"prompt": "<image> what?", "answer": " a", "images": [drawn(tmp_path)], "regions": {"r": [0, 0, 0, 4, 3]}}
    with pytest.raises(InputError, match=f"line 1.*{said}") as raised:
        read_items(written(tmp_path, line | changed))
    assert "\n" not in str(raised.value)
