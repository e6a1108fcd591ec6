"""What the program prints, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

CHATTY = ("transformers", "huggingface_hub", "accelerate", "torch", "peft")


def say(message: str) -> None:
    """One line on stderr, whatever line breaks the message has."""
    print(f"headwise: {' '.join(message.split())}", file=sys.stderr)


def print_json(result: Mapping[str, object]) -> None:
    """The one JSON object of a command. A number that is not finite is a mistake of the command and raises."""
    _write(json.dumps(result, allow_nan=False) + "\n")


def print_tables(*parts: Table | Text | str) -> None:
    # No markup: a model's name or a detail may hold square brackets.
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    with console.capture() as text:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))  # a Text, such as a path, stays in one piece
    _write(text.get())


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `headwise list | head`. The command ends with its own exit code, and Python must
        # not try to flush the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep stdout for the result, and other libraries' progress bars and warnings off the terminal, while at work.

    Only the command line does this; a program that uses headwise as a library keeps its own settings. What headwise
    itself has to remark arrives as a line on stderr.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars_were_off, transformers_bars = are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    remarks, ours = _Remarks(logging.WARNING), logging.getLogger("headwise")
    ours.addHandler(remarks)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(remarks)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if not bars_were_off:
            enable_progress_bars()


class _Remarks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}")
