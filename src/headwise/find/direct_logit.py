"""Direct logit attribution: what each head itself adds to the logit of the answer, less that of the wrong answers.

Two methods.

`direct-logit`, after Yu, Merullo and Pavlick (2023), "Characterizing Mechanisms for Factual Recall in Language Models".
For answer a and foil f, read at the position t that predicts the first token in which they part:

    s_h = < W_O^h z_h[t],  sigma_t * gamma * (W_U[a] - W_U[f]) >

with sigma_t the scale of the final norm, held at its value of the run; where the norm centres, the write is centred.
What stands between a write and the stream (a residual multiplier, a norm after the sublayer) is part of it, its scale
held likewise. Several foils: the mean. No foil: the answer's own logit less the mean of all logits, at the first token.
The logits are those of the unembedding, times what the model multiplies them with; where it soft-caps them (Gemma 2),
they are those before the cap. s_h > 0: the head writes the answer; s_h < 0: it writes the foils. The paper takes a fact
told in the text against the one remembered, `probe("conflict").over(trust="context")` here, and the mean over items; it
has no further settings.

`direct-logit-source`, after Chughtai, Cooney and Nanda (2024), "Summing Up the Facts: Additive Mechanisms Behind
Factual Recall in LLMs": the same, split by the token that the head read it from. For a group G of tokens

    D_h(y, G) = sum_{s in G} A_h[t, s] * < W_O^h v_s, sigma_t * gamma * W_U[y] >

here with answer less foils for y. The setting `span` names G; the paper's groups are the subject, the relation, the end
and the rest. Over all tokens it sums to `direct-logit`.

Both are reconstructions: no code of either paper was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.search import BATCH, over_batches
from headwise.heads import HeadSet
from headwise.metrics import logit_difference
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.direct import Directions, DirectPaths, direct_paths
from headwise.model.running.projection import head_weights
from headwise.model.site import Site
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import Outcome, observe, places, refuse_two_sided


def direct_logit(model: AttachedModel, items: ItemSet) -> Scored:
    """`direct-logit`, in logits."""
    paths = direct_paths(model)
    sites = scored_sites(model)

    def score(batch: Batch) -> Scored:
        tokens = _tokens(batch)
        wanted = read.z([id.label for id in sites], reduce=_last(tokens))
        got, outcome, directions = _run(model, paths, batch, wanted)
        kept = outcome.predicting[:, :, None]
        scored = {}
        for id in sites:
            (z,) = got.z[id.label]
            parts = (z.to(directions[id.label]) * _towards(model, model.table.site(id), directions)).sum(-1)
            scored[id] = parts.masked_fill(~kept, 0).sum(1)
        return scored

    return over_batches(items, score)


def direct_logit_source(model: AttachedModel, items: ItemSet, *, span: str = "subject") -> Scored:
    """`direct-logit-source`: the part of `direct-logit` that was read from the tokens of `span`, in logits.

    Raises `Refusal` as `direct_logit_by_source`.
    """
    sites = scored_sites(model)
    parts = direct_logit_by_source(model, items)
    inside = torch.zeros(len(items), parts.shape[-1], dtype=torch.bool)
    for row, each in enumerate(items):
        inside[row, sorted({token for place in each.spans[span] for token in place})] = True
    sums = parts.masked_fill(~inside[:, None], 0).sum(-1)
    owners = [head.site for head in _all(model)]
    return {id: sums[:, [column for column, owner in enumerate(owners) if owner == id]] for id in sites}


def direct_logit_by_source(
    model: AttachedModel, items: ItemSet, heads: Any = None, *, batch_size: int = BATCH
) -> Float[Tensor, "item head source"]:
    """Direct logit attribution of each chosen head split by the token it was read from, in logits, on the CPU.

    `heads` in any form; the head axis is in the order of `model.heads(heads)`; None is the whole main stack. Source `s`
    is token `s` of the item's prompt, behind it of its answer; behind the end of an item stand zeros.

    Raises:
        InputError: no such heads, or heads outside the main stack.
        Refusal: a head's output is not its row times values (a gate comes after), or prompt and answer do not share a
            row (encoder-decoders); and as `direct_paths`.
    """
    sites = scored_sites(model)
    chosen = _all(model) if heads is None else model.heads(heads)
    outside = next((id for id in chosen.sites if id not in sites), None)
    if outside is not None:
        raise InputError(f"{outside.label} is not in the main stack, whose heads write to the logits; leave it out")
    for id in chosen.sites:
        if model.table.site(id).gated:
            raise Refusal(f"{id.label} of {model.name} gates what it read, so its write is no sum over tokens read")
    paths = direct_paths(model)
    width = max(len(each.prompt) + max(len(each.answer) - 1, 0) for each in items)
    found = torch.zeros(len(items), len(chosen), width)
    first = 0
    for batch in items.batches(batch_size):
        found[first : first + len(batch.items)] = _sources(model, paths, batch, chosen, width)
        first += len(batch.items)
    return found


def contrast(batch: Batch) -> Callable[[Float[Tensor, "item token vocab"]], Float[Tensor, " item"]]:
    """The number of each item that is taken apart, a linear function of the logits: see the top of this file."""
    rows = [row for row, each in enumerate(batch.items) if each.foils]
    others = [row for row, each in enumerate(batch.items) if not each.foils]
    answers = [batch.items[row].answer[0] for row in others]

    def score(logits: Float[Tensor, "item token vocab"]) -> Float[Tensor, " item"]:
        if not others:
            return logit_difference(Outcome(batch, logits=logits))
        found = logits.new_zeros(len(batch.items))
        if rows:
            part = replace(batch, items=tuple(batch.items[row] for row in rows), answers=batch.answers[rows])
            found[rows] = logit_difference(Outcome(part, logits=logits[rows]))
        found[others] = logits[others, 0, answers] - logits[others, 0].mean(-1)
        return found

    return score


def _run(model: AttachedModel, paths: DirectPaths, batch: Batch, *reads: read.Read) -> tuple[Any, Outcome, Directions]:
    refuse_two_sided(model, batch)
    with torch.no_grad(), paths.recording(_tokens(batch)) as run, model.reading(*reads) as got:
        outcome = observe(model, batch, wants={"logits"})
    assert outcome.logits is not None
    return got, outcome, run.directions(contrast(batch), outcome.logits)


def _sources(
    model: AttachedModel, paths: DirectPaths, batch: Batch, chosen: HeadSet, width: int
) -> Float[Tensor, "item head source"]:
    if places(model, batch).prompt_length is None:
        raise Refusal(f"{model.name} does not read prompt and answer as one text, so its sources are not the prompt's")
    columns = batch.input_ids.shape[1]
    ends = list(range(columns - _tokens(batch), columns))
    groups = chosen.to_groups(model.table.group_sizes)
    got, outcome, directions = _run(model, paths, batch, read.rows(chosen, queries=ends), read.v(groups))
    kept = outcome.predicting[:, None, :, None]
    found = torch.zeros(len(batch.items), len(chosen), width)
    place = 0
    for id in chosen.sites:
        site, heads = model.table.site(id), chosen.at(id)
        towards = _towards(model, site, directions)[:, :, list(heads)]
        order = {group: column for column, group in enumerate(groups.at(id))}
        v = got.v[id.label][:, :, [order[head // site.group_size] for head in heads]].to(towards)
        parts = got.rows[id.label].to(towards) * torch.einsum("ithd,ishd->ihts", towards, v)
        summed = parts.masked_fill(~kept, 0).sum(2).cpu()
        for row, each in enumerate(batch.items):
            start = batch.prompt_length - len(each.prompt)
            length = len(each.prompt) + max(len(each.answer) - 1, 0)
            found[row, place : place + len(heads), :length] = summed[row, :, start : start + length]
        place += len(heads)
    return found


def _towards(model: AttachedModel, site: Site, directions: Directions) -> Float[Tensor, "item token head head_dim"]:
    """The direction of the logits as each head's z sees it."""
    assert site.projection is not None
    direction = directions[site.label]
    weights = head_weights(model.model.get_submodule(site.projection), site).detach()
    return torch.einsum("itd,hkd->ithk", direction, weights.to(direction))


