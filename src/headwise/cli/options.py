"""The options that commands share, each defined once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass
class Session:
    """What one call of the program has to remember outside of its command; `when_stopped` is said after Ctrl-C."""

    wants_traceback: bool
    when_stopped: str = "stopped"


def if_stopped(context: typer.Context, line: str) -> None:
    """What the program says if its command is stopped by Ctrl-C."""
    if isinstance(context.obj, Session):
        context.obj.when_stopped = line


def _remember_traceback(context: typer.Context, wanted: bool) -> bool:
    session = context.obj
    if wanted and isinstance(session, Session):
        session.wants_traceback = True
    return wanted


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback", help="On an error, print the traceback as well.", callback=_remember_traceback, is_eager=True
    ),
]

Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of every random draw.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16, float64 or auto.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Attn = Annotated[str | None, typer.Option("--attn", help="Attention kernel: sdpa, eager, flash_attention_2 ...")]

AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Permit weights in pytorch_model.bin, which can run code when read.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Permit Python code that comes with the checkpoint.")
]
