"""The temporal edit: at the last token of the span and nowhere else, through caches in pieces; and the scan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item, Twin
from headwise.probes.outcome import places
from headwise.use.knowledge.temporal_edit import TemporalEdit, mean_values
from headwise.use.knowledge.temporal_scan import temporal_scan

YEARS = ([3, 4, 5], [1, 2], [6])
"""Columns of the span in each prompt, without padding."""


@pytest.fixture(params=["llama", "gpt2"], ids=["gqa", "mha"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def items() -> ItemSet:
    rows = []
    prompts = ((1, *range(20, 28)), (1, 30, 31, 32), (1, *range(40, 50)))
    for n, (prompt, year) in enumerate(zip(prompts, YEARS, strict=True)):
        twin = EncodedTwin((1, *(each + 15 for each in prompt[1:])), (70 + n,), {"year": (tuple(year),)})
        item = Item(prompt="", answer="", id=f"i{n}", twin=Twin(prompt="", answer=""))
        rows.append(EncodedItem(item, prompt, (60 + n,), (), (), {"year": (tuple(year),)}, twin))
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


def vectors(model: AttachedModel, label: str) -> dict[str, Tensor]:
    return {label: torch.randn(model.sites[0].head_dim, generator=torch.Generator().manual_seed(3))}


def test_the_edit_stands_at_the_last_token_of_the_span_and_nowhere_else(model: AttachedModel) -> None:
    (batch,) = items().batches(3, answers=False)
    at = places(model, batch)
    used = TemporalEdit(vectors(model, "L0G1"), 3.0)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    with torch.no_grad(), model.reading(hw.read.v()) as clean:
        model(**inputs)
    with torch.no_grad(), used(model, spans=at.spans) as opened, model.reading(hw.read.v()) as got:
        model(**inputs)
    wanted = torch.zeros_like(clean.v["L0"])
    for row, (each, year) in enumerate(zip(items(), YEARS, strict=True)):
        wanted[row, batch.prompt_length - len(each.prompt) + year[-1], 1] = 3.0 * used.values["L0G1"]
    assert torch.allclose(got.v["L0"] - clean.v["L0"], wanted, atol=1e-5)
    assert opened.fired[0].site == "L0"
    # What comes after reads it; what stands before does not.
    changed = (got.v["L1"] - clean.v["L1"]).abs().amax((2, 3)) > 1e-6
    for row, (each, year) in enumerate(zip(items(), YEARS, strict=True)):
        first = batch.prompt_length - len(each.prompt) + year[-1]
        assert not bool(changed[row, :first].any())
        assert bool(changed[row, first:].all())


@pytest.mark.parametrize("cut", [4, 5, 6])
def test_a_prompt_in_pieces_is_the_prompt_as_a_whole(model: AttachedModel, cut: int) -> None:
    """The span is columns 3 to 5: a piece that ends inside it must not take its end for the span's."""
    ids = torch.tensor([items().items[0].prompt])
    used, spans = TemporalEdit(vectors(model, "L0G1"), 6.0), {"year": [3, 4, 5]}
    with torch.no_grad(), used(model, spans=spans):
        whole = model(input_ids=ids).logits
    with torch.no_grad(), used(model, spans=spans, prompt_length=ids.shape[1]):
        first = model(input_ids=ids[:, :cut], use_cache=True)
        second = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, second.logits], dim=1) - whole).abs().max() < 2e-5
    with torch.no_grad():
        assert (model(input_ids=ids).logits - whole).abs().max() > 1e-3


def test_beams_and_slices_find_the_same_token(model: AttachedModel) -> None:
    used = TemporalEdit(vectors(model, "L0G1"), 6.0)
    ids = torch.tensor([items().items[0].prompt, items().items[0].prompt])
    written = []
    for spans in ({"year": [3, 4, 5]}, {"year": slice(3, 6)}, {"year": [[5], [3, 5]]}):
        with used(model, spans=spans):
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=4)
        written.append(made)
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    with (
        pytest.raises(InputError, match="has no end"),
        torch.no_grad(),
        used(model, spans={"year": slice(3, None)}),
    ):
        model(input_ids=ids)


