"""`headwise atlas [MODEL]`: the main job. Scores, verdicts and a report in a folder."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet
from headwise.cli.find import FILES
from headwise.cli.loading import Loading, load_model
from headwise.errors import Refusal

if TYPE_CHECKING:
    from headwise.atlas import Atlas

DEFAULT_MODEL = "zoo:organism"


def atlas(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")
    ] = DEFAULT_MODEL,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the atlas; atlas-NAME in the current one if left out.")
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            "--probes",
            metavar="NAME|FILE,...",
            help="Ids or probe files with commas between them; all probes that fit the model if left out.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Ids with commas between them; all but knock-out if left out.")
    ] = None,
    items: Annotated[
        int, typer.Option("--items", help="Items per probe: half of them find heads, half test them.")
    ] = 64,
    mode: Annotated[
        str, typer.Option("--mode", help="How heads are taken out: zero, mean, resample or uniform.")
    ] = "zero",
    scope: Annotated[
        str, typer.Option("--scope", help="Where heads are taken out: all, prompt, decode, last or span:NAME.")
    ] = "all",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest item, in tokens.")] = 256,
    controls: Annotated[int, typer.Option("--controls", help="Control sets for each set of heads.")] = 50,
    off_target: Annotated[
        str, typer.Option("--off-target", metavar="NAME", help="The probe on which the heads should cost nothing.")
    ] = "text",
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    attn: options.Attn = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Score every head of MODEL by every method, test what was found on other items, and write a report.

    The same command goes on where it was stopped; with more probes or methods it adds what is missing.
    """
    began = time.perf_counter()
    folder = folder_of(model) if out is None else out
    options.if_stopped(context, f"stopped; what is finished is kept in {folder}, and the same command goes on with it")
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.atlas import atlas as make_atlas
        from headwise.atlas.own import require_files
        from headwise.atlas.report import write_report
        from headwise.atlas.summary import summary

        asked = _listed(probes)
        require_files(asked or ())  # what is wrong in them is found before a model is loaded
        how = Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code)
        attached = load_model(model, how)
        made = make_atlas(
            attached,
            folder,
            probes=asked,
            methods=_listed(methods),
            items=items,
            seed=seed or 0,
            mode=mode,  # type: ignore[arg-type]
            scope=scope,
            max_tokens=max_tokens,
            controls=controls,
            off_target=off_target,
        )
        try:
            report = write_report(made)
        except OSError as error:
            raise Refusal(
                f"the report cannot be written ({error.strerror}: {error.filename}); the atlas in {made.folder} is "
                "complete: make room and run the same command again"
            ) from error
    if json:
        print_json(as_json(made, time.perf_counter() - began))
    else:
        print_tables(*summary(made, report))


def folder_of(model: str) -> Path:
    """`atlas-planted` for `zoo:planted`, `atlas-gpt2` for `openai-community/gpt2`."""
    last = re.split(r"[/:\\]", model.rstrip("/\\"))[-1]
    return Path(f"atlas-{re.sub(r'[^A-Za-z0-9._-]+', '-', last)}")


def as_json(made: Atlas, seconds: float) -> dict[str, object]:
    """What `--json` prints."""
    verified = [
        {"head": each.head.label, "method": each.method, "probe": each.probe, "effect": each.effect, "q": each.q}
        for each in made.verified()
    ]
    return {
        "model": made.manifest.model.name,
        "atlas": str(made.folder),
        "n_heads": len(made.manifest.model.heads),
        "verified": verified,
        "seconds": round(seconds, 3),
    }


def _listed(given: str | None) -> list[str] | None:
    """Names with commas or blanks between them; a file may have blanks in its name."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    return [name for part in parts for name in ([part] if Path(part).suffix.lower() in FILES else part.split())]
