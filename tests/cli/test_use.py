"""`headwise use`: what a model writes with a saved intervention and without, and what is refused."""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise as hw
from headwise import use
from headwise.cli import main
from headwise.heads import HeadSet

MODEL = "zoo:organism"
PROMPT = "The capital of France is"


@cache
def organism() -> hw.AttachedModel:
    return hw.load(MODEL)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The organism takes seconds to load; every other name is loaded as ever."""
    load = hw.load
    monkeypatch.setattr("headwise.loading.load", lambda name, **how: organism() if name == MODEL else load(name, **how))


def saved(folder: Path, thing: Any = None) -> str:
    return str(use.save(thing or use.HeadScaling(organism().heads(), -1.0), folder, model=organism()))


def by_hand(intervention: use.Intervention | None, n: int, **given: Any) -> list[int]:
    """Greedy, one full forward for every token, to the end token."""
    ids = organism().tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(n):
        with torch.no_grad():
            if intervention is None:
                logits = organism()(input_ids=ids).logits
            else:
                with intervention(organism(), prompt_length=start, **given):
                    logits = organism()(input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == organism().model.generation_config.eos_token_id:
            break
    return [int(token) for token in ids[0, start:]]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    organism(), capsys.readouterr()  # what loading it says is not the command's
    code = main(["use", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_has_both_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = saved(tmp_path / "it")
    ask = ("--prompt", PROMPT, "--max-new-tokens", "5")
    code, out, err = run(capsys, folder, MODEL, *ask, "--compare", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == {"intervention", "model", "prompt", "text", "tokens", "plain"}
    assert found["tokens"] == by_hand(use.load(folder), 5)
    assert found["plain"]["tokens"] == by_hand(None, 5)
    assert found["tokens"] != found["plain"]["tokens"]
    assert found["plain"]["text"] == organism().tokenizer.decode(found["plain"]["tokens"], skip_special_tokens=True)
    assert (found["intervention"], found["model"], found["prompt"]) == ("head-scaling", MODEL, PROMPT)
    code, out, _ = run(capsys, folder, MODEL, *ask, "--json")
    assert json.loads(out)["plain"] is None


def test_the_table_shows_prompt_and_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ask = ("--prompt", PROMPT, "--max-new-tokens", "3")
    code, out, _ = run(capsys, saved(tmp_path / "it"), MODEL, *ask, "--compare")
    assert code == 0
    for word in (PROMPT, "head-scaling", "without", "part at the first token"):
        assert word in out
    nothing = saved(tmp_path / "nothing", use.HeadScaling("L0H0", 1.0))
    _, out, _ = run(capsys, nothing, MODEL, *ask, "--compare")
    assert "changes nothing here" in out
    _, out, _ = run(capsys, nothing, MODEL, *ask)
    assert "without" not in out


def test_a_span_is_found_in_the_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = use.SpanEmphasis(None, "land", 0.01)
    folder = saved(tmp_path / "it", given)
    words = organism().tokenizer(PROMPT, return_offsets_mapping=True)["offset_mapping"]
    low, high = PROMPT.index("France"), PROMPT.index("France") + len("France")
    columns = [n for n, (start, stop) in enumerate(words) if max(low, start) < min(high, stop)]
    ask = ("--prompt", PROMPT, "--max-new-tokens", "4", "--json")
    code, out, err = run(capsys, folder, MODEL, *ask, "--span", "land=France")
    assert code == 0, err
    assert json.loads(out)["tokens"] == by_hand(given, 4, spans={"land": columns})
    assert "say which words that is with --span land=WORDS" in refused(capsys, folder, MODEL, *ask)
    odd = ("--span", "land=France", "--span", "lnad=capital")
    assert "names no such passage; it names land" in refused(capsys, folder, MODEL, *ask, *odd)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    lines = [line for line in err.splitlines() if not line.startswith("headwise: loading")]
    assert len(lines) == 1, err
    return lines[0]


def test_typing_mistakes_are_one_line_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "it")
    heads = saved(tmp_path / "heads", HeadSet.parse("L0H0"))
    monkeypatch.setattr("headwise.cli.use.load_model", lambda *_: pytest.fail("a model was loaded"))
    ask = (MODEL, "--prompt", PROMPT)
    assert "is not a folder here" in refused(capsys, str(tmp_path / "nowhere"), *ask)
    assert "holds no headwise.json" in refused(capsys, str(tmp_path), *ask)
    assert "holds a HeadSet, which changes nothing" in refused(capsys, heads, *ask)
    assert "is not NAME=WORDS" in refused(capsys, folder, *ask, "--span", "France")
    assert "'Spain' is 0 times in the prompt" in refused(capsys, folder, *ask, "--span", "land=Spain")
    assert "'a' is 3 times in the prompt" in refused(capsys, folder, *ask, "--span", "land=a")
    assert "--prompt" in refused(capsys, folder, MODEL)
    assert "--max-new-tokens" in refused(capsys, folder, *ask, "--max-new-tokens", "0")


def test_another_model_is_refused_and_permitted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = saved(tmp_path / "it")
    assert "does not fit zoo:tiny-llama" in refused(capsys, folder, "zoo:tiny-llama", "--prompt", PROMPT)
    ask = (folder, MODEL, "--prompt", PROMPT, "--max-new-tokens", "2", "--json")
    norm = next(parameter for parameter in organism().model.parameters() if parameter.dim() == 1)
    with torch.no_grad():
        norm[0] += 1e-3
    try:
        assert "of another model" in refused(capsys, *ask)
        assert run(capsys, *ask, "--anyway")[0] == 0
    finally:
        with torch.no_grad():
            norm[0] -= 1e-3
        organism.cache_clear()


def test_a_model_that_cannot_read_or_write_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = hw.load("zoo:tiny-bert")
    folder = str(use.save(use.HeadScaling("L0H0", 2.0), tmp_path / "it", model=bert))
    monkeypatch.setattr("headwise.cli.use.load_model", lambda *_: bert)
    monkeypatch.setattr(bert, "tokenizer", organism().tokenizer)
    assert "does not write" in refused(capsys, folder, "zoo:tiny-bert", "--prompt", PROMPT)
    monkeypatch.setattr(bert, "tokenizer", None)
    assert "has no tokenizer" in refused(capsys, folder, "zoo:tiny-bert", "--prompt", PROMPT)


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = saved(tmp_path / "it")
    monkeypatch.setattr(type(organism()), "generate", stop)
    code, out, err = run(capsys, folder, MODEL, "--prompt", PROMPT, "--json")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "headwise: stopped"


def test_interventions_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "interventions", "--json"]) == 0
    listed = {each["id"]: each for each in json.loads(capsys.readouterr().out)["items"]}
    assert listed["head-scaling"].keys() == {"id", "kind", "title", "page", "paper", "year", "tier", "status", "cost"}
    assert main(["list", "interventions"]) == 0
    assert "head-scaling" in capsys.readouterr().out


def test_the_exit_code_is_that_of_the_process(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["headwise", "use", str(tmp_path / "nowhere"), MODEL, "--prompt", PROMPT])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("headwise", run_name="__main__")
    assert stopped.value.code == 2
    assert "is not a folder here" in capsys.readouterr().err
