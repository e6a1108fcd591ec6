"""Do detectors find what is there? Each one on its probe, on planted models with places and strengths drawn by seeds.

Every case names a method, the probe it is run on and the heads it has to find by the truth of the model. A method of
patterns has to find the decoys of its role, too: they attend alike, and only a knock-out tells them apart. Methods of
effects have to leave them alone.

- `retrieval` and its proxy are to find what copies the password: the key-copy head its first word, induction heads the
  others. The back-up is not looked for, since it rests while the head before it works.
- `gate-gradient` is to find the heads that write the answer. Those that work through another head's attention have no
  gradient here, because planted attention is saturated.
- `sink` is to find every planted head that rests on the first token of a text that does not call for it. These are more
  than half of the heads, and `stand_out` names a quarter at most: its recall is bounded, its AUC is what counts.
- `arithmetic` and `chain-of-thought` are to find what brings the answer, which here is a fact: planted models neither
  add nor reason.
- `hydra` is to find induction heads, each of which brings back its share; on its own probe no head does so alone.
- `local-global` and `fact-parts` are left out: they describe and look for nothing. `correct-letter` is, too: planted
  models know no letters. So is `codes`, whose codes are of the size of a trained model's writes, and `head-pursuit`,
  which scores writes by their direction alone: also those of heads that write next to nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from headwise.errors import InputError
from headwise.find import find
from headwise.find.choosing import stand_out
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel, attach
from headwise.probes import Probe, encode, probe
from headwise.scores import HeadScores
from headwise.zoo.planted import Planted, Truth, planted
from headwise.zoo.planted.checkpoint import Architecture
from headwise.zoo.planted.circuits import DEFAULT_STRENGTH, DIALS, Behaviour

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "llama-gqa", "gpt2")
SEEDS = 10
ITEMS = 24
STRENGTH = (0.6, 1.4)

PROBES: Mapping[Behaviour, Probe] = {
    "repeat": probe("repeat").over(words=8),
    "ioi": probe("ioi"),
    "facts": probe("facts"),
    "conflict": probe("conflict").over(trust="context"),
    "keys": probe("hash").over(pairs=3, key_length=2),
}
"""The probes that reach the planted circuits, at their shortest."""

Wanted = Callable[[Truth], HeadSet]


def attending(*roles: str) -> Wanted:
    """The heads of these roles, and their decoys."""

    def heads(truth: Truth) -> HeadSet:
        decoys = [truth.decoys(role) for role in roles if any(each.decoy_of == role for each in truth.heads_known)]
        return HeadSet(tuple(head for part in (*map(truth.heads, roles), *decoys) for head in part))

    return heads


def copying_the_needle(truth: Truth) -> HeadSet:
    """What attends to the words of a password while they are written."""
    return attending("key-copy", "induction")(truth) - truth.heads("backup")


def resting(truth: Truth) -> HeadSet:
    """The planted heads that attend by content, and to the first token where there is none of it."""
    moving = HeadSet(
        tuple(head for role in ("fixed-offset", "previous-token", "uniform") for head in truth.heads(role))
    )
    return HeadSet.parse([each.head for each in truth.heads_known], kind="head") - moving


def writing(*roles: str) -> Wanted:
    """The heads of these roles alone."""
    return lambda truth: HeadSet(tuple(head for role in roles for head in truth.heads(role)))


def direct(behaviour: Behaviour) -> Wanted:
    return lambda truth: truth.with_effect(behaviour, "direct")


def total(behaviour: Behaviour) -> Wanted:
    return lambda truth: truth.with_effect(behaviour, "total")


@dataclass(frozen=True, slots=True)
class Case:
    """A method on a probe, and what it has to find."""

    method: str
    probe: Probe
    wanted: Wanted
    settings: Mapping[str, Any] = field(default_factory=dict)


NEEDLE = probe("needle").over(words=40)

CASES = (
    Case("profile", PROBES["repeat"], attending("uniform")),
    Case("uniform", PROBES["repeat"], attending("uniform")),
    Case("sink", probe("text"), resting),
    Case("previous-token", PROBES["repeat"], attending("previous-token")),
    Case("offset", PROBES["repeat"], attending("offset-3"), {"offset": 3}),
    Case("duplicate-token", PROBES["repeat"], attending("duplicate-token")),
    Case("induction", PROBES["repeat"], attending("induction")),
    Case("copying", PROBES["repeat"], writing("induction", "mover", "context", "key-copy")),
    Case("retrieval", NEEDLE, copying_the_needle),
    Case("retrieval-proxy", NEEDLE, copying_the_needle, {"proxy": "copy"}),
    Case("direct-logit", PROBES["ioi"], direct("ioi")),
    Case("direct-logit-source", PROBES["facts"], direct("facts")),
    Case("gate-gradient", PROBES["repeat"], direct("repeat")),
    Case("knock-out", PROBES["ioi"], total("ioi")),
    Case("activation-patching", PROBES["ioi"], total("ioi")),
    Case("path-patching", PROBES["ioi"], direct("ioi")),
    Case("hydra", PROBES["repeat"], writing("induction")),
    Case("memory-context", probe("conflict").over(trust="context", twin="subject-and-told"), writing("memory")),
    Case("arithmetic", PROBES["facts"], direct("facts")),
    Case("chain-of-thought", PROBES["facts"], direct("facts"), {"keep": "all"}),
    Case("chain-of-thought-copy", PROBES["conflict"], writing("context")),
    Case("decision-heads", PROBES["facts"], direct("facts")),
)


@dataclass(frozen=True, slots=True)
class Hit:
    """How a method's scores agree with the truth of one model.

    Attributes:
        k: how many heads the tool chose.
        recall, precision: of these.
        auc: probability that a head that is looked for scores higher than another one.
        margin: lowest score of a head that is looked for less the highest of the others, over the range of all scores.
            Positive where the two are apart.
    """

    k: int
    recall: float
    precision: float
    auc: float
    margin: float


def measure(
    *,
    seed: int = 0,
    seeds: int = SEEDS,
    cases: Sequence[Case] = CASES,
    said: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Means over models, as `METHOD.recall` and so on.

    Args:
        seed: the first of `seeds` seeds, which decide places, strengths, weights and items.
        said: is told which model is at work.
    """
    began = time.monotonic()
    hits: dict[str, list[Hit]] = {case.method: [] for case in cases}
    for organism in _models(seed, seeds):
        said(organism.truth.model)
        with attached(organism) as model:
            for case in cases:
                items = encode(case.probe, model.tokenizer, n=ITEMS, seed=seed)
                scores = find(case.method, model, items, **case.settings)
                hits[case.method].append(compared(scores, case.wanted(organism.truth), stand_out(scores)))
    found: dict[str, float] = {}
    for name, each in hits.items():
        for quantity in ("recall", "precision", "auc", "margin"):
            found[f"{name}.{quantity}"] = float(np.mean([getattr(hit, quantity) for hit in each]))
        found[f"{name}.separated"] = float(np.mean([hit.margin > 0 for hit in each]))
        found[f"{name}.k"] = float(np.mean([hit.k for hit in each]))
    return found | {"models": 3 * seeds, "seconds": time.monotonic() - began}


