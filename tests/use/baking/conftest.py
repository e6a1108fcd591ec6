"""What the tests of baking share: small models, baked folders loaded anew by transformers alone, and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

import headwise as hw
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.proving.patient import distance, main_output
from headwise.use.baking import BakeReport
from headwise.use.baking.origins import attended
from headwise.zoo.decoders import WIDE_HEADS


@pytest.fixture(scope="module")
def build() -> Iterator[Callable[[str], AttachedModel]]:
    """A model of the zoo by its name, attached once for all tests of a module."""

    @cache
    def built(name: str) -> AttachedModel:
        return _mistral_without_window() if name == "mistral-without-window" else hw.load(f"zoo:{name}")

    yield built
    built.cache_clear()


@pytest.fixture
def loaded_by_transformers() -> Callable[[Path], Any]:
    """Nothing of headwise: what a user or a server does."""
    return _loaded


@pytest.fixture
def output() -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """What a model returns at the attended positions."""
    return _output


@pytest.fixture
def bake_and_compare() -> Callable[..., tuple[BakeReport, float, float]]:
    """The report, the difference of the saved model to a run under the edits, and that of such a run to a plain one."""
    return _bake_and_compare


@pytest.fixture
def ramp() -> Callable[[AttachedModel], Tensor]:
    """A vector of z that is no constant."""
    return _ramp


def _mistral_without_window() -> AttachedModel:
    """The zoo's Mistral has a window; its weights work without one as well."""
    model = hw.load("zoo:tiny-mistral")
    config = MistralConfig(**WIDE_HEADS, sliding_window=None)
    whole = MistralForCausalLM(config).eval()
    whole.load_state_dict(model.model.state_dict())
    return hw.attach(whole, model.tokenizer, example=model.example, name="mistral without a window")


def _loaded(folder: Path) -> Any:
    """Nothing of headwise: what a user or a server does."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """At the attended positions."""
    return attended(main_output(model(**inputs)), inputs)


def _bake_and_compare(
    model: AttachedModel, edits: Sequence[Edit], folder: Path, **options: Any
) -> tuple[BakeReport, float, float]:
    """The report, the difference of the saved model to a run under the edits, and that of such a run to a plain one."""
    report = hw.bake(model, edits, **options).save_pretrained(folder)
    baked = _output(_loaded(folder), model.example)
    with model.editing(*edits):
        edited = _output(model.model, model.example)
    return report, distance(baked, edited), distance(edited, _output(model.model, model.example))


def _ramp(model: AttachedModel, site: int = 0) -> Tensor:
    """A vector of z that is no constant."""
    return torch.linspace(-1, 1, model.sites[site].head_dim)
