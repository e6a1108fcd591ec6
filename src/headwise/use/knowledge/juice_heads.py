"""Which heads JUICE makes stronger and weaker, and by how much.

Li et al. (2025), "Taming Knowledge Conflicts in Language Models". Questions are asked in several ways (kinds of prompt:
without a text, with a text that says something else in a word, and in a coherent story). For one head h at a time

    delta(h, alpha) = p(a | clean + alpha c_h) - p(a | clean)

with c_h what the head writes in the clean run, at all positions, and a the first token of the answer that is wanted.

    stronger(h) = mean of delta over alpha in 1, 3, 5, 10, 30, and over items
    weaker(h)   = mean of delta over alpha in -1, -2, -5, and over items

A head is taken for a set if its mean is above 0 for every kind of prompt; heads are ranked by the sum over kinds.

    found = juice_heads(model, [questions, conflicts, others])     # the paper has 4 items of each
    chosen = choose_juice(model, found, validation)                # both alphas, on other items

Exact, after the paper's code, but for two things. A head's own z does not hang on its own edit, so each delta is one
run with z_h times 1 + alpha (the paper's code runs twice). A head that qualifies for both sets goes where its sum is
larger; in the paper's code it may be in both. Four items are few: `Found.stability` says how often a head is chosen
when items are drawn anew. A kind of prompt that is answered with probability 1 already can only get worse, so that no
head passes: give kinds that leave room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import scored_sites
from headwise.heads import HeadSet
from headwise.metrics import Metric
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome
from headwise.sweep.edited import Edited
from headwise.sweep.measuring import measure_sets
from headwise.use.knowledge.conflicts import refuse_shared
from headwise.use.knowledge.juice import JUICE, JustRunOnce
from headwise.use.tuning import Tuned, tuned

STRONGER = (1.0, 3.0, 5.0, 10.0, 30.0)
WEAKER = (-1.0, -2.0, -5.0)
HEADS = 5
"""In each set, for Gemma, Phi 2 and StableLM; 10 for Llama 2, Llama 3 and OLMo."""
ENHANCE_BY = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
SUPPRESS_BY = (0.0, 1.0, 2.0, 3.0)

Side = Literal["enhance", "suppress"]


@dataclass(frozen=True, eq=False)
class Found:
    """What each head alone does to the probability of the answer.

    Attributes:
        heads: the heads, in the order of the head axis.
        stronger, weaker: for each kind of prompt, the mean change over the alphas.
        item_ids: of all kinds; what is tuned or judged on others.
    """

    heads: HeadSet
    stronger: tuple[Float[Tensor, "item head"], ...]
    weaker: tuple[Float[Tensor, "item head"], ...]
    item_ids: tuple[str, ...]

    def enhance(self, k: int = HEADS) -> HeadSet:
        """The k best heads to make stronger; fewer, where fewer help in every kind of prompt."""
        return self._chosen("enhance", self.stronger, self.weaker, k)

    def suppress(self, k: int = HEADS) -> HeadSet:
        """The k best heads to make weaker; fewer, where fewer help in every kind of prompt."""
        return self._chosen("suppress", self.stronger, self.weaker, k)

    def stability(self, side: Side, k: int = HEADS, *, draws: int = 200, seed: int = 0) -> dict[str, float]:
        """For every head of a set, the share of bootstrap draws of the items in which it is chosen again."""
        generator = torch.Generator().manual_seed(seed)
        first = self.enhance(k) if side == "enhance" else self.suppress(k)
        counts = dict.fromkeys(first.labels, 0)
        for _ in range(draws):
            rows = [torch.randint(len(each), (len(each),), generator=generator) for each in self.stronger]
            stronger = tuple(each[row] for each, row in zip(self.stronger, rows, strict=True))
            weaker = tuple(each[row] for each, row in zip(self.weaker, rows, strict=True))
            for label in self._chosen(side, stronger, weaker, k).labels:
                if label in counts:
                    counts[label] += 1
        return {label: count / draws for label, count in counts.items()}

    def to_pandas(self) -> pd.DataFrame:
        """One row per head: head, set, and the mean change of each kind of prompt, made stronger and made weaker."""
        enhance, suppress = self.enhance(len(self.heads)), self.suppress(len(self.heads))
        sets = ["enhance" if each in enhance else "suppress" if each in suppress else "" for each in self.heads]
        columns: dict[str, object] = {"head": list(self.heads.labels), "set": sets}
        for name, kinds in (("stronger", self.stronger), ("weaker", self.weaker)):
            columns |= {f"{name}_{place}": values.mean(0).tolist() for place, values in enumerate(kinds)}
        return pd.DataFrame(columns)

    def _chosen(self, side: Side, stronger: Sequence[Tensor], weaker: Sequence[Tensor], k: int) -> HeadSet:
        if k < 1:
            raise InputError(f"k={k} is no number of heads; give 1 or more")
        (up, helps_up), (down, helps_down) = _summed(stronger), _summed(weaker)
        own, other, helps, others = (up, down, helps_up, helps_down)
        if side == "suppress":
            own, other, helps, others = down, up, helps_down, helps_up
        taken = helps & ~(others & ((other > own) | ((other == own) & (side == "suppress"))))
        order = sorted(taken.nonzero()[:, 0].tolist(), key=lambda place: (-float(own[place]), place))[:k]
        return HeadSet(tuple(self.heads.heads[place] for place in order))

    def __repr__(self) -> str:
        return f"<JUICE of {len(self.heads)} heads: enhance {self.enhance()}, suppress {self.suppress()}>"


def juice_heads(
    model: AttachedModel,
    kinds: Sequence[ItemSet],
    *,
    stronger: Sequence[float] = STRONGER,
    weaker: Sequence[float] = WEAKER,
    tokens: int | None = None,
) -> Found:
    """Make every head of the main stack stronger and weaker, one at a time.

    Args:
        kinds: the items of each kind of prompt, with the answer that is wanted as the right one
            (`answered_from(items, "memory")`). The paper has three kinds: without a text, and with two sorts of text
            that contradicts memory.
        stronger, weaker: the alphas.
        tokens: most tokens of one forward, as of `measure_sets`.

    Cost: one forward per item, head and alpha, from the head's block on.

    Raises:
        InputError: no items; an item without an answer; alphas of the wrong sign; and as `measure_sets`.
        Refusal: as `measure_sets`.
    """
    if not kinds or isinstance(kinds, ItemSet):
        raise InputError("juice_heads takes a list of items, one entry per kind of prompt; give at least one")
    _require_signs(stronger, weaker)
    for each in (each for items in kinds for each in items):
        if not each.answer:
            raise InputError(f"item {each.id} has no answer, whose probability is to change; use items with answers")
    heads = model.heads([site.label for site in scored_sites(model)])
    sets = [HeadSet(), *(HeadSet((head,)) for head in heads)]

    def mean_change(items: ItemSet, alphas: Sequence[float]) -> Float[Tensor, "item head"]:
        total = torch.zeros(len(items), len(heads), dtype=torch.float64)
        for alpha in alphas:
            values = measure_sets(model, items, sets, _times(1 + alpha), FIRST_TOKEN, tokens=tokens)
            total += (values[1:] - values[0]).T
        return total / len(alphas)

    return Found(
        heads,
        tuple(mean_change(items, stronger) for items in kinds),
        tuple(mean_change(items, weaker) for items in kinds),
        tuple(dict.fromkeys(id for items in kinds for id in items.ids)),
    )


def choose_juice(
    model: AttachedModel,
    found: Found,
    validation: ItemSet,
    *,
    k: int = HEADS,
    enhance_by: Sequence[float] = ENHANCE_BY,
    suppress_by: Sequence[float] = SUPPRESS_BY,
    method: type[JUICE | JustRunOnce] = JUICE,
) -> Tuned:
    """Both alphas, chosen on items.

    Args:
        k: most heads of each set.
        validation: items with the answer that is wanted as the right one, that did not find the heads.
        enhance_by, suppress_by: the grid; for the direction of the text the paper has suppress_by to 5.
        method: `JUICE`, or `JustRunOnce` for the ablation.

    Raises:
        InputError: items that found the heads, or alphas below 0.
        Refusal: no head helps in every kind of prompt.
    """
    refuse_shared(found.item_ids, validation)
    enhance, suppress = found.enhance(k), found.suppress(k)
    if not enhance and not suppress:
        raise Refusal(f"no head of {model.name} makes the answer more probable in every kind of prompt")
    grid = product(enhance_by if enhance else (0.0,), suppress_by if suppress else (0.0,))
    pairs = sorted((pair for pair in grid if any(pair)), key=lambda pair: (sum(pair), pair))
    return tuned(model, [method(enhance, suppress, up, down) for up, down in pairs], validation)


def _times(factor: float) -> Edited:
    """z of a set of heads times a factor."""
    return Edited(lambda heads, rows: edit.scale(heads, factor, rows=rows))


def _first_token(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    assert outcome.logits is not None
    first = torch.tensor([each.answer[0] for each in outcome.batch.items], device=outcome.logits.device)
    return outcome.logits[:, 0].double().softmax(-1).gather(-1, first[:, None])[:, 0]


FIRST_TOKEN = Metric(
    "first-token-probability",
    "probability of the answer's first token",
    frozenset({"logits"}),
    "higher",
    "probability",
    _first_token,
)


def _summed(kinds: Sequence[Float[Tensor, "item head"]]) -> tuple[Float[Tensor, " head"], Tensor]:
    """The sum of the means of all kinds, and whether each of them is above 0."""
    means = torch.stack([each.mean(0) for each in kinds])
    return means.sum(0), (means > 0).all(0)


def _require_signs(stronger: Sequence[float], weaker: Sequence[float]) -> None:
    if not stronger or not weaker or not min(stronger) > 0 or not max(weaker) < 0:
        raise InputError(
            f"stronger={tuple(stronger)!r} are to be above 0 and weaker={tuple(weaker)!r} below; give some of each"
        )


__all__ = ["FIRST_TOKEN", "Found", "choose_juice", "juice_heads"]
