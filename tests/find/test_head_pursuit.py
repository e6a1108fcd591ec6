"""Head Pursuit: matching pursuit against least squares, and heads whose writes are made of known words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find import find
from headwise.find.head_pursuit import METHODS, answer_tokens, concept_tokens, head_pursuit, pursue
from headwise.model.attached import AttachedModel
from headwise.model.direct import direct_paths
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item

WORDS = (20, 33, 47)
HEAD = "L1H2"


def items(answers: tuple[int, ...] = WORDS) -> ItemSet:
    prompts = ([1, 9, 10, 11], [1, 12, 13, 14, 15, 16], [1, 40, 9], [1, 41, 8, 42, 43, 44, 45], [1, 60, 61, 62])
    rows = [
        EncodedItem(Item(prompt="", answer="", id=f"i{n}"), tuple(p), (answers[n % len(answers)],), (), (), {}, None)
        for n, p in enumerate(prompts)
    ]
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


def by_least_squares(h: Tensor, d: Tensor, atoms: int) -> tuple[list[int], list[float]]:
    """The definition, step by step: choose, fit all that is chosen anew, take what is left."""
    d = d / d.norm(dim=-1, keepdim=True)
    chosen: list[int] = []
    explained = []
    left = h
    for _ in range(atoms):
        gains = (left @ d.T).abs().sum(0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        basis = d[chosen]
        left = h - torch.linalg.lstsq(basis.T, h.T).solution.T @ basis
        explained.append(1 - float(left.square().sum() / h.square().sum()))
    return chosen, explained


def test_the_pursuit_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    d = torch.randn(9, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 10)[:, None]
    found = pursue(h, d, 6)
    rows, explained = by_least_squares(h, d, 6)
    assert list(found.rows) == rows
    assert found.explained == pytest.approx(explained)
    assert found.ratio == found.explained[-1]
    assert list(found.explained) == sorted(found.explained)


def test_what_is_made_of_some_rows_is_explained_by_them_in_as_many_steps() -> None:
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    h = torch.randn(50, 3, generator=generator, dtype=torch.float64) @ d[[4, 17, 30]]
    found = pursue(h, d, 10)
    assert set(found.rows) == {4, 17, 30}
    assert found.ratio == pytest.approx(1.0)
    assert pursue(h, d[5:17], 10).ratio < 0.5


def test_the_token_taken_speaks_for_all_items_and_not_for_the_loudest() -> None:
    """By the sum of sizes over items: 4 times 1 is more than once 3, though its square is not."""
    h = torch.tensor([[3.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]])
    assert pursue(h, torch.eye(2), 1).rows == (1,)
    assert pursue(h, torch.eye(2), 2).rows == (1, 0)


def test_rows_that_add_nothing_and_heads_that_write_nothing() -> None:
    d = torch.eye(4, dtype=torch.float64)[[0, 0, 1]]
    h = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    found = pursue(h, torch.cat([d, torch.zeros(1, 4)]), 10)
    assert found.rows == (0, 2)
    assert found.ratio == pytest.approx(10 / 11)
    assert pursue(torch.zeros(2, 4), d, 3).ratio == 0.0


@pytest.fixture(params=["llama", "gpt2", "gemma2", "granite"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def write_words(model: AttachedModel) -> None:
    """One head's part of the output projection is made of the words' rows, gains and centring of norms included."""
    site = model.site("L1")
    network: Any = model.model
    rows = direct_paths(model).of_rows(network.get_output_embeddings().weight.detach()[list(WORDS)])["L1"]
    mixed = torch.randn(site.head_dim, len(WORDS), generator=torch.Generator().manual_seed(0)) @ rows.float()
    projection = network.get_submodule(site.projection)
    columns = slice(2 * site.head_dim, 3 * site.head_dim)
    with torch.no_grad():
        if isinstance(projection, torch.nn.Linear):
            projection.weight[:, columns] = mixed.T
        else:
            projection.weight[columns] = mixed


def test_a_head_made_of_the_words_is_explained_by_them_and_by_no_others(model: AttachedModel) -> None:
    write_words(model)
    scores = find(METHODS[0], model, items(), atoms=3)
    assert scores.item_ids == ("all-items",)
    assert scores.top(1).labels == (HEAD,)
    assert float(scores.of(HEAD)[0]) == pytest.approx(1.0, abs=1e-5)
    assert scores.ranked()[1].score < 0.9
    assert float(find(METHODS[0], model, items((21, 34, 48)), atoms=3).of(HEAD)[0]) < 0.9
    assert float(find(METHODS[0], model, items(), atoms=1).of(HEAD)[0]) < 0.999


def test_rows_of_the_dictionary_are_what_a_write_adds_to_the_logits() -> None:
    """Against autograd: with scales held, a word's logit by a head's write is its row times one factor per position."""
    with hw.load("zoo:tiny-llama") as model:
        network: Any = model.model
        rows = direct_paths(model).of_rows(network.lm_head.weight.detach()[list(WORDS)])
        norm = network.model.norm
        stream = torch.randn(32, generator=torch.Generator().manual_seed(2))
        held = float((stream.square().mean() + 1e-6).rsqrt())
        added = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 1e-3
        logit = network.lm_head(norm.weight * added * held)[list(WORDS)]
        for label in ("L0", "L2"):
            assert torch.allclose(rows[label] @ added * held, logit, atol=1e-6)


def test_the_baseline_is_what_is_written_into_the_words_less_into_all(model: AttachedModel) -> None:
    given = items()
    scores = find(METHODS[0], model, given, by="logit-lens")
    network: Any = model.model
    weights = network.get_output_embeddings().weight.detach()
    paths = direct_paths(model)
    direction = (paths.of_rows(weights[list(WORDS)])["L1"].mean(0) - paths.of_rows(weights)["L1"].mean(0)).double()
    total = 0.0
    for each in given:
        with torch.no_grad(), model.reading(hw.read.write("L1")) as got:
            model(input_ids=torch.tensor([each.prompt]))
        total += float(got.write[HEAD][0, -1].double() @ direction)
    assert float(scores.of(HEAD)[0]) == pytest.approx(total / len(given), rel=1e-3, abs=1e-6)


def test_scores_do_not_hang_on_batches_or_on_padding(model: AttachedModel) -> None:
    own = head_pursuit(model, items(), concept="", atoms=2)
    batched = {}
    rows = items().items
    for order in (rows, rows[::-1]):
        turned = head_pursuit(model, ItemSet("made", order, {}, "cross-entropy", pad=0), atoms=2)
        batched[len(batched)] = turned
    for site, values in own.items():
        for other in batched.values():
            assert torch.allclose(values, other[site], atol=1e-5)


def test_a_concept_is_given_in_words() -> None:
    with hw.load("zoo:organism") as model:
        tokenizer = model.tokenizer
        found = concept_tokens(tokenizer, "Rome, Paris")
        assert tokenizer(" Rome", add_special_tokens=False)["input_ids"][0] in found
        assert tokenizer(" Paris", add_special_tokens=False)["input_ids"][0] in found
        assert len(found) == len(set(found)) <= 4
        facts = hw.encode(hw.probe("facts"), tokenizer, n=12)
        assert answer_tokens(facts) == list(dict.fromkeys(each.answer[0] for each in facts))
        named = find("head-pursuit", model, facts, concept="Rome Paris", atoms=2)
        answers = find("head-pursuit", model, facts, atoms=2)
        assert named.ranked() != answers.ranked()
        assert named.provenance.settings["concept"] == "Rome Paris"


def test_what_is_no_concept_is_refused() -> None:
    with hw.load("zoo:tiny-llama") as model:
        with pytest.raises(InputError, match="no word"):
            head_pursuit(model, items(), concept=" , ")
        with pytest.raises(InputError, match="steps"):
            head_pursuit(model, items(), atoms=0)
        with pytest.raises(InputError, match="by="):
            head_pursuit(model, items(), by="lens")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer"):
        concept_tokens(None, "Rome")


def captions() -> ItemSet:
    """Answers of several tokens, some of them words of the concept, each time elsewhere."""
    answers = ((20, 9, 33), (9, 20), (8, 8, 47, 20), (9,))
    rows = [
        EncodedItem(Item(prompt="", answer="", id=f"c{n}"), tuple(p), a, (), (), {}, None)
        for n, (p, a) in enumerate(zip(([1, 9, 10, 11], [1, 12], [1, 40, 9], [1, 41, 8, 42, 43]), answers, strict=True))
    ]
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


@pytest.mark.parametrize("at", ["answer", "concept"])
def test_writes_before_the_tokens_of_a_caption(model: AttachedModel, at: Any) -> None:
    """Against every text by itself, cut before each such token."""
    given = captions()
    made = ItemSet("made", given.items[:3], {}, "cross-entropy", pad=0)
    ids = answer_tokens(made)  # 20, 9 and 8: the answers' first tokens
    rows = []
    for each in made:
        for place, token in enumerate(each.answer):
            if at == "answer" or token in ids:
                with torch.no_grad(), model.reading(hw.read.write("L1")) as got:
                    model(input_ids=torch.tensor([each.prompt + each.answer[:place]]))
                rows.append(got.write["L1"][0, -1])
    network: Any = model.model
    dictionary = direct_paths(model).of_rows(network.get_output_embeddings().weight.detach()[ids])["L1"]
    expected = [pursue(torch.stack(rows)[:, head], dictionary, 2).ratio for head in range(rows[0].shape[0])]
    scores = find(METHODS[0], model, made, atoms=2, at=at)
    assert [float(scores.of(f"L1H{head}")[0]) for head in range(len(expected))] == pytest.approx(expected, abs=1e-4)
    assert len(rows) == (9 if at == "answer" else 7)


def test_a_concept_that_no_answer_has_comes_before_nothing(model: AttachedModel) -> None:
    with pytest.raises(InputError, match="no answer"):
        head_pursuit(model, items(), concept="~", at="concept")
