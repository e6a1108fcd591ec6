"""Memory heads and context heads: what each head itself brings to the answer remembered, and to the answer told.

After Jin et al. (2024), "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating Knowledge
Conflicts in Language Models" (PH3). A text tells c of a subject of which the model remembers m. By path patching from a
head to the logits (the clean run with z_h of the corrupted twin, every other head held at its clean z)

    E_h(a) = logit_clean(a) - logit_patched(a),      a = m, c

is what the head brings to one of the two answers. A memory head has a large E_h(m), a context head a large E_h(c); one
head may have both, so the difference decides:

    s_h = E_h(m) - E_h(c)      for heads="memory",
    s_h = E_h(c) - E_h(m)      for heads="context"

With `by="own"` the other answer is left out. Logits are read at the token where m and c part. To favour one source the
paper then takes out the few best heads of the other kind.

A reconstruction: no code of the paper was to be had. In logits and not as shares, because both answers are to be on one
scale; the difference is the same in log-probabilities. The paper's prompts have no instruction, and its corrupted runs
lack what both answers rest on: so are those of `probe("conflict").over(twin="subject-and-told")`, which is taken unless
another probe is given, another subject of which something else is told. The probe's own twins change the instruction,
so that the scores are of heads that pass on which of the two is to be trusted.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.circuits.path_runs import Held
from headwise.circuits.paths import path_patch
from headwise.errors import InputError
from headwise.find.method import Method, Scored
from headwise.find.parting import parting
from headwise.find.path_patching import by_site, heads_of
from headwise.find.patterns import require_choice
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.layout import Ids
from headwise.probes.outcome import Outcome

Source = Literal["memory", "context"]
By = Literal["difference", "own"]


def memory_context(
    model: AttachedModel,
    items: ItemSet,
    *,
    heads: Source = "memory",
    by: By = "difference",
    feed_forward: Held = "recomputed",
    norms: Held = "recomputed",
) -> Scored:
    """`memory-context`, in logits.

    Args:
        heads: which kind is looked for.
        by: `difference`, what a head brings to its kind's answer less what it brings to the other; `own`, the first
            alone.
        feed_forward, norms: as of `path_patch`. With both `frozen` two forwards give all heads.

    Raises:
        InputError: a setting that is none; an item that does not say by its attribute `trust` which of answer and foil
            is told, or has not one foil; and as `path_patch`.
        Refusal: as `path_patch`.
    """
    require_choice("heads", heads, get_args(Source))
    require_choice("by", by, get_args(By))
    for each in items:
        _answers(each)
    brought = Metric(
        f"{heads}-logit" if by == "own" else f"{heads}-logit-difference",
        "logit of the answer from one source",
        frozenset({"logits"}),
        "higher",
        "logits",
        partial(_logit, heads, by),
    )
    patched = path_patch(
        model, items, ["logits"], heads_of(model), feed_forward=feed_forward, norms=norms, metric=brought
    )
    return by_site(model, patched, -patched.differences)


def _logit(source: Source, by: By, outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Logit of the source's answer, or that less the other's, where the two answers part."""
    assert outcome.logits is not None
    found = []
    for row, each in enumerate(outcome.batch.items):
        remembered, told, place = _answers(each)
        own, other = (remembered, told) if source == "memory" else (told, remembered)
        logits = outcome.logits[row, place]
        found.append(logits[own[place]] - (logits[other[place]] if by == "difference" else 0))
    return torch.stack(found)


def _answers(each: EncodedItem) -> tuple[Ids, Ids, int]:
    """The answer remembered, the answer told, and the place where they part."""
    trust = each.item.attributes.get("trust")
    if trust not in get_args(Source) or len(each.foils) != 1:
        raise InputError(
            f"item {each.id} does not say what is remembered and what is told; give it the attribute trust, which its "
            "answer comes from ('memory' or 'context'), and the answer from the other source as its one foil"
        )
    place = parting(each.answer, each.foils[0])
    if place is None:
        raise InputError(f"item {each.id}: what is remembered and what is told nowhere differ in a token; leave it out")
    return (each.answer, each.foils[0], place) if trust == "memory" else (each.foils[0], each.answer, place)


METHODS = (
    Method(
        id="memory-context",
        title="What a head brings to the answer remembered, less what it brings to the answer told",
        page="methods/memory-context.md",
        paper="Jin et al., Cutting Off the Head Ends the Conflict",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("z", "projection", "logits", "answer", "foils", "twin"),
        cost="1 forward per head and item",
        probe="conflict",
        over={"twin": "subject-and-told"},
        probes=("conflict",),
        score=memory_context,
    ),
)
