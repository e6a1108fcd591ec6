"""The retrieval score: scripted traces, the plain model step by step, and planted heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find, retrieval
from headwise.find.retrieval import METHODS, Counting, retrieval_score
from headwise.model.attention.rows import score_rows
from headwise.model.running import rowwork
from headwise.probes import probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item
from headwise.zoo.planted import Planted, planted

(RETRIEVAL,) = METHODS
SEEDS = {"llama": 0, "llama-gqa": 1, "gpt2": 2}

# -- scripted traces ---------------------------------------------------------------------------------------------------

PROMPT = torch.tensor([[9, 5, 6, 7, 8, 5]])
NEEDLE = torch.tensor([[False, True, True, True, False, False]])  # 5 6 7


def scripted(top: Sequence[Sequence[int]], emitted: Sequence[int], counting: Counting = "steps") -> list[float]:
    """Scores of heads whose strongest columns are `top[head][step]`."""
    return retrieval_score(torch.tensor([top]), torch.tensor([emitted]), PROMPT, NEEDLE, counting)[0].tolist()


def test_what_counts_as_a_hit() -> None:
    heads = {
        "copies": [1, 2, 3],
        "rests on the first token": [0, 0, 0],
        "in the needle, on another token": [2, 3, 1],
        "on the token, outside the needle": [5, 2, 2],
        "one column late": [2, 3, 4],
        "on what was written": [6, 7, 8],
        "twice right": [1, 2, 0],
    }
    found = scripted(list(heads.values()), [5, 6, 7])
    assert found == pytest.approx([1, 0, 0, 1 / 3, 0, 0, 2 / 3])


def test_said_twice() -> None:
    top, emitted = [[1, 2, 3, 1, 2, 3], [1, 0, 0, 1, 0, 0]], [5, 6, 7, 5, 6, 7]
    assert scripted(top, emitted) == pytest.approx([2, 2 / 3])
    assert scripted(top, emitted, "set") == pytest.approx([1, 1 / 3])


def test_a_token_missed_at_first_counts_later() -> None:
    assert scripted([[0, 1]], [5, 5], "set") == pytest.approx([1 / 3])


def test_a_needle_that_repeats_a_token() -> None:
    prompt, needle = torch.tensor([[4, 4, 3]]), torch.tensor([[True, True, True]])
    top, emitted = torch.tensor([[[0, 1]]]), torch.tensor([[4, 4]])
    assert float(retrieval_score(top, emitted, prompt, needle, "steps")) == pytest.approx(2 / 3)
    assert float(retrieval_score(top, emitted, prompt, needle, "set")) == pytest.approx(1 / 2)


def test_nothing_counts_behind_the_end_of_an_answer() -> None:
    assert scripted([[1, 2, 3]], [5, -1, -1]) == pytest.approx([1 / 3])


@given(some.data())
def test_it_is_the_formula(data: Any) -> None:
    items, heads, steps, columns = (data.draw(some.integers(1, 4)) for _ in range(4))

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        size = int(torch.tensor(shape).prod())
        return torch.tensor(data.draw(some.lists(some.integers(low, high), min_size=size, max_size=size))).view(shape)

    top, emitted = drawn(0, columns + 1, items, heads, steps), drawn(-1, 2, items, steps)
    prompt, needle = drawn(0, 2, items, columns), drawn(0, 1, items, columns).bool()
    needle[:, 0] = True
    for counting in retrieval.COUNTINGS:
        found = retrieval_score(top, emitted, prompt, needle, counting)
        for item in range(items):
            inside = {i for i in range(columns) if needle[item, i]}
            wanted = {int(prompt[item, i]) for i in inside}
            for head in range(heads):
                hits = [
                    int(emitted[item, t])
                    for t in range(steps)
                    if int(top[item, head, t]) in inside and prompt[item, top[item, head, t]] == emitted[item, t]
                ]
                expected = len(hits) / len(inside) if counting == "steps" else len(set(hits)) / len(wanted)
                assert float(found[item, head]) == pytest.approx(expected)


# -- the plain model, one item alone, no padding, no cache, and its own attention weights ------------------------------


@cache
def built(architecture: str) -> tuple[Planted, Any]:
    organism = planted(architecture, seed=SEEDS[architecture], attn="eager")  # type: ignore[arg-type]
    return organism, hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example)


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Any:
    yield
    built.cache_clear()


def traced(model: Any, tokenizer: Any, item: EncodedItem, steps: int) -> tuple[list[int], Tensor]:
    """What the model writes up to a line end or its end token, and each head's strongest column at each step."""
    written: list[int] = []
    top = []
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.tensor([[*item.prompt, *written]])
            output = model(input_ids=ids, output_attentions=True, use_cache=False)
            top.append(torch.stack([each[0, :, -1].argmax(dim=-1) for each in output.attentions]))
            written.append(int(output.logits[0, -1].argmax()))
            if "\n" in tokenizer.decode(written[-1:]) or written[-1] == model.generation_config.eos_token_id:
                break
    return written, torch.stack(top, dim=-1)


