"""Subject, relation and mixed heads: planted ones, scripted ones, and single sources taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.direct_logit import direct_logit
from headwise.find.fact_parts import GROUPS, METHODS, FactParts, fact_parts, fact_parts_of, measure_without
from headwise.heads import Head, HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.sweep import KnockOut, measure_sets
from headwise.zoo.planted import Planted

PROMPTS = ([1, 9, 10, 11, 12, 13], [1, 30, 31, 32, 33], [1, 9, 40, 41, 42, 43, 44, 9])
"""Of different lengths: the shorter ones are padded."""

RELATION, SUBJECT = ((1, 2),), ((3,),)


def made(prompts: Sequence[Sequence[int]] = PROMPTS, **spans: Any) -> ItemSet:
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"item-{index}"),
            prompt=tuple(prompt),
            answer=(20 + index, 27),
            also=(),
            foils=((50, 51),),
            spans={"relation": RELATION, "subject": SUBJECT, **spans},
            twin=None,
        )
        for index, prompt in enumerate(prompts)
    ]
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0)


def of_planted(organism: Planted) -> ItemSet:
    """Relation, subject, ` is`: the three last tokens."""
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"item-{index}"),
            prompt=tuple(each.ids),
            answer=(each.answer,),
            also=(),
            foils=((each.foil,),),
            spans={"relation": ((len(each.ids) - 3,),), "subject": ((len(each.ids) - 2,),)},
            twin=None,
        )
        for index, each in enumerate(organism.examples("facts", 8, seed=5))
    ]
    return ItemSet("facts", tuple(rows), {}, "logit-difference", pad=0)


def test_planted_memory_heads_read_the_subject(organism: Planted, attached: AttachedModel) -> None:
    """They turn the subject into the object; the head that finds the relation writes nothing into the output."""
    items = of_planted(organism)
    memory = organism.truth.heads("memory")
    found = fact_parts_of(attached, items)
    assert found.of("subject") == memory
    assert not found.of("relation")
    assert not found.of("mixed")
    scores = find(METHODS[0], attached, items)
    assert scores.top(len(memory)) == memory
    assert all(each.score == 0 for each in scores.ranked() if each.head not in memory)
    expected = [
        organism.expected_direct(each.label, "facts", organism.examples("facts", 1, seed=5)[0]) for each in memory
    ]
    assert max(scores.of(each)[0] for each in memory) > 0.5 * max(expected) > 0


def test_without_the_subject_planted_memory_is_gone(organism: Planted, attached: AttachedModel) -> None:
    items = of_planted(organism)
    sets = [HeadSet(), organism.truth.heads("memory")]
    clean, without_subject = measure_without(attached, items, sets, "subject")
    _, without_relation = measure_without(attached, items, sets, "relation")
    _, knocked_out = measure_sets(attached, items, sets, KnockOut(scope="last"))
    assert float(clean.mean()) > 4
    assert float((without_subject - knocked_out).abs().max()) < 0.1 * float(clean.mean())
    assert float(without_subject.mean()) < 0.2 * float(clean.mean())
    assert float((without_relation - clean).abs().max()) < 0.05 * float(clean.mean())


NAMES = ["llama", "gpt2", "gemma2"]


@pytest.mark.parametrize("name", NAMES)
def test_groups_sum_to_the_head_without_foils(name: str) -> None:
    """On GQA, LayerNorm with biases and norms behind sublayers; the answer's first token alone, foils left out."""
    items = made()
    bare = replace(items, items=tuple(replace(each, answer=each.answer[:1], foils=()) for each in items))
    with hw.load(f"zoo:tiny-{name}") as model:
        found = fact_parts_of(model, items)
        whole = direct_logit(model, bare)
        alone = [fact_parts_of(model, replace(items, items=(each,))).sources for each in items]
    heads = torch.cat([whole[site].double() for site in sorted(whole)], dim=1)
    assert found.sources.shape == (3, len(found.heads), len(GROUPS))
    np.testing.assert_allclose(found.sources.sum(-1), heads, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.sources, np.concatenate(alone), rtol=1e-3, atol=1e-5)


