"""`headwise find METHOD MODEL`: a published method's score of every head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.cli.loading import Loading, load_model

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel
    from headwise.probes import Item, ItemSet, Probe
    from headwise.scores import HeadScores, ScoredHead

FILES = (".jsonl", ".ndjson", ".csv")

ProbeOption = Annotated[
    str | None,
    typer.Option("--probe", metavar="NAME|FILE", help="A probe (`headwise list probes`), or a .jsonl or .csv file."),
]
ItemsOption = Annotated[
    int, typer.Option("--items", min=1, help="How many items of a probe; of a file, all of one half.")
]


def find(
    method: Annotated[str, typer.Argument(help="See `headwise list methods`.")],
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")],
    probe: ProbeOption = None,
    items: ItemsOption = 64,
    top: Annotated[int, typer.Option("--top", min=1, help="How many heads to name.")] = 10,
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
    """Score every head of MODEL by METHOD. Scores describe; `headwise verify` says what heads do.

    METHOD is run on its own probe unless another one is named. Of a file it gets one half; the other is
    for `headwise verify`.
    """
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.find import find as scored
        from headwise.find import method as named
        from headwise.find.search import own_probe
        from headwise.verify.verifying import half_for_finding

        # What can be wrong in the words and the file themselves is found before a model is loaded.
        chosen = named(method)
        source = source_of(probe) if probe else own_probe(chosen)
        questions = half_for_finding(source) if isinstance(source, Path) else source
        how = Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code)
        attached = load_model(model, how)
        given = encoded(questions, attached, items, seed or 0, name=source.stem if isinstance(source, Path) else "")
        half = ", the half of the file that is for finding heads" if isinstance(source, Path) else ""
        say(f"running {chosen.id} on {len(given)} items of {given.probe}{half}")
        scores = scored(chosen, attached, given, seed=seed or 0)
        first = scores.top_scores(min(top, len(scores.heads))) if scores.heads else ()
    if json:
        print_json(
            {
                "method": chosen.id,
                "model": attached.name,
                "scores": grids(scores),
                "top": [{"head": each.head.label, "score": each.score} for each in first],
            }
        )
        return
    print_tables(_table(first, f"headwise find {chosen.id} {attached.name}", chosen.title), _caption(scores, given))


def source_of(name: str) -> Probe | Path:
    """A probe by its id, or the path of a file by its ending or its slashes. Raises `InputError`, with nearest ids."""
    from headwise.probes import probe

    path = Path(name)
    return path if path.suffix.lower() in FILES or len(path.parts) > 1 else probe(name)


def encoded(source: Probe | tuple[Item, ...], model: AttachedModel, n: int, seed: int, *, name: str = "") -> ItemSet:
    """`n` items of a probe, or all of these, in the model's ids; `name` is what to call the latter.

    Raises `InputError`: a model without a tokenizer; too few items.
    """
    from headwise.errors import InputError
    from headwise.probes import encode

    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so no probe can be written for it; use a model that has one")
    if isinstance(source, tuple):
        return encode(source, model, name=name)
    return encode(source, model, n=n, seed=seed)


def grids(scores: HeadScores) -> dict[str, list[list[float | None]]]:
    """Means as `[layer][head]`, by stack; None where a head has no score, `[]` for a layer without attention.

    Further calls of the same modules are a stack of their own, `main@1`.
    """
    found: dict[str, list[list[float | None]]] = {}
    for stack, means in scores.mean().items():
        for site, row in zip(scores.sites[stack], means.tolist(), strict=True):
            layers = found.setdefault(f"{stack}@{site.call}" if site.call else stack, [])
            layers.extend([] for _ in range(site.layer + 1 - len(layers)))
            layers[site.layer] = [value if math.isfinite(value) else None for value in row]
    return found


def _table(first: tuple[ScoredHead, ...], title: str, what: str) -> Table:
    table = Table("head", "score", "± SE", title=f"{title}: {what}", title_justify="left")
    for each in first:
        error = f"{each.standard_error:.3g}" if math.isfinite(each.standard_error) else ""
        table.add_row(each.head.label, f"{each.score:.4g}", error)
    return table


def _caption(scores: HeadScores, items: ItemSet) -> str:
    over = f"mean over {len(scores.item_ids)} items of {items.probe}" if len(scores.item_ids) > 1 else "of the weights"
    return (
        f"{len(scores.heads)} heads have a score, {over}. "
        "Descriptive: not verified; `headwise verify` tests what heads do."
    )
