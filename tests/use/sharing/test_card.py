"""The card: front matter that the hub can read, and what it says with evidence and without."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import headwise as hw
from headwise import use
from headwise.heads import HeadSet
from headwise.use.sharing.saved import read_saved


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


@cache
def organism() -> hw.AttachedModel:
    return hw.load("zoo:organism")


def written(folder: Path, thing: Any, model: hw.AttachedModel, **given: Any) -> ModelCard:
    return ModelCard.load(use.save(thing, folder / "it", model=model, **given) / "README.md")


def named(name: str, revision: str | None) -> hw.AttachedModel:
    model = hw.load("zoo:tiny-llama")
    model.name, model.revision = name, revision
    return model


def test_front_matter_names_library_licence_and_tags(tmp_path: Path) -> None:
    found = written(tmp_path, use.HeadScaling("L1H2", 2.0), llama(), licence="MIT")
    assert found.data.to_dict() == {
        "library_name": "headwise",
        "license": "mit",
        "tags": ["headwise", "attention-heads", "intervention", "head-scaling"],
    }


@pytest.mark.parametrize(
    ("name", "revision", "base"),
    [
        ("owner/name", None, "owner/name"),
        ("gpt2", "0123abcd", "gpt2"),
        ("zoo:tiny-llama", None, None),
        ("LlamaForCausalLM", None, None),
        ("/models/private/mine", None, None),
        ("../mine", None, None),
    ],
)
def test_a_base_model_is_named_where_the_hub_has_it(
    name: str, revision: str | None, base: str | None, tmp_path: Path
) -> None:
    found = written(tmp_path, HeadSet.parse("L1H2"), named(name, revision))
    assert found.data.base_model == base
    assert ("0123abcd" in found.text) == (revision is not None)


def test_without_evidence_it_is_said_to_be_descriptive(tmp_path: Path) -> None:
    text = written(tmp_path, use.HeadScaling("L1H2", 2.0), llama()).text
    assert "Descriptive, not verified" in text
    assert "No licence is stated" in text
    assert "L1: 4 heads of 12 in 2 KV groups, model width 32" in text
    assert "| factor | 2 |" in text
    assert "headwise use FOLDER-OR-REPO zoo:tiny-llama" in text
    assert 'headwise use FOLDER-OR-REPO zoo:tiny-llama --prompt "..." --compare' in text


def test_the_passages_that_it_needs_are_in_what_to_type(tmp_path: Path) -> None:
    given = use.Together((use.SpanEmphasis("L1H2", ("rule", "name")), use.HeadScaling("L0H1", 2.0, scope="span:name")))
    text = written(tmp_path, given, llama()).text
    assert 'with found(model, spans={"rule": [3, 4], "name": [3, 4]}):' in text
    assert ' --prompt "..." --span rule="WORDS OF THE PROMPT" --span name="WORDS OF THE PROMPT" --compare' in text


def test_the_python_of_the_card_runs(tmp_path: Path) -> None:
    text = written(tmp_path, use.SpanEmphasis("L2H1", "rule"), organism()).text
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER-OR-REPO", str(tmp_path / "it")).replace('tokenizer("..."', 'tokenizer("a b c d e"')
    exec(compile(code.replace("(**inputs)", "(**inputs, max_new_tokens=1)"), "card", "exec"), {})


def test_a_verdict_is_shown_with_its_controls(tmp_path: Path) -> None:
    verdict = hw.verify(organism(), "L2H1", "facts", items=8, n_controls=4, off_target=None)
    text = written(tmp_path, use.HeadRemoval("L2H1"), organism(), evidence=verdict).text
    assert f"against matched random heads: **{verdict.ruling}**" in text
    assert str(verdict) in text
    assert "not verified: nothing here" not in text


def test_an_evaluation_is_shown_and_must_be_of_this(tmp_path: Path) -> None:
    given = use.HeadScaling("L2H1", 0.0)
    items = hw.encode(hw.probe("facts"), organism().tokenizer, n=4)
    found = use.evaluate(organism(), given, items, off_target=None, controls=2, samples=0)
    text = written(tmp_path, given, organism(), evidence=found).text
    assert str(found) in text
    assert read_saved(tmp_path / "it").evidence["target"] == found.to_dict()["target"]
    with pytest.raises(hw.InputError, match="the evidence is an evaluation of HeadScaling"):
        use.save(given.but(factor=0.5), tmp_path / "other", model=organism(), evidence=found)
    with pytest.raises(hw.InputError, match="the evidence is an evaluation of HeadScaling"):
        use.save(HeadSet.parse("L2H1"), tmp_path / "other", model=organism(), evidence=found)


@pytest.mark.parametrize("heads", [HeadSet.parse("L1H2, L0H1"), HeadSet.parse("L0G1", "group")], ids=str)
def test_every_member_is_listed(heads: HeadSet, tmp_path: Path) -> None:
    assert f"\n\n{', '.join(heads.labels)}\n\n" in written(tmp_path, heads, llama()).text


def test_what_names_no_heads_says_so(tmp_path: Path) -> None:
    text = written(tmp_path, use.DoLa((0, 1)), llama()).text
    assert "It names no single heads." in text
    assert all(f"- {site.label}: " in text for site in llama().sites)
