"""Adapters in PEFT's layout: what they need of a model, and their way through a saved folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import headwise as hw
from headwise import use
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet

MODULES = {"zoo:tiny-llama": "model.layers.1.self_attn.q_proj", "zoo:tiny-gpt2": "transformer.h.1.attn.c_attn"}


@cache
def built(name: str) -> hw.AttachedModel:
    return hw.load(name)


def sizes(name: str) -> tuple[int, int]:
    """Outputs and inputs of the module that the adapter changes."""
    weight = built(name).model.get_submodule(MODULES[name]).weight
    assert isinstance(weight, Tensor)
    return (weight.shape[0], weight.shape[1]) if "llama" in name else (weight.shape[1], weight.shape[0])


def write(folder: Path, name: str = "zoo:tiny-llama", outputs: int | None = None, module: str = "") -> Path:
    """A LoRA of rank 2 by hand."""
    folder.mkdir()
    path = f"base_model.model.{module or MODULES[name]}"
    out, inside = sizes(name)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{path}.lora_A.weight": torch.randn(2, inside, generator=generator),
        f"{path}.lora_B.weight": torch.randn(outputs or out, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [path.split(".")[-1]],
        "layers_to_transform": [1],
    }
    config |= {"fan_in_fan_out": "gpt2" in name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_an_adapter_says_what_it_changes(name: str, tmp_path: Path) -> None:
    adapter = use.Adapter(write(tmp_path / "lora", name))
    assert adapter.shapes == {MODULES[name]: sizes(name)}
    adapter.require_fits(built(name))


def test_an_adapter_comes_back_byte_for_byte_and_peft_loads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = built("zoo:tiny-llama")
    given = use.Adapter(write(tmp_path / "lora"), HeadSet.parse("L1H2"))
    found = use.load(use.save(given, tmp_path / "it", model=model, licence="mit"), model)
    assert isinstance(found, use.Adapter)
    assert found.heads == given.heads
    assert found.folder == tmp_path / "it" / "adapter"
    files = {each.name: each.read_bytes() for each in given.folder.iterdir()}
    assert {each.name: each.read_bytes() for each in found.folder.iterdir()} == files
    plain = hw.load("zoo:tiny-llama").model
    with torch.no_grad():
        before = plain(**model.example).logits
        changed = peft.PeftModel.from_pretrained(plain, found.folder)(**model.example).logits
    assert not torch.allclose(before, changed)


def test_an_adapter_of_another_shape_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = built("zoo:tiny-llama")
    wide = use.Adapter(write(tmp_path / "wide", outputs=7))
    other = use.Adapter(write(tmp_path / "other", module="model.layers.9.self_attn.q_proj"))
    for adapter, message in ((wide, r"does not fit zoo:tiny-llama: there it is"), (other, "it has no such module")):
        with pytest.raises(Refusal, match=message):
            adapter.require_fits(model)
        with pytest.raises(Refusal, match=message):
            use.save(adapter, tmp_path / "it", model=model)
    folder = use.save(use.Adapter(write(tmp_path / "right")), tmp_path / "it", model=model)
    with pytest.raises(Refusal, match="does not fit zoo:tiny-gpt2"):
        use.load(folder, built("zoo:tiny-gpt2"), anyway=True)


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no PEFT adapter: it has no adapter_config.json"):
        use.Adapter(tmp_path)
    pickled = write(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(Refusal, match="as a pickle"):
        use.Adapter(pickled)
    for name, file in {"json": "adapter_config.json", "weights": "adapter_model.safetensors"}.items():
        folder = write(tmp_path / name)
        (folder / file).write_bytes(b"{ not this")
        with pytest.raises(InputError, match="holds a damaged adapter"):
            use.Adapter(folder)
    other = write(tmp_path / "ia3")
    (other / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    save_file({"base_model.model.x.ia3_l": torch.ones(2)}, other / "adapter_model.safetensors")
    with pytest.raises(Refusal, match="of the type IA3 that changes no weight by LoRA"):
        use.Adapter(other)
    with pytest.raises(InputError, match=r"is a PEFT adapter without headwise.json"):
        use.load(write(tmp_path / "plain"))


def test_weights_that_were_changed_later_are_seen(tmp_path: Path) -> None:
    model = built("zoo:tiny-llama")
    folder = use.save(use.Adapter(write(tmp_path / "lora")), tmp_path / "it", model=model)
    write(tmp_path / "other")
    weights = tmp_path / "it" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"is not the file that headwise.json names"):
        use.load(folder)