def compared(scores: HeadScores, wanted: HeadSet, k: int) -> Hit:
    """Scores against the heads that were to be found. Raises `InputError` if these are none, or all."""
    ranked = scores.ranked()
    values = np.array([each.score for each in ranked])
    looked_for = np.array([each.head in wanted for each in ranked])
    if not looked_for.any() or looked_for.all():
        raise InputError(f"{int(looked_for.sum())} of {len(ranked)} heads are to be found; some, not all, make sense")
    inside, outside = values[looked_for], values[~looked_for]
    span = float(np.ptp(values))
    return Hit(
        k=k,
        recall=float(looked_for[:k].sum()) / len(wanted),
        precision=float(looked_for[:k].mean()),
        auc=float(stats.mannwhitneyu(inside, outside).statistic) / (len(inside) * len(outside)),
        margin=float(inside.min() - outside.max()) / span if span else 0.0,
    )


def attached(organism: Planted) -> AttachedModel:
    return attach(organism.model, organism.tokenizer, example=organism.example)


def _models(seed: int, seeds: int) -> Iterator[Planted]:
    for index in range(seeds):
        for architecture in ARCHITECTURES:
            draw = random.Random(f"strength/{seed + index}/{architecture}")
            strength = {role: draw.uniform(*STRENGTH) * DEFAULT_STRENGTH.get(role, 1.0) for role in DIALS}
            yield planted(architecture, seed=seed + index, strength=strength)
