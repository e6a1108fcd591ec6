"""Where output goes: one JSON object on stdout, other libraries' chatter nowhere, and their settings restored."""

from __future__ import annotations

import contextlib
import logging
import warnings

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from rich.text import Text
from transformers.utils import logging as transformers_logging

from headwise.cli.console import CHATTY, print_json, print_tables, quiet


def test_only_what_headwise_says_gets_through(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as shown, quiet():
        print("a remark of somebody's model file")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        transformers_logging.get_logger("transformers.modeling_utils").warning("LOAD REPORT")
        for _ in transformers_logging.tqdm(range(2), desc="Loading weights"):
            pass
        logging.getLogger("headwise.loading").warning("the processor\nwas not loaded")
    assert not shown
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["a remark of somebody's model file", "headwise: note: the processor was not loaded"]


def test_the_settings_of_other_libraries_come_back_also_after_an_error() -> None:
    def settings() -> tuple[object, ...]:
        levels = tuple(logging.getLogger(name).level for name in CHATTY)
        handlers = tuple(logging.getLogger("headwise").handlers)
        return levels, handlers, are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()

    before = settings()
    with contextlib.suppress(KeyError), quiet():
        assert settings() != before
        raise KeyError
    assert settings() == before


def test_json_is_one_line_of_ascii_and_never_invalid(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"model": "é", "value": 1.5})
    assert capsys.readouterr().out == '{"model": "\\u00e9", "value": 1.5}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"value": float("nan")})
    assert capsys.readouterr().out == ""


def test_square_brackets_in_a_name_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables("model [red]x[/red] :smile:")
    assert capsys.readouterr().out == "model [red]x[/red] :smile:\n"


def test_a_path_is_not_broken_over_lines(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/" + "folder/" * 30 + "report.html"
    print_tables("a sentence " * 12, Text(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == path
    assert max(map(len, lines[:-1])) <= 80
