"""`headwise doctor MODEL`: proof, on the user's own model, that headwise reaches its heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.cli.loading import Loading, load_model
from headwise.heads import SiteId

if TYPE_CHECKING:
    from headwise.model.proving.doctor import DoctorReport, SiteReport

STYLES = {"pass": "green", "fail": "bold red", "n/a": "dim"}


def doctor(
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")],
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
    """Prove on MODEL, as it will be run, that reads and edits of its heads do what they say.

    Exit code 1 if a check fails; a check that does not apply is n/a and says why.
    """
    with quiet():
        how = Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code)
        attached = load_model(model, how)
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.model.proving.doctor import examine

        report = examine(attached, seed=seed or 0, began=lambda check: say(f"checking: {check}"))
    if json:
        print_json(report.to_json())
    else:
        print_tables(*_tables(report))
    raise typer.Exit(0 if report.passed else 1)


def _tables(report: DoctorReport) -> tuple[Table | str, ...]:
    checks = Table("check", "result", "detail", title=f"headwise doctor {report.model}", title_justify="left")
    for check in report.checks:
        checks.add_row(check.name, Text(check.status, style=STYLES[check.status]), check.detail)
    alike = _alike(report.sites)
    sites = Table("site", *(_ranges(group) for group in alike), title="what each site can do", title_justify="left")
    for name in dict.fromkeys(name for site in report.sites for name in site.capabilities):
        sites.add_row(name, *(_cell(group[0].capabilities.get(name, "")) for group in alike))
    return checks, sites, report.summary


def _alike(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Sites of one stack that can do the same: one column each, so that a deep model still fits the terminal."""
    groups: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in sites:
        groups.setdefault((SiteId.parse(site.label).stack, *site.capabilities.items()), []).append(site)
    return list(groups.values())


def _ranges(group: Sequence[SiteReport]) -> str:
    """`L0-L3, L5` for the labels L0, L1, L2, L3, L5."""
    runs: list[list[SiteId]] = []
    for site in (SiteId.parse(report.label) for report in group):
        if runs and runs[-1][-1] == replace(site, layer=max(site.layer - 1, 0)):
            runs[-1].append(site)
        else:
            runs.append([site])
    return ", ".join(run[0].label if len(run) == 1 else f"{run[0].label}-{run[-1].label}" for run in runs)


def _cell(capability: str | bool) -> str:
    if isinstance(capability, bool):
        return "yes" if capability else "no"
    return capability
