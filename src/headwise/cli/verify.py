"""`headwise verify MODEL --heads ...`: what becomes of a behaviour without these heads, against matched random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.cli.find import ItemsOption, ProbeOption, source_of
from headwise.cli.loading import Loading, load_model

if TYPE_CHECKING:
    from headwise.probes import Item, Probe


def verify(
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")],
    heads: Annotated[str, typer.Option("--heads", metavar="L1H2,L3H4", help="The heads to test, together and alone.")],
    probe: ProbeOption = "needle",
    metric: Annotated[str | None, typer.Option("--metric", help="What is measured; left out, the probe's own.")] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="How heads are taken out (zero, mean, resample, uniform).")
    ] = "zero",
    scope: Annotated[str, typer.Option("--scope", help="Where: all, prompt, decode, last, span:NAME.")] = "all",
    items: ItemsOption = 64,
    off_target: Annotated[
        str,
        typer.Option("--off-target", metavar="NAME", help="The probe on which the heads should cost nothing, or none."),
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
    """Knock heads of MODEL out and say what that costs, against matched random heads: verified, not verified,
    undecidable or refused. Every one of these is an answer, and ends in exit code 0.
    """
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise import metrics
        from headwise.errors import InputError
        from headwise.heads import HeadSet
        from headwise.model.positions import check_scope
        from headwise.probes import probe as named
        from headwise.sweep import MODES
        from headwise.verify import verify as tested
        from headwise.verify.verifying import half_for_testing

        # What can be wrong in the words and the file themselves is found before a model is loaded.
        wanted, source = HeadSet.parse(heads, kind="head"), source_of(probe or "needle")
        elsewhere = None if off_target == "none" else off_target
        if elsewhere is not None:
            named(elsewhere)
        if not wanted:
            raise InputError("--heads names no heads; write --heads L1H2,L3H4")
        if mode not in MODES:
            raise InputError(f"no knock-out mode {mode!r}; choose from {', '.join(MODES)}")
        if metric is not None:
            metrics.metric(metric)
        check_scope(scope)
        questions = half_for_testing(source) if isinstance(source, Path) else source
        _check_span(scope, questions)
        how = Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code)
        attached = load_model(model, how)
        wanted = attached.heads(wanted)
        if isinstance(questions, tuple):
            about = f"{len(questions)} items of {probe}, the half of the file that is for testing heads"
        else:
            about = questions.id
        say(f"testing {', '.join(wanted.labels)} on {about}")
        verdict = tested(
            attached,
            wanted,
            probe=source,
            metric=metric,
            mode=mode,
            scope=scope,
            items=items,
            off_target=elsewhere,
            seed=seed or 0,
        )
        found = verdict.to_json()
    if json:
        print_json(found)
    else:
        print_tables(_table(found, f"headwise verify {attached.name}"), str(verdict))


def _check_span(scope: str, questions: Probe | tuple[Item, ...]) -> None:
    """Raises `InputError` if the scope is a span that not every item has."""
    from headwise.errors import InputError

    name = scope.removeprefix("span:")
    if name == scope:
        return
    if isinstance(questions, tuple):
        every = set.intersection(*(set(each.spans) for each in questions))
    else:
        every = set(questions.spans)
    if name not in every:
        raise InputError(
            f"scope {scope!r}: not every item has a span {name!r}; there is {', '.join(sorted(every)) or 'none'}"
        )


def _table(found: Mapping[str, Any], title: str) -> Table:
    table = Table("heads", "effect", "p", "q", title=f"{title}: {found['verdict']}", title_justify="left")
    for name, row in [("together", found["joint"]), *((each["head"], each) for each in found["single"])]:
        table.add_row(name, *(_number(row[column]) for column in ("effect", "p", "q")))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
