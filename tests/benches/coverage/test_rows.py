"""The fixed rows against the transformers that is installed."""

from __future__ import annotations

from pathlib import Path

import transformers

from headwise.benches.coverage import rows
from headwise.benches.coverage.most_used import MOST_USED, is_most_used
from headwise.benches.coverage.rows import TASKS, Row


def test_transformers_ships_the_rows_that_are_committed() -> None:
    """Fails when transformers is another one: write the rows anew (`rows.write`), then the table."""
    committed, shipped = set(rows.committed()), set(rows.shipped())
    assert not shipped - committed, "transformers has rows that the table lacks"
    assert not committed - shipped, "the table has rows that transformers lacks"


def test_a_row_stands_once_and_in_order() -> None:
    committed = rows.committed()
    assert len({row.key for row in committed}) == len(committed) >= 652
    order = list(TASKS)
    assert committed == sorted(committed, key=lambda row: (order.index(row.task), row.model_type))


def test_a_type_has_a_base_row_only_where_it_has_no_other() -> None:
    tasks: dict[str, set[str]] = {}
    for row in rows.committed():
        tasks.setdefault(row.model_type, set()).add(row.task)
    assert all(len(each) == 1 for each in tasks.values() if each & {"base", "other"})
    assert tasks["llama"] == {"causal"}
    assert tasks["vit"] == {"base"}
    assert tasks["bart"] == {"causal", "masked", "text-to-text"}


def test_every_class_is_one_of_transformers() -> None:
    missing = [row.class_name for row in rows.committed() if not hasattr(transformers, row.class_name)]
    # The auto-classes of transformers name one class that they do not export.
    assert missing == ["VoxtralRealtimeTextModel"]


def test_written_rows_are_read_back(tmp_path: Path, monkeypatch: object) -> None:
    written = [Row("a", "causal", "AForCausalLM"), Row("b-c", "base", "BModel")]
    rows.write(written, str(tmp_path / "rows.csv"))
    assert (tmp_path / "rows.csv").read_text() == "model_type,task,class\na,causal,AForCausalLM\nb-c,base,BModel\n"


def test_the_most_used_are_fifty_rows_of_the_table() -> None:
    keys = {row.key for row in rows.committed()}
    listed = [f"{kind} {task}" for task, types in MOST_USED.items() for kind in types]
    assert len(set(listed)) == len(listed) == 50
    assert set(listed) <= keys
    assert is_most_used("llama", "causal")
    assert not is_most_used("llama", "base")
