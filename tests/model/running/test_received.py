"""Keys that a run itself shows, and columns of the prompt inside and outside of places: as `keys=` of any row edit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel

ABOVE = 0.06


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


def rows(model: AttachedModel, *edits: hw.edit.Edit, prompt: int | None = None) -> torch.Tensor:
    with torch.no_grad(), model.reading(hw.read.rows("L0")) as got:
        if edits:
            with model.editing(*edits, prompt_length=prompt, spans={"a": [[20, 21], [5, 6]], "b": [[21], [9]]}):
                model(**model.example)
        else:
            model(**model.example)
    return got.rows["L0"]


def found(clean: torch.Tensor, model: AttachedModel, skip: int, prompt: int | None = None) -> torch.Tensor:
    """`[batch, head, key]`, one key at a time; a query sees a key where it gives it any weight."""
    mask = model.example["attention_mask"].bool().clone()
    mask[:, prompt:] = mask[:, prompt:] if prompt is None else False
    keys = torch.zeros(clean.shape[0], clean.shape[1], clean.shape[3], dtype=torch.bool)
    for row in range(clean.shape[0]):
        for head in range(clean.shape[1]):
            over = []
            for key in range(clean.shape[3]):
                given = [float(clean[row, head, query, key]) for query in mask[row].nonzero()[:, 0]]
                seen = [weight for weight in given if weight > 0]
                if seen and sum(seen) / len(seen) > ABOVE and bool(mask[row, key]):
                    over.append(key)
            keys[row, head, over[skip:]] = True
    return keys


@pytest.mark.parametrize(("skip", "prompt"), [(1, None), (0, None), (1, 22)])
def test_received_keys_are_those_above_the_share_head_by_head(
    model: AttachedModel, skip: int, prompt: int | None
) -> None:
    clean = rows(model)
    hidden = rows(model, hw.edit.reweight("L0", 0.5, keys=hw.edit.received(ABOVE, skip=skip)), prompt=prompt)
    keys = found(clean, model, skip, prompt)
    assert 0 < int(keys.sum()) < keys.numel()
    assert len({tuple(row.tolist()) for row in keys.flatten(0, 1)}) > 2
    scaled = clean * torch.where(keys, 0.5, 1.0)[:, :, None]
    wanted = scaled * (clean.sum(-1, keepdim=True) / scaled.sum(-1, keepdim=True).clamp(min=1e-30))
    real = model.example["attention_mask"].bool()
    assert (hidden - wanted).transpose(1, 2)[real].abs().max() < 1e-5


def test_scores_and_patterns_of_received_keys_are_the_same_edit(model: AttachedModel) -> None:
    keys, real = hw.edit.received(ABOVE), model.example["attention_mask"].bool()
    by_score = rows(model, hw.edit.bias("L0H0, L0H2", math.log(3), keys=keys))
    by_pattern = rows(model, hw.edit.reweight("L0H0, L0H2", 3.0, keys=keys))
    assert (by_score - by_pattern).transpose(1, 2)[real].abs().max() < 1e-5
    assert (by_score - rows(model)).transpose(1, 2)[real].abs().max() > 1e-2


def test_what_is_received_is_counted_after_the_edits_before(model: AttachedModel) -> None:
    """A score edit makes all visible keys alike; then the keys found are those that many queries see."""
    real = model.example["attention_mask"].bool()
    flat = hw.edit.scale("L0", 0.0, variable="score")
    above = 0.2 if "Mistral" in type(model.model).__name__ else 0.12  # in a window every key has an eighth or more
    keys = hw.edit.received(above, skip=0)
    edited = rows(model, hw.edit.redistribute("L0", 1.0, keys=keys), flat)  # a score edit comes first, in any order
    uniform = rows(model, flat)
    wanted = uniform.clone()
    seen = uniform > 0
    for row in range(len(real)):
        for head in range(uniform.shape[1]):
            counts = [float(uniform[row, head, real[row], key].sum()) for key in range(uniform.shape[3])]
            seers = [int(seen[row, head, real[row], key].sum()) for key in range(uniform.shape[3])]
            over = [key for key, (mass, n) in enumerate(zip(counts, seers, strict=True)) if n and mass / n > above]
            moved = wanted[row, head].clone()
            moved[:, over] = 0
            left = moved.sum(-1, keepdim=True)
            wanted[row, head] = torch.where(left > 0, moved / left.clamp(min=1e-30), wanted[row, head])
    assert (edited - wanted).transpose(1, 2)[real].abs().max() < 1e-5
    assert (edited - uniform).transpose(1, 2)[real].abs().max() > 1e-2


def test_two_streams_find_keys_of_their_own() -> None:
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model, torch.no_grad():
        act = hw.edit.redistribute("L1", 0.6, keys=hw.edit.received(ABOVE))
        harm = hw.edit.zero("L0")
        with model.editing(harm, act):
            wanted = model(**model.example).logits
        for mode in ("batch", "caches"):
            with model.dual(harm, act, combine=lambda first, second: second, mode=mode), model.editing(act):
                got = model(**model.example).logits
            real = model.example["attention_mask"].bool()
            assert (got - wanted)[real].abs().max() < 1e-4


def test_gradients_come_by(model: AttachedModel) -> None:
    act = hw.edit.redistribute("L0H0", 0.6, keys=hw.edit.received(ABOVE))
    with model.editing(act), model.reading(hw.read.z("L0", grad=True)) as got:
        model(**model.example).logits[:, -1].logsumexp(-1).sum().backward()
    assert bool(got.z.grad["L0"].isfinite().all())


def test_inside_and_outside_are_the_columns_of_the_prompt_in_any_place(model: AttachedModel) -> None:
    inside, outside = hw.edit.inside("span:a", "span:b"), hw.edit.outside("span:a", "span:b")
    listed = [{20, 21}, {5, 6, 9}]
    shown = {}
    for name, keys in {"inside": inside, "outside": outside}.items():
        edited = rows(model, hw.edit.scale("L0H0", 0.0, variable="pattern", keys=keys), prompt=24)
        shown[name] = [
            {key for key in range(edited.shape[3]) if not edited[row, 0, -1, key]} for row in range(len(edited))
        ]
    clean = rows(model)
    for row, places in enumerate(listed):
        hidden = {key for key in range(clean.shape[3]) if not clean[row, 0, -1, key]}
        assert shown["inside"][row] - hidden == places - hidden
        assert shown["outside"][row] - hidden == set(range(24)) - places - hidden


def test_what_cannot_be_meant_is_refused() -> None:
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        with (
            pytest.raises(InputError, match="no such span"),
            model.editing(hw.edit.bias("L0H0", 1.0, keys=hw.edit.outside("span:a", "span:gone")), spans={"a": [1]}),
        ):
            pass
        with pytest.raises(InputError, match="above=1"):
            hw.edit.received(1.0)
        with pytest.raises(InputError, match="skip"):
            hw.edit.received(skip=-1)
        with pytest.raises(InputError, match="names of places"):
            hw.edit.inside()
        with pytest.raises(InputError, match="not one of"):
            hw.edit.outside("rule")
        with pytest.raises(InputError, match="keys="):
            hw.edit.zero("L0H0", keys=hw.edit.received())
        act = hw.edit.redistribute("L0H0", 0.6, keys=hw.edit.received())
        with torch.no_grad(), model.editing(act, prompt_length=32), pytest.raises(Refusal, match="in pieces"):
            model(input_ids=model.example["input_ids"][1:, :20], use_cache=True)


def test_padding_does_not_count_where_it_could_see() -> None:
    """In an encoder a query on padding sees every key; what it gives them is no attention of a token."""
    organism = zoo.build("tiny-bert")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model, torch.no_grad():
        mask = model.example["attention_mask"].bool()
        row = int((~mask.all(1)).nonzero()[0])
        alone = {key: value[row : row + 1][:, mask[row]] for key, value in model.example.items()}
        act = hw.edit.redistribute("L0", 0.9, keys=hw.edit.received(ABOVE, skip=0))
        with model.editing(act), model.reading(hw.read.rows("L0")) as got:
            model(**model.example)
            together = got.rows["L0"][row][:, mask[row]][:, :, mask[row]].clone()
            model(**alone)
        assert (got.rows["L0"][0] - together).abs().max() < 1e-5
        with model.reading(hw.read.rows("L0")) as clean:
            model(**alone)
        assert (clean.rows["L0"][0] - together).abs().max() > 1e-2
