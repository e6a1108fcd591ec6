"""Is a verdict right? The whole pipeline, selection included, on models whose answers are known.

For each model: encode a probe, let two detectors choose heads on the first half of the items (`stand_out` says how
many), gather the evidence on the other half, judge. A claim is one head, or one set that a detector chose. A verified
claim is **false** if the truth gives the head no total effect, or no head of the set one (nor all heads of a group that
back one another up).

Three kinds of models:

- **nulls**: they solve the probe, and not by the heads that look like it;
- **planted** at full strength: false-discovery rate, and power, the share of the heads that matter that verify. A head
  matters if the truth gives it a total effect and its knock-out costs more than the smallest effect of interest on 32
  items of their own;
- **weakened**: all writing heads at a strength below 1, judged on fewer items as well.

A family that is refused has no claims; it is counted apart, and so are undecidable claims.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import numpy as np
import torch
from scipy import stats

from headwise.benches.detectors import ARCHITECTURES, PROBES, attached
from headwise.errors import InputError
from headwise.find import find
from headwise.find.choosing import stand_out
from headwise.heads import HeadSet
from headwise.probes import encode
from headwise.sweep import KnockOut, measure_sets
from headwise.verify.evidence import Evidence, Joint
from headwise.verify.gathering import gather
from headwise.verify.judging import SMALLEST, judge
from headwise.verify.verdict import FamilyVerdict
from headwise.zoo.planted import BEHAVIOURS, Planted, Truth, null, planted, random_net
from headwise.zoo.planted.circuits import Behaviour
from headwise.zoo.planted.otherwise import WAYS

NULLS = 210
SEEDS = 10
"""Of planted models, for each architecture."""
WEAKENED = 15
"""Families for each strength."""
RANDOM = 6
ITEMS = 48
"""Half of them for finding."""
CONTROLS = 50
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.7)
TEST_ITEMS = (8, 16, 24)
FRESH = 32
WANTED = 0.8

SELECTORS: dict[Behaviour, tuple[str, str]] = {
    "repeat": ("induction", "direct-logit"),
    "ioi": ("duplicate-token", "direct-logit"),
    "facts": ("direct-logit", "gate-gradient"),
    "conflict": ("direct-logit", "gate-gradient"),
    "keys": ("previous-token", "gate-gradient"),
}
"""Two detectors for each behaviour: one of patterns where there is one that fits, one of what reaches the answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    nulls: int = NULLS
    seeds: int = SEEDS
    weakened: int = WEAKENED
    random: int = RANDOM
    strengths: tuple[float, ...] = STRENGTHS
    test_items: tuple[int, ...] = TEST_ITEMS
    items: int = ITEMS
    controls: int = CONTROLS


@dataclass(frozen=True, slots=True)
class Outcome:
    """One family, held against the truth.

    Attributes:
        refused: nothing is claimed; all counts of verified claims are 0.
        verified, false: verified claims (heads and sets), and those of them that are false.
        real, found: heads that matter, and those of them that are verified.
        real_sets, found_sets: the same of chosen sets that hold such a head.
        undecidable: claims on heads and sets that matter that could not be decided.
    """

    refused: bool
    verified: int
    false: int
    real: int
    found: int
    real_sets: int
    found_sets: int
    undecidable: int


@dataclass(frozen=True, slots=True)
class Case:
    """One model and one behaviour; `build` makes the model, in whatever process it is run."""

    build: Callable[[], Planted]
    behaviour: Behaviour


def measure(
    *,
    seed: int = 0,
    plan: Plan | None = None,
    said: Callable[[str], None] = lambda _: None,
    workers: int | None = None,
) -> dict[str, float]:
    """Rates and power; see the module and `docs/benchmarks.md` for the keys.

    Args:
        seed: of places, weights, codes and items of all models.
        plan: how much is measured.
        said: is told what is being measured.
        workers: processes, of one thread each, that models are run in (default: one per core); the figures do not
            depend on it.
    """
    sizes = plan or Plan()
    began = time.monotonic()
    parts: dict[str | float, list[Case]] = {
        "nulls": list(_nulls(sizes.nulls, seed)),
        "random": list(_random(sizes.random, seed)),
        1.0: list(_planted(3 * sizes.seeds, seed, 1.0)),
    }
    for strength in sizes.strengths:
        parts[strength] = list(_planted(sizes.weakened, seed + 1, strength))
    done = _run([case for cases in parts.values() for case in cases], sizes, seed, said, workers or os.cpu_count() or 1)
    outcomes = {name: [next(done) for _ in cases] for name, cases in parts.items()}
    strange = [each[-1] for each in outcomes.pop("random")]
    found = _false_rates([each[-1] for each in outcomes.pop("nulls")])
    found |= {"random.models": len(strange), "random.refused": sum(each.refused for each in strange)}
    found |= _discoveries([each[-1] for each in outcomes[1.0]])
    found |= _curve({float(strength): each for strength, each in outcomes.items()}, sizes.test_items)
    found["seconds"] = time.monotonic() - began
    return found


