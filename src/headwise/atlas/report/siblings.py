"""One set of claims on several models: in how many of them each holds, with what effect, and how specialised heads are.

    python -m headwise.atlas.report.siblings docs/siblings.md ATLAS ATLAS ...

writes it as a page; `make siblings` makes the atlases first. Heads are not joined over models: head 3 of one training
run has nothing to do with head 3 of another. What can be repeated is the claim that a behaviour hangs on the heads
which a method names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas

from headwise.atlas.opened import Atlas
from headwise.atlas.report.numerals import chance_of, counted, number, percent
from headwise.atlas.report.reading import report_of
from headwise.atlas.report.view import Behaviour, Claim, Matrix, Report
from headwise.errors import HeadwiseError, InputError

NOTHING = "\u2013"
CLAIMS = ["model", "probe", "method", "heads", "n_heads", "share", "ceiling", "q", "off_target", "ruling"]
REPEATS = ["probe", "method", "tested", "verified", "lowest", "highest", "ceiling", "q", "heads"]


def claims_of(reports: Iterable[Report]) -> pandas.DataFrame:
    """Every claim about a set, and every head alone that is verified: one row per model and claim.

    Columns: model, probe, method (what named the set; `alone` for a head by itself), heads, n_heads, share (effect as a
    share of the behaviour's reach), ceiling (95th percentile of the controls, likewise), q, off_target (change of the
    off-target metric, positive where it harms), ruling.
    """
    rows = []
    for report in reports:
        for behaviour in report.behaviours:
            alone = tuple(each for each in behaviour.singles if each.ruling == "verified")
            for claim in (*behaviour.joints, *alone):
                # A set that several methods named counts for each of them.
                for method in claim.method.split(", ") if claim.method else ["alone"]:
                    rows.append((report.model, behaviour.probe, method, *_figures(behaviour, claim)))
    return pandas.DataFrame(rows, columns=CLAIMS)


def repeats(reports: Sequence[Report]) -> pandas.DataFrame:
    """In how many models each claim holds: one row per behaviour and method, `alone` for single heads.

    Columns: probe, method, tested (models in which it was tested; for `alone` those with a map), verified (models in
    which a claim of the kind is verified), lowest and highest share of the reach, largest ceiling of the controls and
    largest q, each over the verified ones, and heads, how many there were in each verified model, from least to most.
    """
    claims = claims_of(reports)
    solved = {(each.probe, report.model) for report in reports for each in report.behaviours if not each.refusal}
    rows = []
    for (probe, method), group in claims.groupby(["probe", "method"], sort=True):
        if method == "alone":
            tested = sum(of == probe for of, _ in solved)
        else:
            tested = int(group["model"].nunique())
        held = group[group["ruling"] == "verified"]
        counts = held.groupby("model")["n_heads"].sum()
        rows.append(
            (
                probe,
                method,
                tested,
                int(held["model"].nunique()),
                held["share"].min(),
                held["share"].max(),
                held["ceiling"].max(),
                held["q"].max(),
                _span(counts.min(), counts.max()) if len(counts) else "",
            )
        )
    return pandas.DataFrame(rows, columns=REPEATS)


def page(atlases: Sequence[Atlas]) -> str:
    """The page in Markdown.

    Raises:
        InputError: fewer than two atlases, two of one model, or some with other items, knock-outs or seeds.
    """
    _refuse_unlike(atlases)
    reports = [report_of(each) for each in atlases]
    settings = atlases[0].manifest.settings
    head = f"""<!-- Made by `make siblings` (`python -m headwise.atlas.report.siblings`); change that file instead. -->

# The organism and its siblings

{counted(len(reports), "model")} from one training script: {", ".join(f"`{each.model}`" for each in reports)}. Every one
went through `headwise atlas` with {settings.items} items per probe (half of them for finding), mode
`{settings.mode}`, scope `{settings.scope}`, seed {settings.seed}. An effect is a share of what there is to lose: of
the clean metric's distance from chance. What the words mean: [The verdict](verdict.md).

## Behaviours

Verified alone (with the largest effect) and the best verified set together.

{_behaviours(reports)}

## In how many models each claim holds

A claim: the behaviour hangs on the heads that a method names, tested together; or, `alone`, on at least one single
head. `controls` is the largest 95th percentile of the control sets where it holds, `q` the largest q.

