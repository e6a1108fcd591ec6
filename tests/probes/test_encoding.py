"""Items as a tokenizer writes them: ids, positions and drops worked out by hand, on tokenizers small enough for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headwise.errors import InputError
from headwise.probes import Item, ItemSet, Message, Probe, Quote, Range, Twin, encode, probe
from headwise.zoo.planted.lexicon import own_tokenizer

LETTERS = "abcdefghij <>:."
BOS = 1


def letters(*merges: tuple[str, str], front: bool = True, **tokens: str | None) -> PreTrainedTokenizerFast:
    """One id a letter, `a` = 3, behind `<s>`; `merges` make one id of two, from 18 on."""
    vocabulary = {piece: index for index, piece in enumerate(("<pad>", "<s>", "</s>", *LETTERS))}
    vocabulary |= {one + two: len(vocabulary) + index for index, (one, two) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    if front:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def ids(text: str) -> tuple[int, ...]:
    return tuple(3 + LETTERS.index(letter) for letter in text)


def whole_words(*words: str, front: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerFast:
    """One id a word, whatever its case, between [CLS] = 1 and [SEP] = 2."""
    vocabulary = {word: index for index, word in enumerate(("[UNK]", "[CLS]", "[SEP]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=front, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def one(tokenizer: Any, item: Item, **options: Any) -> ItemSet:
    return encode([item], tokenizer, n=None, **options)


def dropped(tokenizer: Any, item: Item, **options: Any) -> str:
    """Why an item is dropped: beside one that is not, so that the set is not empty."""
    fine = Item(id="fine", prompt="a", answer=" a" if tokenizer.unk_token else ".")
    items = encode([fine, item], tokenizer, n=None, **options)
    assert items.ids == ("fine",)
    ((reason, count),) = items.dropped.items()
    assert count == items.n_dropped == 1
    return reason


def test_ids_and_positions() -> None:
    item = Item(
        id="x",
        prompt="ab cab",
        answer=" d",
        also=("e",),
        foils=("fg", "h"),
        spans={"first": (Range(0, 2),), "both": (Range(0, 2), Range(4, 6)), "c": (Quote("c"),), "b": (Quote("b", 1),)},
        twin=Twin(prompt="ij cij", answer="j", spans={"first": (Range(0, 2),)}),
    )
    (found,) = one(letters(), item)
    assert (found.item, found.id) == (item, "x")
    assert found.prompt == (BOS, *ids("ab cab"))
    assert found.answer == ids(" d")
    assert found.also == (ids("e"),)
    assert found.foils == (ids("fg"), ids("h"))
    assert found.spans == {"first": ((1, 2),), "both": ((1, 2), (5, 6)), "c": ((4,),), "b": ((6,),)}
    assert found.twin is not None
    assert (found.twin.prompt, found.twin.answer) == ((BOS, *ids("ij cij")), ids("j"))
    assert found.twin.spans == {"first": ((1, 2),)}


def test_what_stands_around_a_text() -> None:
    item = Item(id="x", prompt="Red ball", answer=" up", spans={"ball": (Quote("ball"),)})
    items = one(whole_words("red", "ball", "up", "a"), item)
    (found,) = items
    assert (found.prompt, found.answer, items.suffix) == ((1, 3, 4), (5,), (2,))
    assert found.spans == {"ball": ((2,),)}
    items = one(letters(front=False), Item(id="x", prompt="ab", answer="c", spans={"b": (Quote("b"),)}))
    assert (items.items[0].prompt, items.items[0].spans, items.suffix) == (ids("ab"), {"b": ((1,),)}, ())


def test_an_answer_that_melts_into_the_prompt_is_dropped() -> None:
    tokenizer = letters(("a", "b"))
    assert one(tokenizer, Item(id="x", prompt="ca", answer="c"))
    reason = "prompt and answer melt into one token"
    assert dropped(tokenizer, Item(id="x", prompt="ca", answer="b")) == reason
    assert dropped(tokenizer, Item(id="x", prompt="ca", answer="bcc")) == reason, "though there are more ids"
    assert dropped(tokenizer, Item(id="x", prompt="ca", answer="c", also=("b",))) == reason
    assert dropped(tokenizer, Item(id="x", prompt="ca", answer="c", foils=("b",))) == reason
    assert dropped(tokenizer, Item(id="x", prompt="cc", answer="c", twin=Twin(prompt="ca", answer="b"))) == reason
    assert dropped(whole_words("j", "a"), Item(id="x", prompt="a", answer="\n")) == reason


def test_a_span_that_shares_a_token_is_dropped() -> None:
    tokenizer = letters(("a", "b"))
    whole = Item(id="x", prompt="cab", answer="c", spans={"ab": (Quote("ab"),)})
    assert one(tokenizer, whole).items[0].spans == {"ab": ((2,),)}
    for quote in ("a", "b", "ca"):
        item = replace(whole, spans={"it": (Quote(quote),)})
        assert dropped(tokenizer, item) == "span 'it' shares a token with its surroundings"
    blank = Item(id="x", prompt="a\na", answer=" a", spans={"line end": (Range(1, 2),)})
    assert dropped(whole_words("a", "j"), blank) == "span 'line end' shares a token with its surroundings"


def test_a_blank_in_the_token_of_a_word_is_part_of_it() -> None:
    tokenizer = letters((" ", "a"))
    item = Item(id="x", prompt="b a", answer="c", spans={"a": (Quote("a"),)})
    assert one(tokenizer, item).items[0].spans == {"a": ((2,),)}
    assert one(letters(), item).items[0].spans == {"a": ((3,),)}, "a blank that is a token of its own is not"


def test_case_that_a_tokenizer_forgets_does_not_move_a_span() -> None:
    tokenizer = whole_words("may", "mayhem", "a")
    item = Item(id="x", prompt="May mayhem", answer=" a", spans={"it": (Quote("may"),)})
    assert dropped(tokenizer, replace(item)) == "span 'it' shares a token with its surroundings"
    item = Item(id="x", prompt="May may", answer=" a", spans={"it": (Quote("may"),)})
    assert one(tokenizer, item).items[0].spans == {"it": ((2,),)}


class Slow:
    """A tokenizer that does not tell which characters its tokens cover."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast

    def __call__(self, text: str, **options: Any) -> Any:
        return self.fast(text, **options)

    def __getattr__(self, name: str) -> Any:
        return False if name == "is_fast" else getattr(self.fast, name)


