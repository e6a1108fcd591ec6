"""What a race costs, and whether it ends as the exact map does: on made-up tables of effects, and on models.

On a model the exact map is measured once, on items for finding and on items for testing. Then races with many seeds
are run over that table, each with another order of the items, and one race is run on the model itself. A race agrees

- on the **top k**, if what it promises holds in the exact map: no head kept is more than epsilon below rank k, none
  left out more than epsilon above;
- on the **verdicts**, if the same heads are verified: of the exact map's top k, judged with the whole map of the items
  for testing; and of the heads kept, judged with about `CONTROLS` heads of their layers, and no others measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from headwise.benches.detectors import attached
from headwise.find import find
from headwise.heads import HeadSet
from headwise.loading import load
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet, encode, probe
from headwise.sweep import KnockOut, matched_sets, measure_sets
from headwise.verify.elimination import Standing, top_k
from headwise.verify.gathering import Ground, every_head, ground, map_of
from headwise.verify.judging import judge
from headwise.verify.racing import SCREEN, SCREENED, Race, race
from headwise.verify.verifying import unseen_items
from headwise.zoo.planted import planted

SEEDS = 200
ERROR, EPSILON, LARGEST = 0.05, 0.1, 2.0
"""The defaults of `race`."""

CONTROLS = 30
"""Heads that a head kept is judged against."""

Table = Float[np.ndarray, "head item"]
Scores = Float[np.ndarray, " head"]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, one of its behaviours, and the races to run: for each of `ks` heads, up to a fortieth of all.

    The first of them is run on the model, too.
    """

    name: str
    build: Callable[[int], AttachedModel]
    probe: str
    finding: int
    testing: int
    ks: tuple[int, ...]


CASES = (
    Case("planted_12x12", lambda seed: attached(planted(layers=12, heads=12, seed=seed)), "ioi", 64, 32, (3,)),
    Case("planted_24x16", lambda seed: attached(planted(layers=24, heads=16, seed=seed)), "ioi", 32, 16, (3, 9)),
    Case("organism", lambda seed: load("zoo:organism"), "ioi", 64, 32, (1,)),
)
"""Three heads of a planted model have an effect on `ioi`: a race for nine is one among heads that are all the same."""


