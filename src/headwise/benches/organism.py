"""What the trained organism gets right on items it never saw: share of answers that are right to the last token.

Needles are asked for at every depth and several lengths; the worst cell is a figure of its own. Conflicts are split by
what the instruction says to trust.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice

from headwise import metrics
from headwise.loading import load
from headwise.model.attached import AttachedModel
from headwise.probes import Item, Probe, encode, held_out, probe

ITEMS = 300
PER_CELL = 20
DEPTHS = tuple(tenth / 10 for tenth in range(11))
NEEDLE_WORDS = (40, 100, 200, 400)
"""About 85, 150, 270 and 500 tokens with the organism's tokenizer."""

BEHAVIOURS: Mapping[str, Callable[[], Probe]] = {
    "arithmetic": lambda: probe("arithmetic"),
    "choice": lambda: probe("choice"),
    "colored-objects": lambda: probe("colored-objects"),
    "conflict.context": lambda: probe("conflict").over(trust="context"),
    "conflict.memory": lambda: probe("conflict").over(trust="memory"),
    "dated": lambda: probe("dated"),
    "facts": lambda: probe("facts"),
    "fewshot": lambda: probe("fewshot"),
    "hash": lambda: probe("hash"),
    "ioi": lambda: probe("ioi"),
    "refusal": lambda: probe("refusal"),
    "repeat": lambda: probe("repeat"),
}


def measure(*, seed: int = 0, device: str | None = None, dtype: str | None = None) -> dict[str, float]:
    """The shipped organism's figures: `needle.accuracy`, `facts.accuracy` ...; 1 is all right."""
    with load("zoo:organism", device=device, dtype=dtype) as model:
        return accuracies(model, seed=seed)


def accuracies(model: AttachedModel, *, seed: int = 0) -> dict[str, float]:
    """Share of held-out items wholly right, per behaviour, and the loss on plain sentences in nats per token."""
    found = {f"{name}.accuracy": _share(model, make(), ITEMS, seed) for name, make in BEHAVIOURS.items()}
    cells = {
        (words, depth): _share(model, probe("needle").over(words=words, depth=depth), PER_CELL, seed)
        for words in NEEDLE_WORDS
        for depth in DEPTHS
    }
    found["needle.accuracy"] = sum(cells.values()) / len(cells)
    found["needle.worst"] = min(cells.values())
    for words in NEEDLE_WORDS:
        found[f"needle.words_{words}"] = sum(cells[words, depth] for depth in DEPTHS) / len(DEPTHS)
    for depth in DEPTHS:
        found[f"needle.depth_{depth}"] = sum(cells[words, depth] for words in NEEDLE_WORDS) / len(NEEDLE_WORDS)
    items = encode(_unseen(probe("text"), 64, seed), model.tokenizer, name="text")
    found["text.cross_entropy"] = float(metrics.measure(model, items, "cross-entropy").mean())
    return dict(sorted(found.items()))


def _share(model: AttachedModel, of: Probe, n: int, seed: int) -> float:
    items = encode(_unseen(of, n, seed), model.tokenizer, name=of.id)
    if items.n_dropped:
        raise RuntimeError(f"{of.id}: {items.dropped} cannot be expressed, so the share would not be that of all items")
    return float(metrics.measure(model, items, "exact-match", batch_size=32).mean())


def _unseen(of: Probe, n: int, seed: int) -> list[Item]:
    """The first `n` held-out prompts of a stream that training does not use; fewer where the probe has no more.

    Without twins and foils, which exact matches do not use and which not every tokenizer can express.
    """
    prompts: dict[object, Item] = {}
    for item in filter(held_out, islice(of.items(f"bench/{seed}"), 100 * n)):
        prompts.setdefault(item.prompt, replace(item, twin=None, foils=()))
        if len(prompts) == n:
            break
    return list(prompts.values())