def _all(model: AttachedModel) -> HeadSet:
    return model.heads([id.label for id in scored_sites(model)])


def _tokens(batch: Batch) -> int:
    """Columns from which an answer token is predicted."""
    return max(batch.answers.shape[1], 1)


def _last(tokens: int) -> Callable[[Tensor], Tensor]:
    return lambda z: z[:, -tokens:].clone()


METHODS = (
    Method(
        id="direct-logit",
        title="What each head itself writes into the answer's logit, less the foils'",
        page="methods/direct-logit.md",
        paper="Yu, Merullo and Pavlick, Characterizing Mechanisms for Factual Recall in Language Models",
        year=2023,
        tier="B",
        status="reconstruction",
        needs=("z", "projection", "logits", "answer"),
        cost="1 forward per item",
        probe="ioi",
        score=direct_logit,
    ),
    Method(
        id="direct-logit-source",
        title="The part of direct-logit that was read from one span",
        page="methods/direct-logit-source.md",
        paper="Chughtai, Cooney and Nanda, Summing Up the Facts: Additive Mechanisms Behind Factual Recall in LLMs",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("rows", "projection", "logits", "answer", "span:{span}"),
        cost="1 forward per item, with the rows of the last positions",
        probe="facts",
        score=direct_logit_source,
    ),
)
