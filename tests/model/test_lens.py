"""The lens: of the last stream it gives the model's own logits, and of any other the formula written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model import read
from headwise.model.lens import lens


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    with attached("tiny-llama") as model:
        yield model


@pytest.mark.parametrize(
    ("name", "before", "behind", "cap"),
    [
        ("tiny-llama", 1.0, 1.0, None),
        ("tiny-gpt2", 1.0, 1.0, None),
        ("tiny-gemma2", 1.0, 1.0, 30.0),
        ("tiny-granite", 1.0, 0.5, None),
        ("tiny-opt", 1.0, 1.0, None),
        ("tiny-t5", 32**-0.5, 1.0, None),  # its d_model is 32,
    ],
)
def test_of_the_last_stream_it_gives_the_models_logits(
    name: str, before: float, behind: float, cap: float | None
) -> None:
    with attached(name) as model:
        seen = lens(model)
        assert (seen.before, seen.behind) == pytest.approx((before, behind), rel=1e-5)
        assert seen.cap == (cap if cap is None else pytest.approx(cap, rel=1e-4))
        last = max(label for label in model.table.sublayers.blocks if label.startswith("L"))
        with torch.no_grad(), model.reading(read.residual([last])) as got:
            logits = model(**model.example).logits
        torch.testing.assert_close(seen.logits(got.residual_post[last]), logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(seen.logits(got.residual_post[last], normed=False), logits, atol=1e-2)


def test_a_soft_cap_caps_streams_that_are_larger_than_those_of_the_run() -> None:
    with attached("tiny-gemma2") as model:
        seen = lens(model)
        stream = 1e3 * torch.randn(3, seen.d_model, generator=torch.Generator().manual_seed(0))
        raw = model.model.get_output_embeddings().weight.detach() @ stream[0]  # type: ignore[operator]
        assert float(raw.abs().max()) > 100
        found = seen.logits(stream, normed=False)[0]
        torch.testing.assert_close(found, 30 * torch.tanh(raw / 30), rtol=1e-4, atol=1e-3)


def test_with_and_without_the_norm_it_is_the_formula(llama: hw.AttachedModel) -> None:
    network: Any = llama.model
    with torch.no_grad(), llama.reading(read.residual(["L1"], where="pre")) as got:
        states = llama(**llama.example, output_hidden_states=True).hidden_states
    stream = got.residual_pre["L1"]
    torch.testing.assert_close(stream, states[1])
    weight, norm = network.lm_head.weight.detach(), network.model.norm
    rms = (stream.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    seen = lens(llama)
    torch.testing.assert_close(seen.logits(stream, normed=False), stream @ weight.T)
    torch.testing.assert_close(seen.logits(stream), (stream * rms * norm.weight) @ weight.T, rtol=1e-4, atol=1e-5)
    assert seen.logits(stream[0, 0]).shape == (len(weight),)


def test_what_is_hooked_on_the_model_is_not_run(llama: hw.AttachedModel) -> None:
    network: Any = llama.model
    seen, stream = lens(llama), torch.randn(2, lens(llama).d_model)
    expected, met = seen.logits(stream), []
    handles = [m.register_forward_hook(lambda *_: met.append(1)) for m in (network.lm_head, network.model.norm)]
    torch.testing.assert_close(seen.logits(stream), expected)
    for handle in handles:
        handle.remove()
    assert not met


def test_it_is_found_while_a_plan_is_open_and_leaves_it_in_force(llama: hw.AttachedModel) -> None:
    with torch.no_grad(), llama.editing(hw.edit.zero("L0H1")):
        edited = llama(**llama.example).logits
        seen = lens(llama)
        assert seen.behind == 1.0
        assert torch.equal(llama(**llama.example).logits, edited)


def test_gradients_go_through(llama: hw.AttachedModel) -> None:
    stream = torch.randn(2, lens(llama).d_model, requires_grad=True)
    lens(llama).logits(stream)[:, 7].sum().backward()
    assert stream.grad is not None
    assert bool(stream.grad.any())


def test_what_is_no_stream(llama: hw.AttachedModel) -> None:
    for wrong in (torch.zeros(3, 5), torch.zeros(32, dtype=torch.long), "L1"):
        with pytest.raises(InputError, match=r"takes a residual stream \[\.\.\., 32\] in floats"):
            lens(llama).logits(wrong)  # type: ignore[arg-type]


def test_models_that_have_none() -> None:
    with attached("tiny-bert") as model, pytest.raises(Refusal, match="between the last block and the unembedding"):
        lens(model)
    with attached("tiny-wav2vec2") as model, pytest.raises(Refusal, match="has no unembedding"):
        lens(model)

    narrow = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4
    )
    with hw.attach(OPTForCausalLM(narrow).eval()) as model, pytest.raises(Refusal, match="and the unembedding"):
        lens(model)
    with attached("tiny-llama") as model:
        model.model.register_forward_hook(lambda m, a, output: type(output)(logits=output.logits.sin()))
        with pytest.raises(Refusal, match="between the unembedding and the logits"):
            lens(model)
