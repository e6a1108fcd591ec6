"""What holds for every probe under every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from headwise.errors import InputError
from headwise.probes import PROBES, EncodedItem, ItemSet, Probe, Quote, Range, encode, probe
from headwise.probes.item import Spans

TOKENIZERS = ("bytes", "words", "pieces", "own")  # conftest.py makes them
N = 5

Built = Callable[[str], PreTrainedTokenizerBase]
Encoded = Callable[[str, str], ItemSet]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)
every_pair = pytest.mark.parametrize(
    ("probe", "tokenizer"),
    [(probe, name) for probe in PROBES for name in TOKENIZERS if name == "bytes" or not probe.one_token],
    ids=lambda each: each if isinstance(each, str) else each.id,
)
every_probe = pytest.mark.parametrize("probe", PROBES, ids=lambda each: each.id)


@pytest.fixture(scope="session")
def encoded(built: Built) -> Encoded:
    """The first items of a probe as one of the tokenizers writes them."""
    return cache(lambda id, tokenizer: encode(probe(id), built(tokenizer), n=N))


def same(one: str, other: str) -> bool:
    """Whether two texts are the same but for blanks, case and WordPiece's mark of a word that goes on."""
    return bare(one) == bare(other)


def bare(text: str) -> str:
    return "".join(text.replace("##", "").split()).lower()


def check_spans(tokenizer: PreTrainedTokenizerBase, item: EncodedItem) -> None:
    twin, source = item.twin, item.item.twin
    check_quotes(tokenizer, item.item.spans, str(item.item.prompt), item.spans, item.prompt)
    if twin is not None and source is not None:
        check_quotes(tokenizer, source.spans, str(source.prompt), twin.spans, twin.prompt)


def check_quotes(
    tokenizer: PreTrainedTokenizerBase, spans: Spans, prompt: str, found: object, ids: tuple[int, ...]
) -> None:
    assert isinstance(found, dict)
    assert found.keys() == spans.keys()
    for name, places in spans.items():
        assert len(found[name]) == len(places)
        for place, positions in zip(places, found[name], strict=True):
            where = place.find(prompt) if isinstance(place, Quote) else place
            assert isinstance(where, Range)
            assert list(positions) == list(range(positions[0], positions[-1] + 1))
            assert same(tokenizer.decode([ids[p] for p in positions]), prompt[where.start : where.stop])
        # Places in the order of the text are positions in the order of the tokens.
        order = sorted(range(len(places)), key=lambda i: places[i].start)  # type: ignore[union-attr]
        assert order == sorted(range(len(places)), key=lambda i: found[name][i][0])


def check_texts(tokenizer: PreTrainedTokenizerBase, item: EncodedItem) -> None:
    """Ids say the text, and nothing in front or behind that the tokenizer does not put there itself."""
    text = str(item.item.prompt) + item.item.answer
    assert same(tokenizer.decode(item.prompt + item.answer, skip_special_tokens=True), text)
    whole = tokenizer(text)["input_ids"]
    assert tuple(whole[: len(item.prompt) + len(item.answer)]) == item.prompt + item.answer
    for ids, texts in ((item.also, item.item.also), (item.foils, item.item.foils)):
        assert all(same(tokenizer.decode(each), said) for each, said in zip(ids, texts, strict=True))


def check_twin(tokenizer: PreTrainedTokenizerBase, item: EncodedItem) -> None:
    twin, source = item.twin, item.item.twin
    if twin is None or source is None:
        assert twin is None
        assert source is None
        return
    assert len(twin.prompt) == len(item.prompt)
    assert same(tokenizer.decode(twin.prompt, skip_special_tokens=True), str(source.prompt))
    assert bool(twin.answer) == bool(source.answer)
    words, others = str(item.item.prompt).split(), str(source.prompt).split()
    if len(words) == len(others):
        one, other = word_ends(tokenizer, words, item.prompt), word_ends(tokenizer, others, twin.prompt)
        assert all(one[word] == other[word] for word in one.keys() & other.keys())
        assert len(one) > 0.5 * len(words)


def word_ends(tokenizer: PreTrainedTokenizerBase, words: list[str], ids: tuple[int, ...]) -> dict[int, int]:
    """Index of a word -> how many tokens the text has up to its end, for the words that end where a token does."""
    lengths = accumulate(len(bare(tokenizer.decode([token], skip_special_tokens=True))) for token in ids)
    tokens = {length: count for count, length in enumerate(lengths, start=1)}
    ends = accumulate(len(bare(word)) for word in words)
    return {word: tokens[end] for word, end in enumerate(ends) if end in tokens}


@every_pair
def test_items_hold_what_their_text_says(built: Built, encoded: Encoded, probe: Probe, tokenizer: str) -> None:
    items = encoded(probe.id, tokenizer)
    assert len(items) == N
    for item in items:
        check_texts(built(tokenizer), item)
        check_spans(built(tokenizer), item)
        check_twin(built(tokenizer), item)


