"""The copying score: known circuits, planted heads, and the eigenvalues of the whole matrix over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.errors import Refusal
from headwise.find import find
from headwise.find.copying import METHODS, copying_score
from headwise.probes import probe
from headwise.probes.encoding import encode
from headwise.zoo.planted import planted

(COPYING,) = METHODS
WRITING = {"induction", "mover", "context", "key-copy"}
SEEDS = {"llama": 0, "llama-gqa": 1, "gpt2": 2}


def of_matrix(circuit: Tensor) -> float:
    """The score of one head whose circuit between a common embedding and unembedding of orthonormal codes is this."""
    d = len(circuit)
    identity = torch.eye(d, dtype=torch.float64)
    return float(copying_score(identity[:, None], circuit.double()[None], identity))


def test_circuits_that_are_known() -> None:
    identity = torch.eye(4)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert of_matrix(identity) == pytest.approx(1)
    assert of_matrix(-identity) == pytest.approx(-1)
    assert of_matrix(7 * identity) == pytest.approx(1)
    assert of_matrix(turn) == pytest.approx(0, abs=1e-12)
    assert of_matrix(torch.diag(torch.tensor([3.0, -1.0]))) == pytest.approx(0.5)
    # A turn by 60 degrees: eigenvalues 1/2 +- i sqrt(3)/2, of absolute value 1.
    sixty = torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]])
    assert of_matrix(sixty) == pytest.approx(0.5)


def test_a_circuit_of_nothing_has_no_score() -> None:
    assert torch.isnan(torch.tensor(of_matrix(torch.zeros(3, 3))))
    identity = torch.eye(6, dtype=torch.float64)
    parts = identity[:, :3][:, None], identity[3:][None]  # reads one half, writes into the other
    noise = 1e-9 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not copying_score(*parts, identity + noise).isnan().any()
    assert copying_score(*parts, identity + noise, eps=1e-7).isnan().all()


def test_heads_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 3, 2, generator=generator, dtype=torch.float64)
    outputs = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)
    ends = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    together = copying_score(values, outputs, ends)
    for head in range(3):
        alone = copying_score(values[:, [head]], outputs[[head]], ends)
        whole = torch.linalg.eigvals(values[:, head] @ outputs[head] @ ends)
        assert together[head] == pytest.approx(alone.item())
        assert together[head] == pytest.approx(float(whole.sum().real / whole.abs().sum()), abs=1e-9)


# -- against the matrix over the vocabulary, written out by the names of each architecture -----------------------------


def of_vocabulary(embedding: Tensor, value: Tensor, output: Tensor, unembedding: Tensor) -> float:
    """From the V x V matrix itself; the maps act on rows."""
    eigenvalues = torch.linalg.eigvals(embedding.double() @ value.double() @ output.double() @ unembedding.double().T)
    return float(eigenvalues.sum().real / eigenvalues.abs().sum())


def centred(weights: Tensor) -> Tensor:
    return weights - weights.mean(-1, keepdim=True)


def llama(model: Any, layer: int, head: int, gain: Callable[[Any], Tensor], after: bool = False) -> float:
    inner, config = model.model, model.config
    block = inner.layers[layer]
    group, width = head // (config.num_attention_heads // config.num_key_value_heads), config.head_dim
    value = (gain(block.input_layernorm) * block.self_attn.v_proj.weight).T
    output = block.self_attn.o_proj.weight.T[head * width : (head + 1) * width]
    output = output * gain(block.post_attention_layernorm) if after else output
    unembedding = model.lm_head.weight * gain(inner.norm)
    return of_vocabulary(inner.embed_tokens.weight, value[:, group * width : (group + 1) * width], output, unembedding)


def gpt2(model: Any, layer: int, head: int) -> float:
    inner, config = model.transformer, model.config
    block, width = inner.h[layer], config.n_embd // config.n_head
    start = 2 * config.n_embd + head * width
    value = block.ln_1.weight[:, None] * block.attn.c_attn.weight[:, start : start + width]
    output = block.attn.c_proj.weight[head * width : (head + 1) * width]
    return of_vocabulary(centred(inner.wte.weight), value, centred(output), model.lm_head.weight * inner.ln_f.weight)


WHOLE: dict[str, Callable[[Any, int, int], float]] = {
    "llama": lambda model, layer, head: llama(model, layer, head, lambda norm: norm.weight),
    "qwen2": lambda model, layer, head: llama(with_head_dim(model), layer, head, lambda norm: norm.weight),
    "gemma2": lambda model, layer, head: llama(model, layer, head, lambda norm: 1 + norm.weight, after=True),
    "gpt2": gpt2,
}


def with_head_dim(model: Any) -> Any:
    model.config.head_dim = model.model.layers[0].self_attn.head_dim
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_that_of_the_matrix_over_the_vocabulary(name: str) -> None:
    with hw.load(f"zoo:tiny-{name}") as model, torch.no_grad():
        scores = find(COPYING, model, items=1).values["main"][0]
        for layer, of_site in enumerate(scores):
            expected = [WHOLE[name](model.model, layer, head) for head in range(len(of_site))]
            assert of_site == pytest.approx(expected, abs=2e-4), (name, layer)
        assert abs(scores).max() > 0.1  # there is something to tell


def test_no_item_is_looked_at() -> None:
    with hw.load("zoo:tiny-llama") as model:
        one = find(COPYING, model, encode(probe("echo"), model.tokenizer, n=1))
        other = find(COPYING, model, encode(probe("repeat"), model.tokenizer, n=3, seed=4))
        assert one.item_ids == other.item_ids == ("weights",)
        assert (one.values["main"] == other.values["main"]).all()
        assert not model.planned


def test_bfloat16_comes_close() -> None:
    with hw.load("zoo:tiny-llama") as exact, hw.load("zoo:tiny-llama", dtype="bfloat16") as rounded:
        one, other = (find(COPYING, model, items=1).values["main"] for model in (exact, rounded))
        assert other == pytest.approx(one, abs=0.05)


# -- planted truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SEEDS)
def test_planted_heads_that_copy(architecture: str) -> None:
    organism = planted(architecture, seed=SEEDS[architecture])  # type: ignore[arg-type]
    with hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example) as model:
        scores = find(COPYING, model, items=1)
        found = {head: float(scores.values["main"][0, head.layer, head.index]) for head in model.heads()}
    for head, value in found.items():
        roles = organism.truth.roles(head)
        if roles & WRITING:
            assert value > 0.9, (head, roles)
        elif "decoy" in roles or "fixed-offset" in roles - {"key-window"}:
            assert value != value, (head, roles)  # what it writes, nothing reads: no score
        elif "memory" in roles:
            assert value < 0.3, (head, roles)  # writes another token than it reads


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "values of L0 are not a matrix"),
        ("afmoe", "gate"),
        ("t5", "one stream"),
        ("bert", "one stream|normalises the stream"),
    ],
)
def test_what_is_not_such_a_circuit_is_refused(name: str, reason: str) -> None:
    with hw.load(f"zoo:tiny-{name}") as model, pytest.raises(Refusal, match=reason):
        COPYING.score(model, None)


@pytest.mark.parametrize(
    ("place", "change", "reason"),
    [
        ("model.embed_tokens", lambda x: x * torch.linspace(1, 2, x.shape[-1]), "does not begin"),
        ("lm_head", lambda x: -x, "do not rise"),
        ("model.layers.1.self_attn.v_proj", lambda x: x + x.roll(1, dims=1), "values of L1"),
        ("model.layers.1.self_attn.v_proj", lambda x: x * x.norm(dim=-1, keepdim=True), "values of L1"),
    ],
)
def test_what_the_tables_do_not_say_is_noticed(place: str, change: Callable[[Tensor], Tensor], reason: str) -> None:
    with hw.load("zoo:tiny-llama") as model:
        hook = model.model.get_submodule(place).register_forward_hook(lambda module, args, output: change(output))
        with pytest.raises(Refusal, match=reason):
            COPYING.score(model, None)
        hook.remove()
        COPYING.score(model, None)
