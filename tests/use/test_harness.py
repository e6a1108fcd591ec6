"""The adapter for lm-evaluation-harness: its numbers are those of a run by hand, with the intervention and without."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.use import HeadRemoval, HeadScaling, Intervention
from headwise.use.harness import harness_model, log_likelihoods

TASK = """
task: organism_capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
QUESTIONS = """\
{"question": "The capital of France is", "choices": [" Paris", " Rome"], "label": 0}
{"question": "The capital of Italy is", "choices": [" Paris", " Rome"], "label": 1}
"""


@cache
def organism() -> hw.AttachedModel:
    return hw.load("zoo:organism")


@pytest.fixture
def pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of several lengths."""
    tokenizer = organism().tokenizer
    texts = [
        ("The capital of France is", " Paris"),
        ("The king and the dog", " slept in the stable."),
        ("There was a", " heavy lion behind the garden."),
    ]
    return [
        (tokenizer(one)["input_ids"], tokenizer(other, add_special_tokens=False)["input_ids"]) for one, other in texts
    ]


def alone(ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities of the tokens from `start` on, from one row without padding."""
    with torch.no_grad():
        logits = organism().model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]


@pytest.mark.parametrize(
    "intervention", [None, HeadRemoval("L2H1, L3H4"), HeadScaling("L1H0, L4H3", 3.0, scope="decode")]
)
def test_log_likelihoods_are_those_of_each_row_alone(
    pairs: list[tuple[list[int], list[int]]], intervention: Intervention | None
) -> None:
    found = log_likelihoods(organism(), intervention, pairs, max_length=512)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        if intervention is None:
            expected = alone(context + continuation, len(context))
        else:
            with intervention(organism(), prompt_length=len(context)):
                expected = alone(context + continuation, len(context))
        assert value == pytest.approx(float(expected.sum()), abs=1e-4)
    one_by_one = log_likelihoods(organism(), intervention, pairs, max_length=512, batch_size=1)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in one_by_one], abs=1e-4)


def test_the_scope_of_what_is_written_begins_behind_the_context(pairs: list[tuple[list[int], list[int]]]) -> None:
    """A one-token continuation is predicted from the prompt: an edit of what is written cannot change it."""
    plain = log_likelihoods(organism(), None, pairs, max_length=512)
    steered = log_likelihoods(organism(), HeadRemoval("L2H1, L3H4", scope="decode"), pairs, max_length=512)
    assert steered[0][0] == pytest.approx(plain[0][0], abs=1e-6)
    assert abs(steered[1][0] - plain[1][0]) > 1e-4


def test_long_contexts_lose_their_beginning(pairs: list[tuple[list[int], list[int]]]) -> None:
    context, continuation = pairs[1]
    room = len(continuation) + 1
    (cut,) = log_likelihoods(organism(), None, [(context, continuation)], max_length=room)
    (short,) = log_likelihoods(organism(), None, [(context[-2:], continuation)], max_length=512)
    assert cut == short


@pytest.mark.parametrize(
    "pair", [([], [1]), ([1], []), ([1], [2, 3, 4, 5, 6, 7, 8, 9, 10])], ids=["no context", "nothing", "too long"]
)
def test_requests_that_cannot_be_scored(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(InputError, match="at most 8"):
        log_likelihoods(organism(), None, [pair], max_length=8)


def test_greedy_is_what_greedy_decoding_writes(pairs: list[tuple[list[int], list[int]]]) -> None:
    found = log_likelihoods(organism(), None, pairs, max_length=512)
    for (context, continuation), (_, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([context])
        written = organism().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(continuation),
            do_sample=False,
        )[0, len(context) :]
        assert greedy == (written.tolist() == continuation)


def test_what_cannot_be_served_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.use.harness.find_spec", lambda name: object())
    with pytest.raises(InputError, match="L9"):
        harness_model(organism(), HeadRemoval("L9H0"))
    with pytest.raises(Refusal, match="no spans"):
        harness_model(organism(), HeadRemoval("L2H1", scope="span:needle"))
    with pytest.raises(InputError, match="batch_size"):
        harness_model(organism(), None, batch_size=0)
    with pytest.raises(InputError, match="attached model"):
        harness_model(organism().model)  # type: ignore[arg-type]


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.use.harness.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"headwise\[eval\]"):
        harness_model(organism())


def test_the_harness_is_not_imported_with_headwise() -> None:
    code = "import headwise.use.harness, sys; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- with the harness itself ------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return found


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    import yaml

    (tmp_path / "questions.jsonl").write_text(QUESTIONS, encoding="utf-8")
    return yaml.safe_load(TASK.replace("FILE", str(tmp_path / "questions.jsonl")))


def test_the_adapter_without_an_intervention_is_the_harness_s_own(harness: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = harness_model(organism(), batch_size=2)
    theirs = HFLM(pretrained=organism().model, tokenizer=organism().tokenizer, batch_size=1)
    scored = [("The capital of France is", " Paris"), ("", "The king and the dog"), ("There was a", " heavy lion")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(scored)]
    for one, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    whole = [Instance("loglikelihood_rolling", {}, ("The king and the dog slept in the stable.",), 0)]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-4)
    asked = {"until": ["\n"], "max_gen_toks": 6}
    written = [
        Instance("generate_until", {}, (text, asked), i) for i, text in enumerate(["There was a", "The king and"])
    ]
    assert ours.generate_until(written) == theirs.generate_until(written)


def test_all_three_kinds_of_request_run_under_the_intervention(harness: Any) -> None:
    from lm_eval.api.instance import Instance

    plain, removed = harness_model(organism()), harness_model(organism(), HeadRemoval("L0H0, L1H1, L2H1, L3H4"))
    scored = [Instance("loglikelihood", {}, ("The capital of France is", " Paris"), 0)]
    assert plain.loglikelihood(scored)[0][0] != removed.loglikelihood(scored)[0][0]
    whole = [Instance("loglikelihood_rolling", {}, ("The king and the dog slept in the stable.",), 0)]
    assert plain.loglikelihood_rolling(whole) != removed.loglikelihood_rolling(whole)
    intervention = HeadScaling("L1H1, L2H1, L3H4, L4H2, L4H7", -8.0)
    steered = harness_model(organism(), intervention)
    written = [Instance("generate_until", {}, ("The king and the", {"until": ["\n"], "max_gen_toks": 8}), 0)]
    ids = organism().tokenizer("The king and the", return_tensors="pt")
    with intervention(organism()):
        expected = organism().generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert steered.generate_until(written) == [organism().tokenizer.decode(expected, skip_special_tokens=True)]
    assert steered.generate_until(written) != plain.generate_until(written)
    assert steered.get_model_info()["intervention"] == repr(intervention)


def test_a_task_of_the_harness(harness: Any, task: dict[str, Any]) -> None:
    plain = harness.simple_evaluate(model=harness_model(organism()), tasks=[task], bootstrap_iters=0)
    assert plain["results"]["organism_capitals"]["acc,none"] == 1.0
    every = HeadRemoval(organism().heads("L2, L3, L4"))
    removed = harness.simple_evaluate(model=harness_model(organism(), every), tasks=[task], bootstrap_iters=0)
    assert removed["results"]["organism_capitals"]["acc,none"] < 1.0