def test_scripted_heads_get_their_names(tiny: AttachedModel, scripted: Any) -> None:
    """Heads of the last layer look at the subject, at the relation, at both alike and at the end; all others at the
    first token."""
    items = made()
    last = tiny.sites[-1]
    first = last.n_heads * (len(tiny.sites) - 1)

    looks: list[Mapping[int, float]] = [{3: 1.0}, {1: 0.5, 2: 0.5}, {3: 0.5, 1: 0.25, 2: 0.25}, {}]

    def script(head: int, position: int) -> Mapping[int, float]:
        if head < first or position < 3:
            return {0: 1.0}
        return looks[head - first] or {position: 1.0}

    with scripted(tiny, script):
        found = fact_parts_of(tiny, items)
    by_subject, by_relation, by_both, by_end = (found.sources[:, first + head] for head in range(4))
    subject, relation, end, rest = range(4)
    assert np.abs(by_subject[:, subject]).min() > 1e-4 < np.abs(by_relation[:, relation]).min()
    np.testing.assert_allclose(by_subject[:, [relation, end, rest]], 0, atol=1e-9)
    np.testing.assert_allclose(by_relation[:, [subject, end, rest]], 0, atol=1e-9)
    np.testing.assert_allclose(by_end[:, [subject, relation, rest]], 0, atol=1e-9)
    assert np.abs(by_both[:, :2]).min() > 1e-6
    tilt = np.abs(by_both.mean(0)[subject] / by_both.mean(0)[relation])
    labels = found.labels(ratio=1.01 * max(tilt, 1 / tilt), least=0.0)
    assert labels[first:] == ("subject", "relation", "mixed", "none")
    assert set(labels[:first]) == {"none"}
    assert found.labels(ratio=max(1.0, 0.99 * max(tilt, 1 / tilt)), least=0.0)[first + 2] == (
        "subject" if tilt > 1 else "relation"
    )


def by_hand(*means: tuple[float, float]) -> FactParts:
    """Heads with these attributions from subject and relation, on two items that differ around them."""
    rows = np.array([[*each, 5.0, -3.0] for each in means])
    return FactParts(
        tuple(Head.of(0, index) for index in range(len(means))), ("a", "b"), np.stack([rows + 1, rows - 1])
    )


def test_kinds_are_told_by_the_ratio_and_the_size() -> None:
    found = by_hand((4.0, 0.5), (-0.25, 3.0), (2.0, -2.0), (0.1, 0.1), (0.0, 0.0), (-8.0, 1.0))
    assert found.labels(8, 0.1) == ("subject", "relation", "mixed", "none", "none", "subject")
    assert found.labels(9, 0.1) == ("mixed", "relation", "mixed", "none", "none", "mixed")
    assert found.labels(13, 0.0) == ("mixed", "mixed", "mixed", "mixed", "none", "mixed")
    assert found.of("subject", 8) == HeadSet.parse("L0H0, L0H5")
    assert found.of("none", 8) == HeadSet.parse("L0H3, L0H4")
    table = found.sensitivity((8, 9), 0.1)
    assert table.to_dict("list") == {
        "ratio": [8.0, 9.0], "subject": [2, 0], "relation": [1, 1], "mixed": [1, 3], "none": [2, 2],
    }  # fmt: skip
    frame = found.to_pandas(8)
    assert list(frame.columns) == ["label", *GROUPS, "part"]
    assert frame.loc[1].to_dict() == {
        "label": "L0H1", "subject": -0.25, "relation": 3.0, "end": 5.0, "rest": -3.0, "part": "relation",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_taken_out_are_the_head_taken_out(name: str) -> None:
    """Answers of two tokens: the head is out at both places that predict them, and nowhere else."""
    items = made()
    everything = replace(
        items,
        items=tuple(
            replace(each, spans={"all": (tuple(range(len(each.prompt))),)}, answer=each.answer[:1]) for each in items
        ),
    )
    with hw.load(f"zoo:tiny-{name}") as model:
        sets = [HeadSet(), HeadSet.parse("L1H2"), HeadSet.parse("L0H1, L2H3")]
        found = measure_without(model, everything, sets, "all")
        exact = measure_sets(model, everything, sets, KnockOut(scope="last"))
        one_by_one = [measure_without(model, replace(items, items=(each,)), sets, "subject") for each in items]
        together = measure_without(model, items, sets, "subject")
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(one_by_one, dim=1), rtol=1e-3, atol=1e-5)
    assert float((found[1:] - found[0]).abs().min()) > 1e-6


