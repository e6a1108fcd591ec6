"""Models of many kinds: an atlas runs to its end, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import headwise as hw
from headwise.atlas import Atlas
from headwise.errors import Refusal
from headwise.find.method import Method
from headwise.probes.stream import Probe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "tiny-qwen3", "tiny-gemma3_text", "tiny-t5"])
def test_a_random_model_runs_to_its_end_and_is_refused_verdicts(
    name: str, tmp_path: Path, run: Callable[..., Atlas], short: Probe, method: Callable[..., Method]
) -> None:
    pattern = method("pattern", needs=("rows",))
    with hw.load(f"zoo:{name}") as model:
        atlas = run(tmp_path / "atlas", model, methods=[pattern], max_tokens=512)
    assert atlas.complete
    assert atlas.probes == ("repeat",)
    assert atlas.refused["repeat"]
    (verdict,) = atlas.judged()
    assert verdict.refusal
    assert verdict.verified.labels == ()
    assert atlas.scored == (("pattern", "repeat"),)
    assert not atlas.off_target.empty


def test_an_encoder_is_asked_for_its_embedding(
    tmp_path: Path, run: Callable[..., Atlas], method: Callable[..., Method]
) -> None:
    pattern = method("pattern", needs=("rows",), probe="text")
    with hw.load("zoo:tiny-bert") as model:
        atlas = run(tmp_path / "atlas", model, probes=None, methods=[pattern], max_tokens=512)
        assert atlas.complete
        (verdict,) = atlas.judged()
        assert verdict.family.key == "text/cosine-to-clean/zero/all"
        assert verdict.refusal == ""
        assert verdict.clean == pytest.approx(1)
        assert len(verdict.singles) == len(model.heads("main"))
    assert atlas.manifest.off_target == ""
    assert atlas.off_target.empty
    example = atlas.examples("text")[0]
    assert example.weights.sum(axis=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-whisper"])
def test_what_takes_no_text_is_refused_with_the_reason(name: str, tmp_path: Path, run: Callable[..., Atlas]) -> None:
    with hw.load(f"zoo:{name}") as model, pytest.raises(Refusal, match=r"no tokenizer|takes no tokens"):
        run(tmp_path / "atlas", model)
    assert not (tmp_path / "atlas" / "manifest.json").exists()