def test_mean_values_are_those_of_each_prompt_alone(model: AttachedModel) -> None:
    found = mean_values(model, items(), "L1G0, L2G1", batch_size=3)
    assert set(mean_values(model, items())) == set(model.groups(None).labels)
    alone = []
    for each in items():
        with torch.no_grad(), model.reading(hw.read.v()) as got:
            model(input_ids=torch.tensor([each.prompt]))
        alone.append({label: got.v[label][0].mean(0) for label in found})
    for label, value in found.items():
        assert torch.allclose(value, torch.stack([each[label] for each in alone]).mean(0), atol=1e-6)
    with pytest.raises(InputError, match="acts on values"):
        mean_values(model, items(), HeadSet.parse("L0H1"))
    with pytest.raises(InputError, match="no source prompts"):
        mean_values(model, replace(items(), items=()))


def one_by_one(model: AttachedModel, label: str, coefficient: float) -> tuple[list[int], list[int]]:
    """First tokens without and with the edit, item by item, with v-bar of the item's own twin."""
    plain, edited = [], []
    for place, each in enumerate(items()):
        sources = replace(items().twins(), items=(items().twins().items[place],))
        ids = torch.tensor([each.prompt])
        with torch.no_grad():
            plain.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            used = TemporalEdit(mean_values(model, sources, label), coefficient)
            with used(model, spans={"year": list(YEARS[place])}):
                edited.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    return plain, edited


@pytest.mark.parametrize("tokens", [None, 12])
def test_a_scan_is_the_edits_one_by_one(model: AttachedModel, tokens: int | None) -> None:
    labels, coefficients = ["L0G0", "L1G1", "L2G0"], (3.0, 40.0)
    scan = temporal_scan(model, items(), groups=labels, coefficients=coefficients, tokens=tokens)
    for group, label in enumerate(labels):
        for place, coefficient in enumerate(coefficients):
            plain, edited = one_by_one(model, label, coefficient)
            moved = [own != new for own, new in zip(plain, edited, strict=True)]
            assert scan.changed[group, place].tolist() == moved
    assert scan.changed.any()
    assert not scan.hit.any()  # tokens that no one said


def test_a_hit_is_the_other_answer_where_it_was_not_given_before(model: AttachedModel) -> None:
    plain, edited = one_by_one(model, "L0G0", 40.0)
    assert any(own != new for own, new in zip(plain, edited, strict=True))
    told = tuple(
        replace(each, twin=replace(each.twin, answer=(new,)))  # type: ignore[type-var]
        for each, new in zip(items(), edited, strict=True)
    )
    wanted = replace(items(), items=told)
    scan = temporal_scan(model, wanted, groups=["L0G0", "L2G0"], coefficients=(1.0, 40.0))
    assert scan.hit[0, 1].tolist() == [own != new for own, new in zip(plain, edited, strict=True)]
    table = scan.to_pandas()
    assert list(table.columns) == ["group", "coefficient", "changed", "hit", "control_changed", "control_hit"]
    row = table[(table.group == "L0G0") & (table.coefficient == 40.0)].iloc[0]
    assert row.hit == pytest.approx(float(scan.hit[0, 1].double().mean()))
    assert float(scan.excess[0, 1]) == pytest.approx(row.hit - row.control_hit)
    label, coefficient = scan.best
    assert scan.edit(model, wanted.twins()).settings["coefficient"] == coefficient
    assert list(scan.edit(model, wanted.twins()).values) == [label]


def test_the_control_has_the_length_of_the_values_and_a_seed(model: AttachedModel) -> None:
    from headwise.use.knowledge.temporal_edit import values_by_item
    from headwise.use.knowledge.temporal_scan import _random_like

    own = values_by_item(model, items(), model.groups("L0G0"))
    random, again, other = (_random_like(own, seed)["L0G0"] for seed in (0, 0, 1))
    assert torch.allclose(random.norm(dim=-1), own["L0G0"].norm(dim=-1), atol=1e-6)
    assert torch.equal(random, again)
    assert not torch.allclose(random, other)
    assert not torch.allclose(random, own["L0G0"], atol=1e-2)


def test_a_scan_refuses_what_it_cannot_judge(model: AttachedModel) -> None:
    bare = replace(items(), items=tuple(replace(each, twin=None) for each in items()))
    with pytest.raises(InputError, match="no twin with an answer"):
        temporal_scan(model, bare)
    with pytest.raises(InputError, match="no span 'date'"):
        temporal_scan(model, items(), span="date")
    with pytest.raises(InputError, match="other than 0"):
        temporal_scan(model, items(), coefficients=(0.0,))
    with pytest.raises(InputError, match="1 sources for 3"):
        temporal_scan(model, items(), sources=replace(items(), items=items().items[:1]))