def _run(
    cases: Sequence[Case], sizes: Plan, seed: int, said: Callable[[str], None], workers: int
) -> Iterator[list[Outcome]]:
    """What `through` gives of every case, in their order."""
    one = partial(_through_case, sizes=sizes, seed=seed)
    if workers == 1:
        yield from map(one, cases)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for index, outcomes in enumerate(pool.map(one, cases)):
            said(f"{index + 1} of {len(cases)} models")
            yield outcomes


def _through_case(case: Case, sizes: Plan, seed: int) -> list[Outcome]:
    return through(case.build(), case.behaviour, sizes, seed)


def through(organism: Planted, behaviour: Behaviour, sizes: Plan, seed: int) -> list[Outcome]:
    """One model through the pipeline, judged on each number of test items, the largest last."""
    with attached(organism) as model:
        items = encode(PROBES[behaviour], model.tokenizer, n=sizes.items + FRESH, seed=seed)
        half = sizes.items // 2
        finding, testing, fresh = (
            items.only([start <= i < stop for i in range(len(items))], "it serves another purpose")
            for start, stop in ((0, half), (half, sizes.items), (sizes.items, len(items)))
        )
        chosen: dict[str, HeadSet] = {}
        for name in SELECTORS[behaviour]:
            scores = find(name, model, finding)
            chosen[name] = scores.top(stand_out(scores))
        evidence = gather(model, testing, KnockOut(), joints=chosen, n_controls=sizes.controls, seed=seed)
        candidates = organism.truth.with_effect(behaviour, "total")
        groups = _groups(organism.truth, behaviour)
        sets = [HeadSet(), *(HeadSet((head,)) for head in candidates), *groups]
        values = measure_sets(model, fresh, sets, KnockOut()).mean(dim=1)
    costs = (values[0] - values[1:]).numpy()
    matters = costs > SMALLEST * max(float(values[0]) - evidence.chance, 0.0)
    real = HeadSet(tuple(head for head, yes in zip(candidates, matters, strict=False) if yes))
    real_groups = [group for group, yes in zip(groups, matters[len(candidates) :], strict=True) if yes]
    outcomes = []
    for n in sorted({*(n for n in sizes.test_items if n < half), half}):
        verdict = judge(_first(evidence, n))
        outcomes.append(_outcome(verdict, candidates, groups, real, real_groups))
    return outcomes


def _groups(truth: Truth, behaviour: Behaviour) -> list[HeadSet]:
    """The groups that back one another up and serve the behaviour."""
    direct = truth.with_effect(behaviour, "direct")
    groups = [HeadSet.parse(group) for group in truth.backups]
    return [group for group in groups if group & direct]


def _outcome(
    verdict: FamilyVerdict,
    candidates: HeadSet,
    groups: Sequence[HeadSet],
    real: HeadSet,
    real_groups: Sequence[HeadSet],
) -> Outcome:
    """`candidates` and `groups` have an effect by the truth, `real` and `real_groups` one that is large enough."""

    def holds(heads: HeadSet, some: HeadSet, whole: Sequence[HeadSet]) -> bool:
        return bool(heads & some) or any(group <= heads for group in whole)

    heads = [each for each in verdict.singles if each.ruling == "verified"]
    sets = [each for each in verdict.joints if each.ruling == "verified"]
    mattering = [each for each in verdict.joints if holds(each.heads, real, real_groups)]
    rulings = [each.ruling for each in verdict.singles if each.head in real] + [each.ruling for each in mattering]
    return Outcome(
        refused=bool(verdict.refusal),
        verified=len(heads) + len(sets),
        false=sum(each.head not in candidates for each in heads)
        + sum(not holds(each.heads, candidates, groups) for each in sets),
        real=len(real),
        found=sum(each.head in real for each in heads),
        real_sets=len(mattering),
        found_sets=sum(each.ruling == "verified" for each in mattering),
        undecidable=rulings.count("undecidable"),
    )


def _first(evidence: Evidence, n: int) -> Evidence:
    """The evidence on the first `n` items alone. Items that the model gets wrong are not among them to begin with."""

    def cut(joint: Joint) -> Joint:
        return replace(joint, values=joint.values[:n], control_values=joint.control_values[:, :n])

    return replace(
        evidence,
        item_ids=evidence.item_ids[:n],
        clean=evidence.clean[:n],
        values=evidence.values[:, :n],
        joints=tuple(cut(each) for each in evidence.joints),
    )