def test_spans_are_found_by_their_ids_alone() -> None:
    tokenizer = Slow(letters(("a", "b")))
    item = Item(id="x", prompt="cab ab", answer="c", spans={"second": (Quote("ab", 1),)})
    assert one(tokenizer, item).items[0].spans == {"second": ((4,),)}
    assert dropped(tokenizer, replace(item, spans={"it": (Quote("ca"),)})) == "span 'it' is not found in the tokens"


def test_twins_have_as_many_tokens_word_by_word() -> None:
    tokenizer = letters(("a", "b"))
    assert one(tokenizer, Item(id="x", prompt="ab c", answer="c", twin=Twin(prompt="d c")))
    reason = "its twin has another number of tokens"
    assert dropped(tokenizer, Item(id="x", prompt="ab c", answer="c", twin=Twin(prompt="de c"))) == reason
    shifted = Item(id="x", prompt="ab c de", answer="c", twin=Twin(prompt="de c ab"))
    assert dropped(tokenizer, shifted) == "its twin is shifted against it inside"
    assert one(tokenizer, replace(shifted, twin=Twin(prompt="decdec"))), "other words, so nothing to compare"


@pytest.mark.parametrize(
    "item",
    [
        Item(id="x", prompt="abcd", answer="ef"),
        Item(id="x", prompt="abcd", answer="e", also=("ef",)),
        Item(id="x", prompt="abcd", answer="e", foils=("ff",)),
        Item(id="x", prompt="abcd", answer="e", twin=Twin(prompt="dcba", answer="ef")),
    ],
)
def test_what_is_too_long_is_dropped(item: Item) -> None:
    assert len(one(letters(), item, max_tokens=7)) == 1
    assert dropped(letters(), item, max_tokens=6) == "longer than 6 tokens"
    assert dropped(letters(model_max_length=6), item) == "longer than 6 tokens"  # type: ignore[arg-type]
    assert len(one(letters(model_max_length=6), item, max_tokens=7)) == 1  # type: ignore[arg-type]


