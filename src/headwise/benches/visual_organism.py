"""What the visual organism gets right on pictures it never saw, and how often it sees what is not there.

Accuracies are shares of answers that are right to the last token, on clear pictures. Hallucination is measured as by
POPE and CHAIR (`headwise.use.hallucination`), at several degrees of faintness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from headwise import metrics
from headwise.loading import load
from headwise.model.attached import AttachedModel
from headwise.probes import Item, ItemSet, Probe, encode, held_out, probe
from headwise.probes.albums import MOST
from headwise.probes.existence import FAINTNESS, KINDS
from headwise.use.hallucination import answers, hallucination

ITEMS = 200
PER_CELL = 60
FAINT = (0.0, 0.3, 0.4, 0.5, 0.6, 0.8)

BEHAVIOURS: Mapping[str, Mapping[str, object]] = {
    "panel": {},
    "strip": {},
    "place": {},
    "count": {},
    "existence": {"faintness": 0.0},
    "listing": {"faintness": 0.0},
    "picture-needle": {},
    "text-needle": {},
}
"""The settings under which each is to be wholly right."""


def measure(*, seed: int = 0) -> dict[str, float]:
    """The shipped organism's figures: `panel.accuracy`, `chair_i.0.5`, `false_yes.adversarial.0.5` ..."""
    with load("zoo:visual-organism") as model:
        return figures(model, seed=seed)


def figures(model: AttachedModel, *, seed: int = 0) -> dict[str, float]:
    """Accuracies of held-out items, and hallucination by faintness and kind of question."""
    found = {f"{name}.accuracy": accuracy(model, name, seed=seed) for name in BEHAVIOURS}
    for pictures in range(2, MOST + 1):
        for asked in ("color", "picture"):
            settings = {"pictures": pictures, "asked": asked}
            found[f"picture-needle.{asked}_of_{pictures}"] = share(model, "picture-needle", settings, PER_CELL, seed)
        found[f"text-needle.among_{pictures}"] = share(model, "text-needle", {"pictures": pictures}, PER_CELL, seed)
    for faintness in FAINT:
        found |= hallucinations(model, faintness, seed=seed)
    return dict(sorted(found.items()))


def accuracy(model: AttachedModel, behaviour: str, *, n: int = ITEMS, seed: int = 0) -> float:
    """Share of held-out items of one behaviour that are wholly right."""
    return share(model, behaviour, BEHAVIOURS[behaviour], n, seed)


def hallucinations(
    model: AttachedModel, faintness: float = FAINTNESS, *, n: int = ITEMS, seed: int = 0
) -> dict[str, float]:
    """POPE's and CHAIR's numbers on held-out pictures of one faintness, and the rate of a false yes by kind."""
    at = {"faintness": faintness}
    found: dict[str, float] = {}
    kinds = {kind: unseen(model, "existence", at | {"kind": kind}, n // 2, seed) for kind in KINDS}
    for kind, items in kinds.items():
        found[f"false_yes.{kind}.{faintness}"] = answers(model, items).false_yes_rate
    both = hallucination(model, kinds["adversarial"], unseen(model, "listing", at, n // 2, seed))
    return found | {f"{name}.{faintness}": value for name, value in both.figures.items()}


def share(model: AttachedModel, name: str, settings: Mapping[str, object], n: int, seed: int = 0) -> float:
    """Share of `n` held-out items that are right to the last token."""
    items = unseen(model, name, settings, n, seed)
    return float(metrics.measure(model, items, "exact-match", batch_size=32).mean())


def unseen(model: AttachedModel, name: str, settings: Mapping[str, object], n: int, seed: int = 0) -> ItemSet:
    """The first `n` held-out items of a stream that training does not use."""
    return encode(islice(_held_out(probe(name).over(**settings), seed), n), model, name=name)  # type: ignore[arg-type]


def _held_out(of: Probe, seed: int) -> Iterator[Item]:
    return filter(held_out, of.items(f"bench/{seed}"))
