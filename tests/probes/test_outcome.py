"""Runs on items: each number against the plain model on that item alone, without padding or headwise in between."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertLMHeadModel, GenerationConfig, LlamaModel

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item, Range
from headwise.probes.outcome import MARGIN, observe, places

OPEN = ExitStack()
LOGITS, GENERATION, EMBEDDING = frozenset({"logits"}), frozenset({"generation"}), frozenset({"embedding"})
SUFFIX = (2, 2)
"""The byte tokenizer puts nothing behind a text; encoders are given two ends of text here."""

TEXTS = (("a", " x"), ("three words in", " all"), ("the longest of the prompts", " q"))


@functools.cache
def load(name: str) -> AttachedModel:
    return OPEN.enter_context(hw.load(f"zoo:tiny-{name}"))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    load.cache_clear()


@functools.cache
def items_of(name: str) -> ItemSet:
    """Three items of different length, with a span on the last letter of each prompt; answers have 2, 4 and 2 ids."""
    items = [
        Item(id=prompt, prompt=prompt, answer=answer, spans={"end": (Range(len(prompt) - 1, len(prompt)),)})
        for prompt, answer in TEXTS
    ]
    return replace(encode(items, load(name).tokenizer, n=None), suffix=SUFFIX)


def whole(items: ItemSet) -> Any:
    return next(iter(items.batches(len(items))))


def alone(name: str, row: int, **more: Any) -> Any:
    """The plain model on one item: prompt and answer, nothing padded, nothing kept back."""
    model, item = load(name), items_of(name).items[row]
    with torch.no_grad():
        if getattr(model.model.config, "is_encoder_decoder", False):
            start = model.model.config.decoder_start_token_id
            decoder = torch.tensor([(start, *item.answer[:-1])])
            return model.model(input_ids=torch.tensor([item.prompt + SUFFIX]), decoder_input_ids=decoder, **more)
        return model.model(input_ids=torch.tensor([item.prompt + item.answer[:-1]]), **more)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart"])
def test_logits_are_those_of_the_item_alone(name: str) -> None:
    items = items_of(name)
    outcome = observe(load(name), whole(items), wants=LOGITS)
    assert outcome.logits is not None
    assert outcome.logits.shape[:2] == (3, 4)
    assert outcome.predicting.sum(dim=1).tolist() == [2, 4, 2]
    assert (outcome.generated, outcome.text, outcome.embedding) == (None, None, None)
    assert not outcome.logits.requires_grad
    for row, item in enumerate(items):
        expected = alone(name, row).logits[0, -len(item.answer) :]
        torch.testing.assert_close(outcome.logits[row, : len(item.answer)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_the_continuation_is_what_taking_the_best_token_again_and_again_gives(name: str) -> None:
    items = items_of(name)
    outcome = observe(load(name), whole(items), wants=GENERATION, new_tokens=3)
    assert outcome.generated is not None
    assert outcome.text is not None
    for row, item in enumerate(items):
        written = outcome.generated[row][outcome.generated[row] >= 0].tolist()
        assert written == by_hand(name, item.prompt, 3)
        assert outcome.text[row] == load(name).tokenizer.decode(written, skip_special_tokens=True)


def by_hand(name: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Greedy decoding without a cache."""
    model = load(name).model
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    written: list[int] = []
    with torch.no_grad():
        while len(written) < tokens and written[-1:] != [2]:
            if seq2seq:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *written]])
                logits = model(input_ids=torch.tensor([prompt + SUFFIX]), decoder_input_ids=decoder).logits
            else:
                logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits
            written.append(int(logits[0, -1].argmax()))
    return written


def test_what_a_checkpoint_asks_of_generation_is_put_aside_and_put_back() -> None:
    model, items = load("llama"), items_of("llama")
    plain = observe(model, whole(items), wants=GENERATION, new_tokens=4).generated
    assert plain is not None
    own = model.model.generation_config
    loud = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        suppress_tokens=sorted(set(plain.flatten().tolist()) - {-1}),
        repetition_penalty=50.0,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    model.model.generation_config = loud
    try:
        again = observe(model, whole(items), wants=GENERATION, new_tokens=4).generated
        assert model.model.generation_config is loud
    finally:
        model.model.generation_config = own
    assert again is not None
    assert torch.equal(again, plain)