def test_one_token_asks_for_an_answer_of_one() -> None:
    item = Item(id="x", prompt="a", answer="cd")
    assert len(one(letters(), item)) == 1
    assert dropped(letters(), item, one_token=True) == "an answer has several tokens where one is needed"
    assert len(one(letters(("c", "d")), item, one_token=True)) == 1


def test_an_empty_prompt_is_dropped() -> None:
    assert dropped(letters(), Item(id="x", prompt="", answer="a")) == "the prompt is empty"


def counted() -> Probe:
    """A probe whose item says which of 26 it is; every other one melts in `letters(("a", "b"))`."""

    def make(random: Any, *, ending: str) -> Item:
        return Item(prompt=f"{random.choice('cdefghij')}{random.choice('cdefghij')}{ending}", answer="b")

    return Probe(id="counted", title="t", page="p", make=make, metric="m", chance=None, grid={"ending": ("a", "c")})


def test_the_first_that_can_be_expressed_are_used_and_the_others_counted() -> None:
    some = counted()
    items = encode(some, letters(("a", "b")), n=10, seed=3)
    stream = some.items(3)
    drawn = []
    for item in stream:
        drawn.append(item)
        if sum(each.prompt[-1] == "c" for each in drawn) == 10:  # type: ignore[index]
            break
    assert items.ids == tuple(each.id for each in drawn if each.prompt[-1] == "c")  # type: ignore[index]
    assert items.dropped == {"prompt and answer melt into one token": len(drawn) - 10}
    assert (items.probe, items.metric, items.seed, items.settings) == ("counted", "m", 3, {"ending": ("a", "c")})


def test_all_of_a_file_are_used_and_fewer_than_asked_for_are_an_error() -> None:
    own = [Item(id=str(number), prompt="a" * number, answer="b") for number in range(1, 101)]
    items = encode(own, letters(), name="own")
    assert (len(items), items.probe, items.metric) == (100, "own", "answer-log-probability")
    assert len(encode(own, letters(), n=5)) == 5
    with pytest.raises(InputError, match="can express 100 of 101 items; there are no more"):
        encode(own, letters(), n=101)


def test_a_probe_without_a_number_gives_64() -> None:
    assert len(encode(probe("hash"), own_tokenizer())) == 64


def test_a_word_that_the_tokenizer_does_not_know_is_counted() -> None:
    tokenizer = whole_words("a", "b", "c")
    item = Item(id="x", prompt="a b", answer=" c")
    assert one(tokenizer, item)
    for wrong in (
        replace(item, prompt="a new b"),
        replace(item, answer=" new"),
        replace(item, foils=(" new",)),
        replace(item, twin=Twin(prompt="a new")),
        replace(item, twin=Twin(prompt="b a", answer=" new")),
    ):
        assert dropped(tokenizer, wrong) == "a word is unknown to this tokenizer"


def test_a_twin_that_is_the_same_to_the_tokenizer_is_dropped() -> None:
    item = Item(id="x", prompt="a b", answer=" a", twin=Twin(prompt="A b", answer=" b"))
    assert dropped(whole_words("a", "b"), item) == "its twin is the same to this tokenizer"


def test_a_slow_tokenizer_sees_a_shifted_twin_too() -> None:
    fast = letters(("a", "b"))

    class Slow:
        is_fast, unk_token, pad_token_id, model_max_length = False, None, 0, 10**30
        convert_ids_to_tokens = None

        def __call__(self, text: str, **options: Any) -> Any:
            return fast(text, **options)

    item = Item(id="x", prompt="ab c de", answer="c", twin=Twin(prompt="de c ab"))
    assert dropped(Slow(), item) == dropped(fast, item) == "its twin is shifted against it inside"


@pytest.mark.parametrize("id", ["facts", "choice", "conflict", "ioi", "arithmetic", "hash"])
def test_partners_have_answers_and_foils_of_their_own(id: str) -> None:
    items = encode(probe(id), own_tokenizer(), n=8)
    for item, twin in zip(items, items.twins(), strict=True):
        assert item.item.twin is not None
        assert (twin.item.prompt, twin.item.answer) == (item.item.twin.prompt, item.item.twin.answer)
        assert twin.item.also == twin.also == ()
        assert len(twin.foils) == len(twin.item.foils)
        assert twin.answer not in twin.foils
        assert bool(twin.answer) == (item.answer in twin.foils)