def measure(
    *,
    seed: int = 0,
    seeds: int = SEEDS,
    cases: Sequence[Case] = CASES,
    said: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Costs and agreement, as `CASE.k_K.QUANTITY`, and `simulated.WORLD.QUANTITY`.

    Args:
        seed: of models, items and made-up tables; the orders have the seeds 0 to `seeds - 1`.
        said: is told what is at work.
    """
    began = time.monotonic()
    found: dict[str, float] = {}
    for name, world in WORLDS.items():
        said(f"simulated: {name}")
        found |= {f"simulated.{name}.{key}": value for key, value in simulated(world, seed, seeds).items()}
    for case in cases:
        said(case.name)
        with case.build(seed) as model:
            for k, values in _on_a_model(model, case, seed, seeds).items():
                found |= {f"{case.name}.k_{k}.{key}": value for key, value in values.items()}
    return found | {"seconds": time.monotonic() - began}


def keeps_its_promise(effects: Scores, named: Bool[np.ndarray, " head"], epsilon: float) -> bool:
    """Whether no head named is more than epsilon below rank k of these mean effects, and no other more above it."""
    rank_k = np.sort(effects)[-int(named.sum())]
    slack = epsilon + 1e-9 * abs(rank_k)
    return bool(effects[named].min() >= rank_k - slack and effects[~named].max() <= rank_k + slack)


# -- made-up tables ---------------------------------------------------------------------------------------------------

HEADS, ITEMS, WANTED = 144, 64, 3
"""Of the made-up tables. Effects are shares of what there is to lose."""


def _quiet(rng: np.random.Generator) -> Table:
    return 0.02 * rng.standard_normal((HEADS, ITEMS))


def _clear(rng: np.random.Generator) -> tuple[Table, Scores]:
    """Three heads cost nearly everything, the others nothing; the screen is right."""
    effects = _quiet(rng)
    effects[:3] += rng.normal([[1.2], [1.0], [0.8]], 0.2, (3, ITEMS))
    return effects, effects.mean(axis=1)


def _decoys(rng: np.random.Generator) -> tuple[Table, Scores]:
    """The screen names six heads without an effect first, and the three that have one last."""
    effects, screen = _clear(rng)
    screen[:3], screen[3:9] = -1, 2
    return effects, screen


def _backups(rng: np.random.Generator) -> tuple[Table, Scores]:
    """Six heads hide one another: by the screen they are first, alone each costs something on one item in sixteen."""
    effects, screen = _clear(rng)
    effects[3:9] += 0.8 * (rng.random((6, ITEMS)) < 1 / 16)
    screen[3:9] = 2
    return effects, screen


def _near_ties(rng: np.random.Generator) -> tuple[Table, Scores]:
    """Eight heads with 0.6 to 0.74 of all there is to lose, so that ranks 3 and 4 are 0.02 apart."""
    effects = _quiet(rng)
    effects[:8] += rng.normal(np.linspace(0.74, 0.6, 8)[:, None], 0.2, (8, ITEMS))
    return effects, effects.mean(axis=1) + 0.1 * rng.standard_normal(HEADS)


def _rare(rng: np.random.Generator) -> tuple[Table, Scores]:
    """Three heads matter on every third item, and nowhere else; the screen does not see them."""
    effects = _quiet(rng)
    effects[:3] += 1.2 * (rng.random((3, ITEMS)) < 1 / 3)
    return effects, rng.random(HEADS)


def _heavy_tails(rng: np.random.Generator) -> tuple[Table, Scores]:
    """Effects scatter by Student's t with 2 degrees of freedom, some of them beyond what an item may count for."""
    effects = 0.1 * rng.standard_t(2, (HEADS, ITEMS))
    effects[:3] += np.array([[1.0], [0.8], [0.6]])
    return effects, rng.random(HEADS)


def _nothing(rng: np.random.Generator) -> tuple[Table, Scores]:
    """No head has an effect."""
    effects = _quiet(rng)
    return effects, rng.random(HEADS)


WORLDS: Mapping[str, Callable[[np.random.Generator], tuple[Table, Scores]]] = {
    "clear": _clear,
    "decoys": _decoys,
    "backups": _backups,
    "near_ties": _near_ties,
    "rare": _rare,
    "heavy_tails": _heavy_tails,
    "nothing": _nothing,
}


def simulated(world: Callable[[np.random.Generator], tuple[Table, Scores]], seed: int, seeds: int) -> dict[str, float]:
    """One race on each of `seeds` tables: its share of the knock-outs of the exact map, and whether it agrees.

    `top_k` is about the means of what counts, where an effect beyond `LARGEST` is `LARGEST`; `top_k_uncut` about the
    plain means; `same` is the share of races that name the very heads.
    """
    rng = np.random.default_rng([seed, *world.__name__.encode()])
    rows = []
    for number in range(seeds):
        effects, screen = world(rng)
        ended = _raced(effects, screen, WANTED, EPSILON, LARGEST, number)
        means = effects.mean(axis=1)
        rows.append(
            {
                "share_of_map": float(ended.spent.sum()) / effects.size,
                "top_k": keeps_its_promise(effects.clip(-LARGEST, LARGEST).mean(axis=1), ended.named, EPSILON),
                "top_k_uncut": keeps_its_promise(means, ended.named, EPSILON),
                "same": bool(means[ended.named].min() >= means[~ended.named].max()),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _raced(effects: Table, screen: Scores, k: int, epsilon: float, largest: float, seed: int) -> Standing:
    """A race over a table that is all there."""
    return top_k(
        lambda heads, items: effects[np.ix_(heads, items)],
        effects.shape[1],
        screen,
        k=k,
        error=ERROR,
        epsilon=epsilon,
        largest=largest,
        seed=seed,
    )


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Exact:
    """The exact maps of a model, on the items for finding and on those for testing, and how long the first one took."""

    heads: HeadSet
    effects: Table
    screen: Scores
    ground: Ground
    values: Table
    cpu: float

    def verified(self, measured: HeadSet) -> HeadSet:
        """The heads that verify alone where only these are measured."""
        rows = [i for i, head in enumerate(self.heads) if head in measured]
        judged = judge(self.ground.evidence(measured, self.values[rows], ()))
        return HeadSet(tuple(each.head for each in judged.singles if each.ruling == "verified"))

    def raced(self, once: Race, k: int, seed: int) -> Standing:
        """A race over the first map with the terms of one on the model."""
        return _raced(self.effects, self.screen, k, once.epsilon, once.largest, seed)

    def named(self, rows: Bool[np.ndarray, " head"]) -> HeadSet:
        return HeadSet(tuple(head for head, wanted in zip(self.heads.heads, rows, strict=True) if wanted))


def _on_a_model(model: AttachedModel, case: Case, seed: int, seeds: int) -> dict[int, dict[str, float]]:
    finding = encode(probe(case.probe), model.tokenizer, n=case.finding, seed=seed)
    testing = unseen_items(model, case.probe, case.testing, finding, seed)
    exact = _exact(model, finding, testing, seed)
    began = time.process_time()
    once = race(model, finding, k=case.ks[0], error=ERROR, epsilon=EPSILON, largest=LARGEST, seed=0)
    cpu = time.process_time() - began
    found = {k: _replayed(exact, once, k, seeds) for k in case.ks}
    same = once.kept == exact.named(exact.raced(once, once.k, 0).named)
    found[once.k] |= {"as_on_the_model": float(same), "cpu_share_of_map": cpu / exact.cpu}
    return found


def _exact(model: AttachedModel, finding: ItemSet, testing: ItemSet, seed: int) -> _Exact:
    heads = every_head(model)
    began = time.process_time()
    sets = [HeadSet(), *(HeadSet((head,)) for head in heads.heads)]
    clean, *values = measure_sets(model, finding, sets, KnockOut()).numpy()
    cpu = time.process_time() - began
    found = ground(model, testing, KnockOut(), seed=seed)
    few = finding.only([place < SCREENED for place in range(len(finding))], "not screened")
    scored = {each.head: each.score for each in find(SCREEN, model, few).ranked()}
    return _Exact(
        heads=heads,
        effects=(clean - np.array(values)) * found.metric.sign,
        screen=np.array([scored[head] for head in heads.heads]),
        ground=found,
        values=map_of(model, found, heads),
        cpu=cpu,
    )


def _replayed(exact: _Exact, once: Race, k: int, seeds: int) -> dict[str, float]:
    """Races for `k` heads with the terms of `once`, over the exact map.

    The shares are of all forwards. `share`: of the exact map and a verdict on every head, each with controls of its
    own, to the race and such verdicts on the heads kept. `share_common`: verdicts have their controls in common, so
    that all of them take another exact map, and those on the heads kept take these and their controls.
    """
    means, cut = exact.effects.mean(axis=1), exact.effects.clip(-once.largest, once.largest).mean(axis=1)
    first, of_all = exact.named(means >= np.sort(means)[-k]), exact.verified(exact.heads)
    beside = once.forwards - sum(each.items for each in once.heads)
    testing = len(exact.ground.items)
    judged: dict[HeadSet, tuple[HeadSet, int]] = {}
    rows = []
    for seed in range(seeds):
        ended = exact.raced(once, k, seed)
        kept = exact.named(ended.named)
        if kept not in judged:
            measured = kept | _controls(kept, exact.heads)
            judged[kept] = exact.verified(measured) & kept, len(measured)
        verified, measured_alone = judged[kept]
        forwards = beside + int(ended.spent.sum())
        own = (1 + CONTROLS) * testing
        rows.append(
            {
                "share_of_map": forwards / once.map_forwards,
                "share": (forwards + k * own) / (once.map_forwards + len(means) * own),
                "share_common": (forwards + measured_alone * testing) / (once.map_forwards + len(means) * testing),
                "top_k": keeps_its_promise(cut, ended.named, once.epsilon),
                "top_k_uncut": keeps_its_promise(means, ended.named, once.epsilon),
                "same": kept == first,
                "verdicts": verified == of_all & first,
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} | {"verified": len(of_all)}


def _controls(kept: HeadSet, heads: HeadSet) -> HeadSet:
    """Heads of the same layers as far as there are any, `CONTROLS` or a few less, since control sets overlap."""
    sets = matched_sets(kept, heads, -(-CONTROLS // len(kept)), seed=0).sets
    return HeadSet(tuple(head for each in sets for head in each))
