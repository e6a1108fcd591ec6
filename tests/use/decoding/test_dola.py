"""DoLa: against the same computed from `output_hidden_states`, and where no layer differs from the last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.use.decoding.dola import DoLa, jensen_shannon, released_divergence
from headwise.use.intervention import Together
from headwise.use.scaling import HeadScaling

VARIANTS = ("released", "normed")
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.2},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"num_beams": 3},
}


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False} | options
    written: Tensor = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return written


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    with attached("tiny-llama") as model:
        yield model


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def by_hand(network: Any, variant: str, candidates: tuple[int, ...], logits: Tensor, states: Any) -> Tensor:
    """Row by row and position by position, from the definitions."""
    final_norm = network.model.norm if hasattr(network, "model") else network.transformer.ln_f
    made = torch.zeros_like(logits)
    for row in range(logits.shape[0]):
        for column in range(logits.shape[1]):
            p = logits[row, column].double().softmax(-1)
            furthest, chosen = -math.inf, p
            for layer in candidates:
                stream = states[layer][row, column - logits.shape[1]]
                stream = final_norm(stream) if variant == "normed" else stream
                q = network.get_output_embeddings()(stream).double().softmax(-1)
                m = (p + q) / 2
                apart = kl(m, p) + kl(m, q) if variant == "released" else (kl(p, m) + kl(q, m)) / 2
                if apart > furthest:
                    furthest, chosen = apart, q
            made[row, column] = torch.where(p < 0.1 * p.max(), torch.tensor(-1000.0).double(), p.log() - chosen.log())
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "layers", "candidates"),
    [
        ("tiny-llama", (0, 1, 2), (0, 1, 2)),
        ("tiny-llama", "high", (2,)),
        ("tiny-llama", "low", (0,)),
        ("tiny-gpt2", (0, 2), (0, 2)),
    ],
)
@torch.no_grad()
def test_scores_are_those_of_the_hidden_states(name: str, layers: Any, candidates: Any, variant: Any) -> None:
    with attached(name) as model:
        plain = model.model.forward(**model.example, output_hidden_states=True)
        expected = by_hand(model.model, variant, candidates, plain.logits[:, -6:], plain.hidden_states)
        with DoLa(layers=layers, variant=variant)(model):
            found = model(**model.example).logits[:, -6:]
            few = model(**model.example, logits_to_keep=2).logits
        torch.testing.assert_close(found, expected.to(found), rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(few, found[:, -2:], rtol=1e-4, atol=1e-4)
        assert 0 < int((found > -1000).sum()) < found.numel()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_that_of_whole_recomputations(llama: hw.AttachedModel, variant: Any, search: str) -> None:
    network: Any = llama.model

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        output["logits"] = by_hand(module, variant, (0, 2), output.logits[:, -1:], output.hidden_states)
        return output

    with DoLa(layers=(0, 2), variant=variant)(llama):
        found = generated(llama, llama.example, **SEARCHES[search])
    plain = generated(llama, llama.example, **SEARCHES[search])
    handle = network.register_forward_hook(hook, with_kwargs=True)
    network.config.output_hidden_states = True
    expected = generated(llama, llama.example, use_cache=False, **SEARCHES[search])
    handle.remove()
    network.config.output_hidden_states = False
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_where_no_later_layer_does_anything_every_plausible_token_is_alike() -> None:
    with attached("tiny-llama") as model:
        network: Any = model.model
        for block in network.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        p = model(**model.example).logits.softmax(-1)
        with DoLa(layers=(1, 2), variant="normed")(model):
            found = model(**model.example).logits
        kept = p >= 0.1 * p.max(-1, keepdim=True).values
        assert float(found[kept].abs().max()) < 1e-5
        assert bool((found[~kept] == -1000).all())
        assert bool(kept.any(-1).all())


def test_the_divergences_are_their_definitions() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    a, b = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    m = (a + b) / 2
    as_logs = a.log().expand(1, 1, 3), torch.stack([a, b]).log().reshape(2, 1, 1, 3)
    assert released_divergence(*as_logs).flatten().tolist() == pytest.approx([0, kl(m, a) + kl(m, b)], abs=1e-6)
    assert jensen_shannon(*as_logs).flatten().tolist() == pytest.approx([0, (kl(a, m) + kl(b, m)) / 2], abs=1e-6)
    opposite = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    for divergence in (released_divergence, jensen_shannon):
        assert not bool(divergence(p.log().expand(1, 1, 3), q.log().expand(1, 1, 1, 3)).isnan().any())
        assert not bool(divergence(opposite[0].expand(1, 1, 2), opposite[1].expand(1, 1, 1, 2)).isnan().any())


def test_tokens_whose_share_is_0_in_fp32_do_not_hide_a_layer() -> None:
    """As logits that spread over more than a hundred nats have them; a nan would be the largest divergence of all."""
    final = torch.tensor([[[0.0, -120.0, -300.0]]]).log_softmax(-1)
    near, far = torch.tensor([0.0, -110.0, -400.0]), torch.tensor([0.0, 1.0, -500.0])
    exits = torch.stack([near, far]).log_softmax(-1).reshape(2, 1, 1, 3)
    for divergence in (released_divergence, jensen_shannon):
        found = divergence(final, exits).flatten()
        wanted = divergence(final.double(), exits.double()).flatten()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert found.argmax() == 1


@torch.no_grad()
def test_rows_choose_their_layer_for_themselves(llama: hw.AttachedModel) -> None:
    with DoLa(layers=(0, 1, 2))(llama):
        together = generated(llama, llama.example)
        for row, mask in enumerate(llama.example["attention_mask"].bool()):
            ids = llama.example["input_ids"][row][mask][None]
            alone = generated(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            assert torch.equal(together[row], alone[0])


def test_candidates_are_even_layers_of_a_half() -> None:
    with hw.load("zoo:organism") as model:  # six blocks
        assert DoLa().candidates(model) == ("L4",)
        assert DoLa(layers="low").candidates(model) == ("L0", "L2")
        assert DoLa(layers=[3, 1, 3]).candidates(model) == ("L1", "L3")  # type: ignore[arg-type]


def test_streaming_and_drafts(llama: hw.AttachedModel) -> None:
    inputs = {name: value[:1] for name, value in llama.example.items()}
    with DoLa()(llama):
        whole = generated(llama, inputs)
        assert torch.equal(generated(llama, inputs, prompt_lookup_num_tokens=3), whole)
        streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=generated, args=(llama, inputs), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == llama.tokenizer.decode(whole[0], skip_special_tokens=True)


@torch.no_grad()
def test_together_and_nested_it_contrasts_layers_of_the_edited_model(llama: hw.AttachedModel) -> None:
    with HeadScaling("L0H0", 3.0)(llama):
        plain = llama(**llama.example, output_hidden_states=True)
    expected = by_hand(llama.model, "released", (2,), plain.logits[:, -3:], plain.hidden_states)
    with Together((DoLa(), HeadScaling("L0H0", 3.0)))(llama):
        found = llama(**llama.example).logits[:, -3:]
    with DoLa()(llama), HeadScaling("L0H0", 3.0)(llama):
        nested = llama(**llama.example).logits[:, -3:]
    torch.testing.assert_close(found, expected.to(found), rtol=1e-3, atol=2e-3)
    assert torch.equal(found, nested)


def test_what_cannot_be_is_refused(llama: hw.AttachedModel) -> None:
    with pytest.raises(Refusal, match="contrastive_search is code"), DoLa()(llama):
        llama.generate(**llama.example, penalty_alpha=0.6, top_k=4)
    with pytest.raises(PlanConflict, match="contrasted already"), DoLa()(llama), DoLa()(llama):
        pass
    with attached("tiny-bert") as model, pytest.raises(Refusal, match="it has no lens"), DoLa()(model):
        pass
    with pytest.raises(InputError, match="take 0 to 2"), DoLa(layers=(3,))(llama):
        pass
    for wrong, message in (
        ({"layers": "middle"}, "not 'high', 'low' or numbers"),
        ({"layers": ()}, "not 'high', 'low' or numbers"),
        ({"layers": (1.5,)}, "not 'high', 'low' or numbers"),
        ({"layers": 3}, "not 'high', 'low' or numbers"),
        ({"variant": "JS"}, "not one of released, normed"),
        ({"relative_top": -1}, "from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            DoLa(**wrong)  # type: ignore[arg-type]
