"""`headwise bake MODEL [FOLDER] --out DIR`: heads scaled, or a saved intervention, as an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.cli.loading import Loading, load_model

if TYPE_CHECKING:
    from headwise.use.baking import BakeReport
    from headwise.use.intervention import Intervention


def bake(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")],
    folder: Annotated[
        str | None, typer.Argument(help="A saved intervention: what `use.save` wrote, or owner/name on the hub.")
    ] = None,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to make.")] = ...,  # type: ignore[assignment]
    heads: Annotated[
        str | None, typer.Option("--heads", metavar="L1H2,...", help="In place of FOLDER: scale these heads.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="What --heads are multiplied by (default: 0, which takes them out).")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Make the weights smaller by KV groups of which no head is left.")
    ] = False,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Bake what can be baked and name the rest, in place of refusing it all.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Permit a model of other weights where shapes fit.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    attn: options.Attn = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Write a checkpoint of MODEL that computes by itself what MODEL computes under a change of its heads.

    The change is a saved intervention, or a factor on heads. What was written is loaded anew and compared.
    """
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.errors import InputError
        from headwise.heads import HeadSet
        from headwise.use.baking import bake as baked
        from headwise.use.baking.saving import new_folder
        from headwise.use.intervention import Intervention
        from headwise.use.scaling import HeadScaling
        from headwise.use.sharing.hub import fetched
        from headwise.use.sharing.saved import load, read_saved

        # What can be wrong in the words and the folders is found before a model is loaded.
        if (folder is None) == (heads is None):
            raise InputError("give the folder of a saved intervention, or --heads with --scale: one of them")
        if scale is not None and heads is None:
            raise InputError("--scale goes with --heads; a saved intervention has its own settings")
        new_folder(out)
        options.if_stopped(context, "stopped; nothing was written")
        change: Intervention | None = None
        if heads is not None:
            change = HeadScaling(HeadSet.parse(heads, "head"), 0.0 if scale is None else scale)
        place = None if folder is None else fetched(folder)
        if place is not None and not isinstance(read_saved(place).thing, Intervention):
            raise InputError(f"{folder} holds no intervention, and that is what is baked; give one that use.save wrote")
        attached = load_model(model, Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code))
        if change is None:
            assert place is not None
            change = load(place, attached, anyway=anyway)
        say(f"baking {change!r}")
        report = baked(attached, change, remove=remove, leave_out=leave_out).save_pretrained(out)
    if json:
        print_json({"model": attached.name, "folder": str(out), **_told(report)})
        return
    print_tables(_table(report, out), _caption(report))


def _told(report: BakeReport) -> Mapping[str, Any]:
    removal, check = report.removal, report.check
    return {
        "architecture": report.architecture,
        "housing": report.housing,
        "edits": [asdict(line) for line in report.lines],
        "removal": None if removal is None else asdict(removal),
        "check": None if check is None else asdict(check),
    }


def _table(report: BakeReport, out: str) -> Table:
    table = Table("edit", "result", "how", title=f"{report.source} -> {out}", title_justify="left")
    for line in report.lines:
        table.add_row(line.edit, line.result, line.why)
    return table


def _caption(report: BakeReport) -> str:
    """The report without its lines, which are in the table."""
    edits = len(report.lines)
    first, *rest = str(report).splitlines()
    return "\n".join([first, *rest[edits:]])
