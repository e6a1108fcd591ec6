"""What `generate` may search with where logits are contrasted: refused before a forward, or served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from transformers import GenerationConfig

import headwise as hw
from headwise import zoo
from headwise.errors import Refusal

UNSERVED: list[tuple[dict[str, Any], str]] = [
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search is code"),
    ({"dola_layers": "high"}, "dola_generation is code"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search is code"),
    ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained_beam_search is code"),
    ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate= is code that headwise does not know"),
    ({"custom_generate": "someone/something"}, "custom_generate= is code that headwise does not know"),
    ({"assistant_early_exit": 2}, "drafts with fewer layers"),
    ({"generation_config": GenerationConfig(dola_layers="low")}, "dola_generation is code"),
]


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    built = zoo.build("tiny-llama")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:
        yield model


@pytest.mark.parametrize(("asked", "message"), UNSERVED)
def test_what_is_not_served_is_refused_before_anything_runs(
    llama: hw.AttachedModel, asked: dict[str, Any], message: str
) -> None:
    assert llama.table.sublayers.blocks  # looked for once, by running the model
    ran: list[int] = []
    handle = llama.model.register_forward_pre_hook(lambda *_: ran.append(1))
    blocks = (
        llama.dual(hw.edit.zero("L0H1"), combine=torch.sub),
        llama.rescoring(lambda logits, streams: logits, ["L1"]),
    )
    for block in blocks:
        with pytest.raises(Refusal, match=message) as caught, block:
            llama.generate(**llama.example, **asked)
        assert "greedy search, sampling, beams" in str(caught.value)
        assert "\n" not in str(caught.value)
    handle.remove()
    assert not ran


def test_settings_given_by_place_count(llama: hw.AttachedModel) -> None:
    settings = GenerationConfig(dola_layers="low", max_new_tokens=2)
    with pytest.raises(Refusal, match="dola_generation"), llama.rescoring(lambda a, b: a, ["L1"]):
        llama.generate(llama.example["input_ids"], settings)
    tuned = peft.get_peft_model(zoo.build("tiny-llama").model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with hw.attach(tuned, example=llama.example) as model, pytest.raises(Refusal, match="dola_generation"):  # noqa: SIM117
        with model.rescoring(lambda a, b: a, ["L1"]):
            model.generate(llama.example["input_ids"], settings)


def test_the_models_own_generation_config_counts(llama: hw.AttachedModel) -> None:
    network: Any = llama.model
    own = network.generation_config
    network.generation_config = GenerationConfig(dola_layers="low", max_new_tokens=2)
    try:
        with pytest.raises(Refusal, match="dola_generation"), llama.rescoring(lambda a, b: a, ["L1"]):
            llama.generate(**llama.example)
        with llama.rescoring(lambda a, b: a, ["L1"]):
            assert llama.generate(**llama.example, dola_layers=None).shape[1] == 34
    finally:
        network.generation_config = own


def test_without_a_contrast_nothing_is_refused(llama: hw.AttachedModel) -> None:
    def own_code(model: Any, input_ids: Any, **kwargs: Any) -> str:
        model(input_ids)
        return "mine"

    with llama.editing(hw.edit.zero("L0H1")):
        assert llama.generate(**llama.example, custom_generate=own_code) == "mine"
    with llama.dual(hw.edit.zero("L0H1")):  # the first stream's logits as they are
        assert llama.generate(**llama.example, custom_generate=own_code) == "mine"
