r"""Multimodal retrieval heads: the rows of the question look at the evidence, be it text or a picture.

"Can Retrieval Heads See Images?", 2026. With q the tokens of the question, G the spans of evidence in the context x (a
sentence, a picture, a box in one), A the head's pattern, and x0 the same context with a question that asks nothing:

    S(x)     = 1/|q| sum_{t in q} sum_{g in G} sum_{j in g} A[t, j]
    S_cal    = S(x) - S(x0)                         what the head would do for any question is taken away
    s        = max(mean over items of S_cal, 0)
    rho_0.5  = least share of heads that hold half of sum s       (`sparsity`)

S is a sum, so evidence of many tokens, such as a large picture, has a large score: right for comparing heads on one
kind of evidence. `counting="mean"` divides by the number of evidence tokens, for comparing kinds.

A head of a sliding window that reaches no token of the evidence from the question is NaN on that item, not 0: it could
not look. Reach is told from the masks of the question's first and last row.

Per-item scores are S_cal (or S) as they are, below 0 too; `positive` gives s, and a head's place in the ranking is the
same. Exact: S, S_cal, s, rho. Reconstruction, as there is no code: the text of the null question, which stands in the
question's place alone, so that what follows it ("Answer:") stays. It is that of QRHead ("N/A").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.patterns import mean_over, require_choice
from headwise.find.search import over_batches
from headwise.heads import HeadSet, SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch, pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.layout import Ids
from headwise.probes.outcome import observe, places
from headwise.scores import HeadScores

Counting = Literal["sum", "mean"]
COUNTINGS: tuple[Counting, ...] = get_args(Counting)

NULL = "N/A"
EVIDENCE = ("needle", "region:target")
"""Spans that are the evidence unless one is named: the first of these that an item has."""


def multimodal_retrieval(
    model: AttachedModel,
    items: ItemSet,
    *,
    question: str = "question",
    evidence: str | None = None,
    counting: Counting = "sum",
    calibrated: bool = True,
    null: str = NULL,
) -> Scored:
    """S_cal of every head on every item; NaN for a head that cannot reach the evidence.

    Args:
        question: the span whose rows are looked at.
        evidence: the span that is looked for, such as `needle`, `image:1` or `region:target`; None takes `needle` where
            an item has it and else `region:target`.
        counting: `sum` over the tokens of the evidence (the paper's), or their `mean`.
        calibrated: whether what a null question gives is taken away, which takes a second forward.
        null: text of the null question.

    Raises:
        InputError: a setting that is none; a null question without tokens, or with some that the tokenizer has not.
        Refusal: an item has no such span, its question stands before its evidence, or the model does not continue a
            prompt.
    """
    require_choice("counting", counting, COUNTINGS)
    ids = null_ids(model, null) if calibrated else ()

    def scored(batch: Batch) -> Scored:
        wanted = [_evidence(each, evidence) for each in batch.items]
        found = question_masses(model, batch, {"evidence": wanted}, question=question, counting=counting)
        if calibrated:
            asked_nothing = [without_question(each, question, ids) for each in batch.items]
            again = pad(asked_nothing, items.pad, items.suffix, answers=False, reader=batch.reader)
            nothing = question_masses(model, again, {"evidence": wanted}, question=question, counting=counting)
            found = {site: masses - nothing[site] for site, masses in found.items()}
        return {site: masses[..., 0] for site, masses in found.items()}

    result = over_batches(items, scored, answers=False)
    if all(bool(each.isnan().all()) for each in result.values()):
        raise Refusal(
            f"no head of {model.name} sees the evidence from the question in {items.probe}: the question must stand "
            "behind it"
        )
    return result


def positive(scores: HeadScores) -> dict[str, Float[Any, "site head"]]:
    """s: the mean score of each head by stack, and 0 where it is below."""
    return {stack: means.clip(min=0) for stack, means in scores.mean().items()}


def sparsity(scores: HeadScores, share: float = 0.5) -> float:
    """rho: the least share of the heads that together hold `share` of all positive score.

    Raises:
        InputError: a share that is none, or no head with a positive score.
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share!r} is no share; give a number above 0, up to 1")
    ranked = torch.tensor([max(each.score, 0.0) for each in scores.ranked()], dtype=torch.float64)
    if not bool((ranked > 0).any()):
        raise InputError("no head has a positive score, so no share of it can be held")
    held = ranked.cumsum(0) / ranked.sum()
    return (int((held < share - 1e-12).sum()) + 1) / len(ranked)


