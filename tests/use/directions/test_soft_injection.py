"""Soft Injection: constants at full strength, nothing at none, and nowhere but at the prompt's last token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import HeadwiseError, InputError
from headwise.model.attached import AttachedModel
from headwise.use import SoftInjection

TEXTS = ["a b c", "some longer text of words"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest) -> AttachedModel:
    return hw.load(f"zoo:tiny-{request.param}")


def vectors(model: AttachedModel, heads: str) -> dict[str, Tensor]:
    found = model.heads(heads)
    width = model.site(found.sites[0].label).head_dim
    drawn = torch.randn(len(found), width, generator=torch.Generator().manual_seed(0))
    return dict(zip(found.labels, drawn, strict=True))


def padded(model: AttachedModel, texts: list[str]) -> dict[str, Tensor]:
    model.tokenizer.padding_side = "left"
    return dict(model.tokenizer(texts, return_tensors="pt", padding=True))


def projection_output(model: AttachedModel, label: str, inputs: dict[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    module = model.model.get_submodule(model.site(label).projection or "")
    hook = module.register_forward_hook(lambda module, given, output: found.append(output))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found[0]


def test_the_whole_of_it_in_every_head_of_a_layer_is_a_constant(model: AttachedModel) -> None:
    last = model.sites[-1].label
    embedding = vectors(model, last)
    inputs = padded(model, TEXTS)
    plain = projection_output(model, last, inputs)
    with SoftInjection(embedding, 1.0)(model):
        mixed = projection_output(model, last, inputs)
        alone = projection_output(model, last, padded(model, TEXTS[:1]))
    module = model.model.get_submodule(model.site(last).projection or "")
    constant = module(torch.cat([embedding[head.label] for head in model.heads(last)])[None])[0]
    assert torch.allclose(mixed[:, -1], constant.expand(2, -1), atol=1e-5)
    assert torch.allclose(alone[0, -1], constant, atol=1e-5)
    assert (plain[0, -1] - plain[1, -1]).abs().max() > 1e-3
    assert torch.equal(mixed[:, :-1], plain[:, :-1])  # nothing before


def test_between_it_is_a_straight_line(model: AttachedModel) -> None:
    embedding = vectors(model, "L1H0, L1H2")
    inputs = padded(model, TEXTS)
    with torch.no_grad(), model.reading(hw.read.z(heads="L1")) as got:
        model(**inputs)
    plain = got.z["L1"].clone()
    given = SoftInjection(embedding, {"L1H0": 0.25, "L1H2": 0.75})
    with given(model), torch.no_grad(), model.reading(hw.read.z(heads="L1")) as got:
        model(**inputs)
    wanted = plain.clone()
    wanted[:, -1, 0] = 0.75 * plain[:, -1, 0] + 0.25 * embedding["L1H0"]
    wanted[:, -1, 2] = 0.25 * plain[:, -1, 2] + 0.75 * embedding["L1H2"]
    assert torch.allclose(got.z["L1"], wanted, atol=1e-6)


def test_none_of_it_is_no_edit(model: AttachedModel) -> None:
    inputs = padded(model, TEXTS)
    none = SoftInjection(vectors(model, "L0, L1"), 0.0)
    assert none.edits(model) == ()
    with torch.no_grad():
        plain = model(**inputs).logits
        with none(model):
            assert torch.equal(model(**inputs).logits, plain)
    assert SoftInjection(vectors(model, "L0H0")).alpha == 0.5


def test_generation_is_edited_at_the_prompt_alone(model: AttachedModel) -> None:
    """With a cache, where the decoded tokens come one by one, as without one, where all are run again."""
    inputs = padded(model, TEXTS)
    n = inputs["input_ids"].shape[1]
    given = SoftInjection(vectors(model, "L0, L1"), 0.9)
    options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with given(model):
        cached = model.generate(**inputs, **options)
        uncached = model.generate(**inputs, **options, use_cache=False)
        logits = torch.stack(model.generate(**inputs, **options, **kept).logits)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    # Prompts are flush right, so their last token is one column in every row.
    by_column = hw.edit.mix(given.heads, dict(given.embedding), 0.9, queries=[n - 1])
    with model.editing(by_column):
        wanted = torch.stack(model.generate(**inputs, **options, **kept).logits)
    assert torch.allclose(logits, wanted, atol=1e-5)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with given(model, prompt_length=n), torch.no_grad():
        logits = model(input_ids=cached, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits[:, n - 1 : -1].argmax(-1), cached[:, n:])


def test_what_cannot_be_meant_is_refused(model: AttachedModel) -> None:
    embedding = vectors(model, "L0H0")
    for alpha in (-0.1, 1.1, float("nan"), {"L0H0": 2.0}):
        with pytest.raises(InputError, match="alpha"):
            SoftInjection(embedding, alpha)
    with pytest.raises(InputError, match="without a head of its own"):
        SoftInjection(embedding, {"L0H1": 0.5})
    with pytest.raises(InputError, match="mapping from head label"):
        SoftInjection({})
    with pytest.raises(InputError), SoftInjection({"L9H0": embedding["L0H0"]})(model):
        pass
    with pytest.raises(HeadwiseError), SoftInjection({"L0H0": torch.zeros(99)})(model):
        pass
