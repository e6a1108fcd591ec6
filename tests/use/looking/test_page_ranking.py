"""Pages ranked by scripted heads, against plain sums over a pattern, and recall by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.use.looking.page_ranking import PageRanking, rank_pages

PAGES = {"image:0": (2, 3, 4, 5), "image:1": (6, 7), "image:2": (8, 9)}
QUESTION = (11, 12)


@pytest.fixture
def tiny() -> Iterator[AttachedModel]:
    with hw.load("zoo:tiny-llama") as attached:
        yield attached


def album(*pictures: int) -> ItemSet:
    """Items with that many pictures, of four tokens and two; each item is one token longer than the one before."""
    rows = []
    for number, count in enumerate(pictures):
        shown = {name: tuple(at + number for at in place) for name, place in list(PAGES.items())[:count]}
        spans: dict[str, Any] = {name: (place,) for name, place in shown.items()}
        spans |= {"image": tuple(shown.values()), "question": (tuple(at + number for at in QUESTION),)}
        ids = (1, *range(10, 23 + number))
        rows.append(EncodedItem(Item(prompt="", answer="", id=f"item-{number}"), ids, (20,), (), (), spans, None))
    return ItemSet("album", tuple(rows), {}, "cross-entropy", pad=0)


def pattern_of(model: AttachedModel, item: EncodedItem) -> Tensor:
    row = torch.tensor([item.prompt])
    with torch.no_grad(), model.reading(hw.read.rows(model.heads("main"))) as got:
        model(input_ids=row)
    return torch.stack([got.rows[f"L{layer}"][0] for layer in range(3)]).double()


@pytest.mark.parametrize("counting", ["sum", "mean"])
def test_the_score_of_a_page_is_a_plain_sum(tiny: AttachedModel, counting: Any) -> None:
    items = album(3, 2, 3)
    found = rank_pages(tiny, items, "L0H1, L2H0, L2H3", counting=counting)
    assert found.pages == tuple(PAGES)
    for row, item in enumerate(items):
        pattern = pattern_of(tiny, item)
        for page, name in enumerate(PAGES):
            if name not in item.spans:
                assert found.scores[row, page].isnan()
                continue
            asked, place = list(item.spans["question"][0]), list(item.spans[name][0])
            by_head = torch.stack([pattern[layer, head][asked][:, place] for layer, head in ((0, 1), (2, 0), (2, 3))])
            sums = by_head.sum(-1).mean()
            assert found.scores[row, page] == pytest.approx(
                float(sums) / (1 if counting == "sum" else len(place)), abs=1e-5
            )
    assert len(found.order(1)) == 2


def test_a_null_question_is_taken_away(tiny: AttachedModel) -> None:
    items, heads = album(3), "L0H1, L2H0"
    plain, calibrated = (rank_pages(tiny, items, heads, calibrated=each, null="?") for each in (False, True))
    (item,) = items
    null = tiny.tokenizer("?", add_special_tokens=False)["input_ids"]
    bare = replace(item, prompt=(*item.prompt[:11], *null, item.prompt[13]))
    pattern = pattern_of(tiny, bare)
    nothing = [(pattern[0, 1, 11][list(p)].sum() + pattern[2, 0, 11][list(p)].sum()) / 2 for p in PAGES.values()]
    torch.testing.assert_close(calibrated.scores[0], plain.scores[0] - torch.stack(nothing), atol=1e-5, rtol=0)


def test_a_page_out_of_the_windows_reach_is_ranked_by_the_heads_that_reach_it() -> None:
    with hw.load("zoo:tiny-gemma3_text") as model:
        kinds = model.model.config.layer_types
        near, far = (kinds.index(kind) for kind in ("sliding_attention", "full_attention"))
        items, (item,) = album(3), album(3)
        items = replace(items, items=(replace(item, spans={**item.spans, "image:0": ((2, 3),)}),))
        both, whole = (rank_pages(model, items, heads) for heads in (f"L{near}H0, L{far}H0", f"L{far}H0"))
        alone = rank_pages(model, items, f"L{near}H0")
    assert both.scores[0, 0] == whole.scores[0, 0]
    assert both.scores[0, 2] != whole.scores[0, 2]
    assert alone.scores[0].isnan().tolist() == [True, False, False]
    assert set(alone.order(0)) == {"image:1", "image:2"}


def test_recall_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, torch.nan], [torch.nan, 0.0, -0.1]])
    ranking = PageRanking(("a", "b", "c"), ("one", "two", "three"), scores)
    assert [ranking.order(item) for item in range(3)] == [("two", "three", "one"), ("one", "two"), ("two", "three")]
    assert ranking.recall(["two", "two", "three"]).tolist() == [1, 0, 0]
    assert ranking.recall(["three", "two", "one"], k=2).tolist() == [1, 1, 0]
    assert ranking.recall([("two", "one"), ("one",), ("two", "three")], k=1).tolist() == [0.5, 1, 0.5]
    for gold, k, said in ((["two"], 1, "one entry"), (["two"] * 3, 0, "k=0"), (["two", "four", "one"], 1, "four")):
        with pytest.raises(InputError, match=said):
            ranking.recall(gold, k)
    with pytest.raises(InputError, match="nothing"):
        ranking.recall([(), "two", "one"])


def test_what_cannot_be_ranked(tiny: AttachedModel) -> None:
    items = album(2, 3)
    with pytest.raises(InputError, match="one name"):
        rank_pages(tiny, items, "L0H0", pages="image:0")
    with pytest.raises(InputError, match="L9"):
        rank_pages(tiny, items, "L9H9")
    with pytest.raises(InputError, match="item-0"):
        rank_pages(tiny, items, "L0H0", pages=["image:2"])
    with pytest.raises(Refusal, match="asked"):
        rank_pages(tiny, items, "L0H0", question="asked")
