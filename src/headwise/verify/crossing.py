"""The heads of several behaviours, each taken out on fresh items of all of them: what double dissociation is told from.

    heads = {name: heads_behind(verdict) for name, verdict in verdicts.items()}
    fresh = {name: fresh_items(model, evidence) for name, evidence in families.items()}
    crossed = [measure_crossed(model, name, heads[name], fresh, families) for name in families]

What selected the heads never tests them: heads are verified on the items of the evidence, so a large loss there is in
part luck, and both sets of heads would look as if they cost their own behaviour more. The pairs are measured on items
that neither found nor verified a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import Probe, encode
from headwise.probes import probe as probe_named
from headwise.probes.encoding import ITEMS, ItemSet
from headwise.sweep import Controls, KnockOut, matched_sets, measure_sets
from headwise.sweep.matched import FEWEST
from headwise.verify.evidence import Evidence, Values
from headwise.verify.gathering import ground
from headwise.verify.judging import why_refused
from headwise.verify.verdict import FamilyVerdict

CONTROLS = 20


@dataclass(frozen=True, eq=False)
class CrossedSet:
    """The heads of one behaviour out on fresh items of every behaviour, and matched random sets likewise.

    Attributes:
        behaviour: whose heads these are.
        item_ids: by behaviour, its fresh items.
        clean: by behaviour whose items they are, the metric of each item without a knock-out.
        values: the same with the heads out.
        control_values: the same with each of the control sets out.
    """

    behaviour: str
    heads: HeadSet
    controls: Controls
    item_ids: Mapping[str, tuple[str, ...]]
    clean: Mapping[str, Values]
    values: Mapping[str, Values]
    control_values: Mapping[str, Float[np.ndarray, "set item"]]


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """The metric of one behaviour's fresh items: clean, with a set of heads out, and with each control set out."""

    clean: Values
    values: Values
    control_values: Float[np.ndarray, "set item"]


def heads_behind(verdict: FamilyVerdict) -> HeadSet:
    """The heads that a behaviour is taken to rest on: those verified alone; where none is, because they hide one
    another, the smallest set that is verified together. Empty where nothing is verified."""
    joints = sorted((each for each in verdict.joints if each.ruling == "verified"), key=lambda each: len(each.heads))
    return verdict.verified or (joints[0].heads if joints else HeadSet())


