"""Discrete codes: sets counted by hand, planted directions found, and writes that are those of the heads."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import codes as module
from headwise.find import find
from headwise.find.codes import METHODS, Training, codes, codes_of, shares_below, unique_codes
from headwise.heads import HeadSet
from headwise.probes import ItemSet, encode, probe
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.item import Item
from headwise.zoo.planted import Planted, planted

QUICK = {"n_codes": 40, "epochs": 120, "trials": 3}


def of_ids(*pairs: tuple[list[int], list[int]]) -> ItemSet:
    """Items and their twins, with answers of two tokens."""
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"item-{index}"),
            prompt=tuple(prompt),
            answer=(20, 21),
            also=(),
            foils=(),
            spans={},
            twin=EncodedTwin(tuple(twin), (), {}),
        )
        for index, (prompt, twin) in enumerate(pairs)
    ]
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


PAIRS = (([1, 9, 10, 11], [1, 9, 30, 11]), ([1, 12, 13, 14, 15, 16], [1, 12, 13, 14, 31, 16]), ([1, 8, 9], [1, 8, 32]))


@cache
def built() -> tuple[Planted, hw.AttachedModel]:
    organism = planted(layers=4, heads=4, circuits=("indirect-object",), seed=1)
    return organism, hw.attach(organism.model, organism.tokenizer, example=organism.example)


@cache
def items() -> ItemSet:
    return encode(probe("ioi"), built()[1].tokenizer, n=12, seed=0)


def test_codes_on_positives_alone_are_counted() -> None:
    """Positives {1, 2, 3}, negatives {3, 4}; the same on both; none that negatives lack; nothing in common."""
    positives = [[1, 7, 5, 0], [2, 7, 5, 0], [3, 8, 5, 1]]
    negatives = [[3, 8, 5, 3], [4, 7, 6, 3], [4, 7, 5, 3]]
    table = torch.tensor(positives + negatives)
    assert unique_codes(table, normalise=False).tolist() == [2.0, 0.0, 0.0, 2.0]
    assert unique_codes(table, normalise=True).tolist() == [2 / 4, 0.0, 0.0, 2 / 3]
    assert unique_codes(table.flip(0), normalise=False).tolist() == [1.0, 0.0, 1.0, 1.0]


def test_shares_of_heads_below() -> None:
    assert shares_below(torch.tensor([3.0, 0.0, 1.0, 0.0, 0.0])).tolist() == [1.0, 0.25, 0.75, 0.25, 0.25]
    assert shares_below(torch.tensor([2.0])).tolist() == [0.0]


def test_a_direction_on_positives_alone_is_found_and_noise_is_not() -> None:
    """Four of twelve heads write two directions more on positives; the others write as much, the same on both."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0]
    writes = 0.05 * torch.randn(20, 12, 16, generator=draw)
    every = torch.arange(20)
    writes[:, 4:] += 2.0 * directions[every[:, None] % 10 % 3 + torch.arange(8)[None] % 4]
    for head in range(4):
        writes[10:, head] += 2.0 * directions[8]
        writes[:10, head] += 2.0 * directions[9 + every[:10] % 2 + 2 * (head % 2)]
    u = torch.stack(
        [unique_codes(codes_of(writes, Training(30, 0.02, 1e-3, 300, 10), seed), normalise=False) for seed in range(2)]
    ).mean(0)
    assert u[:4].min() >= 1
    assert u[:4].min() > u[4:].max()
    unrelated = torch.randn(200, 12, 16, generator=draw)  # the same on both halves but for chance
    shares = shares_below(unique_codes(codes_of(unrelated, Training(8, 0.02, 1e-3, 50, 10), 0), normalise=False))
    assert 0.2 < float(shares[:4].mean()) < 0.8


