"""The page and the JSON that are written."""

from __future__ import annotations

from pathlib import Path

from headwise.benches.coverage.examining import NO_OP, ZERO, Z
from headwise.benches.coverage.result import Outcome, Result
from headwise.benches.coverage.table import page, read_json, write_json

PASS = Outcome("pass", "bit-equal")
VERSIONS = {"transformers": "5.23.0"}


def right(kind: str, task: str = "causal", **more: object) -> Result:
    given = {
        "sites": 2,
        "heads": 8,
        "routes": ("registry",),
        "projections": ("Linear",),
        "with_z": 2,
        "with_rows": 1,
        "checks": {NO_OP: PASS, Z: PASS, ZERO: PASS},
        "seconds": 1.5,
    }
    return Result(kind, task, kind.title(), "right", **{**given, **more})  # type: ignore[arg-type]


RESULTS = [
    right("llama", capabilities={"rows": PASS, "NF4": Outcome("n/a", "none of its layers")}),
    right("bloom", routes=("watched",), reason="no rows at 1 of 2 sites: because_so"),
    Result("odd", "causal", "Odd", "wrong", "zeroing two ways agrees: the two outputs differ", sites=1),
    Result("vit", "base", "ViT", "not built", "the optional package timm is missing"),
]


def test_json_comes_back_without_times(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "models.json"
    write_json(path, VERSIONS, RESULTS)
    versions, read = read_json(path)
    assert versions == VERSIONS
    assert list(read) == ["llama causal", "bloom causal", "odd causal", "vit base"]
    assert read["bloom causal"].checks == RESULTS[1].checks
    assert {result.seconds for result in read.values()} == {0.0}
    assert "seconds" not in path.read_text()


def test_counts_are_of_rows_and_of_types() -> None:
    text = page([*RESULTS, right("llama", "image-text")], VERSIONS)
    assert "| in the table | 5 | 4 |" in text
    assert "| built | 4 | 3 |" in text
    assert "| a head zeroed equals its slice zeroed, bit for bit | 3 | 2 |" in text
    assert "| reached by watching | 1 | 1 |" in text
    assert "| rows readable at every site | 0 | 0 |" in text


def test_a_failure_stands_before_all_tables() -> None:
    text = page(RESULTS, VERSIONS)
    assert text.index("## Not to be used") < text.index("most used types") < text.index("## Causal language models")
    assert "- **odd** (causal): zeroing two ways agrees: the two outputs differ" in text
    assert "| odd | `Odd` | **wrong** |" in text
    assert "## Not to be used" not in page(RESULTS[:2], VERSIONS)


def test_every_row_that_is_not_right_has_its_reason() -> None:
    text = page(RESULTS, VERSIONS)
    assert "- vit: the optional package timm is missing" in text
    assert "- bloom: no rows at 1 of 2 sites: because\\_so" in text
    assert "| llama | `Llama` | right | registry | 2 | 2 | 1 | Linear | `+++` |" in text


def test_the_most_used_show_their_capabilities() -> None:
    text = page(RESULTS, VERSIONS)
    assert "| llama | causal | right | + |  |  |  |  |  |  | · |" in text
    assert "- llama (causal), NF4: n/a, none of its layers" in text


def test_the_page_has_no_date_and_says_how_it_was_made() -> None:
    text = page(RESULTS, VERSIONS)
    assert "`python -m headwise.benches.coverage docs/models.md`, with transformers 5.23.0" in text
    assert page(RESULTS, VERSIONS) == text