@given(probe=st.sampled_from(PROBES), tokenizer=st.sampled_from(TOKENIZERS), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_so_do_those_of_any_seed(built: Built, probe: Probe, tokenizer: str, seed: int) -> None:
    tokenizer = "bytes" if probe.one_token else tokenizer
    for item in encode(probe, built(tokenizer), n=2, seed=seed):
        check_texts(built(tokenizer), item)
        check_spans(built(tokenizer), item)
        check_twin(built(tokenizer), item)


@every_pair
def test_what_is_drawn_is_kept_or_counted(encoded: Encoded, probe: Probe, tokenizer: str) -> None:
    items = encoded(probe.id, tokenizer)
    drawn = list(islice(probe.items(0), len(items) + items.n_dropped))
    assert [each.id for each in drawn if each.id in items.ids] == list(items.ids)
    assert drawn[-1].id == items.ids[-1]


@every_probe
def test_an_id_is_the_same_question_for_every_tokenizer(encoded: Encoded, probe: Probe) -> None:
    texts: dict[str, tuple[object, ...]] = {}
    for tokenizer in ("bytes",) if probe.one_token else TOKENIZERS:
        for each in encoded(probe.id, tokenizer):
            text = (each.item.prompt, each.item.answer, each.item.twin and each.item.twin.prompt)
            assert texts.setdefault(each.id, text) == text
    assert len(set(texts.values())) == len(texts)


@every_tokenizer
def test_two_tokenizers_share_most_items(encoded: Encoded, tokenizer: str) -> None:
    shared = set(encoded("choice", "own").ids) & set(encoded("choice", tokenizer).ids)
    assert shared, "or a comparison of two models would have nothing to compare"


@every_tokenizer
@pytest.mark.parametrize("id", ["needle", "facts", "refusal"])
def test_no_row_is_longer_than_asked_for(built: Built, encoded: Encoded, id: str, tokenizer: str) -> None:
    items = encoded(id, tokenizer)
    lengths = sorted(len(each.prompt) + max(len(a) for a in all_answers(each)) for each in items)
    limit = lengths[len(lengths) // 2]
    short = encode(probe(id), built(tokenizer), n=2, max_tokens=limit)
    for each in short:
        assert len(each.prompt) + max(len(answer) for answer in all_answers(each)) <= limit
    for batch in short.twins().batches(2):
        assert batch.input_ids.shape[1] <= 2 * limit
    with pytest.raises(InputError, match="longer than 3 tokens"):
        encode(probe(id), built(tokenizer), n=1, max_tokens=3)


def all_answers(item: EncodedItem) -> list[tuple[int, ...]]:
    return [item.answer, *item.also, *item.foils, *([item.twin.answer] if item.twin else [])]


@every_tokenizer
def test_answers_of_one_token(built: Built, tokenizer: str) -> None:
    assert {len(each.answer) for each in encode(probe("choice"), built(tokenizer), n=4, one_token=True)} == {1}
    needle = probe("needle").over(words=[0])
    with pytest.raises(InputError, match="an answer has several tokens where one is needed"):
        encode(needle, built(tokenizer), n=1, one_token=True)


@every_pair
def test_rows_of_a_batch_are_the_items(encoded: Encoded, probe: Probe, tokenizer: str) -> None:
    items = encoded(probe.id, tokenizer)
    seen = []
    for batch in items.batches(3):
        assert set(probe.spans) <= set(batch.spans)
        for row, item in enumerate(batch.items):
            seen.append(item.id)
            attended = batch.attention_mask[row].bool()
            assert batch.input_ids[row, attended].tolist() == [*item.prompt, *item.answer[:-1]]
            assert batch.input_ids[row, batch.prompt_length - len(item.prompt) : batch.prompt_length].tolist() == list(
                item.prompt
            )
            assert batch.answers[row, batch.answer_mask[row]].tolist() == list(item.answer)
            assert batch.position_ids[row, attended].tolist() == list(range(int(attended.sum())))
            assert (batch.input_ids[row, ~attended] == items.pad).all()
            for name, columns in batch.spans.items():
                positions = [p for place in item.spans[name] for p in place]
                assert batch.input_ids[row, columns[row]].tolist() == [item.prompt[p] for p in positions]
    assert tuple(seen) == items.ids
    assert torch.is_tensor(batch.input_ids)


@every_probe
def test_twins_take_the_place_of_the_items(encoded: Encoded, probe: Probe) -> None:
    items = encoded(probe.id, "bytes" if probe.one_token else "own")
    if probe.id == "text":
        with pytest.raises(InputError, match="has no twin"):
            items.twins()
        return
    if any(each.twin is None for each in items):
        items = items.only([each.twin is not None for each in items], "no twin")
    swapped = items.twins()
    assert swapped.ids == items.ids
    for item, twin in zip(items, swapped, strict=True):
        assert item.twin is not None
        assert (twin.prompt, twin.answer, twin.spans) == (item.twin.prompt, item.twin.answer, item.twin.spans)


def test_a_probe_of_single_tokens_is_refused_where_there_are_none(built: Built) -> None:
    with pytest.raises(InputError, match=r"0 of 5 items: .* an answer has several tokens where one is needed"):
        encode(probe("greater-than"), built("own"), n=5)