def test_the_same_seed_gives_the_same_codes() -> None:
    writes = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(1))
    training = Training(20, 0.02, 1e-3, 20, 4)
    before = torch.random.get_rng_state()
    assert torch.equal(codes_of(writes, training, 3), codes_of(writes, training, 3))
    assert not torch.equal(codes_of(writes, training, 3), codes_of(writes, training, 4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_auto_encoder_is_that_of_the_paper() -> None:
    """Two steps of Adam on weights on the sphere, against the loss put down once more."""
    draw = torch.Generator().manual_seed(2)
    writes = torch.randn(3, 2, 4, generator=draw, dtype=torch.float32)
    encode_by = module._trained(writes, Training(5, 0.3, 0.05, 2, 3), torch.Generator().manual_seed(7))
    again = torch.Generator().manual_seed(7)
    w_e = torch.nn.Parameter(torch.empty(5, 4).normal_(generator=again))
    a = torch.nn.Parameter(torch.empty(5).uniform_(-0.5, 0.5, generator=again))
    w_d = torch.nn.Parameter(torch.empty(4, 5).normal_(generator=again))
    b = torch.nn.Parameter(torch.zeros(4))
    adam = torch.optim.Adam([w_e, a, w_d, b], lr=0.05)
    for _ in range(2):
        for matrix in (w_e, w_d):
            matrix.data /= matrix.data.norm(dim=1, keepdim=True)
        c = ((writes - b) @ w_e.T + a).clamp(min=0)
        error = (c @ w_d.T + b - writes).pow(2).sum() / writes.numel()
        gradients = torch.autograd.grad(error + 0.3 * c.sum() / 6, [w_e, a, w_d, b])
        for parameter, gradient in zip((w_e, a, w_d, b), gradients, strict=True):
            along = (gradient * parameter).sum(1, keepdim=True) * parameter if gradient.dim() == 2 else 0.0
            parameter.grad = (gradient - along).detach()
        adam.step()
    expected = ((writes[0] - b) @ (w_e / w_e.norm(dim=1, keepdim=True)).T + a).clamp(min=0).detach()
    torch.testing.assert_close(encode_by(writes[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writes_are_those_of_the_heads_at_the_prompt(name: str) -> None:
    """Means over a prompt's own tokens, or the last of them; answers and padding are no part of either."""
    texts = of_ids(*PAIRS)
    with hw.load(f"zoo:tiny-{name}") as model:
        mean, last = module._writes(model, texts, "mean"), module._writes(model, texts, "last")
        for row, (prompt, _) in enumerate(PAIRS):
            with torch.no_grad(), model.reading(hw.read.write()) as got:
                model(input_ids=torch.tensor([prompt]))
            expected: Tensor = torch.cat([got.write[site.label][0] for site in model.sites], dim=1)
            torch.testing.assert_close(mean[row], expected.mean(0), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(last[row], expected[-1], rtol=1e-3, atol=1e-5)


def test_planted_heads_that_write_otherwise_on_twins_stand_out() -> None:
    """At the last token: nobody is inhibited on a twin, so the mover and its decoy take in two names there."""
    organism, model = built()
    scores = find(METHODS[0], model, items(), position="last", **QUICK)
    assert scores.item_ids == ("all-items",)
    named = HeadSet(tuple(organism.truth.named(name) for name in ("inhibitor", "mover", "mover-decoy")))
    assert scores.top(3) == named
    assert scores.top(1) == HeadSet((organism.truth.named("inhibitor"),))
    unmoved = organism.truth.named("same-token")  # it marks the second name, and does nothing at the end
    assert float(scores.of(unmoved)[0]) <= min(each.score for each in scores.ranked()) + 0.2


def test_twins_that_are_the_items_leave_no_head_out() -> None:
    same = replace(items(), items=tuple(replace(each, twin=EncodedTwin(each.prompt, (), {})) for each in items()))
    found = codes(built()[1], same, n_codes=10, epochs=5, trials=1)
    assert {float(value) for values in found.values() for value in values.flatten()} == {0.5}


def test_bad_input_is_one_line() -> None:
    model, texts = built()[1], of_ids(*PAIRS)
    with pytest.raises(InputError, match="position='end' is not known; choose from mean, last"):
        codes(model, texts, position="end")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="examples=10 cannot be drawn from 6 texts"):
        codes(model, texts)
    with pytest.raises(InputError, match="trials=0"):
        codes(model, texts, trials=0)
    with pytest.raises(InputError, match="give at least 2 codes"):
        codes(model, texts, n_codes=1)
    bare = replace(items(), items=tuple(replace(each, twin=None) for each in items()))
    with pytest.raises(Refusal, match="has no corrupted twin"):
        find(METHODS[0], model, bare)
    with pytest.raises(InputError, match="has no corrupted twin"):
        codes(model, bare)
    with hw.load("zoo:tiny-t5") as two, pytest.raises(Refusal, match="does not continue a text"):
        codes(two, texts, examples=2)