def question_masses(
    model: AttachedModel,
    batch: Batch,
    spans: Mapping[str, Sequence[str | None]],
    *,
    question: str,
    counting: Counting,
    heads: HeadSet | None = None,
) -> dict[SiteId, Float[Tensor, "item head span"]]:
    """Attention of the question's rows to spans, mean over the rows; NaN where a head reaches no token of a span.

    Args:
        batch: prompts alone.
        spans: by a name of one's own, for each item the name of its span; None where an item has none (NaN).
        heads: of these alone, in canonical order; every head of the scored sites unless given.

    Raises:
        Refusal: the model does not continue a prompt, or an item has no question or no such span.
    """
    if places(model, batch).prompt_length is None:
        raise Refusal(f"{model.name} does not read the prompt in the row that it continues; use a decoder-only model")
    asked = [_columns(batch, each, question) for each in batch.items]
    looked_at = {
        name: [[] if own is None else _columns(batch, each, own) for each, own in zip(batch.items, owns, strict=True)]
        for name, owns in spans.items()
    }
    chosen = tuple(scored_sites(model)) if heads is None else heads
    low, high = min(map(min, asked)), max(map(max, asked)) + 1
    marked = {name: _marked(batch, rows) for name, rows in looked_at.items()}
    reads = [read.statistics(chosen, queries=slice(low, high), wanted=[], spans=tuple(spans))]
    # Every row sees a stretch of keys that only moves on, so the first and the last one show all that is seen.
    ends = {"question_first": [[min(row)] for row in asked], "question_last": [[max(row)] for row in asked]}
    reads += [
        read.scores(chosen, queries=f"span:{end}", reduce=partial(_reached, list(marked.values())), name=end)
        for end in ends
    ]
    prompts = replace(batch, answers=batch.answers[:, :0])  # the last column's logits are all that the model must give
    with torch.no_grad(), model.reading(*reads, spans={**looked_at, **ends}) as got:
        observe(model, prompts, wants={"logits"})
    counted = _marked(batch, asked)[:, low:high]
    found = {}
    for site in scored_sites(model) if heads is None else heads.sites:
        reached = got.captures["question_first"][site][0] | got.captures["question_last"][site][0]
        masses = torch.stack([mean_over(got.statistics[site].span_mass[name].cpu(), counted) for name in spans], dim=-1)
        if counting == "mean":
            masses = masses / torch.stack([each.sum(1) for each in marked.values()], dim=-1)[:, None]
        found[site] = masses.masked_fill(~reached, torch.nan)
    return found


def null_ids(model: AttachedModel, null: str) -> Ids:
    """The null question as the model's tokenizer writes it.

    Raises:
        InputError: no tokenizer, or a text that it cannot write.
    """
    tokenizer = model.tokenizer if model.tokenizer is not None else getattr(model.processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer to write the null question; use calibrated=False")
    ids = tuple(tokenizer(null, add_special_tokens=False)["input_ids"])
    if not ids or getattr(tokenizer, "unk_token_id", None) in ids:
        raise InputError(f"null={null!r} cannot be written by the tokenizer of {model.name}; give words that it knows")
    return ids


def without_question(item: EncodedItem, question: str, null: Ids) -> EncodedItem:
    """The item with `null` in the place of its question; spans behind it move, and those in it are gone.

    Raises:
        Refusal: it has no question, or one that does not stand in one piece.
    """
    asked = _positions(item, question)
    start, stop = min(asked), max(asked) + 1
    if len(asked) != stop - start:
        raise Refusal(f"the span {question!r} of item {item.id} stands in several places; a null question needs one")
    shift = len(null) - len(asked)

    def moved(place: Ids) -> Ids:
        return tuple(at if at < start else at + shift for at in place if not start <= at < stop)

    spans = {name: tuple(kept for place in each if (kept := moved(place))) for name, each in item.spans.items()}
    spans[question] = (tuple(range(start, start + len(null))),)
    return replace(item, prompt=item.prompt[:start] + null + item.prompt[stop:], spans=spans, twin=None)


def _evidence(item: EncodedItem, evidence: str | None) -> str:
    names = EVIDENCE if evidence is None else (evidence,)
    found = next((name for name in names if any(item.spans.get(name, ()))), None)
    if found is None:
        known = ", ".join(item.spans) or "none"
        raise Refusal(
            f"item {item.id} has no span {' or '.join(names)} as evidence; name one with evidence= (it has {known})"
        )
    return found


def _positions(item: EncodedItem, span: str) -> list[int]:
    found = sorted(at for place in item.spans.get(span, ()) for at in place)
    if not found:
        raise Refusal(f"item {item.id} has no span {span!r}; it has {', '.join(item.spans) or 'none'}")
    return found


def _columns(batch: Batch, item: EncodedItem, span: str) -> list[int]:
    start = batch.prompt_length - len(item.prompt)
    return [start + at for at in _positions(item, span)]


def _marked(batch: Batch, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[item, column]`, True at the columns of each row."""
    marked = torch.zeros(len(rows), batch.prompt_length, dtype=torch.bool)
    for row, columns in enumerate(rows):
        marked[row, list(columns)] = True
    return marked


def _reached(spans: Sequence[Tensor], scores: Float[Tensor, "item head 1 key"]) -> Tensor:
    """Whether a row may look at a token of each span, `[item, head, span]`."""
    seen = scores[:, :, 0].isfinite().cpu()
    return torch.stack([(seen & each[:, None, : seen.shape[-1]]).any(-1) for each in spans], dim=-1)


METHODS = (
    Method(
        id="multimodal-retrieval",
        title="rows of the question on the evidence, a sentence or a picture, less those of a null question",
        page="methods/multimodal-retrieval.md",
        paper="Can Retrieval Heads See Images?",
        year=2026,
        tier="B",
        status="reconstruction",
        needs=("rows", "span:{question}"),
        cost="two forwards per item, statistics of the question's rows",
        probe="picture-needle",
        probes=("picture-needle", "text-needle", "needle"),
        score=multimodal_retrieval,
    ),
)
