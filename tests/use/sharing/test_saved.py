"""Saved folders: what is read is what was written, a kill leaves nothing, and another model is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import use
from headwise.catalogue import entries
from headwise.errors import InputError, Refusal
from headwise.fit.head_lora import HeadAdapter, fit_head_lora
from headwise.fit.training import Schedule
from headwise.heads import HeadSet, KVGroup
from headwise.model.edit import Edit
from headwise.scores import HeadScores
from headwise.use.intervention import Intervention, Together
from headwise.use.sharing import saved
from headwise.use.sharing.made_on import made_on
from headwise.zoo.planted import planted

HEADS = "L0H1, L1H2"


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


@cache
def llava() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llava")


@cache
def verdict() -> hw.Verdict:
    return hw.verify(planted_model(), "L0H0, L1H1", "repeat", items=8, n_controls=4, off_target=None)


@cache
def planted_model() -> hw.AttachedModel:
    organism = planted(circuits=("induction",), seed=1)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example, name="planted")


def vectors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    width = llama().site("L0").head_dim
    drawn = torch.randn(2, width, generator=torch.Generator().manual_seed(3)) * scale
    return {"L0H1": drawn[0], "L1H2": drawn[1]}


def adapter() -> HeadAdapter:
    return fit_head_lora(
        llama(), "L1H0", hw.encode(hw.probe("text"), llama().tokenizer, n=2), rank=1, schedule=Schedule(steps=2)
    ).adapter


EXAMPLES: dict[str, Callable[[], Intervention]] = {
    "head-scaling": lambda: use.HeadScaling({"L0H1": 0.5, "L1H2": torch.linspace(0, 1, llama().site("L0").head_dim)}),
    "head-offset": lambda: use.HeadOffset(vectors(), -2.5, scope="last"),
    "head-removal": lambda: use.HeadRemoval(HEADS, "mean", vectors(0.1), scope="decode"),
    "span-emphasis": lambda: use.SpanEmphasis(HEADS, ("rule", "case"), 2.0, "include", "compounding", "prompt"),
    "attention-temperature": lambda: use.AttentionTemperature({"L0H1": 0.5, "L1H2": 2.0}, scope="decode"),
    "attention-calibration": lambda: use.AttentionCalibration(HEADS, 0.25, 0.2, "prompt"),
    "zero-tuning": lambda: use.ZeroTuning({"L0H1": 0.5, "L1H2": 2.0}, scope="last"),
    "rotary-dimensions": lambda: use.RotaryDimensions(HEADS, (1, 2), None, 0.5, "k", 3, "prompt"),
    "head-adapter": lambda: adapter(),
    "ph3": lambda: use.PH3(HEADS, "last"),
    "factual-scaling": lambda: use.FactualScaling("L1H2", 3.0, "last"),
    "juice": lambda: use.JUICE("L0H1", "L1H2", 3.0, 0.5, "caches"),
    "just-run-once": lambda: use.JustRunOnce("L0H1, L0H0", "L1H2", 3.0, 0.5),
    "temporal-edit": lambda: use.TemporalEdit({"L0G1": vectors()["L0H1"], "L1G0": vectors()["L1H2"]}, 3.0, "date"),
    "iti": lambda: use.ITI({h: v / v.norm() for h, v in vectors().items()}, {"L0H1": 0.5, "L1H2": 2.0}, 5.0, "all"),
    "head-pursuit": lambda: use.HeadPursuit(HEADS, 5.0, "decode"),
    "decore": lambda: use.DeCoRe(HEADS, "entropy", 2.0, True, True, 0.1, "caches"),
    "dola": lambda: use.DoLa((0, 1), "normed", 0.2),
    "context-aware": lambda: use.ContextAware(1.5, "passage", 0.1, "caches"),
    "soft-injection": lambda: use.SoftInjection(vectors(), {"L0H1": 0.25, "L1H2": 0.75}),
    "gaze-redirection": lambda: use.GazeRedirection(
        HEADS, "image:0", ((2, "image:1"),), 3.0, "suppress-image", "decode"
    ),
    "paint": lambda: use.PAINT(HEADS, 0.5, 0.2, {"L0H1": 1.0, "L1H2": 0.5}, 0.5, 1),
    "vision-head-reinforcement": lambda: use.VHR(3.0, 2, None, "all"),
    "vision-pruning": lambda: use.VisionPruning(0.5, 0.2, 0.6, 0.1, 1),
    "visual-attention-redistribution": lambda: use.VAR((3,), 0.5, 3.0, 0.4, 0.1, HEADS),
    "together": lambda: Together((use.HeadScaling("L0H0", 2.0), Together((use.HeadRemoval(HEADS, "uniform"),)))),
}
"""An example of every intervention, with every setting away from its default, made for `model_of(id)`."""


def model_of(id: str) -> hw.AttachedModel:
    seeing = next((each for each in entries("interventions") if each.id == id and "looking" in each.page), None)
    return llama() if seeing is None else llava()


def same(one: Any, other: Any) -> bool:
    """Bit for bit, types and all, whatever it is made of."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one) and not isinstance(one, HeadSet):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    return bool(one == other) or (one != one and other != other)


