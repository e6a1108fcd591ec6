"""Written aside, loaded anew, compared, named at the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

import headwise as hw
from headwise import edit
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.identity import weights_hash
from headwise.model.proving.patient import distance
from headwise.use.baking import saving

Build = Callable[[str], AttachedModel]
Ramp = Callable[[AttachedModel], Tensor]


def test_the_displacement_of_z_stored_as_the_bias_is_caught(build: Build, ramp: Ramp, tmp_path: Path) -> None:
    """As honest_llama's edit_weight.py stores it: shapes agree, since heads x dim is the hidden size."""
    model = build("tiny-gpt2")
    site, delta = model.site("L1"), ramp(model)
    baked = hw.bake(model, edit.add("L1H2", delta))
    bias = f"{site.projection}.bias"
    displaced = torch.zeros(site.n_heads, site.head_dim)
    displaced[2] = delta
    baked.tensors[bias] = model.model.state_dict()[bias] + displaced.flatten()
    with pytest.raises(Refusal, match="differs from the model under the edits"):
        baked.save_pretrained(tmp_path / "baked")
    assert not list(tmp_path.iterdir())


def test_the_folder_holds_all_that_a_server_needs(build: Build, tmp_path: Path) -> None:
    model = hw.load("zoo:organism")
    items = hw.encode(hw.probe("conflict"), model.tokenizer, n=12)
    there = edit.scale("L3H1", 1.5)
    report = hw.bake(model, there).save_pretrained(tmp_path / "deep" / "baked", items)
    folder = tmp_path / "deep" / "baked"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert [path.name for path in folder.parent.iterdir()] == ["baked"]
    told = json.loads((folder / "headwise-bake.json").read_text())
    assert told["source"] == "zoo:organism"
    assert told["weights_hash"] == weights_hash(model.model)
    assert told["lines"][0]["tensors"] == ["model.layers.3.self_attn.o_proj.weight"]
    assert told["check"]["inputs"] == "the example inputs and 12 items of conflict"
    assert told["check"]["difference"] < told["check"]["tolerance"] == 1e-4 < told["check"]["effect"]
    assert str(report).splitlines()[1].startswith("exact      edit.scale(L3H1")
    with hw.load(folder) as baked, model.editing(there):
        wanted = hw.measure(model, items)
        torch.testing.assert_close(hw.measure(baked, items), wanted, rtol=1e-4, atol=1e-5)
    assert distance(hw.measure(model, items), wanted) > 1e-3
    assert (folder.stat().st_mode & 0o777) == (folder.parent.stat().st_mode & 0o777)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01), ("float64", 1e-6)])
def test_other_precisions(dtype: str, tolerance: float, tmp_path: Path) -> None:
    with hw.load("zoo:tiny-llama", dtype=dtype) as model:
        edits = [edit.scale("L0H1", 2.0), edit.add("L1H1", torch.linspace(-1, 1, 12)), edit.uniform("L1H0")]
        report = hw.bake(model, edits).save_pretrained(tmp_path / "baked")
    assert report.check is not None
    assert report.check.difference <= report.check.tolerance == tolerance < report.check.effect
    saved = safetensors.torch.load_file(tmp_path / "baked" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_left_alone(build: Build, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to(tmp_path / "nowhere")}[kind]()
    with pytest.raises(InputError, match="exists"):
        hw.bake(build("tiny-llama"), edit.zero("L0H0")).save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_settings_of_generation_are_kept_as_they_are(tmp_path: Path) -> None:
    """Also those that transformers itself does not write, such as a temperature beside a greedy search."""
    with hw.load("zoo:tiny-llama") as model:
        model.model.generation_config.update(do_sample=False, temperature=0.7, eos_token_id=[5, 6])
        hw.bake(model, edit.zero("L0H0")).save_pretrained(tmp_path / "baked")
    kept = GenerationConfig.from_pretrained(tmp_path / "baked")
    assert (kept.do_sample, kept.temperature, kept.eos_token_id) == (False, 0.7, [5, 6])


def test_what_it_cannot_be_compared_with_is_told_before_it_is_written(build: Build, tmp_path: Path) -> None:
    baked = hw.bake(build("tiny-llama"), edit.zero("L0H0"))
    with pytest.raises(InputError, match="takes an ItemSet"):
        baked.save_pretrained(tmp_path / "baked", items="conflict")  # type: ignore[arg-type]
    with build("tiny-llama").editing(edit.zero("L1H0")):
        with pytest.raises(PlanConflict, match="then save"):
            baked.save_pretrained(tmp_path / "baked")
        build("tiny-llama")(**build("tiny-llama").example)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_the_loader_lost_is_seen(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Qwen2 class drops an output bias; this offset is far below the tolerance of outputs."""
    model = build("tiny-gpt2")
    loaded = saving._loaded

    def forgetful(*given: Any) -> Any:
        made = loaded(*given)
        made.transformer.h[1].attn.c_proj.bias.data.copy_(model.model.transformer.h[1].attn.c_proj.bias)
        return made

    monkeypatch.setattr(saving, "_loaded", forgetful)
    with pytest.raises(Refusal, match=r"attn\.c_proj\.bias is not in the saved checkpoint"):
        hw.bake(model, edit.add("L1H2", 1e-6)).save_pretrained(tmp_path / "baked")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [partial(OSError, 28), SafetensorError])
def test_a_disk_that_does_not_take_it(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[str], Exception]
) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise kind("No space left on device")

    monkeypatch.setattr(type(build("tiny-llama").model), "save_pretrained", full)
    with pytest.raises(Refusal, match="No space left on device"):
        hw.bake(build("tiny-llama"), edit.zero("L0H0")).save_pretrained(tmp_path / "baked")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    """It dies after all files are written and before the comparison."""
    program = (
        "import os, signal, sys, headwise as hw\n"
        "from headwise.use.baking import saving\n"
        "saving._compare = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        "hw.bake(hw.load('zoo:tiny-llama'), hw.edit.zero('L0H0')).save_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "baked")], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "baked").exists()
    assert all(path.name.startswith(".baked.") and path.name.endswith(".partial") for path in tmp_path.iterdir())
