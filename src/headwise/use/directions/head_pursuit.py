"""Head Pursuit as an intervention: the heads that write a concept turned around, or made stronger.

After Basile et al. (2025), "Head Pursuit: Probing Attention Specialization in Multimodal Transformers". With the k
heads whose writes are explained best by the words of a concept (`find("head-pursuit")`)

    z_h <- alpha * z_h      alpha = -1 suppresses the concept, alpha = 5 enhances it

    scores = hw.find("head-pursuit", model, items, concept="Rome Paris Vienna")
    with HeadPursuit(scores.top(8))(model): ...

The paper takes 8 to 32 heads (0.8 to 3 percent), and looks at text that did not choose them. Its controls are as many
random heads of the same layers (`headwise.sweep.matched.matched_sets`) and heads chosen by the logit lens
(`find("head-pursuit", ..., by="logit-lens")`). The scaling is exact; the scores are a reconstruction.

In captions the heads are those before the concept's words, and what counts is how many of the words are still written:

    found = pursue_concept(model, captions, "red green blue", alpha=-1.0)
    found.written.mean(), found.changed.mean(), found.controls.mean()
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.find.head_pursuit import ATOMS
from headwise.find.search import find
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe
from headwise.sweep.matched import matched_sets
from headwise.use.attention.zero_tuning import parted
from headwise.use.intervention import Intervention, finite, named_heads

SUPPRESS = -1.0
ENHANCE = 5.0
BATCH = 16


@dataclass(frozen=True, eq=False, repr=False)
class HeadPursuit(Intervention):
    """Multiply what the heads of a concept write.

    Attributes:
        heads: the heads.
        alpha: -1, the paper's, suppresses the concept; 5 enhances it; 1 changes nothing.
        scope: where, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "head-pursuit"
    heads: HeadSet
    alpha: float = SUPPRESS
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha"))
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = model.heads(self.heads)
        return () if self.alpha == 1 else (edit.scale(heads, self.alpha, scope=self.scope),)


@dataclass(frozen=True, eq=False)
class PursuedConcept:
    """Heads of a concept chosen on one part of some captions, and what scaling them does to the others.

    Attributes:
        intervention: the heads, and alpha.
        tuning, judging: the two parts; no prompt with its pictures is in both.
        written: words of the concept in the caption of each judging item, by the plain model.
        changed: the same under the intervention.
        controls: the same under as many random heads of the same layers, for each set of them.
        kept: of the other words of the plain caption, the share that is written under the intervention too; NaN for a
            caption that has none. `controls_kept`: the same under each set of controls.
    """

    intervention: HeadPursuit
    tuning: ItemSet
    judging: ItemSet
    written: Float[Tensor, " item"]
    changed: Float[Tensor, " item"]
    controls: Float[Tensor, "set item"]
    kept: Float[Tensor, " item"]
    controls_kept: Float[Tensor, "set item"]


def pursue_concept(
    model: AttachedModel,
    items: ItemSet,
    concept: str,
    *,
    heads: int = 8,
    alpha: float = SUPPRESS,
    atoms: int = ATOMS,
    controls: int = 5,
    new_tokens: int | None = None,
    seed: int = 0,
) -> PursuedConcept:
    """Find the heads that write a concept's words in the answers of one half of the items, scale them, and count the
    words that the model writes for the other half.

    Cost: one forward for each tuning item, one generated answer for each judging item and set of heads.

    Args:
        concept: words with blanks between them.
        heads: how many.
        controls: how many sets of random heads.
        new_tokens: most tokens of an answer; None is some more than the item's own answer has.

    Raises:
        InputError: words that no answer has, no number of heads or controls, fewer than two different items.
        Refusal: a model that writes no text.
    """
    if heads < 1 or controls < 1:
        raise InputError(f"heads={heads} and controls={controls} are numbers from 1 on; give others")
    tuning, judging = parted(items)
    scores = find("head-pursuit", model, tuning, concept=concept, atoms=atoms, at="concept")
    found = HeadPursuit(scores.top(heads), alpha)
    random = [found.on(each) for each in matched_sets(found.heads, model.heads(scores.heads), controls, seed).sets]
    plain = written_by(model, judging, None, new_tokens)
    own = written_by(model, judging, found, new_tokens)
    others = [written_by(model, judging, each, new_tokens) for each in random]
    words = concept.replace(",", " ").lower().split()
    return PursuedConcept(
        found,
        tuning,
        judging,
        _counts(plain, words),
        _counts(own, words),
        torch.stack([_counts(each, words) for each in others]),
        _kept(plain, own, words),
        torch.stack([_kept(plain, each, words) for each in others]),
    )


def written_by(
    model: AttachedModel, items: ItemSet, intervention: Intervention | None, new_tokens: int | None = None
) -> list[list[str]]:
    """The words that the model goes on with, item by item, in lower case. Raises `Refusal` where it writes no text."""
    written: list[list[str]] = []
    with nullcontext() if intervention is None else intervention(model):
        for batch in items.batches(BATCH, answers=False):
            text = observe(model, batch, wants={"generation"}, new_tokens=new_tokens).text
            if text is None:
                raise Refusal(f"{model.name} writes no text; attach it with its tokenizer")
            written += [re.findall(r"\w+", each.lower()) for each in text]
    return written


def _counts(written: Sequence[Sequence[str]], words: Sequence[str]) -> Float[Tensor, " item"]:
    return torch.tensor([sum(word in words for word in each) for each in written], dtype=torch.float64)


def _kept(
    plain: Sequence[Sequence[str]], changed: Sequence[Sequence[str]], words: Sequence[str]
) -> Float[Tensor, " item"]:
    shares = []
    for before, after in zip(plain, changed, strict=True):
        wanted = Counter(word for word in before if word not in words)
        same = wanted & Counter(after)
        shares.append(same.total() / wanted.total() if wanted else float("nan"))
    return torch.tensor(shares, dtype=torch.float64)


INTERVENTIONS = (
    InterventionEntry(
        id=HeadPursuit.id,
        title="Turn around, or make stronger, the heads that write the words of a concept",
        page="use/directions.md#head-pursuit",
        paper="Basile et al., Head Pursuit",
        year=2025,
        tier="B",
        status="reconstruction",
        cost="1 forward",
        made=HeadPursuit,
    ),
)

__all__ = [
    "ENHANCE",
    "INTERVENTIONS",
    "SUPPRESS",
    "HeadPursuit",
    "PursuedConcept",
    "pursue_concept",
    "written_by",
]