def shown(edits: tuple[Edit, ...]) -> list[str]:
    """What they say of themselves, but for where their functions lie in memory."""
    return [re.sub(r" at 0x[0-9a-f]+", "", repr(each)) for each in edits]


def test_every_intervention_has_an_example() -> None:
    assert {each.id for each in entries("interventions")} | {"together"} == EXAMPLES.keys()


@pytest.mark.parametrize("id", EXAMPLES)
def test_an_intervention_comes_back_as_it_was(id: str, tmp_path: Path) -> None:
    given, model = EXAMPLES[id](), model_of(id)
    folder = use.save(given, tmp_path / "it", model=model, licence="CC-BY-4.0")
    found = use.load(folder, model)
    assert found.id == id
    assert same(given, found)
    assert shown(found.edits(model)) == shown(given.edits(model))


def test_what_is_loaded_does_what_was_saved(tmp_path: Path) -> None:
    inputs = llama().example
    given = use.HeadOffset(vectors(5.0))
    with torch.no_grad():
        plain = llama()(**inputs).logits
        with given(llama()):
            meant = llama()(**inputs).logits
        with use.load(use.save(given, tmp_path / "it", model=llama()), llama())(llama()):
            found = llama()(**inputs).logits
    assert torch.equal(found, meant)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    "heads", [HeadSet.parse(HEADS), HeadSet((KVGroup.of(1, 1),), "group")], ids=["heads", "groups"]
)
def test_a_head_set_comes_back(heads: HeadSet, tmp_path: Path) -> None:
    assert use.load(use.save(heads, tmp_path / "it", model=llama()), llama()) == heads


def test_a_verdict_comes_back_with_its_evidence(tmp_path: Path) -> None:
    given = verdict()
    found = use.load(use.save(given, tmp_path / "it", model=planted_model()), planted_model())
    assert same(given, found)
    assert str(found) == str(given)
    assert hw.Verdict.to_json(found) == given.to_json()
    assert saved.read_saved(tmp_path / "it").evidence["verdict"] == given.ruling


def test_scores_come_back(tmp_path: Path) -> None:
    items = hw.encode(hw.probe("repeat"), planted_model().tokenizer, n=4)
    given = hw.find("induction", planted_model(), items)
    found = use.load(use.save(given, tmp_path / "it", model=planted_model()), planted_model())
    assert isinstance(found, HeadScores)
    assert same(given, found)
    assert saved.read_saved(tmp_path / "it").id == "induction"
    with pytest.raises(Refusal, match="these scores are of planted with other weights than zoo:tiny-llama"):
        use.save(hw.HeadScores(*small_scores(given)), tmp_path / "other", model=llama())
    with pytest.raises(InputError, match="there is no L0H4"):
        use.save(given, tmp_path / "other", model=llama())


def small_scores(given: HeadScores) -> tuple[Any, ...]:
    """The same, of no more heads than `llama()` has."""
    layers = min(2, len(given.sites["main"]))
    values = {"main": given.values["main"][:, :layers, :4]}
    return values, {"main": given.sites["main"][:layers]}, given.item_ids, given.provenance


def test_evidence_goes_with_the_heads_that_it_is_of(tmp_path: Path) -> None:
    model = planted_model()
    use.save(use.HeadScaling(verdict().heads, 0.5), tmp_path / "right", model=model, evidence=verdict())
    told = saved.read_saved(tmp_path / "right").evidence
    assert told["heads"] == ["L0H0", "L1H1"]
    assert told["joint"]["controls"] == verdict().joint.controls.tolist()
    with pytest.raises(InputError, match="a verdict on L0H0, L1H1 and what is saved names L0H0; verify the same heads"):
        use.save(use.HeadScaling("L0H0", 0.5), tmp_path / "wrong", model=model, evidence=verdict())
    with pytest.raises(InputError, match="evidence= is a Verdict or an Evaluation"):
        use.save(HeadSet.parse("L0H0"), tmp_path / "wrong", model=model, evidence=verdict().to_json())  # type: ignore
    assert not (tmp_path / "wrong").exists()


# -- another model --------------------------------------------------------------------------------------------------


