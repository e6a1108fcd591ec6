"""Heads for arithmetic: how far the result's logit falls when one head no longer sees anything to compute.

After Zhang et al. (2024), "Interpreting and Improving Large Language Models in Arithmetic Calculation". By path
patching from a head to the logits (the clean run with z_h of the corrupted twin, every other head held at its clean z,
feed-forward parts recomputed), with y the logit of the true result,

    s_h = (y_clean - y_patched) / |y_clean|

the relative change, positive where the head brings the result; the paper writes it with the other sign and calls the
few heads that stand out the key heads. The denominator is the mean over the items, so that the mean score is a ratio of
means. With `of="probability"` y is the probability of that token.

A result of several tokens is read at the first one in which it parts from the wrong result, its foil: tokenizers that
write a blank or a digit alone begin many results alike. Without a foil it is the first token.

A reconstruction: no code of the paper was to be had. Its corrupted prompts have the same form and nothing to compute:
`probe("arithmetic").over(twin="no-operation")`, "3 and 5 =" for "3 + 5 =", is taken unless another probe is given. The
probe's own twins have another second number, so that the scores are of heads that bring that number.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from headwise.circuits.patched import FLAT
from headwise.circuits.path_runs import Held
from headwise.circuits.paths import path_patch
from headwise.errors import Refusal
from headwise.find.method import Method, Scored
from headwise.find.parting import parting
from headwise.find.path_patching import by_site, heads_of
from headwise.find.patterns import require_choice
from headwise.metrics import Metric
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome

Of = Literal["logit", "probability"]


def arithmetic(
    model: AttachedModel,
    items: ItemSet,
    *,
    of: Of = "logit",
    feed_forward: Held = "recomputed",
    norms: Held = "recomputed",
) -> Scored:
    """`arithmetic`, a share of the result's logit, or probability.

    Args:
        feed_forward, norms: as of `path_patch`. With both `frozen` two forwards give all heads, of the logit.

    Raises:
        InputError: a setting that is none; and as `path_patch`.
        Refusal: the logits of the results are 0 on the mean; and as `path_patch`.
    """
    require_choice("of", of, get_args(Of))
    result = Metric(f"result-{of}", f"{of} of the result", frozenset({"logits"}), "higher", of, partial(_result, of))
    patched = path_patch(
        model, items, ["logits"], heads_of(model), feed_forward=feed_forward, norms=norms, metric=result
    )
    whole = patched.clean.mean().abs()
    if not whole > FLAT * patched.clean.abs().mean():
        raise Refusal(
            f"the {of} of the results of {items.probe} is 0 on the mean, so no share of it can be told; use "
            "of='probability'"
        )
    return by_site(model, patched, -patched.differences / whole)


def _result(of: Of, outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    assert outcome.logits is not None
    rows = range(len(outcome.batch.items))
    spots = [_place(each) for each in outcome.batch.items]
    tokens = [each.answer[place] for each, place in zip(outcome.batch.items, spots, strict=True)]
    logits = outcome.logits[list(rows), spots]
    values = logits if of == "logit" else logits.softmax(-1)
    return values[list(rows), tokens]


def _place(each: EncodedItem) -> int:
    """Of the token that is read."""
    return (parting(each.answer, each.foils[0]) or 0) if each.foils else 0


METHODS = (
    Method(
        id="arithmetic",
        title="How far the result's logit falls when a head sees nothing to compute",
        page="methods/arithmetic.md",
        paper="Zhang et al., Interpreting and Improving Large Language Models in Arithmetic Calculation",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("z", "projection", "logits", "answer", "twin"),
        cost="1 forward per head and item",
        probe="arithmetic",
        over={"twin": "no-operation"},
        probes=("arithmetic",),
        score=arithmetic,
    ),
)
