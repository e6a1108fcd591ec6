"""Subject heads, relation heads and mixed heads: from which tokens of a question a head's part of the answer comes.

After Chughtai, Cooney and Nanda (2024), "Summing Up the Facts: Additive Mechanisms Behind Factual Recall in LLMs". A
head's direct part of the answer's logit, split by the token it was read from (`direct-logit-source`), is summed over
groups G of tokens: the subject, the relation, the end (the token that the answer is predicted from) and the rest.

    D_h(G) = mean over items of sum_{s in G} A_h[t, s] * < W_O^h v_s, sigma_t * gamma * W_U[a] >

    subject    |D_h(SUBJECT)|  >= ratio * |D_h(RELATION)|
    relation   |D_h(RELATION)| >= ratio * |D_h(SUBJECT)|
    mixed      neither
    none       |D_h(SUBJECT)| + |D_h(RELATION)| is less than `least` times that of the head with the most

a is the answer's first token; its logit is taken less the mean of all logits, and not less that of a wrong answer of
the same relation: what a relation head does is to raise all the answers of its relation alike, which would cancel.

Reconstruction: no code of the paper was at hand. It tells the kinds apart by the ratio of the two attributions with a
careful threshold, whose value we do not know. `ratio` 10 and `least` 0.1 are our choices, and so is the form of the
inequalities. How much hangs on them is what `FactParts.sensitivity` tells: the number of heads of each kind at other
ratios. The score is D of subject and relation together, item by item, for heads of the kind `part`, and 0 for others.

What a head adds directly is no proof that it matters. The paper has no causal test of single sources; `measure_without`
is one: the metric of every item with nothing read from one group of tokens.

    found = fact_parts_of(model, items)
    found.of("subject")                        # the heads
    found.sensitivity((2, 5, 10, 20))          # how many of each kind, by ratio
    measure_without(model, items, [HeadSet(), found.of("subject")], "subject")

Attention to the first token, whose value is seldom 0, is in the rest. The subject and the relation must be spans of
every item, and not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.direct_logit import direct_logit_by_source
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.search import BATCH
from headwise.heads import Head, HeadSet
from headwise.metrics import Metric, metric
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places, refuse_spans_in_the_decoder, refuse_two_sided

Part = Literal["subject", "relation", "mixed"]
Label = Literal["subject", "relation", "mixed", "none"]
GROUPS = ("subject", "relation", "end", "rest")

RATIO = 10.0
LEAST = 0.1


@dataclass(frozen=True, eq=False)
class FactParts:
    """What each head adds to the answer from each group of tokens.

    Attributes:
        heads: those of the main stack, in canonical order.
        item_ids: the items.
        sources: direct part of the answer's logit less the mean logit, by group (`GROUPS`), in logits.
    """

    heads: tuple[Head, ...]
    item_ids: tuple[str, ...]
    sources: Float[np.ndarray, "item head group"]

    def labels(self, ratio: float = RATIO, least: float = LEAST) -> tuple[Label, ...]:
        """The kind of each head. Raises `InputError` for a ratio below 1, or `least` that is no share."""
        if not ratio >= 1 or not 0 <= least <= 1:
            raise InputError(f"ratio={ratio!r} and least={least!r}: give a ratio of at least 1 and a share from 0 to 1")
        subject, relation = np.abs(self.sources.mean(axis=0)[:, :2]).T
        size = subject + relation
        floor = least * size.max()
        return tuple(
            "none"
            if whole == 0 or whole < floor
            else "subject"
            if of_subject >= ratio * of_relation
            else "relation"
            if of_relation >= ratio * of_subject
            else "mixed"
            for of_subject, of_relation, whole in zip(subject, relation, size, strict=True)
        )

    def of(self, part: Label, ratio: float = RATIO, least: float = LEAST) -> HeadSet:
        """The heads of one kind. Raises `InputError` for an unknown one, and as `labels`."""
        if part not in get_args(Label):
            raise InputError(f"part={part!r} is not known; choose from {', '.join(get_args(Label))}")
        labels = self.labels(ratio, least)
        return HeadSet(tuple(head for head, label in zip(self.heads, labels, strict=True) if label == part))

    def sensitivity(self, ratios: Sequence[float] = (1.5, 2, 5, 10, 20, 50), least: float = LEAST) -> pd.DataFrame:
        """How many heads are of each kind at each ratio: columns ratio, subject, relation, mixed, none."""
        rows = []
        for ratio in ratios:
            labels = self.labels(ratio, least)
            rows.append({"ratio": float(ratio), **{kind: labels.count(kind) for kind in get_args(Label)}})
        return pd.DataFrame(rows)

    def to_pandas(self, ratio: float = RATIO, least: float = LEAST) -> pd.DataFrame:
        """One row per head: label, the mean of every group in logits, and its kind (column `part`)."""
        means = self.sources.mean(axis=0)
        return pd.DataFrame(
            {"label": [head.label for head in self.heads]}
            | {group: means[:, column] for column, group in enumerate(GROUPS)}
            | {"part": list(self.labels(ratio, least))}
        )


def fact_parts(
    model: AttachedModel,
    items: ItemSet,
    *,
    part: Part = "subject",
    ratio: float = RATIO,
    least: float = LEAST,
    subject: str = "subject",
    relation: str = "relation",
) -> Scored:
    """`fact-parts`, in logits: what heads of the kind `part` read from subject and relation; 0 for the other heads.

    Args:
        subject, relation: names of the spans.

    Raises:
        InputError, Refusal: an unknown `part`, and as `FactParts.labels` and `fact_parts_of`.
    """
    if part not in get_args(Part):
        raise InputError(f"part={part!r} is not known; choose from {', '.join(get_args(Part))}")
    found = fact_parts_of(model, items, subject=subject, relation=relation)
    chosen = torch.tensor([label == part for label in found.labels(ratio, least)])
    read_there = torch.from_numpy(found.sources[:, :, :2]).sum(-1).masked_fill(~chosen, 0)
    columns = range(len(found.heads))
    return {
        id: read_there[:, [column for column in columns if found.heads[column].site == id]]
        for id in scored_sites(model)
    }


def fact_parts_of(
    model: AttachedModel, items: ItemSet, *, subject: str = "subject", relation: str = "relation"
) -> FactParts:
    """What every head of the main stack adds to the answer from subject, relation, end and rest.

    Raises:
        InputError: an item without one of the spans, without an answer, or with spans that overlap.
        Refusal: as `direct_logit_by_source`.
    """
    against_all = replace(items, items=tuple(replace(each, answer=each.answer[:1], foils=()) for each in items))
    groups = [_groups(each, subject, relation, items.probe) for each in against_all]
    by_source = direct_logit_by_source(model, against_all).double()
    sources = torch.stack(
        [part[:, : inside.shape[1]] @ inside.double().T for part, inside in zip(by_source, groups, strict=True)]
    )
    heads = model.heads([id.label for id in scored_sites(model)]).heads
    return FactParts(heads, items.ids, sources.numpy())


def measure_without(
    model: AttachedModel,
    items: ItemSet,
    sets: Sequence[HeadSet],
    span: str,
    measured: str | Metric | None = None,
) -> Float[Tensor, "set item"]:
    """The metric of every item with nothing read from `span` by the heads of each set; an empty set is no knock-out.

    Their patterns are 0 there, and not given to other tokens instead: what is taken out is the sum of A v over the
    span. That is done where answers are predicted, at the end of the prompt and at the answer's own tokens; the heads
    do at other positions what they did. On the CPU.

    Args:
        measured: the metric; None is that of the items' probe. A foil of the same relation hides what a relation head
            does; `answer-log-probability` does not.

    Raises:
        InputError: no items or sets, heads that the model does not have, or an item without the span.
        Refusal: a site whose pattern cannot be edited, or a metric that the model cannot give.
    """
    if isinstance(sets, str) or not all(isinstance(each, HeadSet) for each in sets):
        raise InputError("measure_without takes a list of head sets; write [HeadSet.parse('L0H1'), ...]")
    if not len(items) or not sets:
        raise InputError(f"measure_without needs items and sets of heads; got {len(items)} items and {len(sets)} sets")
    for each in items:
        _require_span(each, span, items.probe)
    chosen = measured if isinstance(measured, Metric) else metric(items.metric if measured is None else measured)
    if "generation" in chosen.needs or len(chosen.wants) > 1:
        raise Refusal(f"{chosen.id} needs more than one run over given answers; use a metric of the logits")
    checked = [model.heads(each) if each else HeadSet() for each in sets]
    found = torch.full((len(sets), len(items)), torch.nan, dtype=torch.float64)
    first = 0
    for batch in items.batches(BATCH):
        rows = slice(first, first + len(batch.items))
        refuse_two_sided(model, batch)
        at = places(model, batch)
        clean = observe(model, batch, wants=chosen.wants)
        for place, heads in enumerate(checked):
            outcome = clean
            if heads:
                without = edit.scale(heads, 0.0, "pattern", scope="last", keys=f"span:{span}")
                refuse_spans_in_the_decoder(model, [without])
                with model.editing(without, spans=at.spans, prompt_length=at.prompt_length):
                    outcome = observe(model, batch, wants=chosen.wants)
            found[place, rows] = chosen(outcome, clean).detach().cpu().double()
        first = rows.stop
    return found


def _groups(each: EncodedItem, subject: str, relation: str, probe: str) -> Bool[Tensor, "group source"]:
    """Which tokens of an item are of each group."""
    of_subject, of_relation = _require_span(each, subject, probe), _require_span(each, relation, probe)
    if not each.answer:
        raise InputError(f"item {each.id} of {probe} has no answer, whose logit is taken apart; give it one")
    if both := of_subject & of_relation:
        raise InputError(
            f"item {each.id} of {probe}: token {min(both)} is in span {subject!r} and in span {relation!r}; "
            "mark them apart"
        )
    end = {len(each.prompt) - 1} - of_subject - of_relation
    rest = set(range(len(each.prompt))) - of_subject - of_relation - end
    inside = torch.zeros(len(GROUPS), len(each.prompt), dtype=torch.bool)
    for row, group in enumerate((of_subject, of_relation, end, rest)):
        inside[row, sorted(group)] = True
    return inside


def _require_span(each: EncodedItem, name: str, probe: str) -> set[int]:
    if name not in each.spans:
        raise InputError(
            f"item {each.id} of {probe} has no span {name!r}; it has {', '.join(each.spans) or 'none'}; "
            "name one of them"
        )
    return {token for place in each.spans[name] for token in place}


METHODS = (
    Method(
        id="fact-parts",
        title="Heads that read the answer from the subject, from the relation, or from both",
        page="methods/fact-parts.md",
        paper="Chughtai, Cooney and Nanda, Summing Up the Facts: Additive Mechanisms Behind Factual Recall in LLMs",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("rows", "projection", "logits", "answer", "span:{subject}", "span:{relation}"),
        cost="1 forward per item, with the rows of the last position",
        probe="facts",
        score=fact_parts,
    ),
)