def changed_copy() -> hw.AttachedModel:
    """The same shapes, one weight moved."""
    model = hw.load("zoo:tiny-llama")
    with torch.no_grad():
        next(model.model.parameters()).view(-1)[0] += 1
    return model


def test_a_model_of_other_weights_is_refused_and_permitted(tmp_path: Path) -> None:
    folder = use.save(EXAMPLES["head-offset"](), tmp_path / "it", model=llama())
    other = changed_copy()
    hashes = [made_on(each).weights_hash[:8] for each in (llama(), other)]
    with pytest.raises(Refusal, match="of another model") as refusal:
        use.load(folder, other)
    assert all(each in str(refusal.value) for each in hashes)
    assert "\n" not in str(refusal.value)
    assert same(use.load(folder, other, anyway=True), EXAMPLES["head-offset"]())


@pytest.mark.parametrize("anyway", [False, True])
def test_a_model_of_another_shape_is_always_refused(anyway: bool, tmp_path: Path) -> None:
    folder = use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=llama())
    with pytest.raises(Refusal, match=r"zoo:tiny-llama .* does not fit zoo:tiny-gpt2 .*: L1 is 4 heads"):
        use.load(folder, hw.load("zoo:tiny-gpt2"), anyway=anyway)


def test_the_same_commit_in_another_dtype_is_the_same_model(tmp_path: Path) -> None:
    def of_hub(dtype: str, commit: str = "abc", move: bool = False) -> hw.AttachedModel:
        model = hw.load("zoo:tiny-llama", dtype=dtype)
        model.name, model.revision = "owner/name", commit
        if move:
            with torch.no_grad():
                next(model.model.parameters()).view(-1)[0] += 1
        return model

    folder = use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=of_hub("float32"))
    assert use.load(folder, of_hub("bfloat16"))
    assert use.load(folder, of_hub("float32", commit="def")), "the weights are the same"
    with pytest.raises(Refusal, match=r"owner/name at abc .* owner/name at def"):
        use.load(folder, of_hub("bfloat16", commit="def"))
    with pytest.raises(Refusal, match="of another model"):
        use.load(folder, of_hub("float32", move=True))


def test_heads_that_a_model_lacks_are_not_saved_for_it(tmp_path: Path) -> None:
    for wrong in ("L9H0", "L1H4"):
        with pytest.raises(InputError, match=r"L9|L1H4"):
            use.save(HeadSet.parse(wrong), tmp_path / "it", model=llama())
    assert not any(tmp_path.iterdir())


def test_a_path_on_this_machine_is_not_told(tmp_path: Path) -> None:
    model = hw.load("zoo:tiny-llama")
    model.name = str(tmp_path / "private" / "my-model")
    folder = use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=model)
    for file in ("headwise.json", "README.md"):
        text = (folder / file).read_text(encoding="utf-8")
        assert "my-model" in text
        assert "private" not in text


# -- the folder -----------------------------------------------------------------------------------------------------


def test_two_saves_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = (use.save(EXAMPLES["head-offset"](), tmp_path / name, model=llama()) for name in ("one", "two"))
    files = {each.name for each in one.iterdir()}
    assert files == {"headwise.json", "tensors.safetensors", "README.md"}
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


@pytest.mark.parametrize("there", ["a file", "a folder with something", "a saved folder"])
def test_what_is_there_stays(there: str, tmp_path: Path) -> None:
    target = tmp_path / "it"
    if there == "a file":
        target.write_text("mine")
    elif there == "a folder with something":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        use.save(HeadSet.parse("L0H0"), target, model=llama())
    before = {str(each): each.read_bytes() for each in [target, *target.rglob("*")] if each.is_file()}
    with pytest.raises(InputError, match="give a new folder"):
        use.save(HeadSet.parse("L1H2"), target, model=llama())
    assert before == {str(each): each.read_bytes() for each in [target, *target.rglob("*")] if each.is_file()}


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    assert use.load(use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=llama())) == HeadSet.parse("L1H2")


def _killed_at(step: int, target: str) -> None:
    written = 0
    write = saved._write

    def counted(path: Path, content: bytes) -> str:
        nonlocal written
        if written == step:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return write(path, content)

    saved._write = counted
    use.save(EXAMPLES["head-offset"](), target, model=llama())


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_kill_leaves_no_folder_and_the_next_save_works(step: int, tmp_path: Path) -> None:
    target = tmp_path / "it"
    llama(), vectors()  # the child has them from here
    child = multiprocessing.get_context("fork").Process(target=_killed_at, args=(step, str(target)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not target.exists()
    assert same(use.load(use.save(EXAMPLES["head-offset"](), target, model=llama())), EXAMPLES["head-offset"]())


def test_a_disk_that_does_not_take_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refusal, match=r"cannot be written \(No space left on device\)"):
        use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=llama())
    assert not list(tmp_path.iterdir())