def test_no_more_is_drawn_than_needed() -> None:
    def stream() -> Iterator[Item]:
        yield Item(id="x", prompt="a", answer="b")
        raise AssertionError("one was asked for")

    assert len(encode(stream(), letters(), n=1)) == 1


@pytest.mark.parametrize(
    ("items", "options", "said"),
    [
        ([], {}, "can express none of its items; there are no more"),
        ([{"prompt": "a"}], {}, "encode takes a probe or items, and one is a dict"),
        (None, {}, "encode takes a probe or items, not a NoneType"),
        ([Item(id="x", prompt="a", answer="b")], {"max_tokens": "9"}, "max_tokens='9' must be a whole number"),
        ([Item(id="x", prompt="a", answer="b")] * 2, {}, "items: two items have the id 'x'; give every item an id"),
        ([Item(id="x", prompt="a", answer="b")], {"n": 0}, "n must be a whole number of items, at least 1"),
        ([Item(id="x", prompt="a", answer="b")], {"n": 2.0}, "n must be a whole number of items, at least 1"),
        ([Item(id="x", prompt="a", answer="bc")], {"one_token": True}, "1 x an answer has several tokens"),
        ("ioi", {}, "write probe('ioi') or read_items('ioi')"),
        (counted(), {"n": 100}, "counted: this tokenizer and length can express 64 of 100 items"),
        ([Item(id="x", prompt="a", answer="b", spans={"s": (Quote("z"),)})], {}, "items, item x: span text 'z' is not"),
        ([Item(id="x", prompt="a", answer="b", spans={"s": (Range(0, 9),)})], {}, "span 's' is characters 0 to 9 of a"),
        ([Item(id="x", prompt="a", answer="b", spans={"s": (Range(1, 1),)})], {}, "give a range inside it"),
        ([Item(id="x", prompt=(Message("user", "a"),), answer="b")], {}, "item x: it has messages, and this tokenizer"),
    ],
)
def test_what_cannot_be_encoded_says_why(items: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        encode(items, letters(("a", "b")) if isinstance(items, Probe) else letters(), **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        encode(counted(), None)


CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_messages_become_a_text_with_its_own_special_tokens() -> None:
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    item = Item(
        id="x",
        prompt=(Message("b", "cd"), Message("c", "ef")),
        answer="g",
        spans={"it": (Quote("ef"),)},
        twin=Twin(prompt=(Message("b", "cd"), Message("c", "hi")), spans={"it": (Quote("hi"),)}),
    )
    (found,) = one(tokenizer, item)
    assert found.prompt == (BOS, *ids("<b>cd<c>ef<a>")), "one <s>, the template's"
    assert found.answer == ids("g")
    assert found.spans == {"it": ((9, 10),)}
    assert found.twin is not None
    assert found.twin.prompt == (BOS, *ids("<b>cd<c>hi<a>"))
    assert found.twin.spans == {"it": ((9, 10),)}


def test_messages_that_the_template_refuses() -> None:
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    with pytest.raises(InputError, match=r"item x: the chat template refuses its messages \(no tools\)"):
        one(tokenizer, Item(id="x", prompt=(Message("tool", "a"),), answer="b"))


def three() -> ItemSet:
    texts = [("ab", "c", "ba"), ("abcd", "ef", "dcba"), ("j", "gh", "i")]
    items = [
        Item(
            id=prompt,
            prompt=prompt,
            answer=answer,
            spans={"last": (Range(len(prompt) - 1, len(prompt)),)} | ({"a": (Quote("a"),)} if "a" in prompt else {}),
            twin=Twin(prompt=twin, answer="j", spans={"last": (Range(0, 1),)}),
        )
        for prompt, answer, twin in texts
    ]
    return encode(items, letters(), n=None)


def test_rows_are_padded_on_the_left_and_answers_on_the_right() -> None:
    first, second = three().batches(2)
    a, b, c, d, e = ids("abcde")
    assert [item.id for item in first.items] == ["ab", "abcd"]
    assert first.input_ids.tolist() == [[0, 0, BOS, a, b, 0], [BOS, a, b, c, d, e]]
    assert first.attention_mask.tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert first.prompt_length == 5
    assert first.answers.tolist() == [[*ids("c"), -1], list(ids("ef"))]
    assert first.answer_mask.tolist() == [[True, False], [True, True]]
    assert first.position_ids[:, :5].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert first.position_ids[1, 5] == 5
    assert first.spans == {"last": [[4], [4]], "a": [[3], [1]]}
    assert second.spans == {"last": [[1]]}
    assert second.input_ids.tolist() == [[BOS, *ids("jg")]]


def test_without_answers_only_the_prompts_are_rows() -> None:
    (batch,) = three().batches(8, answers=False)
    assert batch.input_ids.shape == (3, 5) == (3, batch.prompt_length)
    assert batch.answers.shape == (3, 2)
    assert batch.spans == {"last": [[4], [4], [4]]}, "a span that one item lacks is no span of the batch"


def test_the_columns_of_a_span_hold_its_ids() -> None:
    for batch in three().batches(3):
        for row, columns in enumerate(batch.spans["last"]):
            item = batch.items[row]
            assert batch.input_ids[row, columns].tolist() == [item.prompt[p] for p in item.spans["last"][0]]


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_batch_has_a_size(size: Any) -> None:
    with pytest.raises(InputError, match="a batch has at least one item"):
        next(three().batches(size))


def test_a_part_of_a_set_counts_the_rest_as_dropped() -> None:
    items = replace(three(), dropped={"old": 2})
    part = items.only(torch.tensor([True, False, True]).tolist(), "wrong")
    assert part.ids == ("ab", "j")
    assert part.dropped == {"old": 2, "wrong": 1}
    assert part.only([True, True], "wrong").dropped == {"old": 2, "wrong": 1}
    assert part.only([False, False], "wrong").dropped == {"old": 2, "wrong": 3}
    assert items.dropped == {"old": 2}
    with pytest.raises(InputError, match="keep has 2 entries for 3 items"):
        items.only([True, False], "wrong")


def test_twins_in_place_of_the_items() -> None:
    items = three()
    twins = items.twins()
    assert twins.ids == items.ids
    assert [each.prompt for each in twins] == [(BOS, *ids(text)) for text in ("ba", "dcba", "i")]
    assert {each.answer for each in twins} == {ids("j")}
    assert [each.spans for each in twins] == [{"last": ((1,),)}] * 3
    with pytest.raises(InputError, match="item ab has no twin"):
        twins.twins()


@pytest.mark.parametrize(("tokens", "fill"), [({"pad_token": None}, 2), ({"pad_token": None, "eos_token": None}, 0)])
def test_without_a_pad_token_another_fills_the_rows(tokens: dict[str, None], fill: int) -> None:
    assert one(letters(**tokens), Item(id="x", prompt="a", answer="b")).pad == fill


def test_a_probe_has_a_tokenizer_of_any_kind_but_this() -> None:
    class Odd(Slow):
        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [5] if options.get("add_special_tokens", True) else [6]}

    with pytest.raises(InputError, match="with and without its special tokens"):
        encode(probe("ioi"), Odd(letters()))


def test_one_token_asks_it_of_wrong_answers_and_other_right_ones_too() -> None:
    for more in ({"foils": ("cd",)}, {"also": ("cd",)}):
        item = Item(id="x", prompt="a", answer="b", **more)  # type: ignore[arg-type]
        assert len(one(letters(), item)) == 1
        assert dropped(letters(), item, one_token=True) == "an answer has several tokens where one is needed"


@pytest.mark.parametrize(("answer", "foil"), [("c", "cd"), ("cd", "c"), ("c", "c")])
def test_a_foil_that_no_token_tells_from_the_answer_is_dropped(answer: str, foil: str) -> None:
    item = Item(id="x", prompt="a", answer=answer, foils=("b", foil))
    assert dropped(letters(), item) == "a wrong answer differs from the right one in no token"
    assert len(one(letters(), replace(item, foils=("b", "dc")))) == 1


def test_a_partner_has_no_other_right_answers() -> None:
    twin = Twin(prompt="b", answer="d")
    item = Item(id="x", prompt="a", answer="c", also=("e",), foils=("d", "f"), twin=twin)
    (swapped,) = one(letters(), item).twins()
    assert (swapped.item.also, swapped.also) == ((), ())
    assert (swapped.item.foils, swapped.foils) == (("c", "f"), (ids("c"), ids("f")))
