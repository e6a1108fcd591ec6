"""The `headwise` program: its commands, its exit codes, and the one place where an error becomes one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import headwise
from headwise.cli import options
from headwise.cli.atlas import atlas
from headwise.cli.bake import bake
from headwise.cli.bench import bench
from headwise.cli.console import say
from headwise.cli.doctor import doctor
from headwise.cli.find import find
from headwise.cli.listing import list_entries
from headwise.cli.papers import papers
from headwise.cli.race import race
from headwise.cli.replicate import replicate
from headwise.cli.use import use
from headwise.cli.verify import verify
from headwise.errors import HeadwiseError

DONE, BAD_INPUT, OWN_ERROR, INTERRUPTED = 0, 2, 3, 130
TRACEBACK_VARIABLE = "HEADWISE_TRACEBACK"

app = typer.Typer(
    name="headwise",
    help="Find what each attention head of a transformer does, prove it causally, and put it to use.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 bad input or refusal, 3 an error in headwise, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("atlas")(atlas)
app.command("bake")(bake)
app.command("doctor")(doctor)
app.command("list")(list_entries)
app.command("find")(find)
app.command("race")(race)
app.command("verify")(verify)
app.command("use")(use)
app.command("replicate")(replicate)
app.command("papers")(papers)
app.command("bench")(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with `arguments` (default: those of the process) and return its exit code."""
    session = options.Session(wants_traceback=os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"))
    try:
        code = app(args=arguments, prog_name="headwise", standalone_mode=False, obj=session)
    except HeadwiseError as error:
        _print_traceback_if(session)
        say(str(error))
        return error.exit_code
    except TyperException as error:
        context = getattr(error, "ctx", None)
        program = context.command_path if context else "headwise"
        message = error.format_message().rstrip(".")
        say(f"{message}{' See' if message.endswith('?') else '; see'} `{program} --help`")
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        _print_traceback_if(session)
        hint = "" if session.wants_traceback else f"; add --traceback (or {TRACEBACK_VARIABLE}=1) to see where"
        say(f"an error in headwise itself: {type(error).__name__}: {error}{hint}")
        return OWN_ERROR
    if code == INTERRUPTED:  # typer makes this exit code of Ctrl-C itself
        say(session.when_stopped)
    return code if isinstance(code, int) else DONE


def _print_traceback_if(session: options.Session) -> None:
    if session.wants_traceback:
        traceback.print_exc(file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headwise {headwise.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