def test_a_continuation_stops_behind_the_first_end_of_text() -> None:
    model, items = load("llama"), items_of("llama")
    free = observe(model, whole(items), wants=GENERATION, new_tokens=5).generated
    assert free is not None
    own, row = model.model.generation_config, free[1].tolist()
    model.model.generation_config = GenerationConfig(eos_token_id=[2, row[1]], pad_token_id=0)
    try:
        ended = observe(model, whole(items), wants=GENERATION, new_tokens=5).generated
    finally:
        model.model.generation_config = own
    assert ended is not None
    stop = row.index(row[1]) + 1
    assert ended[1].tolist() == row[:stop] + [-1] * (ended.shape[1] - stop)


def test_a_row_is_cut_by_its_own_answer_not_by_the_longest_of_its_batch() -> None:
    model, items = load("llama"), items_of("llama")
    model.model.generation_config.eos_token_id = None
    try:
        generated = observe(model, whole(items), wants=GENERATION).generated
    finally:
        model.model.generation_config.eos_token_id = 2
    assert generated is not None
    assert (generated >= 0).sum(dim=1).tolist() == [2 + MARGIN, 4 + MARGIN, 2 + MARGIN]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "t5", "bart"])
def test_the_embedding_is_the_mean_over_the_prompt_of_the_last_hidden_state(name: str) -> None:
    items = items_of(name)
    outcome = observe(load(name), whole(items), wants=EMBEDDING)
    assert outcome.embedding is not None
    model = load(name).model
    inner: Any = {"bert": "bert", "roberta": "roberta", "t5": "encoder", "llama": "model", "gpt2": "transformer"}
    encoder = model.get_encoder() if name == "bart" else getattr(model, inner[name])
    decoder = name in ("llama", "gpt2")
    for row, item in enumerate(items):
        with torch.no_grad():
            ids = torch.tensor([item.prompt if decoder else item.prompt + SUFFIX])
            expected = encoder(input_ids=ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(outcome.embedding[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_places_are_the_columns_of_the_rows_that_run(name: str) -> None:
    """A span edit of a batch is the edit of each item alone, at the column where its span stands there."""
    model, items = load(name), items_of(name)
    label = "encoder.L1" if name == "t5" else "L1"
    edit = hw.edit.zero(label, scope="span:end")
    at = places(model, whole(items))
    with model.editing(edit, spans=at.spans, prompt_length=at.prompt_length):
        together = observe(model, whole(items), wants=EMBEDDING).embedding
    assert together is not None
    unedited = observe(model, whole(items), wants=EMBEDDING).embedding
    assert not torch.allclose(together, unedited, atol=1e-3)
    for row, item in enumerate(items):
        one = next(iter(items.only([each is item for each in items], "not this one").batches(1)))
        with model.editing(edit, spans={"end": [len(item.prompt) - 1]}):
            expected = observe(model, one, wants=EMBEDDING).embedding
        assert expected is not None
        torch.testing.assert_close(together[row], expected[0], atol=1e-5, rtol=0)


def test_the_prompt_ends_where_the_answer_begins_in_the_same_row() -> None:
    for name, length in (("llama", whole(items_of("llama")).prompt_length), ("t5", None), ("bert", None)):
        assert places(load(name), whole(items_of(name))).prompt_length == length


def test_an_edit_of_the_prompt_leaves_the_answer_s_columns_alone() -> None:
    model, batch = load("llama"), whole(items_of("llama"))
    at = places(model, batch)
    with (
        model.editing(hw.edit.zero("L1", scope="prompt"), spans=at.spans, prompt_length=at.prompt_length),
        model.reading(hw.read.z("L1")) as got,
    ):
        observe(model, batch, wants=LOGITS)
    assert not got.z["L1"][:, : batch.prompt_length].any()
    assert bool(got.z["L1"][1, batch.prompt_length :].any(dim=-1).all())


def test_a_forced_first_token_stands_before_the_answer() -> None:
    model, items = load("bart"), items_of("bart")
    model.model.generation_config.forced_bos_token_id = 1
    try:
        outcome = observe(model, whole(items), wants=LOGITS | GENERATION, new_tokens=1)
    finally:
        model.model.generation_config.forced_bos_token_id = None
    assert outcome.logits is not None
    assert outcome.generated is not None
    for row, item in enumerate(items):
        with torch.no_grad():
            expected = model.model(
                input_ids=torch.tensor([item.prompt + SUFFIX]), decoder_input_ids=torch.tensor([[0, 1]])
            ).logits[0, -1]
        torch.testing.assert_close(outcome.logits[row, 0], expected, atol=1e-4, rtol=0)
        assert outcome.generated[row].tolist() == [int(expected.argmax())]


def test_an_open_plan_is_in_force() -> None:
    model, items = load("llama"), items_of("llama")
    wants = LOGITS | GENERATION | EMBEDDING
    plain = observe(model, whole(items), wants=wants)
    with model.editing(hw.edit.zero("L0"), hw.edit.zero("L1"), hw.edit.zero("L2")):
        edited = observe(model, whole(items), wants=wants)
    for one, other in ((plain.logits, edited.logits), (plain.embedding, edited.embedding)):
        assert one is not None
        assert other is not None
        assert not torch.allclose(one, other, atol=1e-3)
    assert plain.text != edited.text


def test_gradients_flow_to_what_is_read() -> None:
    model, items = load("llama"), items_of("llama")
    with model.reading(hw.read.z("L1", grad=True)) as got:
        outcome = observe(model, whole(items), wants=LOGITS, gradients=True)
        assert outcome.logits is not None
        outcome.logits[:, 0, 5].sum().backward()
    item = items.items[0]
    gradient = got.z.grad["L1"][0]
    start = whole(items).prompt_length - len(item.prompt)
    assert bool((gradient[start : start + len(item.prompt)] != 0).any(dim=-1).all())
    # What is predicted behind the prompt does not hang on the answer, nor on the padding.
    assert not gradient[start + len(item.prompt) :].any()
    assert not gradient[:start].any()
    for parameter in model.model.parameters():
        parameter.grad = None


def test_items_without_an_answer_are_predicted_behind_the_prompt() -> None:
    items = items_of("llama")
    silent = replace(items, items=tuple(replace(each, answer=()) for each in items))
    outcome = observe(load("llama"), whole(silent), wants=LOGITS)
    assert outcome.logits is not None
    assert outcome.predicting.tolist() == [[True]] * 3
    torch.testing.assert_close(
        outcome.logits[0, 0], alone("llama", 0).logits[0, len(items.items[0].prompt) - 1], atol=1e-4, rtol=0
    )


# -- what cannot be had ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants", [LOGITS, GENERATION])
def test_an_encoder_gives_an_embedding_alone(wants: Any) -> None:
    with pytest.raises(Refusal, match=r"tiny-bert does not predict what comes next, so it gives no \w+; use"):
        observe(load("bert"), whole(items_of("bert")), wants=wants)


def test_a_model_that_takes_no_tokens_is_refused() -> None:
    with pytest.raises(Refusal, match="tiny-vit takes no tokens"):
        observe(load("vit"), whole(items_of("llama")), wants=EMBEDDING)


def test_without_a_tokenizer_nothing_is_written() -> None:
    organism = hw.load("zoo:tiny-llama")
    organism.tokenizer = None
    with organism, pytest.raises(Refusal, match=r"no tokenizer.*hw\.attach\(model, tokenizer\)"):
        observe(organism, whole(items_of("llama")), wants=GENERATION)


def test_a_decoder_without_a_head_gives_an_embedding() -> None:
    base = LlamaModel(copy.deepcopy(load("llama").model.config)).eval()
    items = items_of("llama")
    with hw.attach(base, name="base") as model:
        with pytest.raises(Refusal, match="base does not predict"):
            observe(model, whole(items), wants=LOGITS)
        got = observe(model, whole(items), wants=EMBEDDING).embedding
    assert got is not None
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([items.items[0].prompt + SUFFIX])).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)


def test_a_batch_of_prompts_alone_has_no_answers_to_predict() -> None:
    items = items_of("llama")
    batch = next(iter(items.batches(3, answers=False)))
    with pytest.raises(InputError, match=r"prompts alone.* up to 4 tokens; make it with"):
        observe(load("llama"), batch, wants=LOGITS)


@pytest.mark.parametrize("wants", [frozenset(), frozenset({"logit"}), "logits"])
def test_what_is_wanted_must_be_known(wants: Any) -> None:
    with pytest.raises(InputError, match="give some of logits, generation, embedding"):
        observe(load("llama"), whole(items_of("llama")), wants=wants)


@pytest.mark.parametrize("count", [0, 1.5])
def test_new_tokens_are_counted(count: Any) -> None:
    with pytest.raises(InputError, match="at least 1"):
        observe(load("llama"), whole(items_of("llama")), wants=GENERATION, new_tokens=count)


def test_padding_that_is_no_number_does_not_reach_the_mean() -> None:
    model, items = load("bert"), items_of("bert")
    plain = observe(model, whole(items), wants=EMBEDDING).embedding

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        padding = kwargs["attention_mask"] == 0
        output.hidden_states = (output.hidden_states[-1].masked_fill(padding[:, :, None], float("nan")),)
        return output

    handle = model.model.register_forward_hook(spoil, with_kwargs=True)
    try:
        got = observe(model, whole(items), wants=EMBEDDING).embedding
    finally:
        handle.remove()
    assert plain is not None
    assert got is not None
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("kind", ["two-sided", "prefix"])
def test_a_model_that_looks_ahead_is_not_shown_its_answers(kind: str) -> None:
    if kind == "prefix":
        model = load("paligemma")
    else:
        config = copy.deepcopy(load("bert").model.config)
        torch.manual_seed(0)
        model = OPEN.enter_context(hw.attach(BertLMHeadModel(config).eval(), load("llama").tokenizer, name="two-sided"))
    long, short = items_of("llama"), items_of("llama")
    short = replace(short, items=tuple(replace(each, answer=each.answer[:1]) for each in short))
    with pytest.raises(Refusal, match="looks at tokens behind the one it predicts from"):
        observe(model, whole(long), wants=LOGITS)
    assert observe(model, whole(short), wants=LOGITS).logits is not None
    with pytest.raises(Refusal, match="looks at tokens behind"):
        hw.measure(model, long, "exact-match", edits=[hw.edit.zero("L1H0")])


def test_logits_that_are_not_numbers_say_nothing_of_looking_ahead() -> None:
    broken = copy.deepcopy(load("llama").model)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with hw.attach(broken, load("llama").tokenizer, name="broken") as model:
        for _ in range(2):
            with pytest.raises(Refusal, match=r"the logits of broken are not numbers \(NaN\)") as error:
                observe(model, whole(items_of("llama")), wants=LOGITS)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("-inf"), 0.0])
