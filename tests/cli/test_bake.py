"""`headwise bake`: what it writes and prints, and what it says of wrong words before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import headwise as hw
from headwise.cli import main
from headwise.use import HeadOffset, HeadScaling
from headwise.use.sharing.saved import save

MODEL = "zoo:tiny-llama"


def test_heads_are_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "baked"
    assert main(["bake", MODEL, "--heads", "L0H1,L1H2", "--scale", "-0.5", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "exact" in shown.out
    assert "loaded anew" in " ".join(shown.out.split())
    assert f"loading {MODEL}" in shown.err
    plain = hw.load(MODEL).model.state_dict()
    baked = LlamaForCausalLM.from_pretrained(out).state_dict()
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(baked[name][:, 24:36], -0.5 * plain[name][:, 24:36])
    assert torch.equal(baked[name][:, :24], plain[name][:, :24])


def test_the_scale_is_0_where_none_is_given_and_groups_can_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = "L0H0,L0H1,L1H0,L1H1,L2H2,L2H3"
    assert main(["bake", MODEL, "--heads", heads, "--remove", "--out", str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["removal"]["sliced"]
    assert told["removal"]["groups"] == ["L0G0", "L1G0", "L2G1"]
    assert told["removal"]["bytes"][1] < told["removal"]["bytes"][0]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "b").config.num_attention_heads == 2


def test_a_saved_intervention_is_baked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hw.load("zoo:tiny-qwen2") as model:
        save(HeadOffset({"L1H1": torch.ones(12)}), tmp_path / "louder", model=model)
    words = ["bake", "zoo:tiny-qwen2", str(tmp_path / "louder"), "--out", str(tmp_path / "baked"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["architecture"] == "LlamaForCausalLM"
    assert told["edits"][0]["tensors"] == ["model.layers.1.self_attn.o_proj.bias"]
    assert told["check"]["difference"] < told["check"]["tolerance"]
    assert json.loads((tmp_path / "baked" / "headwise-bake.json").read_text())["check"] == told["check"]


def test_what_cannot_be_baked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hw.load(MODEL) as model:
        save(HeadScaling("L1H1", 2.0, scope="decode"), tmp_path / "late", model=model)
    words = ["bake", MODEL, str(tmp_path / "late"), "--out", str(tmp_path / "baked")]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "some positions only" in shown.err.splitlines()[-1]
    assert not (tmp_path / "baked").exists()
    assert main([*words, "--leave-out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edits"][0]["result"] == "impossible"


def test_wrong_words_are_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hw.load(MODEL) as model:
        save(model.heads("L0H0"), tmp_path / "heads", model=model)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for words, said in (
        ([], "one of them"),
        ([str(tmp_path / "heads"), "--heads", "L0H0"], "one of them"),
        ([str(tmp_path / "heads")], "holds no intervention"),
        ([str(tmp_path / "heads"), "--scale", "0.5"], "goes with --heads"),
        (["--heads", "nonsense"], "not a head label"),
        (["--heads", "L0H0", "--scale", "nan"], "that is finite"),
        (["--heads", "L0H0", "--out", str(tmp_path)], "exists"),
        (["--heads", "L0H0", "--out", str(tmp_path / "nowhere")], "exists"),
    ):
        assert main(["bake", MODEL, "--out", str(tmp_path / "out"), *words]) == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert len(shown.err.splitlines()) == 1
        assert not shown.out
    assert main(["bake", MODEL, "--heads", "L0H0"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["bake", MODEL, "--heads", "L7H0", "--out", str(tmp_path / "out")]) == 2
    assert "no attention at L7" in capsys.readouterr().err
