"""What is planned: which probes and methods fit, and what is left out and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import headwise as hw
from headwise.atlas import Atlas, Settings
from headwise.atlas.asking import BY_REQUEST
from headwise.atlas.planning import OF_THE_ANSWER, Plan, is_tested, plan
from headwise.atlas.progress import announcement
from headwise.errors import InputError, Refusal
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.probes import probe
from headwise.probes.stream import Probe

SMALL = Settings(items=16, controls=4)


def kinds(planned: Plan, kind: str) -> list[str]:
    return [cell.id for cell in planned.cells if cell.kind == kind]


def test_the_cells_of_two_methods_on_one_probe(finished: Atlas) -> None:
    assert [cell.id for cell in finished.cells] == [
        "clean/repeat",
        "clean/text",
        "find/by-place/repeat",
        "find/silent/repeat",
        "map/repeat/L0",
        "map/repeat/L1",
        "map/text/L0",
        "map/text/L1",
        "joint/by-place/repeat",
        "offtarget/by-place/repeat",
        "joint/silent/repeat",
        "offtarget/silent/repeat",
        "fresh/repeat",
        "crossed/repeat/repeat",
        "dose/repeat",
        "examples/repeat",
    ]


def test_methods_of_the_pattern_are_scored_everywhere_and_tested_at_home(
    model: AttachedModel, method: Callable[..., Method], short: Probe
) -> None:
    patterns = method("patterns", needs=("rows",), probe="repeat")
    answers = method("answers", needs=("answer",), probe="repeat")
    only = method("only", needs=("rows",), probe="ioi", probes=("ioi",))
    prose = method("prose", needs=("rows",), probe="text")
    planned = plan(model, SMALL, [short, "ioi"], [patterns, answers, only, prose], None)
    assert kinds(planned, "find") == [
        "find/patterns/repeat",
        "find/answers/repeat",
        "find/prose/repeat",
        "find/patterns/ioi",
        "find/answers/ioi",
        "find/only/ioi",
        "find/prose/ioi",
        "find/prose/text",
    ]
    assert kinds(planned, "joint") == [
        "joint/patterns/repeat",
        "joint/answers/repeat",
        "joint/answers/ioi",
        "joint/only/ioi",
    ]


def test_what_a_method_needs_decides_on_what_its_heads_are_tested(method: Callable[..., Method]) -> None:
    for need in ("answer", "foils", "twin", "logits", "gradients", "generation"):
        assert need in OF_THE_ANSWER
        assert is_tested(method("one", needs=(need,), probe="text"), "ioi")
    assert not is_tested(method("one", needs=("rows", "z"), probe="text"), "ioi")
    assert is_tested(method("one", needs=("rows",), probes=("ioi",), probe="text"), "ioi")
    assert is_tested(method(BY_REQUEST[0], needs=("z",), probe="text"), "ioi")


def test_a_method_without_what_it_needs_is_left_out_with_the_reason(
    model: AttachedModel, method: Callable[..., Method], short: Probe
) -> None:
    planned = plan(model, SMALL, [short], [method("spans", needs=("span:nowhere",))], None)
    assert kinds(planned, "find") == []
    assert "has no span 'nowhere'" in planned.manifest.left_out["find/spans/repeat"]


def test_a_probe_that_the_tokenizer_cannot_express_is_left_out_or_an_error_if_it_was_named(
    model: AttachedModel, method: Callable[..., Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = probe("needle").over(words=(400,))
    with pytest.raises(InputError, match="longer than 256 tokens"):
        plan(model, SMALL, [long], [method("one")], None)
    entries = {"probes": (probe("ioi"), long, probe("text")), "methods": (method("one"), method(BY_REQUEST[0]))}
    monkeypatch.setattr("headwise.atlas.asking.catalogue.entries", lambda kind: entries[kind])
    planned = plan(model, SMALL, None, None, None)
    assert "longer than 256 tokens" in planned.manifest.left_out["needle"]
    assert [each.id for each in planned.manifest.probes] == ["ioi", "text"]
    assert [each.id for each in planned.manifest.methods] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"probes": ["iol"]}, "did you mean ioi"),
        ({"probes": "ioi"}, r"write probes=\['ioi'\]"),
        ({"probes": []}, "probes takes a list"),
        ({"methods": "m"}, r"write methods=\['m'\]"),
        ({"items": 14}, "too few"),
        ({"off_target": "texts"}, "did you mean text"),
        ({"probes": ["text"]}, "text is the off-target probe"),
        ({"probes": ["ioi"], "off_target": "ioi"}, "ioi is the off-target probe"),
        ({"scope": "span:nmae"}, "has the span of scope 'span:nmae'; the spans there are: repeat: .*source"),
    ],
)
def test_what_cannot_be_asked_for(
    run: Callable[..., Atlas], tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(tmp_path / "atlas", **arguments)


def test_an_unknown_method_is_answered_with_the_nearest(
    run: Callable[..., Atlas], tmp_path: Path, method: Callable[..., Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"methods": {"induction": method("induction")}}
    monkeypatch.setattr("headwise.catalogue._registered", known)
    monkeypatch.setattr("headwise.catalogue._gathered", True)
    with pytest.raises(InputError, match="no method 'inductoin'; did you mean induction"):
        run(tmp_path / "atlas", methods=["inductoin"])


def test_a_model_without_a_tokenizer_is_refused(run: Callable[..., Atlas], tmp_path: Path) -> None:
    with hw.load("zoo:tiny-vit") as vision, pytest.raises(Refusal, match="has no tokenizer"):
        run(tmp_path / "atlas", vision)


def test_the_estimate_counts_tokens(model: AttachedModel, method: Callable[..., Method], short: Probe) -> None:
    planned = plan(model, SMALL, [short], [method("one")], None)
    halves = planned.items["repeat"]
    testing = sum(len(each.prompt) + len(each.answer) for each in halves.testing)
    tokens = {cell.id: planned.tokens(cell) for cell in planned.cells}
    assert tokens["map/repeat/L0"] == 4 * testing
    assert tokens["joint/one/repeat"] == 5 * testing
    assert all(tokens[cell.id] > 0 and planned.seconds(cell) > 0 for cell in planned.cells)


def test_a_probe_without_the_span_of_the_scope_is_left_out_and_the_others_are_not(
    model: AttachedModel, method: Callable[..., Method], short: Probe
) -> None:
    planned = plan(model, Settings(items=16, controls=4, scope="span:source"), [short, "ioi"], [method("one")], None)
    assert [each.id for each in planned.manifest.behaviours] == ["repeat"]
    assert not [cell for cell in planned.cells if cell.probe in ("ioi", "text")]
    for probe_id in ("ioi", "text"):
        assert f"not every item of {probe_id} has the span" in planned.manifest.left_out[probe_id]
    assert "its spans: io, s1, s2" in planned.manifest.left_out["ioi"]


def test_the_off_target_text_is_shortened_until_it_fits_and_that_is_said(
    model: AttachedModel, method: Callable[..., Method], short: Probe
) -> None:
    planned = plan(model, Settings(items=16, controls=4, max_tokens=40), [short], [method("one")], None)
    assert planned.manifest.off_target == "text"
    # Four sentences have 38 to 44 tokens, five have 47 or more.
    assert planned.manifest.probe("text").settings == {"sentences": [4]}
    assert planned.shortened == {"text": "4 sentences in place of 8, to fit 40 tokens"}
    assert "text: 4 sentences in place of 8, to fit 40 tokens" in announcement(planned, planned.cells)
    assert max(len(each.prompt) + len(each.answer) for each in planned.items["text"].testing) <= 40
    whole = plan(model, SMALL, [short], [method("one")], None)
    assert whole.manifest.probe("text").settings == {"sentences": [8]}
    assert whole.shortened == {}


def test_where_not_even_two_sentences_fit_there_is_no_off_target_and_the_reason(
    model: AttachedModel, method: Callable[..., Method], short: Probe
) -> None:
    few = short.over(words=(4,))
    planned = plan(model, Settings(items=16, controls=4, max_tokens=11), [few], [method("one")], None)
    assert planned.manifest.off_target == ""
    assert "longer than 11 tokens" in planned.manifest.left_out["text"]


def test_an_encoder_reads_shorter_text(method: Callable[..., Method]) -> None:
    with hw.load("zoo:tiny-bert") as encoder:
        planned = plan(encoder, Settings(items=16, max_tokens=150), ["text"], [method("one", probe="text")], None)
    assert [each.id for each in planned.manifest.behaviours] == ["text"]
    assert planned.shortened["text"].endswith("sentences in place of 8, to fit 150 tokens")


def test_an_encoder_reads_the_text_that_is_asked_for(method: Callable[..., Method]) -> None:
    with hw.load("zoo:tiny-bert") as encoder:
        asked = [probe("text").over(sentences=2)]
        planned = plan(encoder, Settings(items=16, max_tokens=512), asked, [method("one", probe="text")], None)
    assert planned.manifest.probe("text").settings == {"sentences": [2]}