def expected_scores(model: Any, item: EncodedItem, steps: int) -> Tensor:
    """`[layer, head]`, by the words of the paper."""
    written, top = traced(model.model, model.tokenizer, item, steps)
    needle = {column for place in item.spans["needle"] for column in place}
    scores = torch.zeros(top.shape[:2], dtype=torch.float64)
    for step, token in enumerate(written):
        for layer, head in torch.cartesian_prod(torch.arange(top.shape[0]), torch.arange(top.shape[1])).tolist():
            column = int(top[layer, head, step])
            scores[layer, head] += column in needle and item.prompt[column] == token
    return scores / len(needle)


@pytest.mark.parametrize("architecture", SEEDS)
def test_batched_padded_and_cached_is_alone_and_uncached(architecture: str) -> None:
    organism, model = built(architecture)
    items = encode(probe("needle"), organism.tokenizer, n=8)
    assert len({len(each.prompt) for each in items}) > 4  # rows of different length, so there is padding
    found = find(RETRIEVAL, model, items, new_tokens=5).values["main"]
    counts = ~torch.tensor(found).isnan().any(dim=-1).any(dim=-1)
    assert 2 <= int(counts.sum()) < len(items)  # some are answered, some are not
    for row, item in enumerate(items):
        expected = expected_scores(model, item, 5)
        if counts[row]:
            assert found[row] == pytest.approx(expected.numpy())
            assert expected.max() > 0
        else:
            assert torch.tensor(found[row]).isnan().all()


