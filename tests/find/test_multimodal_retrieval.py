"""Multimodal retrieval: scripted heads whose numbers are known, one item alone, windows that do not reach, sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.multimodal_retrieval import (
    METHODS,
    multimodal_retrieval,
    null_ids,
    positive,
    sparsity,
    without_question,
)
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Passage
from headwise.probes.outcome import observe
from headwise.probes.picture import Picture, Region
from headwise.scores import HeadScores, Provenance

(RETRIEVAL,) = METHODS
NEEDLE, PICTURE, QUESTION = (4, 5), (6, 7, 8, 9), (12, 13, 14)
PROMPT = [1, *range(10, 25)]
"""16 tokens: a start, some text, needle, picture, text, question, and one token behind it."""


def told(made: Any, *lengths: int, needle: bool = True) -> ItemSet:
    """Items with that much text before the rest, so that short ones are padded."""
    items: ItemSet = made(*([1, *[30] * extra, *PROMPT[1:]] for extra in lengths))

    def spans(extra: int) -> dict[str, Any]:
        places = {"region:target": PICTURE, "image": PICTURE, "question": QUESTION}
        places |= {"needle": NEEDLE} if needle else {}
        return {name: (tuple(at + extra for at in place),) for name, place in places.items()}

    rows = zip(items, lengths, strict=True)
    return replace(items, items=tuple(replace(each, spans=spans(extra)) for each, extra in rows))


def looks(head: int, t: int) -> dict[int, float]:
    """Heads by number: 0 at the needle from the question's second and third token, 1 at the needle from wherever it is
    seen, 2 at the picture from the whole question, 3 at one token of it with half of its mass from the third, 4 at the
    needle from the first and last token alone, the others at the first token."""
    match head:
        case 0 if t in QUESTION[1:]:
            return {4: 0.5, 5: 0.5}
        case 1 if t > 5:
            return {4: 0.25, 5: 0.75}
        case 2 if t in QUESTION:
            return dict.fromkeys(PICTURE, 0.25)
        case 3 if t == QUESTION[2]:
            return {0: 0.5, 7: 0.5}
        case 4 if t in (QUESTION[0], 15):
            return {4: 1.0}
    return {0: 1.0}


def rows_of(model: AttachedModel, items: ItemSet) -> tuple[torch.Tensor, int]:
    """The pattern of one item `[layer, head, query, key]`, and its first column."""
    (batch,) = items.batches(1)
    with model.reading(hw.read.rows(model.heads("main"))) as got:
        observe(model, batch, wants={"logits"})
    layers = [got.rows[site.id.label][0] for site in model.sites if site.id.stack == "main"]
    return torch.stack(layers).double(), batch.prompt_length - len(batch.items[0].prompt)


# The null question is one token, so its row is that of the question's first token: there are heads 1, 2 and 4.
ON_NEEDLE = {"plain": [2 / 3, 1, 0, 0, 1 / 3], "calibrated": [2 / 3, 0, 0, 0, -2 / 3]}
ON_PICTURE = {"plain": [0, 0, 1, 1 / 6, 0], "calibrated": [0, 0, 0, 1 / 6, 0]}


@pytest.mark.parametrize("evidence", ["needle", "region:target"])
@pytest.mark.parametrize("counting", ["sum", "mean"])
def test_heads_of_known_score(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any, evidence: str, counting: Any
) -> None:
    items = told(made, 0)
    with scripted(tiny, looks):
        plain, calibrated = (
            by_head(
                multimodal_retrieval(tiny, items, evidence=evidence, counting=counting, calibrated=calibrated, null="?")
            )
            for calibrated in (False, True)
        )
    known, size = (ON_NEEDLE, 2) if evidence == "needle" else (ON_PICTURE, 4)
    by = 1 if counting == "sum" else size
    for found, name in ((plain, "plain"), (calibrated, "calibrated")):
        expected = torch.tensor(known[name] + [0.0] * 7, dtype=torch.float64) / by
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_a_null_question_removes_the_head_that_always_looks_there(
    tiny: AttachedModel, made: Any, scripted: Any
) -> None:
    with scripted(tiny, looks):
        raw = find(RETRIEVAL, tiny, told(made, 0), calibrated=False)
        scores = find(RETRIEVAL, tiny, told(made, 0), null="?")
    assert raw.top(1).labels == ("L0H1",)
    assert scores.top(1).labels == ("L0H0",)
    assert positive(scores)["main"].min() == 0
    assert scores.mean()["main"].min() < -0.6


def test_the_needle_is_the_evidence_where_there_is_one_and_else_the_target(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    with scripted(tiny, looks):
        text, picture = (
            by_head(multimodal_retrieval(tiny, told(made, 0, needle=needle), calibrated=False))
            for needle in (True, False)
        )
    assert text[0, :5].tolist() == pytest.approx(ON_NEEDLE["plain"], abs=1e-5)
    assert picture[0, :5].tolist() == pytest.approx(ON_PICTURE["plain"], abs=1e-5)


def test_an_item_with_a_null_question(made: Any) -> None:
    (item,) = told(made, 0)
    item = replace(item, spans={**item.spans, "behind": ((15,),), "across": ((11, 12, 13), (14,))})
    longer = without_question(item, "question", (40, 41, 42, 43))
    assert longer.prompt == (*item.prompt[:12], 40, 41, 42, 43, item.prompt[15])
    assert longer.spans["question"] == ((12, 13, 14, 15),)
    assert longer.spans["behind"] == ((16,),)
    assert longer.spans["across"] == ((11,),)
    assert longer.spans["needle"] == (NEEDLE,)
    shorter = without_question(item, "question", (40,))
    assert shorter.prompt == (*item.prompt[:12], 40, item.prompt[15])
    assert shorter.spans["behind"] == ((13,),)
    apart = replace(item, spans={"question": ((3,), (12,))})
    with pytest.raises(Refusal, match="several places"):
        without_question(apart, "question", (40,))


@pytest.mark.parametrize("build", ["tiny-llama", "tiny-gpt2"])
def test_padded_in_a_batch_is_one_item_alone(build: str, made: Any, pattern: Callable[..., Any], by_head: Any) -> None:
    lengths = (0, 3, 7)

    def alone(model: AttachedModel, ids: list[int], question: range, place: list[int]) -> torch.Tensor:
        return pattern(model, ids)[:, list(question)][:, :, place].sum(-1).mean(-1)

    with hw.load(f"zoo:{build}") as model:
        null = list(null_ids(model, "N/A"))
        found = by_head(multimodal_retrieval(model, told(made, *lengths)))
        for row, extra in enumerate(lengths):
            ids, start = [1, *[30] * extra, *PROMPT[1:]], 12 + extra
            place = [at + extra for at in NEEDLE]
            asked = alone(model, ids, range(start, start + 3), place)
            nothing = alone(model, [*ids[:start], *null, ids[-1]], range(start, start + len(null)), place)
            torch.testing.assert_close(found[row], asked - nothing, atol=1e-5, rtol=0)


def test_a_window_that_does_not_reach_is_no_score(made: Any, by_head: Any) -> None:
    """Eight keys: from the question's first token at 12 back to 5, so the needle's last token, but not one more."""
    with hw.load("zoo:tiny-gemma3_text") as model:
        sliding = [kind == "sliding_attention" for kind in model.model.config.layer_types]
        assert any(sliding)
        assert not all(sliding)
        near, far = told(made, 0), told(made, 0)
        far = replace(far, items=tuple(replace(each, spans={**each.spans, "needle": ((3, 4),)}) for each in far))
        for items, seen in ((near, [True, True, True]), (far, [not each for each in sliding])):
            found = multimodal_retrieval(model, items, calibrated=False)
            assert [not bool(found[site].isnan().any()) for site in sorted(found)] == seen
            assert [bool(found[site].isnan().all()) for site in sorted(found)] == [not each for each in seen]
        scores = find(RETRIEVAL, model, far, calibrated=False)
        assert len(scores.heads) == 4 * sum(not each for each in sliding)


def test_a_question_on_both_sides_of_the_evidence(tiny: AttachedModel, made: Any, pattern: Any, by_head: Any) -> None:
    """Its first token sees none of it, its last one does."""
    items = told(made, 0)
    around = {"question": ((12,), (14,)), "needle": ((13,),)}
    items = replace(items, items=tuple(replace(each, spans=around) for each in items))
    found = by_head(multimodal_retrieval(tiny, items, calibrated=False))
    torch.testing.assert_close(found[0], pattern(tiny, PROMPT)[:, 14, 13] / 2, atol=1e-5, rtol=0)


def noise(height: int, width: int, seed: int) -> Picture:
    return Picture.drawn(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def seen(model: AttachedModel) -> ItemSet:
    """An item with a picture, and one with two of other sizes, whose prompt is longer."""
    one = Passage().add("It is ").add("so", "needle").add(" <image>").add(" Which?", "question").add("\n")
    two = Passage().add("See <image> and <image> ").add("here", "needle").add(" Where is it?", "question").add(":")
    left, right = Region(0, (0, 0, 16, 32)), Region(0, (16, 0, 32, 32))
    wide = {"left": Region(1, (0, 0, 20, 24)), "right": Region(1, (20, 0, 40, 24))}
    passages = (
        (one, (noise(32, 32, 0),), {"left": left, "right": right, "target": left}),
        (two, (noise(16, 16, 1), noise(24, 40, 2)), wide | {"target": wide["right"]}),
    )
    made = [p.item(" a", foils=(" b",), pictures=pictures, regions=r).named("seen") for p, pictures, r in passages]
    return encode(made, model)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "smolvlm"])
def test_pictures_of_different_size(family: str) -> None:
    """Text and picture evidence of items with one and two pictures, in a batch and alone, against plain sums."""
    with hw.load(f"zoo:tiny-{family}") as model:
        items = seen(model)
        for evidence in ("needle", "region:target", "image:0"):
            scores = find(RETRIEVAL, model, items, evidence=evidence, calibrated=False).values["main"]
            for row, item in enumerate(items):
                alone = items.only([each == row for each in range(len(items))], "one")
                pattern, shift = rows_of(model, alone)
                asked, place = ([shift + at for p in item.spans[name] for at in p] for name in ("question", evidence))
                sums = pattern[:, :, asked][..., place].sum(-1).mean(-1)
                reached = ~np.isnan(scores[row])
                assert scores[row][reached] == pytest.approx(sums.numpy()[reached], abs=1e-5)
                assert (sums.numpy()[~reached] == 0).all()
            calibrated = find(RETRIEVAL, model, items, evidence=evidence)
            assert np.nanmax(np.abs(calibrated.values["main"] - scores)) > 1e-3


def test_how_few_heads_hold_half() -> None:
    def scores(*means: float) -> HeadScores:
        values = np.array(means).reshape(1, 1, -1)
        return HeadScores({"main": values}, {"main": (SiteId(layer=0),)}, ("one",), Provenance("retrieval"))

    assert sparsity(scores(1, 0, 0, 0)) == 0.25
    assert sparsity(scores(1, 1, 1, 1)) == 0.5
    assert sparsity(scores(0.5, 0.3, 0.2, 0.0, -5.0)) == 0.2  # what is below 0 counts as none
    assert sparsity(scores(0.4, 0.3, 0.2, 0.1, -5.0)) == 0.4
    assert sparsity(scores(0.4, 0.3, 0.2, 0.1, -5.0), 0.9) == 0.6
    with pytest.raises(InputError, match="share"):
        sparsity(scores(1.0), 1.5)
    with pytest.raises(InputError, match="positive"):
        sparsity(scores(-1.0))


def test_what_cannot_be_scored(tiny: AttachedModel, made: Any) -> None:
    items = told(made, 0, 2)
    with pytest.raises(InputError, match="counting"):
        multimodal_retrieval(tiny, items, counting="total")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="null"):
        multimodal_retrieval(tiny, items, null="")
    with pytest.raises(Refusal, match="image:3"):
        multimodal_retrieval(tiny, items, evidence="image:3")
    with pytest.raises(Refusal, match="asked"):
        find(RETRIEVAL, tiny, items, question="asked")
    before = told(made, 0)
    before = replace(before, items=tuple(replace(each, spans={**each.spans, "needle": ((15,),)}) for each in before))
    with pytest.raises(Refusal, match="behind"):
        multimodal_retrieval(tiny, before, calibrated=False)