# -- the models -------------------------------------------------------------------------------------------------------


def _nulls(n: int, seed: int) -> Iterator[Case]:
    kinds = list(product(WAYS, ARCHITECTURES, BEHAVIOURS))
    for index in range(n):
        way, architecture, behaviour = kinds[index % len(kinds)]
        yield Case(partial(null, behaviour, way, architecture, seed=seed + 1000 + index), behaviour)


def _random(n: int, seed: int) -> Iterator[Case]:
    for index in range(n):
        behaviour = BEHAVIOURS[index % len(BEHAVIOURS)]
        yield Case(partial(random_net, ARCHITECTURES[index % 3], seed=seed + 2000 + index), behaviour)


def _planted(n: int, seed: int, strength: float) -> Iterator[Case]:
    """Every model with its own places and strengths; each gives one family, the behaviours in turn."""
    for index in range(n):
        architecture = ARCHITECTURES[index % 3]
        build = partial(planted, architecture, seed=seed + 3000 + index, strength=strength)
        yield Case(build, BEHAVIOURS[index % len(BEHAVIOURS)])


# -- the figures ------------------------------------------------------------------------------------------------------


def upper_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound on a share (Clopper and Pearson). Raises `InputError` for no trials."""
    if n < 1:
        raise InputError("a share of no trials has no bound; measure at least one model")
    return float(stats.binomtest(hits, n, alternative="less").proportion_ci(confidence, method="exact").high)


def _false_rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of models that solve the probe: those with any false verified claim."""
    solved = [each for each in outcomes if not each.refused]
    wrong = sum(each.false > 0 for each in solved)
    return {
        "false_rate": _share(wrong, len(solved)),
        "false_rate_upper": upper_bound(wrong, len(solved)) if solved else float("nan"),
        "null.models": len(solved),
        "null.refused": len(outcomes) - len(solved),
        "null.false_claims": sum(each.false for each in solved),
        "null.true_claims": sum(each.verified - each.false for each in solved),
    }


def _discoveries(outcomes: Sequence[Outcome]) -> dict[str, float]:
    decided = [each for each in outcomes if not each.refused]
    claims, false = _sum(decided, "verified"), _sum(decided, "false")
    return {
        "false_discovery_rate": _share(false, claims),
        "false_discovery_rate_upper": upper_bound(false, claims) if claims else float("nan"),
        "power": _share(_sum(decided, "found"), _sum(decided, "real")),
        "power_sets": _share(_sum(decided, "found_sets"), _sum(decided, "real_sets")),
        "planted.families": len(decided),
        "planted.refused": len(outcomes) - len(decided),
        "planted.heads": _sum(decided, "real"),
        "planted.undecidable": _sum(decided, "undecidable"),
    }


def _curve(curve: dict[float, list[list[Outcome]]], test_items: Sequence[int]) -> dict[str, float]:
    """Power by strength and number of items, of families that are decided; refusals and undecidables beside it.

    `strength_at_80` is on the most items, with refused families counted as found nothing: it is the strength from which
    on a user would be told of four heads in five. It is interpolated between the strengths measured.
    """
    found: dict[str, float] = {}
    powers: list[tuple[float, float]] = []
    for strength in sorted(curve):
        for column, n in enumerate(sorted(test_items)):
            outcomes = [each[min(column, len(each) - 1)] for each in curve[strength]]
            decided = [each for each in outcomes if not each.refused]
            key = f"strength_{strength:g}.items_{n}"
            found[f"power.{key}"] = _share(_sum(decided, "found"), _sum(decided, "real"))
            found[f"refused.{key}"] = _share(len(outcomes) - len(decided), len(outcomes))
            found[f"undecidable.{key}"] = _sum(decided, "undecidable")
        full = [each[-1] for each in curve[strength]]
        powers.append((strength, _share(_sum(full, "found"), _sum(full, "real"))))
    return found | {"strength_at_80": crossing(powers, WANTED)}


def crossing(points: Iterable[tuple[float, float]], wanted: float) -> float:
    """Where a curve through the points, from left to right, is at `wanted` for good; NaN where it ends below.

    The first point, where all are above.
    """
    known = [(x, y) for x, y in sorted(points) if np.isfinite(y)]
    if not known or known[-1][1] < wanted:
        return float("nan")
    last = max((i for i, (_, y) in enumerate(known) if y < wanted), default=-1)
    if last < 0:
        return known[0][0]
    (x0, y0), (x1, y1) = known[last], known[last + 1]
    return x0 + (wanted - y0) / (y1 - y0) * (x1 - x0)


def _sum(outcomes: Sequence[Outcome], count: str) -> int:
    return sum(int(getattr(each, count)) for each in outcomes)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
