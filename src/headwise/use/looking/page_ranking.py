"""Which page holds the answer, as retrieval heads see it: pages ranked by where the question looks.

"Can Retrieval Heads See Images?", 2026. A page d is a span of the prompt: a picture, a box in one, a passage. With the
selected heads H and the question's tokens q:

    R(d)      = mean over h in H of 1/|q| sum_{t in q} sum_{j in d} A_h[t, j]
    recall@k  = share of the right pages among the k with the largest R

    heads = hw.find("multimodal-retrieval", model, "picture-needle").top(5)
    rank_pages(model, items, heads).recall(gold, k=1)

Exact: R, and heads from the top 5 percent of the scores (`HeadScores.top`). The paper's text does not say whether R
takes a null question away as the score of heads does (QRHead does): `calibrated`, off unless asked for. R is a sum over
tokens, so that large pages gain; `counting="mean"` is R by token. A head whose window does not reach a page has no part
in the mean of that page, and a page that none reaches is not ranked: it counts as not found.

The heads must come from other items than those that are ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.multimodal_retrieval import (
    COUNTINGS,
    NULL,
    Counting,
    null_ids,
    question_masses,
    without_question,
)
from headwise.find.patterns import require_choice
from headwise.find.search import BATCH
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch, pad
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.use.intervention import named_heads


@dataclass(frozen=True, eq=False)
class PageRanking:
    """R of every page of every item.

    Attributes:
        item_ids: the items.
        pages: names of the pages of any of them.
        scores: R, `[item, page]`; NaN for a page that an item does not have, or that no head reaches.
    """

    item_ids: tuple[str, ...]
    pages: tuple[str, ...]
    scores: Float[Tensor, "item page"]

    def order(self, item: int) -> tuple[str, ...]:
        """The pages of an item that have a score, the best first; ties in the order of the pages."""
        row = self.scores[item]
        ranked = row.nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices
        return tuple(self.pages[int(at)] for at in ranked if not bool(row[at].isnan()))

    def recall(self, gold: Sequence[str | Sequence[str]], k: int = 1) -> Float[Tensor, " item"]:
        """Recall@k of every item: the share of its right pages that are among its first k.

        Args:
            gold: for each item the name of its right page, or of several.

        Raises:
            InputError: another number of items, no right page, a page that is none, or k below 1.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r} must be a whole number of pages, at least 1")
        if isinstance(gold, str) or len(gold) != len(self.item_ids):
            raise InputError(f"gold names the right page of each of {len(self.item_ids)} items, one entry each")
        shares = []
        for item, right in enumerate(gold):
            names = {right} if isinstance(right, str) else set(right)
            if not names or (odd := sorted(names - set(self.pages))):
                what = repr(odd[0]) if names else "nothing"
                raise InputError(f"gold of item {self.item_ids[item]} is {what}; its pages are {', '.join(self.pages)}")
            shares.append(len(names & set(self.order(item)[:k])) / len(names))
        return torch.tensor(shares, dtype=torch.float64)


def rank_pages(
    model: AttachedModel,
    items: ItemSet,
    heads: Any,
    *,
    pages: Sequence[str] | None = None,
    question: str = "question",
    counting: Counting = "sum",
    calibrated: bool = False,
    null: str = NULL,
) -> PageRanking:
    """R(d) of the pages of every item, by the heads given.

    Args:
        heads: heads of the text model, in any form.
        pages: names of spans; None is every picture, `image:0`, `image:1` ... An item may lack some of them.
        question, counting, calibrated, null: as of the method `multimodal-retrieval`.

    Raises:
        InputError: heads that the model does not have, a setting that is none, or an item without pages.
        Refusal: as `find("multimodal-retrieval", ...)`.
    """
    require_choice("counting", counting, COUNTINGS)
    if isinstance(pages, str):
        raise InputError(f"pages={pages!r} is one name; give the pages in a list, two or more")
    chosen: HeadSet = model.heads(named_heads(heads, "rank_pages"))
    names = tuple(dict.fromkeys(pages)) if pages is not None else _pictures(items)
    bare = next((each.id for each in items if not any(_has(each, name) for name in names)), None)
    if bare is not None or not names:
        raise InputError(
            f"item {bare or items.ids[0]} has none of the pages {', '.join(names) or '(pictures)'}; name spans of it"
        )
    ids = null_ids(model, null) if calibrated else ()

    def of_batch(batch: Batch) -> Tensor:
        found = _mean_of_heads(model, batch, chosen, names, question, counting)
        if calibrated:
            asked_nothing = [without_question(each, question, ids) for each in batch.items]
            again = pad(asked_nothing, items.pad, items.suffix, answers=False, reader=batch.reader)
            found = found - _mean_of_heads(model, again, chosen, names, question, counting)
        return found

    scores = torch.cat([of_batch(batch) for batch in items.batches(BATCH, answers=False)])
    if bool(scores.isnan().all()):
        raise Refusal(f"none of {chosen} reaches a page from the question; use heads without a window, or nearer pages")
    return PageRanking(items.ids, names, scores)


def _mean_of_heads(
    model: AttachedModel, batch: Batch, heads: HeadSet, names: Sequence[str], question: str, counting: Counting
) -> Float[Tensor, "item page"]:
    spans = {
        f"page {number}": [name if _has(each, name) else None for each in batch.items]
        for number, name in enumerate(names)
    }
    found = question_masses(model, batch, spans, question=question, counting=counting, heads=heads)
    return torch.cat([*found.values()], dim=1).nanmean(dim=1)


def _has(item: EncodedItem, span: str) -> bool:
    return any(item.spans.get(span, ()))


def _pictures(items: ItemSet) -> tuple[str, ...]:
    most = max((len(each.spans.get("image", ())) for each in items), default=0)
    return tuple(f"image:{number}" for number in range(most))


__all__ = ["PageRanking", "rank_pages"]
