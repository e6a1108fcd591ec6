"""How items are run in batches for a method."""

from __future__ import annotations

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.find.search import over_batches
from headwise.heads import SiteId
from headwise.probes import encode, probe
from headwise.probes.batch import Batch
from headwise.zoo.planted import planted


def test_batches_hold_items_of_like_length_and_scores_come_in_the_items_order() -> None:
    model = planted("llama", layers=4, heads=4, circuits=("induction",), seed=0)
    items = encode(probe("repeat").over(words=(4, 10)), model.tokenizer, n=20)
    lengths = [len(each.prompt) for each in items]
    seen: list[list[int]] = []

    def score(batch: Batch) -> dict[SiteId, torch.Tensor]:
        seen.append([len(each.prompt) for each in batch.items])
        return {SiteId(layer=0): torch.tensor(seen[-1])[:, None]}

    (found,) = over_batches(items, score, size=6).values()
    assert found[:, 0].tolist() == lengths != sorted(lengths)
    assert [length for batch in seen for length in batch] == sorted(lengths)


def test_a_score_without_a_row_per_item_is_an_error() -> None:
    model = planted("llama", layers=4, heads=4, circuits=("induction",), seed=0)
    items = encode(probe("repeat"), model.tokenizer, n=3)
    with pytest.raises(HeadwiseError, match="no row per item of repeat"):
        over_batches(items, lambda batch: {SiteId(layer=0): torch.zeros(len(batch.items) + 1, 1)})
