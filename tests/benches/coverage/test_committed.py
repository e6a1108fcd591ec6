"""The table as it is committed: complete, honest about what is not served, and what the program makes again."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import Path

import pytest

from headwise.benches.coverage.__main__ import main
from headwise.benches.coverage.examining import NO_OP, ZERO
from headwise.benches.coverage.result import Result
from headwise.benches.coverage.rows import committed
from headwise.benches.coverage.table import page, read_json

ROOT = Path(__file__).parents[3]
JSON = ROOT / "benchmarks" / "models.json"
PAGE = ROOT / "docs" / "models.md"


@functools.cache
def results() -> list[Result]:
    return list(read_json(JSON)[1].values())


def types(held: list[Result]) -> int:
    return len({result.model_type for result in held})


def test_every_row_is_in_the_table_once_and_in_order() -> None:
    assert [result.key for result in results()] == [row.key for row in committed()]


def test_the_page_is_what_the_program_makes_of_the_json() -> None:
    versions, read = read_json(JSON)
    assert PAGE.read_text(encoding="utf-8") == page(list(read.values()), versions)


def test_it_reaches_what_was_measured_before() -> None:
    """What the first measurements of all types had, and a table has to keep."""
    built = [result for result in results() if result.built]
    assert len(built) >= 463
    assert types(built) >= 426
    assert sum(result.passed(ZERO) for result in results()) >= 407
    assert sum(result.passed(ZERO) and result.passed(NO_OP) for result in results()) >= 356


def test_no_check_of_a_row_failed() -> None:
    assert not [f"{result.key}: {result.reason}" for result in results() if result.status in ("wrong", "ended")]


def test_every_row_that_is_not_served_has_its_own_reason() -> None:
    assert not [result.key for result in results() if result.status != "right" and not result.reason]


def test_reasons_name_no_folder_of_the_machine_that_made_them() -> None:
    assert not re.search(r"(/home|/root|/tmp|/opt|/work|site-packages)", JSON.read_text(encoding="utf-8"))


@pytest.mark.prove
def test_the_whole_table_comes_out_again(tmp_path: Path) -> None:
    versions, before = read_json(JSON)
    if versions["transformers"] != importlib.metadata.version("transformers"):
        pytest.skip(f"the table is of transformers {versions['transformers']}")
    assert main([str(tmp_path / "models.md"), "--json", str(tmp_path / "models.json")]) == 0
    after = read_json(tmp_path / "models.json")[1]
    assert {key: (each.status, each.route) for key, each in after.items()} == {
        key: (each.status, each.route) for key, each in before.items()
    }