# -- damage ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path, **changed: Any) -> None:
    form = json.loads((folder / "headwise.json").read_bytes())
    (folder / "headwise.json").write_text(json.dumps(form | changed))


def _other_made_on(folder: Path, **changed: Any) -> None:
    form = json.loads((folder / "headwise.json").read_bytes())
    spoil(folder, made_on=form["made_on"] | changed)


def _other_tensors(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(bytes(content))


OFFSET = {"intervention": "head-offset", "settings": {"offset": {"mapping": {"L0H1": {"tensor": "offset/L0H1"}}}}}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda f: (f / "headwise.json").unlink(), "holds no headwise.json"),
    "half a json": (lambda f: (f / "headwise.json").write_text('{"format": '), "is not JSON"),
    "another json": (lambda f: (f / "headwise.json").write_text("[]"), "does not describe"),
    "newer": (lambda f: spoil(f, format_version=2), "has format_version 2, this headwise reads 1"),
    "another kind": (lambda f: spoil(f, kind="heads"), "is of the kind 'heads' and holds a HeadOffset"),
    "unknown intervention": (
        lambda f: spoil(f, holds={"intervention": "head-ofset", "settings": {}}),
        "no intervention 'head-ofset'; did you mean head-offset",
    ),
    "unknown setting": (
        lambda f: spoil(f, holds={"intervention": "head-offset", "settings": {"loudness": 1}}),
        "saved with the setting 'loudness', which it does not have here",
    ),
    "settings out of range": (
        lambda f: spoil(f, holds=OFFSET | {"settings": OFFSET["settings"] | {"strength": {"number": "nan"}}}),
        "strength=nan is out of range",
    ),
    "missing setting": (
        lambda f: spoil(f, holds={"intervention": "head-offset", "settings": {}}),
        "the saved settings of head-offset cannot be used here",
    ),
    "unknown form": (lambda f: spoil(f, holds={"code": "print()"}), "is no form of a saved value"),
    "no tensors": (lambda f: (f / "tensors.safetensors").unlink(), "lacks tensors.safetensors"),
    "other tensors": (_other_tensors, "is not the file that headwise.json names"),
    "tensors not named": (lambda f: spoil(f, files={}), "the tensor 'offset/L0H1' is named and is not among"),
    "a file outside": (lambda f: spoil(f, files={"../it": ""}), "is no file of such a folder"),
    "no model": (lambda f: spoil(f, made_on=None), "is damaged"),
    "no hash of a model": (lambda f: _other_made_on(f, weights_hash=None), "does not say what model"),
    "a truth as a version": (lambda f: spoil(f, format_version=True), "has format_version True, this headwise reads 1"),
    "another id": (lambda f: spoil(f, id="iti"), "is of the id 'iti' and holds 'head-offset'"),
    "evidence in words": (lambda f: spoil(f, evidence="it works"), "is 'it works', which no verdict"),
    "a licence that is none": (lambda f: spoil(f, licence=5), "licence=5 is not the id of a licence"),
    "a word as a number": (
        lambda f: spoil(f, holds=OFFSET | {"settings": OFFSET["settings"] | {"strength": "2"}}),
        "strength='2' is not a number",
    ),
    "a json without a floor": (lambda f: (f / "headwise.json").write_text("[" * 100_000), "is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    folder = use.save(EXAMPLES["head-offset"](), tmp_path / "it", model=llama())
    spoiled, message = DAMAGE[damage]
    spoiled(folder)
    with pytest.raises(InputError) as error:
        use.load(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_folders_are_told_for_what_they_are(tmp_path: Path) -> None:
    for file, message in {"config.json": "is a checkpoint", "scores.json": "HeadScores.load"}.items():
        folder = tmp_path / file.partition(".")[0]
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(InputError, match=message):
            use.load(folder)
    with pytest.raises(InputError, match="is not a folder"):
        use.load(tmp_path / "nowhere")


class Homemade(Intervention):
    id = "homemade"


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    for given in (Homemade(), Together((use.HeadRemoval("L0H0"), Homemade()))):
        with pytest.raises(Refusal, match=r"Homemade \(homemade\) is not in the catalogue"):
            use.save(given, tmp_path / "it", model=llama())
    with pytest.raises(InputError, match="save takes intervention, heads, verdict, scores, adapter, not a str"):
        use.save("L1H2", tmp_path / "it", model=llama())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes the attached model"):
        use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=llama().model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not the id of a licence"):
        use.save(HeadSet.parse("L1H2"), tmp_path / "it", model=llama(), licence="do what you like")
    assert not any(tmp_path.iterdir())