def test_it_follows_heads_that_nobody_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights with sliding windows; the answers are nonsense, and every trial is made to count."""
    monkeypatch.setattr(retrieval, "rouge_1_recall", lambda outcome: torch.ones(len(outcome.batch.items)))
    with hw.load("zoo:tiny-gemma3_text", attn="eager") as model:
        ids = [tuple(range(20, 20 + length)) for length in (9, 14)]
        items = by_hand(model.tokenizer, [(each, each[2], tuple(range(len(each)))) for each in ids])
        found = model_scores(model, items, new_tokens=12)
        for row, item in enumerate(items):
            assert found[row] == pytest.approx(expected_scores(model, item, 12).numpy())


def model_scores(model: Any, items: ItemSet, **settings: Any) -> Any:
    return find(RETRIEVAL, model, items, **settings).values["main"]


# -- planted heads -----------------------------------------------------------------------------------------------------


def by_hand(tokenizer: Any, given: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]]) -> ItemSet:
    """Items from ids: prompt, answer, columns of the needle."""
    items = []
    for index, (ids, answer, columns) in enumerate(given):
        item = Item(prompt=tokenizer.decode(list(ids)), answer=tokenizer.decode([answer]), id=f"item-{index}")
        items.append(EncodedItem(item, ids, (answer,), (), (), {"needle": (columns,)}, None))
    return ItemSet("by-hand", tuple(items), {}, "exact-match", tokenizer.pad_token_id or 0)


def called_for(organism: Planted, behaviour: Any, n: int = 8) -> ItemSet:
    """Examples of a behaviour whose answer stands once in the prompt: that token is the needle."""
    drawn = organism.examples(behaviour, n)
    return by_hand(organism.tokenizer, [(each.ids, each.answer, (each.ids.index(each.answer),)) for each in drawn])


@pytest.mark.parametrize("architecture", SEEDS)
@pytest.mark.parametrize(
    ("behaviour", "role"), [("keys", "key-copy"), ("conflict", "context"), ("repeat", "induction")]
)
def test_planted_heads_are_found_and_with_them_their_decoys(architecture: str, behaviour: str, role: str) -> None:
    organism, model = built(architecture)
    scores = find(RETRIEVAL, model, called_for(organism, behaviour), new_tokens=1)
    mean = torch.tensor(scores.values["main"]).mean(dim=0)
    above = {f"L{layer}H{head}" for layer, head in (mean > 0.5).nonzero().tolist()}
    truth = organism.truth
    # A back-up's pattern rests on the first token while what it backs up is there.
    assert above == set(truth.heads(role).labels + truth.decoys(role).labels) - set(backing_up(organism))
    assert mean.max() == 1


def backing_up(organism: Planted) -> tuple[str, ...]:
    return organism.truth.heads("backup").labels


def test_a_decoder_without_the_needle_finds_nothing_there() -> None:
    """The needle one column further: nobody looks at it."""
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys")
    shifted = [replace(each, spans={"needle": ((each.spans["needle"][0][0] - 1,),)}) for each in items]
    found = torch.tensor(model_scores(model, replace(items, items=tuple(shifted)), new_tokens=1)).mean(dim=0)
    heads = organism.truth.heads("key-copy")
    assert all(found[head.layer, head.index] == 0 for head in heads.heads)


# -- trials ------------------------------------------------------------------------------------------------------------


def test_only_right_answers_count() -> None:
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys", 3)
    wrong = replace(items.items[1], item=replace(items.items[1].item, answer=" elsewhere"))
    mixed = replace(items, items=(items.items[0], wrong, items.items[2]))
    missing = torch.tensor(model_scores(model, mixed, new_tokens=1)).isnan()
    assert missing.all(dim=-1).all(dim=-1).tolist() == [False, True, False]
    assert missing.any(dim=-1).any(dim=-1).tolist() == [False, True, False]
    half = replace(items.items[1], item=replace(items.items[1].item, answer=items.items[1].item.answer + " elsewhere"))
    mixed = replace(items, items=(half,))
    assert not torch.tensor(model_scores(model, mixed, new_tokens=1, recall=0.4)).isnan().any()
    with pytest.raises(Refusal, match="answers none of 1 items"):
        model_scores(model, mixed, new_tokens=1)  # half the words are not more than half of them


def test_a_line_end_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys", 2)
    (line_end,) = organism.tokenizer("\n", add_special_tokens=False)["input_ids"]
    run = retrieval.observe

    def behind(*words: int) -> Any:
        def scripted_observe(*args: Any, **more: Any) -> Any:
            outcome = run(*args, **more)
            first = outcome.generated[:, :1]
            written = torch.cat([*(first if word < 0 else torch.full_like(first, word) for word in words)], dim=1)
            text = tuple(organism.tokenizer.decode(row) for row in written.tolist())
            return replace(outcome, generated=written, text=text)

        return scripted_observe

    first_step = model_scores(model, items, new_tokens=1)
    assert first_step.max() == 1
    monkeypatch.setattr(retrieval, "observe", behind(-1, line_end, -1))
    assert (model_scores(model, items, new_tokens=3) == first_step).all()
    monkeypatch.setattr(retrieval, "observe", behind(line_end, -1, -1))
    with pytest.raises(Refusal, match="answers none"):
        model_scores(model, items, new_tokens=3)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_mistakes_and_refusals() -> None:
    organism, model = built("llama-gqa")
    items = called_for(organism, "keys", 1)
    with pytest.raises(InputError, match="counting='both'"):
        model_scores(model, items, counting="both")
    with pytest.raises(InputError, match="recall=1"):
        model_scores(model, items, recall=1)
    with pytest.raises(Refusal, match="no span 'value'"):
        model_scores(model, items, span="value")
    with pytest.raises(Refusal, match="no answer"):
        model_scores(model, replace(items, items=(replace(items.items[0], answer=()),)))
    with hw.load("zoo:tiny-t5") as seq2seq, pytest.raises(Refusal, match="decoder-only"):
        model_scores(seq2seq, by_hand(seq2seq.tokenizer, [((20, 21, 22), 21, (1,))]))


def test_the_prompt_runs_through_the_kernel_and_rows_are_made_for_written_tokens_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One query a call, at the column that the next token is written from; 2 layers, a prefill and 3 steps."""
    made: list[tuple[int, int]] = []

    def noting(call: Any, heads: Tensor, queries: Tensor) -> Any:
        made.append((call.query.shape[2], queries.shape[-1]))
        return score_rows(call, heads, queries)

    monkeypatch.setattr(rowwork, "score_rows", noting)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.arange(1, 31).view(2, 15)
    with hw.attach(LlamaForCausalLM(config).eval()) as model:
        with model.reading(retrieval.strongest_keys(model)) as got:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
        assert [each.shape for each in got.rows["L1"]] == [(2, 4)] * 4
    assert made == [(15, 1)] * 2 + [(1, 1)] * 6
