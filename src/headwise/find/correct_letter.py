"""Letter heads: which heads bring the letter of the right choice to the logits, and what they look at to do it.

After Lieberum et al. (2023), "Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities
in Chinchilla". Two scores, by the setting `of`:

- `effect`: the direct effect on the right letter. The corrupted twin has the right option under another letter. With
  sigma_t the scale of the final norm and everything else held at the clean run, at the last token t,

      s_h = < W_O^h (z_h[t] - z_h'[t]),  sigma_t * gamma * (W_U[right] - mean of W_U[wrong]) > / (M_clean - M_corrupted)

  with z' that of the corrupted run and M the logit of the right letter less the mean of the wrong ones. Heads,
  feed-forward parts and the input together have 1 where norms scale alike in both runs; the denominator is the mean
  over the items.
- `attention`: what the last token gives of its attention to the right letter, span `letter`.

`letter_classes` puts the two together. The output heads are the few of the largest effects that have a given share of
all positive ones; each is of a class by its mean attention from the last token, over items in which the right letter
changes places:

    correct-letter   most of what it gives to letters goes to the right one
    single-letter    most of it goes to one and the same place in the list, whatever is right
    uniform          it attends to letters, to none most of all
    amplification    it attends to the last token itself
    other            none of these

A reconstruction: the paper reports the classes and no rule for them, so what counts as most is a parameter, and its
ranking of nodes on a model that is not public. `probe("choice").over(labels="random")` has other letters, the paper's
test beyond what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from headwise.circuits.paths import path_patch
from headwise.errors import InputError
from headwise.find.last_row import last_row_masses
from headwise.find.method import Method, Scored
from headwise.find.path_patching import heads_of, shares
from headwise.find.patterns import require_choice
from headwise.find.search import over_batches
from headwise.heads import Head, SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet

Of = Literal["effect", "attention"]
LetterClass = Literal["correct-letter", "single-letter", "uniform", "amplification", "other"]


def correct_letter(model: AttachedModel, items: ItemSet, *, of: Of = "effect") -> Scored:
    """`correct-letter`: a share of what the two runs differ by, or a share of attention.

    Raises:
        InputError, Refusal: as `path_patch` with frozen norms; letters that are as likely in the clean as in the
            corrupted run; a model that does not continue text.
    """
    require_choice("of", of, get_args(Of))
    if of == "attention":
        return over_batches(items, partial(_on_the_right_letter, model), answers=False)
    return shares(
        model,
        path_patch(
            model,
            items,
            ["logits"],
            heads_of(model),
            feed_forward="frozen",
            norms="frozen",
            metric="logit-difference",
        ),
    )


@dataclass(frozen=True, slots=True)
class LetterHead:
    """An output head, and what it attends to.

    Attributes:
        effect: its mean direct effect on the right letter, a share.
        kind: its class.
        right: mean attention of the last token to the right letter.
        places: to the letter in each place of the list.
        itself: to the last token.
    """

    head: Head
    effect: float
    kind: LetterClass
    right: float
    places: tuple[float, ...]
    itself: float


def letter_classes(
    model: AttachedModel, items: ItemSet, *, share: float = 0.9, attends: float = 0.5, most: float = 0.5
) -> tuple[LetterHead, ...]:
    """The output heads and their classes, the largest effect first.

    Args:
        items: with the spans `letters`, a place for each letter of the list, and `letter`, the right one.
        share: of the sum of all positive effects, what the output heads have together.
        attends: attention of the last token from which on a head attends to letters, or to the last token.
        most: of its attention to letters, more than which goes to the right letter, or to one place.

    Raises:
        InputError: a parameter outside 0 to 1; items without the spans, or with lists of different length; and as
            `correct_letter`.
        Refusal: as `correct_letter`.
    """
    for name, value in (("share", share), ("attends", attends), ("most", most)):
        if not 0 < value <= 1:
            raise InputError(f"{name}={value!r} must be a share, above 0 and at most 1")
    _require_lists(items)
    output = _output_heads(correct_letter(model, items), share)
    masses = over_batches(items, partial(_masses, model), answers=False)
    means = {id: found.mean(0) for id, found in masses.items()}
    return tuple(_classed(effect, head, means[head.site][head.index], attends, most) for effect, head in output)


def _output_heads(scored: Scored, share: float) -> list[tuple[float, Head]]:
    """The fewest heads that have this share of all positive mean effects, the largest first."""
    means = {id: values.nanmean(0).tolist() for id, values in scored.items()}
    effects = [(effect, Head(id, index)) for id in means for index, effect in enumerate(means[id]) if effect > 0]
    left, found = share * sum(effect for effect, _ in effects), []
    for effect, head in sorted(effects, key=lambda each: (-each[0], each[1])):
        if left <= 0:
            break
        found.append((effect, head))
        left -= effect
    return found


def _classed(effect: float, head: Head, masses: Float[Tensor, " group"], attends: float, most: float) -> LetterHead:
    right, itself, *places = masses.tolist()
    letters = sum(places)
    kind: LetterClass = "other"
    if letters >= attends:
        kind = "correct-letter" if right > most * letters else "uniform"
        if kind == "uniform" and max(places) > most * letters:
            kind = "single-letter"
    elif itself >= attends:
        kind = "amplification"
    return LetterHead(head, effect, kind, right, tuple(places), itself)


def _on_the_right_letter(model: AttachedModel, batch: Batch) -> dict[SiteId, Float[Tensor, "item head"]]:
    return {id: found[..., 0] for id, found in last_row_masses(model, batch, _right).items()}


def _masses(model: AttachedModel, batch: Batch) -> dict[SiteId, Float[Tensor, "item head group"]]:
    return last_row_masses(model, batch, lambda each: [*_right(each), [len(each.prompt) - 1], *_letters(each)])


def _right(each: EncodedItem) -> list[list[int]]:
    return [[position for place in each.spans["letter"] for position in place]]


def _letters(each: EncodedItem) -> list[list[int]]:
    return [list(place) for place in each.spans["letters"]]


def _require_lists(items: ItemSet) -> None:
    for each in items:
        if not {"letter", "letters"} <= set(each.spans):
            raise InputError(
                f"item {each.id} of {items.probe} has not the spans letters (a place for each) and letter (the right "
                "one); take items of probe choice, or mark them"
            )
    lengths = sorted({len(each.spans["letters"]) for each in items})
    if len(lengths) > 1:
        raise InputError(
            f"items of {items.probe} have {lengths[0]} to {lengths[-1]} letters, so a place in the list is not one "
            "place in all of them; take items with lists of one length"
        )


METHODS = (
    Method(
        id="correct-letter",
        title="What a head itself brings to the letter of the right choice",
        page="methods/correct-letter.md",
        paper="Lieberum et al., Does Circuit Analysis Interpretability Scale?",
        year=2023,
        tier="B",
        status="reconstruction",
        needs=("rows", "z", "projection", "logits", "answer", "foils", "twin", "span:letter"),
        cost="2 forwards per item",
        probe="choice",
        probes=("choice",),
        score=correct_letter,
    ),
)
