"""The catalogue: what it takes, what it refuses, and how another package's entries get in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headwise import catalogue
from headwise.catalogue import BenchEntry, Entry, MethodEntry, entries, entry, register
from headwise.errors import InputError, Refusal


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue with nothing in it, and nothing to gather."""
    monkeypatch.setattr(catalogue, "_registered", {kind: {} for kind in catalogue.KINDS})
    monkeypatch.setattr(catalogue, "_gathered", False)
    monkeypatch.setattr(catalogue, "ROOMS", ())
    monkeypatch.setattr(catalogue, "entry_points", lambda group: ())


def model_entry(id: str) -> Entry:
    return Entry(id=id, kind="models", title=f"Model {id}", page="zoo.md")


METHOD = MethodEntry(
    id="previous-token",
    title="Previous token",
    page="methods/previous-token.md",
    paper="Elhage et al.",
    year=2021,
    tier="B",
    status="exact",
    needs=("pattern", "spans"),
    cost="one forward per item",
)


@pytest.mark.usefixtures("empty")
class TestLookUp:
    def test_entries_come_back_in_the_order_of_their_ids(self) -> None:
        for id in ("c", "a", "b"):
            register(model_entry(id))
        assert [found.id for found in entries("models")] == ["a", "b", "c"]
        assert entries("edits") == ()

    def test_an_id_is_taken_once_within_its_kind(self) -> None:
        register(model_entry("twin"))
        register(Entry(id="twin", kind="edits", title="An edit", page="edits.md"))
        with pytest.raises(InputError, match=r"models already has 'twin' \(Model twin\)"):
            register(Entry(id="twin", kind="models", title="Another", page="zoo.md"))
        assert entry("models", "twin").title == "Model twin"

    def test_a_near_miss_is_told_the_nearest_id(self) -> None:
        register(model_entry("tiny-llama"))
        register(model_entry("planted"))
        with pytest.raises(InputError, match=r"^no model 'tiny-lama'; did you mean tiny-llama\?$"):
            entry("models", "tiny-lama")

    def test_a_far_miss_is_told_what_there_is(self) -> None:
        register(model_entry("tiny-llama"))
        with pytest.raises(InputError, match="choose one of: tiny-llama"):
            entry("models", "zzzz")

    def test_a_look_up_in_an_empty_kind_says_so(self) -> None:
        with pytest.raises(InputError, match="no bench 'speed'; this installation has no benches yet"):
            entry("benches", "speed")

    def test_an_unknown_kind_is_told_the_nearest(self) -> None:
        with pytest.raises(InputError, match="unknown kind 'model'; did you mean models"):
            entries("model")  # type: ignore[arg-type]


class TestEntry:
    @pytest.mark.parametrize("id", ["", "Tiny", "two words", "-x", "a--b", "a/b"])
    def test_an_id_has_one_form(self, id: str) -> None:
        with pytest.raises(InputError, match="lower-case"):
            model_entry(id)

    def test_a_method_cannot_hide_what_its_kind_must_say(self) -> None:
        with pytest.raises(InputError, match="must be made with MethodEntry"):
            Entry(id="x", kind="methods", title="t", page="p.md")

    def test_a_title_and_a_page_are_required(self) -> None:
        with pytest.raises(InputError, match="needs a title and a page"):
            Entry(id="x", kind="edits", title="", page="p.md")

    def test_json_of_a_method_holds_its_declarations(self) -> None:
        assert json.loads(json.dumps(METHOD.to_json())) == {
            "id": "previous-token",
            "kind": "methods",
            "title": "Previous token",
            "page": "methods/previous-token.md",
            "paper": "Elhage et al.",
            "year": 2021,
            "tier": "B",
            "status": "exact",
            "needs": ["pattern", "spans"],
            "cost": "one forward per item",
        }

    def test_json_of_a_bench_leaves_its_function_out(self) -> None:
        bench = BenchEntry(id="b", title="t", page="p.md", run=lambda seed=0: {"value": seed})
        assert bench.to_json() == {"id": "b", "kind": "benches", "title": "t", "page": "p.md"}
        assert bench.options == ("seed",)

    def test_a_bench_with_a_setting_that_no_command_gives_is_refused(self) -> None:
        with pytest.raises(InputError, match="change colour"):
            BenchEntry(id="b", title="t", page="p.md", run=lambda seed=0, colour="red": {})
        with pytest.raises(InputError, match="change seed"):
            BenchEntry(id="b", title="t", page="p.md", run=lambda seed: {})


class FakePoint:
    name, value, dist = "mine", "no_such_package.entries", None

    def load(self) -> None:
        raise ImportError("No module named 'no_such_package'")


@pytest.mark.usefixtures("empty")
def test_entries_of_another_package_that_do_not_load_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "entry_points", lambda group: (FakePoint(),))
    for _ in range(2):
        with pytest.raises(Refusal, match=r"mine = no_such_package\.entries.*No module named"):
            entries("models")


def test_another_package_is_found_by_its_entry_point_and_not_before_a_look_up(tmp_path: Path) -> None:
    """A package on the path with real metadata, in a fresh process."""
    (tmp_path / "other_package.py").write_text(
        "from headwise.catalogue import Entry, register\n"
        "register(Entry(id='theirs', kind='edits', title='Theirs', page='https://example.org'))\n"
    )
    metadata = tmp_path / "other_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[headwise.catalogue]\ntheirs = other_package\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import headwise.catalogue as catalogue\n"
        "assert 'other_package' not in sys.modules\n"
        "catalogue.ROOMS = ()\n"
        "assert catalogue.entry('edits', 'theirs').title == 'Theirs'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_rooms_of_headwise_register_their_entries() -> None:
    assert "tiny-llama" in {found.id for found in entries("models")}
    assert "zero" in {found.id for found in entries("edits")}