{_repeats(repeats(reports))}
"""
    return "\n".join([head, *(_model(each) for each in reports)])


def _figures(behaviour: Behaviour, claim: Claim) -> tuple[object, ...]:
    off = claim.off[0].effect if claim.off else float("nan")
    return (
        ", ".join(claim.heads),
        len(claim.heads),
        behaviour.share(claim.effect),
        behaviour.share(claim.ceiling),
        claim.q,
        off,
        claim.ruling,
    )


def _refuse_unlike(atlases: Sequence[Atlas]) -> None:
    if len(atlases) < 2:
        raise InputError(f"siblings are two atlases or more; {counted(len(atlases), 'folder')} given")
    names = [each.manifest.model.name for each in atlases]
    if len(set(names)) < len(names):
        raise InputError(f"two atlases are of one model ({', '.join(sorted(names))}); give each model once")
    for each in atlases:
        if not each.complete:
            raise InputError(f"{each.folder} is not complete; give the command again that made it")
    for name in ("items", "mode", "scope", "seed"):
        values = [getattr(each.manifest.settings, name) for each in atlases]
        if len(set(values)) > 1:
            raise InputError(f"{name} differs between the atlases ({', '.join(map(str, values))}); make them alike")


# -- tables -----------------------------------------------------------------------------------------------------------


def _behaviours(reports: Sequence[Report]) -> str:
    probes = sorted({each.probe for report in reports for each in report.behaviours})
    rows = []
    for probe in probes:
        found = [next((each for each in report.behaviours if each.probe == probe), None) for report in reports]
        rows.append([probe, *("not planned" if each is None else _of_behaviour(each) for each in found)])
    return _table(["behaviour", *(report.model for report in reports)], rows)


def _of_behaviour(behaviour: Behaviour) -> str:
    if behaviour.refusal:
        return f"refused ({percent(behaviour.solved)} right)"
    alone = [each for each in behaviour.singles if each.ruling == "verified"]
    parts = [f"{len(alone)} alone ({percent(behaviour.share(alone[0].effect))})"] if alone else []
    best = behaviour.best_set
    if best is not None and len(best.heads) > 1:
        parts.append(f"{len(best.heads)} together {percent(behaviour.share(best.effect))}")
    return "; ".join(parts) or NOTHING


def _repeats(found: pandas.DataFrame) -> str:
    rows = [
        [
            each.probe,
            each.method,
            f"{each.verified} of {each.tested}",
            _shares(each.lowest, each.highest),
            each.heads or NOTHING,
            percent(each.ceiling),
            chance_of(each.q),
        ]
        for each in found.itertuples()
    ]
    return _table(["behaviour", "claim", "holds in", "effect", "heads", "controls", "q"], rows)


def _model(report: Report) -> str:
    parts = [f"## {report.model}", _verified(report)]
    if report.matrix is not None:
        parts += [
            "Effect of each of these heads on every behaviour, as a share of its reach; verified ones are bold. The "
            f"last column is {report.matrix.index}.",
            _matrix(report.matrix),
        ]
    return "\n\n".join(parts) + "\n"


def _verified(report: Report) -> str:
    rows = [
        [
            claim.heads[0],
            behaviour.probe,
            ", ".join(claim.named_by) or "knock-out",
            percent(behaviour.share(claim.effect)),
            percent(behaviour.share(claim.ceiling)),
            chance_of(claim.q),
            f"{number(claim.off[0].effect, 2)} {claim.off[0].unit}" if claim.off else NOTHING,
        ]
        for behaviour in report.behaviours
        for claim in behaviour.singles
        if claim.ruling == "verified"
    ]
    if not rows:
        return "No head is verified alone."
    said = f"{counted(len(report.verified_heads), 'head')} of {report.n_heads} verified alone."
    return f"{said}\n\n" + _table(["head", "behaviour", "named by", "effect", "controls", "q", "off-target"], rows)


def _matrix(matrix: Matrix) -> str:
    lines = zip(
        matrix.heads, matrix.shares.tolist(), matrix.verified.tolist(), matrix.selectivity.tolist(), strict=True
    )
    rows = []
    for head, shares, verified, selectivity in lines:
        told = [
            f"**{percent(share)}**" if held else percent(share) for share, held in zip(shares, verified, strict=True)
        ]
        rows.append([head, *told, f"{selectivity:.2f}"])
    return _table(["head", *matrix.behaviours, "tau"], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _shares(low: float, high: float) -> str:
    if not np.isfinite(low):
        return NOTHING
    one, other = percent(low), percent(high)
    return one if one == other else f"{one} to {other}"


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a page on what several atlases agree about.")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("atlases", type=Path, nargs="+", help="folders of atlases, one for each model")
    asked = parser.parse_args(arguments)
    try:
        text = page([Atlas.open(folder) for folder in asked.atlases])
    except HeadwiseError as error:
        sys.exit(f"siblings: {error}")
    asked.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