def test_what_is_taken_out_is_the_sum_over_the_span(tiny: AttachedModel) -> None:
    """z at the end less A v of the relation's two tokens, put in place by hand; the other attention is not renewed."""
    items = made(PROMPTS[:1])
    items = replace(items, items=(replace(items.items[0], answer=(20,), foils=((50,),)),))
    (batch,) = items.batches(1)
    site = tiny.site("L1")
    with torch.no_grad(), tiny.reading(hw.read.rows("L1"), hw.read.v("L1"), hw.read.z("L1")) as got:
        tiny(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    rows, v, z = got.rows["L1"][0, 2, -1], got.v["L1"][0, :, 2 // site.group_size], got.z["L1"][0, -1, 2]
    without: Tensor = z - rows[1] * v[1] - rows[2] * v[2]
    with tiny.editing(hw.edit.set("L1H2", without, scope="last"), prompt_length=batch.prompt_length):
        expected = hw.measure(tiny, items, "logit-difference").double()
    found = measure_without(tiny, items, [HeadSet.parse("L1H2"), HeadSet()], "relation")
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
    assert abs(float(found[0] - found[1])) > 1e-5


def test_the_probe_has_what_it_needs(tiny: AttachedModel) -> None:
    items = encode(probe("facts"), tiny.tokenizer, n=2, seed=0)
    assert METHODS[0].spans() == ("subject", "relation")
    assert not METHODS[0].missing(tiny, items)
    for each in items:
        (subject,), (relation,) = each.spans["subject"], each.spans["relation"]
        assert max(relation) < min(subject) < len(each.prompt) - 1


def test_bad_input_is_one_line(tiny: AttachedModel) -> None:
    items = made()
    with pytest.raises(InputError, match="has no span 'place'; it has relation, subject; name one of them"):
        fact_parts_of(tiny, items, subject="place")
    with pytest.raises(InputError, match="token 3 is in span 'subject' and in span 'relation'"):
        fact_parts_of(tiny, made(relation=((2, 3),)))
    silent = replace(items, items=(replace(items.items[0], answer=()),))
    with pytest.raises(InputError, match="has no answer"):
        fact_parts_of(tiny, silent)
    with pytest.raises(InputError, match="part='object' is not known; choose from subject, relation, mixed"):
        fact_parts(tiny, items, part="object")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ratio=0\.5 and least=0\.1"):
        fact_parts(tiny, items, ratio=0.5)
    with pytest.raises(InputError, match="part='object' is not known"):
        by_hand((1.0, 2.0)).of("object")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes a list of head sets"):
        measure_without(tiny, items, HeadSet.parse("L0H0"), "subject")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 3 items and 0 sets"):
        measure_without(tiny, items, [], "subject")
    with pytest.raises(InputError, match="has no span 'place'"):
        measure_without(tiny, items, [HeadSet()], "place")
    with pytest.raises(Refusal, match="needs more than one run over given answers"):
        measure_without(tiny, items, [HeadSet()], "subject", "exact-match-generated")
