"""Heads of a chain of thought: which heads carry the deciding step, and which of them copy it.

After Dutta et al. (2024), "How to think step-by-step: A mechanistic understanding of chain-of-thought reasoning". The
item's chain and that of its corrupted twin say the same up to one token, by which the two texts are told apart (with
probe `ontology`, the property at the end of the chain). Both prompts are continued with the chain up to that token, and
the token is what is looked at. Two methods.

`chain-of-thought` runs the corrupted prompt with z_h of the clean run at every token, and asks how far that brings the
next token's distribution p back to that of the clean run:

    s_h = (KL_noise - KL_patched) / KL_noise,      KL = KL(p_clean || p)

1: the head alone restores it, 0: nothing. The denominator is the mean over the items, so that the mean score is a ratio
of means. As in the paper only items count whose token the model gets right on both prompts, the others have no score;
`keep="all"` takes every item. An item on which both runs agree has KL_noise 0 and no score.

`chain-of-thought-copy` looks for the heads that write that token by copying it from the text, by one of two numbers:

    s_h = < W_O^h z_h[t], sigma_t * gamma * (W_U[answer] - mean of W_U) >       of="write"
    s_h = sum over s with token[s] = answer of A_h[t, s]                        of="attention"

at the last token t. A copying head has both. With `of="attention"` an item whose text does not hold the token has no
score.

The formulas are those of the paper's code. What is ours: the step is the one that twins differ in and not each of the
paper's ten subtasks, the projection is net of the mean over the vocabulary and holds the final norm, and padding is
masked, where the code attends to it. The paper's decision heads, by the lens of each head's write, are a method of
their own, `decision-heads`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.circuits.patching import patch_map
from headwise.circuits.twins import corrupted, require_twins
from headwise.errors import Refusal
from headwise.find.direct_logit import direct_logit
from headwise.find.last_row import last_row_masses
from headwise.find.method import Method, Scored
from headwise.find.parting import at_parting
from headwise.find.path_patching import heads_of, shares
from headwise.find.patterns import require_choice
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.metrics import measure
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet

Keep = Literal["right", "all"]
Of = Literal["write", "attention"]


def chain_of_thought(model: AttachedModel, items: ItemSet, *, keep: Keep = "right") -> Scored:
    """`chain-of-thought`: a share of the divergence.

    Raises:
        InputError: a setting that is none; as `at_parting` and `patch_map`.
        Refusal: no item is kept; clean and corrupted run agree on every item; and as `patch_map`.
    """
    require_choice("keep", keep, get_args(Keep))
    require_twins(items)
    steps = at_parting(items)
    kept = torch.ones(len(steps), dtype=torch.bool) if keep == "all" else _right_on_both(model, steps)
    if not bool(kept.any()):
        raise Refusal(
            f"{model.name} gets the deciding step right on both prompts of none of {len(items)} items of "
            f"{items.probe}; use a model that solves the probe, or keep='all'"
        )
    some = steps.only(kept.tolist(), "the model gets it or its twin wrong")
    patched = patch_map(model, some, "z", heads_of(model), direction="denoising", metric="kl-to-clean")
    found = {}
    for id, scores in shares(model, patched).items():
        found[id] = scores.new_full((len(items), scores.shape[1]), torch.nan)
        found[id][kept] = scores
    return found


def chain_of_thought_copy(model: AttachedModel, items: ItemSet, *, of: Of = "write") -> Scored:
    """`chain-of-thought-copy`: in logits, or as a share of attention.

    Raises:
        InputError: a setting that is none; as `at_parting`.
        Refusal: as `direct_logit`; a model that does not continue text.
    """
    require_choice("of", of, get_args(Of))
    steps = at_parting(items)
    if of == "write":
        return direct_logit(model, steps)
    return over_batches(steps, partial(_on_the_answer, model), answers=False)


def _right_on_both(model: AttachedModel, steps: ItemSet) -> Tensor:
    turned = replace(steps, items=tuple(_turned(each) for each in steps))
    both = [measure(model, each, "exact-match") == 1 for each in (steps, turned)]
    return both[0] & both[1]


def _turned(each: EncodedItem) -> EncodedItem:
    assert each.twin is not None
    return replace(corrupted(each), answer=each.twin.answer)


def _on_the_answer(model: AttachedModel, batch: Batch) -> dict[SiteId, Float[Tensor, "item head"]]:
    absent = torch.tensor([each.answer[0] not in each.prompt for each in batch.items])
    masses = last_row_masses(model, batch, _of_the_answer)
    return {id: found[..., 0].masked_fill(absent[:, None], torch.nan) for id, found in masses.items()}


def _of_the_answer(each: EncodedItem) -> list[list[int]]:
    return [[position for position, token in enumerate(each.prompt) if token == each.answer[0]]]


METHODS = (
    Method(
        id="chain-of-thought",
        title="How far a head's clean value alone restores the deciding step of a chain of thought",
        page="methods/chain-of-thought.md",
        paper="Dutta et al., How to think step-by-step",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("z", "logits", "answer", "twin"),
        cost="1 forward per head and item",
        probe="ontology",
        probes=("ontology",),
        score=chain_of_thought,
    ),
    Method(
        id="chain-of-thought-copy",
        title="What a head writes of the deciding step's token, or how much it attends to it",
        page="methods/chain-of-thought-copy.md",
        paper="Dutta et al., How to think step-by-step",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("rows", "z", "projection", "logits", "answer", "twin"),
        cost="1 forward per item",
        probe="ontology",
        probes=("ontology",),
        score=chain_of_thought_copy,
    ),
)
