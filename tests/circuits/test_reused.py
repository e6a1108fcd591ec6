"""Heads traced backwards in planted models, one for each level, and a repair of what was broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import headwise as hw
from headwise.circuits.overlap import Shared
from headwise.circuits.paths import path_patch
from headwise.circuits.reused import attend_to, repair, trace_back
from headwise.errors import InputError, Refusal
from headwise.probes.encoded import EncodedTwin
from headwise.zoo.planted import planted

ARCHITECTURES = ("llama", "llama-gqa")


@cache
def indirect_object(architecture: str) -> tuple[dict[str, str], hw.AttachedModel, hw.ItemSet]:
    """The planted heads by name, the model, and items."""
    organism = planted(architecture, layers=3, heads=4, circuits=("indirect-object",), seed=0)  # type: ignore[arg-type]
    model = hw.attach(organism.model, organism.tokenizer, example=organism.example)
    named = {known.name: known.head for known in organism.truth.heads_known}
    return named, model, hw.encode(hw.probe("ioi"), model.tokenizer, n=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planted_heads_are_found_level_by_level(architecture: str) -> None:
    named, model, items = indirect_object(architecture)
    found = trace_back(model, items, ports=("q", "k"))
    assert [level.heads.labels for level in found.levels] == [
        (named["mover"],),
        (named["inhibitor"],),
        (named["same-token"],),
    ]
    assert found.n_heads == 12
    assert found.levels[0].patched.effect(named["mover"]) == pytest.approx(1, abs=0.05)
    group = hw.HeadSet.parse(named["inhibitor"]).to_groups(model.table.group_sizes).labels[0]
    assert [[str(each) for each in level.receivers] for level in found.levels] == [
        ["logits"],
        [f"{named['mover']}.q"],
        [f"{group}.k"],
    ]
    # The keys of the inhibitor stand at the repeated name, not at the last token.
    assert path_patch(model, items, [f"{group}.k"], [named["same-token"]], scope="last").normalised.abs().item() < 0.05
    table = found.to_pandas()
    assert table["head"].tolist() == [named["mover"], named["inhibitor"], named["same-token"]]
    assert table["effect"][2] == pytest.approx(found.levels[2].patched.effect(named["same-token"]))


def test_it_ends_where_nothing_is_read() -> None:
    named, model, items = indirect_object("llama")
    # The inhibitor's values are those of the tokens themselves.
    found = trace_back(model, items)
    assert [level.heads.labels for level in found.levels] == [(named["mover"],), (named["inhibitor"],), ()]
    assert len(trace_back(model, items, ports=("q", "v", "q")).levels) == 3
    assert not trace_back(model, items, threshold=5.0).heads


def test_what_two_tasks_share_is_counted() -> None:
    _, model, items = indirect_object("llama")
    whole = trace_back(model, items, ports=("q", "k"))
    part = trace_back(model, items, ports=("q",))
    assert part.shared(whole) == Shared(12, 2, 3, 2)
    assert part.shared(whole).of_b_in_a == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="in one model"):
        part.shared(replace(whole, n_heads=16))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_that_attend_to_what_they_no_longer_find_repair_the_model(architecture: str) -> None:
    named, model, items = indirect_object(architecture)
    with model.editing(hw.edit.zero(named["same-token"])):
        found = repair(model, items, named["inhibitor"], "s2")
        assert (float(found.before.mean()), float(found.after.mean())) == (0, 1)
        # Held back is the name that the heads are made to look at.
        assert float(repair(model, items, named["inhibitor"], "io").after.mean()) == 0
    assert float(repair(model, items, named["inhibitor"], "io").before.mean()) == 1
    assert "0.000 -> 1.000" in repr(found)


def test_silenced_heads_write_nothing_at_the_last_token() -> None:
    named, model, items = indirect_object("llama")
    found = repair(model, items, named["inhibitor"], "s2", silenced=named["mover"], metric="logit-difference")
    last = hw.edit.zero(named["mover"], scope="last")
    expected = hw.measure(model, items, edits=[attend_to(named["inhibitor"], "s2"), last])
    assert found.after.tolist() == expected.tolist()
    assert float(found.after.mean()) < 0.2 * float(found.before.mean())
    assert len(found.edits) == 2


def test_all_attention_goes_to_the_span_at_the_last_token_alone() -> None:
    named, model, items = indirect_object("llama-gqa")
    head = hw.HeadSet.parse(named["inhibitor"]).heads[0]
    (batch,) = items.batches(len(items), answers=False)
    rows = []
    for change in (hw.edit.scale(head, 1.0), attend_to(head, "s2")):
        with torch.no_grad(), model.editing(change, spans=batch.spans), model.reading(hw.read.rows(head)) as got:
            model(batch.input_ids, attention_mask=batch.attention_mask)
        rows.append(got.rows[head.site.label][:, 0])
    before, after = rows
    for row, item in enumerate(items):
        (place,) = item.spans["s2"][0]
        column = after.shape[-1] - len(item.prompt) + place
        assert float(after[row, -1, column]) == pytest.approx(1, abs=1e-6)
        assert float(before[row, -1].max()) > 0.9
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=1e-6)


def test_what_cannot_be_traced_or_repaired_is_said() -> None:
    named, model, items = indirect_object("llama")
    with pytest.raises(InputError, match="ports are of"):
        trace_back(model, items, ports=("z",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threshold=0"):
        trace_back(model, items, threshold=0)
    with pytest.raises(InputError, match="no span 'other_color'"):
        repair(model, items, named["mover"], "other_color")
    same = replace(items, items=tuple(replace(each, twin=EncodedTwin(each.prompt, (), {})) for each in items))
    with pytest.raises(Refusal, match="nothing to trace"):
        trace_back(model, same)


def test_the_wrong_colors_have_their_places() -> None:
    _, model, _ = indirect_object("llama")
    for item in hw.encode(hw.probe("colored-objects").over(objects=3), model.tokenizer, n=2):
        tokens = model.tokenizer.convert_ids_to_tokens(item.prompt)
        wrong = {tuple(tokens[place] for place in places) for places in item.spans["other_color"]}
        assert len(wrong) == 2
        assert not wrong & {tuple(tokens[place] for place in places) for places in item.spans["color"]}
