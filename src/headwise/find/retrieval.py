r"""Retrieval heads: at a decode step the head looks hardest at the very token of the needle that is written next.

Wu, Wang, Xiao, Peng and Fu, "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024.

The model answers greedily. At step t it emits token y_t, and a_t is the head's row at the last column, over the prompt
x and what was written so far. With k the columns of the needle:

    i_t   = argmax_i a_t[i]
    hit_t = i_t in k and x[i_t] == y_t

    steps   sum_t hit_t / |k|
    set     |{y_t : hit_t}| / |{x_i : i in k}|

The row that emits y_0 is that of the prompt's last token. A trial counts only if the ROUGE-1 recall of the answer is
above 0.5; on any other item every head is NaN. The score of a head is its mean over the trials that count.

Where paper and released code part: the paper writes |g_h & k| / |k| for the set g_h of tokens that the head copied
(`set`, as we read it), the code adds 1 / |k| for each step (`steps`), so that what is said twice is counted twice and a
score can exceed 1. `steps` is the default, because the published lists of heads were made with it.

Exact: the hit, both denominators, 50 new tokens, the one strongest column, the bar of 0.5.
Ours: the needle's tokens are known, not searched for; an answer ends with any token that holds a line end (the code
knows that of Llama) or with the model's own end token; the words of the recall are those of the metric
`rouge-1-recall`. Where the needle is a sentence of which the answer is a part (the probe `needle`), a perfect head
reaches |answer| / |k|, not 1; `span="value"` counts the part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.metrics import rouge_1_recall
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.read import Read
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, observe, places

Counting = Literal["steps", "set"]
COUNTINGS: tuple[Counting, ...] = get_args(Counting)


def score(
    model: AttachedModel,
    items: ItemSet,
    *,
    counting: Counting = "steps",
    recall: float = 0.5,
    new_tokens: int = 50,
    span: str = "needle",
) -> Scored:
    """The retrieval score of every head on every item, NaN where the trial does not count.

    Args:
        counting: `steps` or `set`, see the top of this file.
        recall: a trial counts if the ROUGE-1 recall of its answer is above this, from 0 to below 1.
        new_tokens: most tokens of an answer.
        span: the span that is the needle.

    Raises:
        InputError: a setting that is none.
        Refusal: the model does not continue a prompt, an item has no such span, or no trial counts.
    """
    if counting not in COUNTINGS:
        raise InputError(f"counting={counting!r} is no way to count; use {' or '.join(COUNTINGS)}")
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 <= recall < 1:
        raise InputError(f"recall={recall!r} is no bar for a share of words; give a number from 0 to below 1")
    scored = over_batches(
        items,
        partial(_of_batch, model, counting=counting, recall=recall, new_tokens=new_tokens, span=span),
        answers=False,
    )
    if bool(next(iter(scored.values())).isnan().all()):
        raise Refusal(
            f"{model.name} answers none of {len(items)} items of {items.probe} with a recall above {recall}, so "
            "nothing was retrieved; use a model that solves the probe, or easier settings"
        )
    return scored


def retrieval_score(
    top: Int[Tensor, "item head step"],
    emitted: Int[Tensor, "item step"],
    prompt: Int[Tensor, "item column"],
    needle: Bool[Tensor, "item column"],
    counting: Counting = "steps",
) -> Float[Tensor, "item head"]:
    """The score from a trace; every needle has at least one column.

    Args:
        top: the strongest column of each head's row at each step.
        emitted: ids written at each step, -1 behind the end of an answer.
        prompt: ids of the prompt.
        needle: which columns of it are the needle.
    """
    inside = top < prompt.shape[1]  # a head may look at what was written before, which is no part of the needle
    column = top.clamp(max=prompt.shape[1] - 1)
    copied = _at(prompt, column) == emitted[:, None]
    hits = inside & _at(needle, column) & copied
    if counting == "set":
        # Of all steps at which a head copies one token, only the first counts.
        same = (emitted[:, :, None] == emitted[:, None, :]).tril(-1)
        hits &= ~torch.einsum("ist,iht->ihs", same.double(), hits.double()).bool()
        sizes = torch.tensor([len(set(ids[chosen].tolist())) for ids, chosen in zip(prompt, needle, strict=True)])
    else:
        sizes = needle.sum(dim=1).cpu()
    return hits.sum(dim=2).double() / sizes[:, None].to(hits.device)


def strongest_keys(model: AttachedModel) -> Read:
    """The read behind the trace, `[item, head]` at each step: the prompt runs through the model's own kernel, and the
    only rows made are those that a token is written from."""
    labels = [site.label for site in scored_sites(model)]
    return read.rows(labels, queries="last", reduce=_strongest)


def span_columns(model: AttachedModel, batch: Batch, span: str, width: int) -> Bool[Tensor, "item column"]:
    """True at the columns of a span, in rows of `width` columns whose prompts are padded on the left.

    Raises:
        Refusal: the model does not continue a prompt in its own row, or an item has no such span.
    """
    at = places(model, batch)
    if at.prompt_length is None:
        raise Refusal(
            f"{model.name} does not read the prompt in the row that it continues, so its heads cannot copy from it; "
            "use a decoder-only model"
        )
    lacking = next((each.id for each in batch.items if not any(each.spans.get(span, ()))), None)
    if lacking is not None:
        raise Refusal(f"item {lacking} has no span {span!r} to retrieve from; name one that every item has with span=")
    marked = torch.zeros(len(batch.items), width, dtype=torch.bool)
    for row, columns in enumerate(at.spans[span]):
        marked[row, columns] = True
    return marked


def _of_batch(
    model: AttachedModel, batch: Batch, *, counting: Counting, recall: float, new_tokens: int, span: str
) -> dict[SiteId, Float[Tensor, "item head"]]:
    needle = span_columns(model, batch, span, batch.prompt_length)
    sites = scored_sites(model)
    with model.reading(strongest_keys(model)) as got:
        outcome = observe(model, batch, wants={"generation"}, new_tokens=new_tokens)
    outcome = _until_line_end(outcome, model.tokenizer)
    assert outcome.generated is not None
    steps = outcome.generated.shape[1]
    counts = rouge_1_recall(outcome) > recall
    found = {}
    for site in sites:
        top = torch.stack(got.rows[site.label][:steps], dim=2)
        scored = retrieval_score(top, outcome.generated, batch.input_ids, needle, counting)
        found[site] = scored.masked_fill(~counts[:, None], torch.nan)
    return found


def _strongest(rows: Float[Tensor, "item head 1 column"]) -> Int[Tensor, "item head"]:
    return rows[:, :, 0].argmax(dim=-1).cpu()


def _until_line_end(outcome: Outcome, tokenizer: Any) -> Outcome:
    """The outcome without what was written behind the first line end."""
    assert outcome.generated is not None
    written = [_line([id for id in row if id >= 0], tokenizer) for row in outcome.generated.tolist()]
    generated = torch.full((len(written), max(len(row) for row in written)), -1)
    for index, row in enumerate(written):
        generated[index, : len(row)] = torch.tensor(row)
    text = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in written)
    return replace(outcome, generated=generated, text=text)


def _line(ids: Sequence[int], tokenizer: Any) -> Sequence[int]:
    stop = next((index + 1 for index, id in enumerate(ids) if "\n" in tokenizer.decode([id])), len(ids))
    return ids[:stop]


def _at(values: Tensor, column: Int[Tensor, "item head step"]) -> Tensor:
    """`values[item, column]` for each head and step."""
    return values.gather(1, column.flatten(1)).view(column.shape)


METHODS = (
    Method(
        id="retrieval",
        title="retrieval score: looks hardest at the needle's token that is written next",
        page="methods/retrieval.md",
        paper="Wu, Wang, Xiao, Peng and Fu: Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2024,
        tier="B",
        status="exact",
        needs=("rows", "generation", "answer"),
        cost="one prefill and up to 50 decode steps per item, one row per head and step",
        probe="needle",
        probes=("needle",),
        score=score,
    ),
)
