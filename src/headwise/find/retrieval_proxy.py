"""Retrieval heads in one pass: where the last row looks, or what the rows of a given answer point at.

Three scores that stand in for the retrieval score and need no decoding. With A the head's pattern, T the prompt's last
column, x the prompt, y the answer and k the columns of the needle:

    argmax   1 if argmax_i A[T, i] is in k, else 0
    mass     sum of A[T, i] over i in k
    copy     share of the answer tokens y_t that stand in the prompt for which x[i_t] == y_t,
             i_t = argmax_{i <= T} A[T + t, i], t = 0, 1, ...

`argmax` is the detector of "Does RoPE Prevent or Degrade Retrieval Heads?", 2026, and the default, as it is there;
`mass` is its variant for quantised models. `copy` is the detector of "AttentionInfluence", 2025.

In `copy` the answer is given (teacher forcing), and the row is that of the position before y_t, which predicts it. A
public re-implementation reads the row of y_t itself, and so finds heads that look at an earlier copy of their own
token. Only columns of the prompt are looked at. Answer tokens that are not in the prompt are no attempts; an item
without an attempt is NaN.

Exact: `argmax` and `mass`. Reconstruction: `copy`, after descriptions of it; no official code is known, and whether the
first paper's own teacher-forced score is the same is not known either. The items are those of the probe at hand: the
papers used a passphrase (`needle` is its like) and hash keys, `find("retrieval-proxy", model, "hash", proxy="copy")`;
`copy` needs no span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.retrieval import span_columns
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places, refuse_two_sided

Proxy = Literal["argmax", "mass", "copy"]
PROXIES: tuple[Proxy, ...] = get_args(Proxy)


def score(model: AttachedModel, items: ItemSet, *, proxy: Proxy = "argmax", span: str = "needle") -> Scored:
    """The proxy of every head on every item.

    Args:
        proxy: `argmax`, `mass` or `copy`, see the top of this file.
        span: the span that is the needle, for `argmax` and `mass`.

    Raises:
        InputError: a proxy that is none.
        Refusal: the model does not continue a prompt, or an item has no such span.
    """
    if proxy not in PROXIES:
        raise InputError(f"proxy={proxy!r} is no proxy of the retrieval score; use {', '.join(PROXIES)}")
    return over_batches(items, partial(_copy, model) if proxy == "copy" else partial(_last_row, model, proxy, span))


def needle_hits(
    rows: Float[Tensor, "item head query column"], needle: Bool[Tensor, "item column"]
) -> Float[Tensor, "item head query"]:
    """1 where the strongest column of a row is in the needle, else 0."""
    top = rows.argmax(dim=-1)
    return needle.to(rows.device).gather(1, top.flatten(1)).view(top.shape).double()


def needle_mass(
    rows: Float[Tensor, "item head query column"], needle: Bool[Tensor, "item column"]
) -> Float[Tensor, "item head query"]:
    """Sum of a row over the needle."""
    return rows.masked_fill(~needle.to(rows.device)[:, None, None], 0.0).sum(dim=-1).double()


def copy_score(
    top: Int[Tensor, "item head token"],
    answers: Int[Tensor, "item token"],
    prompt: Int[Tensor, "item column"],
    attended: Bool[Tensor, "item column"],
) -> Float[Tensor, "item head"]:
    """Share of the answer tokens in the prompt that the strongest column points at; NaN where none is there.

    Args:
        top: strongest column of the prompt in the row that predicts each answer token.
        answers: ids, -1 behind the end of an answer.
        prompt, attended: ids of the prompt, and which of them are no padding.
    """
    present = ((prompt[:, None] == answers[:, :, None]) & attended[:, None]).any(dim=2)
    pointed = prompt.gather(1, top.flatten(1)).view(top.shape)
    hits = (pointed == answers[:, None]) & present[:, None]
    return hits.sum(dim=2).double() / present.sum(dim=1)[:, None]


def _last_row(model: AttachedModel, proxy: Proxy, span: str, batch: Batch) -> dict[SiteId, Float[Tensor, "item head"]]:
    needle = span_columns(model, batch, span, batch.input_ids.shape[1])
    measure = partial(needle_mass if proxy == "mass" else needle_hits, needle=needle)
    found = _read(model, batch, [batch.prompt_length - 1], measure)
    return {site: values[:, :, 0] for site, values in found.items()}


def _copy(model: AttachedModel, batch: Batch) -> dict[SiteId, Float[Tensor, "item head"]]:
    end = batch.prompt_length
    prompt, attended = batch.input_ids[:, :end], batch.attention_mask[:, :end].bool()
    predicting = range(end - 1, end - 1 + batch.answers.shape[1])
    found = _read(model, batch, predicting, lambda rows: rows[..., :end].argmax(dim=-1))
    return {site: copy_score(top, batch.answers, prompt, attended) for site, top in found.items()}


def _read(
    model: AttachedModel, batch: Batch, columns: Sequence[int], measure: Callable[[Tensor], Tensor]
) -> dict[SiteId, Tensor]:
    """`measure` of the rows at `columns`, `[item, head, query]`, with the answers given behind the prompts.

    Raises:
        Refusal: the model does not continue a prompt in its own row, or sees what stands behind.
    """
    end = places(model, batch).prompt_length
    if end is None:
        raise Refusal(f"{model.name} does not read the prompt in the row that it continues; use a decoder-only model")
    refuse_two_sided(model, batch)
    sites = scored_sites(model)
    rows = read.rows([site.label for site in sites], queries=columns, reduce=lambda each: measure(each).cpu())
    with model.reading(rows, prompt_length=end) as got:
        observe(model, batch, wants={"logits"})
    return {site: torch.cat(got.rows[site.label], dim=2) for site in sites}


METHODS = (
    Method(
        id="retrieval-proxy",
        title="one-pass retrieval: the last row on the needle, or a given answer pointed at",
        page="methods/retrieval-proxy.md",
        paper="Does RoPE Prevent or Degrade Retrieval Heads?; copy: AttentionInfluence",
        year=2026,
        tier="B",
        status="exact",
        needs=("rows", "answer"),
        cost="one forward per item, one row per head (copy: one per answer token)",
        probe="needle",
        probes=("needle",),
        score=score,
    ),
)
