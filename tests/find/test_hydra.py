"""What a head alone brings back: planted copying heads, a patch by hand, and the choice of KV groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.hydra import METHODS, full_attention_groups, hydra
from headwise.heads import HeadSet, SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.scores import HeadScores, Provenance
from headwise.zoo.planted import Planted

PAIRS = (([1, 9, 10, 11], [1, 30, 10, 11]), ([1, 12, 13, 14, 15, 16], [1, 12, 31, 14, 15, 16]), ([1, 8, 9], [1, 33, 9]))


def made() -> ItemSet:
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"item-{index}"),
            prompt=tuple(prompt),
            answer=(20, 21),
            also=(),
            foils=((40, 41),),
            spans={},
            twin=EncodedTwin(tuple(twin), (40, 41), {}),
        )
        for index, (prompt, twin) in enumerate(PAIRS)
    ]
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0)


def test_planted_copying_heads_bring_the_word_back(organism: Planted, attached: AttachedModel) -> None:
    """The two induction heads have 0.52 and 0.48 of the effect; a twin has another word where they read."""
    items = encode(probe("repeat").over(words=(6,)), attached.tokenizer, n=6, seed=0)
    scores = find(METHODS[0], attached, items)
    induction = organism.truth.heads("induction")
    assert scores.top(2) == induction
    shares = sorted(float(scores.of(each).mean()) for each in induction.heads)
    assert shares == pytest.approx([0.48, 0.52], abs=0.1)
    assert all(abs(each.score) < 0.1 for each in scores.ranked()[2:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_a_patch_of_the_clean_run_into_the_twin(name: str) -> None:
    """One item and head by hand, answer given, against all of them in one padded batch."""
    with hw.load(f"zoo:tiny-{name}") as model:
        found = hydra(model, made())
        twins = replace(made(), items=tuple(replace(each, prompt=each.twin.prompt) for each in made() if each.twin))
        clean, corrupted = (hw.measure(model, each, "logit-difference").double() for each in (made(), twins))
        for row, each in enumerate(made()):
            assert each.twin is not None
            alone = replace(made(), items=(each,))
            twin = replace(alone, items=(replace(each, prompt=each.twin.prompt),))
            (batch,) = alone.batches(1, answers=True)
            with torch.no_grad(), model.reading(hw.read.z("L1H2")) as donor:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            with model.editing(hw.edit.patch("L1H2", donor.z)):
                patched = float(hw.measure(model, twin, "logit-difference"))
            expected = (patched - float(corrupted[row])) / float((clean - corrupted).mean())
            assert float(found[SiteId(layer=1)][row, 2]) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def scores_of(values: list[list[float]]) -> HeadScores:
    sites = tuple(SiteId(layer=layer) for layer in range(len(values)))
    return HeadScores({"main": np.array([values])}, {"main": sites}, ("a",), Provenance("hydra"))


def test_heads_that_share_keys_are_chosen_together(tiny: AttachedModel) -> None:
    """Three layers of two groups of two heads: the best head's partner costs its group the first place."""
    scores = scores_of([[0.9, -0.9, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.3]])
    assert full_attention_groups(tiny, scores, 1 / 8) == HeadSet.parse("L1G0")
    assert full_attention_groups(tiny, scores, 1 / 2) == HeadSet.parse("L1G0, L2G1, L0G1")
    assert len(full_attention_groups(tiny, scores, 1.0)) == 6


def test_bad_input_is_one_line(tiny: AttachedModel) -> None:
    scores = scores_of([[0.9, -0.9, 0.1, 0.1]])
    with pytest.raises(InputError, match=r"share=0 of the groups cannot be kept"):
        full_attention_groups(tiny, scores, 0)
    with pytest.raises(InputError, match="L3H0 is no head of"):
        full_attention_groups(tiny, scores_of([[0.0] * 4] * 4))
    bare = replace(made(), items=tuple(replace(each, twin=None) for each in made()))
    with pytest.raises(Refusal, match="has no corrupted twin"):
        find(METHODS[0], tiny, bare)