def fresh_items(
    model: AttachedModel,
    evidence: Evidence,
    n: int = ITEMS,
    *,
    finding: Iterable[str] = (),
    probe: Probe | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> ItemSet:
    """`n` items of a behaviour's probe that the model answers rightly and that neither found nor tested its heads.

    Args:
        finding: ids of items that chose heads beside those that the evidence names (`evidence.finding_ids`).
        probe: the probe of the evidence, where it is your own or has settings of its own; None is that of its id.
        max_tokens: see `encode`.

    Raises:
        InputError: the probe has not so many further items; there is no probe of that id; no tokenizer.
        Refusal: the model answers less than half of them rightly, or as `ground`.
    """
    if isinstance(finding, str):
        raise InputError("finding takes the ids of the items that chose the heads; give a list, or () for none")
    family = evidence.family
    chosen = probe_named(family.probe) if probe is None else probe
    used = {*finding, *evidence.finding_ids, *evidence.item_ids}
    wanted = n
    while True:
        unseen = _unseen(model, chosen, wanted, used, max_tokens, seed)
        found = ground(model, unseen, KnockOut(), measured=family.metric, seed=seed)
        right = len(found.items) if found.solved != 0 else 0
        if right >= n:
            return found.items.only([place < n for place in range(right)], "enough are there")
        if wanted >= 2 * n:  # half of them right is what a verdict asks for, too
            raise Refusal(
                f"{model.name} answers {right} of {wanted} fresh items of {chosen.id} rightly, and {n} are wanted; "
                "ask for fewer, or use a model that solves the probe"
            )
        wanted = min(wanted + n - right, 2 * n)


def fresh_again(
    model: AttachedModel, probe: Probe, ids: Sequence[str], max_tokens: int | None = None, seed: int = 0
) -> ItemSet:
    """The items that `fresh_items` gave, by their ids, without a run of the model.

    Raises `InputError` if the probe's stream with these arguments does not hold them.
    """
    wanted, n = set(ids), len(ids)
    while True:
        drawn = encode(probe, model, n=n, seed=_stream(seed), max_tokens=max_tokens)
        missing = wanted - set(drawn.ids)
        if not missing:
            return drawn.only([each in wanted for each in drawn.ids], "it is none of these")
        n += len(missing)


def random_sets(heads: HeadSet, every: HeadSet, others: HeadSet, n: int = CONTROLS, seed: int = 0) -> Controls:
    """`n` control sets for `heads` from `every`: without a head of `others` where enough sets are left without.

    Raises as `matched_sets`.
    """
    controls = matched_sets(heads, every - others if others else every, n, seed)
    if len(controls.sets) < min(n, FEWEST):
        return matched_sets(heads, every, n, seed)
    return controls


def try_on(
    model: AttachedModel, items: ItemSet, heads: HeadSet, controls: Controls, knock_out: KnockOut, evidence: Evidence
) -> Trial:
    """Take heads, and each control set, out on fresh items of the behaviour of `evidence`; the clean metric is measured
    on them, too.

    Raises `Refusal` if the model does no better than chance on these items, or as `measure_sets`.
    """
    sets = [HeadSet(), heads, *controls.sets]
    clean, values, *under = measure_sets(model, items, sets, knock_out, evidence.family.metric).numpy()
    if why := why_refused(clean, evidence.chance, evidence.sign, evidence.solved):
        name = evidence.family.probe
        raise Refusal(f"nothing can be lost on the fresh items of {name}: {why}; leave {name} out, or give others")
    return Trial(clean, values, np.array(under).reshape(len(under), len(clean)))


def measure_crossed(
    model: AttachedModel,
    behaviour: str,
    heads: HeadSet,
    items: Mapping[str, ItemSet],
    families: Mapping[str, Evidence],
    knock_out: KnockOut | None = None,
    *,
    others: HeadSet | None = None,
    n_controls: int = CONTROLS,
    seed: int = 0,
) -> CrossedSet:
    """Knock the heads of one behaviour out on fresh items of all of them, and `n_controls` matched random sets too.

    Args:
        heads: of `behaviour`, see `heads_behind`.
        items: by behaviour: items that did not select heads, see `fresh_items`. The clean metric is measured on them.
        families: by behaviour: the evidence that the heads were verified on.
        knock_out: None is that of the evidence.
        others: heads of the other behaviours; the random sets have none of them where enough sets are left without.

    Raises:
        InputError: items that found or tested heads among those given, or no items for a behaviour; no heads; families
            that were knocked out in different ways, and no `knock_out`.
        Refusal: the model does no better than chance on the fresh items, or as `measure_sets`.
    """
    for name in families:
        if name not in items:
            raise InputError(f"no items were given for {name}; draw some with fresh_items")
        require_fresh(name, items[name].ids, families)
    out = knock_out or _knock_out_of(families)
    controls = random_sets(heads, model.heads("main"), others or HeadSet(), n_controls, seed)
    tried = {name: try_on(model, items[name], heads, controls, out, evidence) for name, evidence in families.items()}
    return CrossedSet(
        behaviour,
        heads,
        controls,
        {name: items[name].ids for name in families},
        {name: each.clean for name, each in tried.items()},
        {name: each.values for name, each in tried.items()},
        {name: each.control_values for name, each in tried.items()},
    )


def require_fresh(name: str, ids: Sequence[str], families: Mapping[str, Evidence]) -> None:
    """Raises `InputError` if one of `ids` found or tested heads of the probe of `families[name]`.

    Of one probe there may be several families, and each has selected heads.
    """
    probe = families[name].family.probe
    of_probe = [each for each in families.values() if each.family.probe == probe]
    for selecting, selected in (
        ("its heads were verified on", {id for each in of_probe for id in each.item_ids}),
        ("its heads were found with", {id for each in of_probe for id in each.finding_ids}),
    ):
        if common := selected & set(ids):
            raise InputError(
                f"{len(common)} of the {len(ids)} items given for {name} are among those {selecting}, so they cannot "
                "test them; draw others with fresh_items"
            )


def _unseen(model: AttachedModel, probe: Probe, n: int, used: set[str], max_tokens: int | None, seed: int) -> ItemSet:
    """The first `n` items, of a stream of their own, that are not among `used`."""
    wanted = n
    while True:
        try:
            drawn = encode(probe, model, n=wanted, seed=_stream(seed), max_tokens=max_tokens)
        except InputError as error:
            raise InputError(f"{n} fresh items are wanted, beside those that found or tested heads: {error}") from None
        left = drawn.only([each not in used for each in drawn.ids], "it found or tested heads")
        if len(left) >= n:
            return left
        wanted += n - len(left)


def _stream(seed: int) -> str:
    return f"dissociation/{seed}"


def _knock_out_of(families: Mapping[str, Evidence]) -> KnockOut:
    ways = {(each.family.mode, each.family.scope) for each in families.values()}
    if len(ways) > 1:
        raise InputError(f"heads were knocked out in {len(ways)} ways by the evidence; say which one with knock_out")
    return KnockOut(*ways.pop()) if ways else KnockOut()
