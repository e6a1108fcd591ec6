"""`verify`: knock a set of heads out on items that did not choose it, and say whether it matters.

verdict = hw.verify(model, scores.top(5), probe="needle")
verdict.ruling, verdict.reason
print(verdict)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise import freed_memory
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.metrics import Metric
from headwise.metrics import metric as metric_named
from headwise.model.attached import AttachedModel
from headwise.probes import Item, ItemSet, Probe, encode, read_items
from headwise.probes import probe as probe_named
from headwise.scores import HeadScores, ScoredHead
from headwise.sweep import KnockOut, Mode, measure_sets
from headwise.sweep.clean_runs import remembered
from headwise.sweep.knockout import reference_of
from headwise.verify.evidence import Joint
from headwise.verify.gathering import N_CONTROLS, Ground, every_head, ground, joint_of, map_of
from headwise.verify.judging import FEWEST_ITEMS, SMALLEST, judge
from headwise.verify.result import Dose, KeptOnly, OffTarget, Verdict
from headwise.verify.statistics import mean_interval

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
FOUND_BY_DEFAULT = 64
"""As many items of a probe does `find` use where no number is given."""
REFERENCE_ITEMS = 32
OFF_TARGET_ITEMS = 32
OFF_TARGET_CONTROLS = 20

Finding = ItemSet | HeadScores | Iterable[str]


@freed_memory.kept()
@remembered()
def verify(
    model: AttachedModel,
    heads: Any,
    probe: str | Path | Probe | ItemSet | None = None,
    *,
    metric: str | Metric | None = None,
    mode: Mode = "zero",
    scope: str = "all",
    items: int = 64,
    off_target: str | None = "text",
    n_controls: int = N_CONTROLS,
    smallest: float = SMALLEST,
    finding: Finding | None = None,
    seed: int = 0,
) -> Verdict:
    """Whether these heads matter for a behaviour, together and alone, against heads like them.

    Every head of the main stack is knocked out by itself as well: the single heads are judged against one another, and
    the family of claims is all of them and the set.

    Args:
        heads: heads by any name, or what `scores.top_scores(k)` gives, whose order makes a growing set.
        probe: id of a probe, a probe, a probe file, or items encoded for this model.
        metric: None is the probe's own.
        mode, scope: how heads are taken out, and where; see `KnockOut`. What `mean` and `resample` put in place is from
            items that are not tested: those of `finding` where these are given as an `ItemSet`, else further items of
            the probe, or the other items of the file. `verdict.reference` says which.
        items: how many items of a probe are drawn; those that the model gets wrong do not count.
        off_target: probe on which the same knock-out should cost nothing; None measures none.
        n_controls: control sets, of as many heads in the same layers.
        smallest: the smallest effect of interest, as a share of the distance between clean metric and chance.
        finding: the items that chose the heads (an `ItemSet`, `HeadScores` or ids; `[]` for none of them). They are not
            used. Left out, it is what `find` uses by default: of a probe the first 64 items of the same seed (or
            `items`, where that is more), of a file its finding half (`half_for_finding`).
        seed: of items, controls and draws.

    Raises:
        InputError: heads, a probe or a metric that does not exist; too few items; no heads.
        Refusal: the model cannot give what the metric needs, or no item has a position in the scope. A model that does
            not solve the probe is no error: the verdict is `refused`.
    """
    if not isinstance(model, AttachedModel):
        raise InputError(f"verify takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    ranking = _ranking(heads)
    tested = model.heads(HeadSet.parse(ranking) if ranking else heads)
    if len(tested.stacks) > 1:
        raise InputError(f"verify takes heads of one stack, and {tested} are of several; verify each stack by itself")
    used = used_ids(model, probe, items, finding, seed)
    testing = unseen_items(model, probe, items, used, seed)
    knock_out, reference = _knock_out(model, mode, scope, testing, probe, finding, seed)
    found = ground(model, testing, knock_out, measured=metric, seed=seed)
    mapped = every_head(model, tested.stacks)
    values = map_of(model, found, mapped)
    joint = joint_of(model, found, "given", tested, available=mapped, n_controls=n_controls, seed=seed)
    evidence = found.evidence(mapped, values, (joint,), sorted(used))
    family = judge(evidence, smallest=smallest)
    if found.refusal:
        return Verdict(tested, family, evidence, None, (), (), None, reference)
    return Verdict(
        heads=tested,
        family=family,
        evidence=evidence,
        off_target=None if off_target is None else measure_off_target(model, off_target, joint, knock_out, seed=seed),
        doses=dose_curve(model, found, tested),
        growing=growing_set(model, found, ranking),
        kept_only=keep_only(model, found, tested),
        reference=reference,
    )


def used_ids(
    model: AttachedModel, probe: str | Path | Probe | ItemSet | None, n: int, finding: Finding | None, seed: int
) -> frozenset[str]:
    """The items that chose the heads: those of `finding`, or those that `find` uses by default (see `verify`).

    Raises:
        InputError: no such probe or file; the model has no tokenizer; `finding` is one word.
    """
    if finding is not None or probe is None or isinstance(probe, ItemSet):
        return _ids(finding)
    if (file := _file(probe)) is not None:
        testing = {each.id for each in half_for_testing(file)}
        return frozenset(each.id for each in read_items(file)) - testing
    chosen = _probe(probe)
    _require_tokenizer(model)
    try:
        return frozenset(encode(chosen, model, n=max(n, FOUND_BY_DEFAULT), seed=seed).ids)
    except InputError as error:
        raise _too_few(chosen, n, error) from None


def unseen_items(
    model: AttachedModel, probe: str | Path | Probe | ItemSet | None, n: int, finding: Finding | None, seed: int
) -> ItemSet:
    """`n` items of a probe (all of a file, or of encoded items) that did not choose the heads; see `used_ids`.

    Raises:
        InputError: no probe; no items are left, or too few; the model has no tokenizer.
    """
    used = used_ids(model, probe, n, finding, seed)
    if probe is None:
        raise InputError('verify needs the behaviour to test on: probe="ioi", a probe file, or encoded items')
    if isinstance(probe, ItemSet):
        return _unused(probe, used)
    _require_tokenizer(model)
    if (file := _file(probe)) is not None:
        return _unused(encode(read_items(file), model, name=file.stem), used)
    chosen = _probe(probe)
    try:
        return _drawn(chosen, model, n, used, seed)
    except InputError as error:
        raise _too_few(chosen, n, error) from None


def _require_tokenizer(model: AttachedModel) -> None:
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, so no probe can be written for it; attach one, or pass encoded items"
        )


def _too_few(chosen: Probe, n: int, error: InputError) -> InputError:
    return InputError(
        f"{chosen.id} has too few items for {n} that did not choose the heads ({error}); use fewer items, or name "
        "those that did with finding="
    )


def half_for_finding(file: str | Path) -> tuple[Item, ...]:
    """The items of a probe file that are for finding heads; `half_for_testing` has the others. The item's id decides.

    Raises `InputError` for a file that cannot be used, or none in this half.
    """
    return _half(Path(file), "finding", 1)


def half_for_testing(file: str | Path) -> tuple[Item, ...]:
    """The items of a probe file that are for testing heads; `half_for_finding` has the others.

    Raises `InputError` for a file that cannot be used, or too few items in this half for a verdict.
    """
    return _half(Path(file), "testing", FEWEST_ITEMS)


def _half(file: Path, name: str, fewest: int) -> tuple[Item, ...]:
    items = read_items(file)
    half = tuple(each for each in items if _is_for_testing(each.id) == (name == "testing"))
    if len(half) < fewest:
        raise InputError(
            f"probe file {file}: {len(half)} of its {len(items)} items are in the {name} half (the id decides), and "
            f"{fewest} are needed; add items"
        )
    return half


def _is_for_testing(id: str) -> bool:
    return hashlib.blake2s(f"half/{id}".encode(), digest_size=1).digest()[0] % 2 == 1


def _file(probe: str | Path | Probe | ItemSet | None) -> Path | None:
    """The path of a probe file; None for what is none."""
    if isinstance(probe, Path) or (isinstance(probe, str) and Path(probe).suffix):
        return Path(probe)
    return None


def _probe(probe: str | Path | Probe) -> Probe:
    return probe if isinstance(probe, Probe) else probe_named(str(probe))


def _drawn(chosen: Probe, model: AttachedModel, n: int, used: frozenset[str], seed: int) -> ItemSet:
    wanted = n
    while True:
        drawn = encode(chosen, model, n=wanted, seed=f"verify/{seed}")
        left = drawn.only([each not in used for each in drawn.ids], FOUND_WITH)
        if len(left) >= n:
            return left
        wanted += n - len(left)


FOUND_WITH = "the heads were found with it"


def dose_curve(model: AttachedModel, found: Ground, heads: HeadSet) -> tuple[Dose, ...]:
    """The metric with a quarter of the knock-out of `heads`, half, three quarters, and all of it."""
    return tuple(_dose(model, found, heads, strength) for strength in STRENGTHS)


def growing_set(model: AttachedModel, found: Ground, ranking: Sequence[Any]) -> tuple[Dose, ...]:
    """The metric with the first head of a ranking out, the first two, and so on."""
    sets = [HeadSet.parse(ranking[: k + 1]) for k in range(len(ranking))]
    return tuple(_dose(model, found, each, 1.0) for each in sets)


def keep_only(model: AttachedModel, found: Ground, heads: HeadSet) -> KeptOnly:
    """The metric with every head of the stack out but these: whether they are enough."""
    others = every_head(model, heads.stacks) - heads
    value = _dose(model, found, others, 1.0).value
    reach = float(found.clean.mean()) - found.chance
    return KeptOnly(heads, value, (value - found.chance) / reach)


def measure_off_target(
    model: AttachedModel,
    probe: str,
    joint: Joint,
    knock_out: KnockOut,
    *,
    items: int = OFF_TARGET_ITEMS,
    n_controls: int = OFF_TARGET_CONTROLS,
    seed: int = 0,
) -> OffTarget | None:
    """What taking out a set, and the first of its control sets, costs on another probe, by that probe's own metric.

    A knock-out in a span of the behaviour's own is carried out at all positions there. None where the model has no
    tokenizer, or cannot give what the metric needs (encoders give no logits), or the scope has no position there.

    Raises:
        InputError: no such probe; too few items can be written for this model.
    """
    if model.tokenizer is None:
        return None
    drawn = encode(probe_named(probe), model, n=items, seed=f"off target/{seed}")
    chosen = metric_named(drawn.metric)
    sets = [HeadSet(), joint.heads, *joint.controls.sets[:n_controls]]
    if knock_out.scope.startswith("span:"):
        knock_out = replace(knock_out, scope="all")
    try:
        values = measure_sets(model, drawn, sets, knock_out, chosen).numpy()
    except Refusal:
        return None
    costs = (values[0] - values[1:]) * chosen.sign
    return OffTarget(
        probe=drawn.probe,
        metric=chosen.id,
        unit=chosen.unit,
        n_items=len(drawn),
        clean=float(values[0].mean()),
        effect=float(costs[0].mean()),
        ci=mean_interval(costs[0]),
        controls=costs[1:].mean(axis=1),
    )


def _dose(model: AttachedModel, found: Ground, heads: HeadSet, strength: float) -> Dose:
    knock_out = replace(found.knock_out, strength=strength)
    values = measure_sets(model, found.items, [heads], knock_out, found.metric)[0].numpy()
    return Dose(heads, strength, float(values.mean()), mean_interval(values))


def _knock_out(
    model: AttachedModel,
    mode: Mode,
    scope: str,
    testing: ItemSet,
    probe: str | Path | Probe | ItemSet | None,
    finding: Finding | None,
    seed: int,
) -> tuple[KnockOut, str]:
    """The knock-out, and which items its reference set is of."""
    if mode not in ("mean", "resample"):
        return KnockOut(mode, scope, seed=seed), ""
    if isinstance(finding, ItemSet):
        others, of = finding, "that found the heads"
    else:
        others, of = _untested(model, testing, probe, seed), f"of {testing.probe} that are not tested"
    if not len(others):
        raise InputError(
            f"mode {mode!r} puts in place what heads do on items that are not tested, and all {len(testing)} of "
            f"{testing.probe} are; give others with finding=, as an ItemSet"
        )
    return KnockOut(mode, scope, reference_of(model, others), seed), f"{len(others)} items {of}"


def _untested(model: AttachedModel, testing: ItemSet, probe: str | Path | Probe | ItemSet | None, seed: int) -> ItemSet:
    if isinstance(probe, ItemSet):
        pool = probe
    elif (file := _file(probe)) is not None:
        pool = encode(read_items(file), model, name=file.stem)
    else:
        assert probe is not None
        pool = encode(_probe(probe), model, n=REFERENCE_ITEMS, seed=f"reference/{seed}")
    tested = frozenset(testing.ids)
    return pool.only([each not in tested for each in pool.ids], "it is tested")


def _ranking(heads: Any) -> list[Any]:
    """The heads of a ranking in their order; empty for anything that is not one."""
    if isinstance(heads, list | tuple) and heads and all(isinstance(each, ScoredHead) for each in heads):
        return [each.head for each in heads]
    return []


def _ids(finding: Finding | None) -> frozenset[str]:
    if finding is None:
        return frozenset()
    if isinstance(finding, HeadScores):
        return frozenset(finding.item_ids)
    if isinstance(finding, ItemSet):
        return frozenset(finding.ids)
    if isinstance(finding, str):
        raise InputError("finding takes the items that chose the heads: an ItemSet, HeadScores, or a list of ids")
    return frozenset(finding)


def _unused(items: ItemSet, used: frozenset[str]) -> ItemSet:
    left = items.only([each not in used for each in items.ids], FOUND_WITH)
    if not len(left):
        raise InputError(f"all {len(items)} items of {items.probe} were used to find the heads; give others to test on")
    return left