def test_tokens_that_are_ruled_out_and_logits_of_0_are_no_looking_ahead(value: float) -> None:
    network = copy.deepcopy(load("llama").model)

    def rule_out(module: Any, args: Any, output: Any) -> Any:
        return output.index_fill(-1, torch.tensor([3]), value) if value else torch.zeros_like(output)

    network.lm_head.register_forward_hook(rule_out)
    with hw.attach(network, load("llama").tokenizer, name="sparse") as model:
        assert observe(model, whole(items_of("llama")), wants=LOGITS).logits is not None


@pytest.mark.parametrize("heads", ["L1", "cross.L1H0", "encoder.L1, L0H1"])
def test_spans_of_an_encoder_decoder_are_places_of_its_encoder(heads: str) -> None:
    with pytest.raises(Refusal, match="'span:end' is a place of the encoder's prompt"):
        hw.measure(load("t5"), items_of("t5"), "answer-rank", edits=[hw.edit.zero(heads, scope="span:end")])


def test_a_pad_outside_the_embedding_is_never_looked_up() -> None:
    items = items_of("llama")
    far = replace(items, pad=10**6)
    got, expected = (observe(load("llama"), whole(each), wants=LOGITS).logits for each in (far, items))
    assert torch.equal(got, expected)


def test_rows_longer_than_the_model_are_one_clear_line() -> None:
    model = load("gpt2")
    most = model.model.config.max_position_embeddings
    item = Item(id="x", prompt="a" * (most - 3), answer="b")
    items = encode([item], model.tokenizer, max_tokens=10**6)
    assert observe(model, whole(items), wants=LOGITS | GENERATION).generated is not None, (
        "with no more than there is room"
    )
    longer = encode([replace(item, prompt="a" * most)], model.tokenizer, max_tokens=10**6)
    with pytest.raises(InputError, match=rf"rows of {most + 1} tokens are longer than the {most} .* max_tokens={most}"):
        observe(model, whole(longer), wants=LOGITS)


@pytest.mark.parametrize("scope", ["last", "prompt", "decode"])
def test_a_plan_that_was_opened_before_knows_where_the_prompts_end(scope: str) -> None:
    model = hw.load("zoo:tiny-llama")
    asked = [Item(prompt=text, answer=" and then more", id=text) for text in ("the cat sat", "a much longer line")]
    items = replace(encode(asked, model.tokenizer, name="asked"), metric="answer-log-probability")
    assert min(len(each.answer) for each in items) > 1
    change = hw.edit.scale("L1", -1.0, scope=scope)
    with model.editing(change):
        around = hw.measure(model, items)
    torch.testing.assert_close(around, hw.measure(model, items, edits=[change]))
