"""Decision heads: the lens of what each head adds, written out from the model's own weights, and planted heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.decision import decision_heads
from headwise.find.parting import at_parting
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes import encode, probe
from headwise.probes.encoding import ItemSet
from headwise.zoo.planted import planted

Row = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[Sequence[int]]]

ROWS: tuple[Row, ...] = (
    ([1, 9, 10, 22, 12], [1, 9, 30, 23, 12], [20, 22, 50], []),
    ([1, 24, 40, 41, 24, 43, 44, 9], [1, 24, 40, 51, 42, 43, 44, 9], [24, 60], []),
)
TWIN_ANSWERS = ([20, 23, 51], [25, 60])


@pytest.fixture
def chains(twinned: Callable[..., ItemSet]) -> ItemSet:
    return twinned(*ROWS, twin_answers=TWIN_ANSWERS)


@pytest.fixture(params=["tiny-llama", "tiny-gpt2", "tiny-gemma2"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    built = zoo.build(request.param)
    with hw.attach(built.model, built.tokenizer, example=built.example) as attached:
        yield attached


def parts(network: Any, ids: Sequence[int], layer: int) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """By hooks: the stream before a block, with all that attention adds, each head's part (GPT-2 stores W_O turned,
    Gemma 2 normalises what is added), and the lens; at the last token."""
    if hasattr(network, "model"):
        block, norm, turned = network.model.layers[layer], network.model.norm, False
        projection, attention = block.self_attn.o_proj, block.self_attn
    else:
        block, norm, turned = network.transformer.h[layer], network.transformer.ln_f, True
        projection, attention = block.attn.c_proj, block.attn
    kept: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda m, args: kept.update(before=args[0][0, -1])),
        projection.register_forward_pre_hook(lambda m, args: kept.update(z=args[0][0, -1])),
        attention.register_forward_hook(lambda m, args, output: kept.update(added=output[0][0, -1])),
    ]
    with torch.no_grad():
        network(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    weight = projection.weight.detach() if turned else projection.weight.detach().T
    writes = torch.einsum("hd,hdm->hm", kept["z"].unflatten(0, (4, -1)), weight.unflatten(0, (4, -1)))

    def lens(stream: Tensor) -> Tensor:
        logits = network.get_output_embeddings()(norm(stream))
        cap = getattr(network.config, "final_logit_softcapping", None)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)

    if hasattr(block, "pre_feedforward_layernorm"):
        after = block.post_attention_layernorm
        rms = (kept["added"].square().mean() + after.eps).rsqrt()
        return kept["before"], kept["before"] + after(kept["added"]), writes * rms * (1 + after.weight), lens
    return kept["before"], kept["before"] + kept["added"], writes, lens


@pytest.mark.parametrize("of", ["share", "loss"])
@torch.no_grad()
def test_scores_are_those_of_the_weights(model: AttachedModel, chains: ItemSet, of: Any) -> None:
    found = decision_heads(model, chains, of=of)
    assert sorted(found) == [SiteId(layer=layer) for layer in range(len(found))]
    for row, step in enumerate(at_parting(chains)):
        for layer in range(len(found)):
            before, behind, writes, lens = parts(model.model, step.prompt, layer)
            p_pre, p_mid = (lens(stream)[step.answer[0]] for stream in (before, behind))
            p_h = torch.stack([lens(before + write)[step.answer[0]] for write in writes])
            expected = (p_h - p_pre) / p_mid if of == "share" else -(p_mid - p_h) / p_mid
            torch.testing.assert_close(found[SiteId(layer=layer)][row], expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_head_that_writes_nothing_has_no_share_and_one_alone_in_its_block_has_no_loss(
    tiny: AttachedModel, chains: ItemSet
) -> None:
    network: Any = tiny.model
    projection = network.model.layers[1].self_attn.o_proj
    projection.weight[:, projection.in_features // 4 :] = 0
    share, loss = (decision_heads(tiny, chains, of=of)[SiteId(layer=1)] for of in ("share", "loss"))  # type: ignore[arg-type]
    assert float(share[:, 1:].abs().max()) < 1e-6
    assert float(share[:, 0].abs().min()) > 1e-3
    assert float(loss[:, 0].abs().max()) < 1e-5


def test_heads_that_know_are_found_and_the_published_loss_cannot_tell_blocks_apart() -> None:
    organism = planted("llama-gqa", seed=1)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        items = encode(probe("facts"), model.tokenizer, n=8)
        wanted = organism.truth.with_effect("facts", "direct")
        assert find("decision-heads", model, items).top(len(wanted)) == wanted
        assert find("decision-heads", model, items, of="loss").top(len(wanted)) != wanted


def test_what_cannot_be_asked_for(tiny: AttachedModel, chains: ItemSet) -> None:
    with pytest.raises(InputError, match="choose from share, loss"):
        find("decision-heads", tiny, chains, of="gain")
    built = zoo.build("tiny-olmo2")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:
        assert decision_heads(model, chains)[SiteId(layer=0)].isfinite().all()
    built = zoo.build("tiny-bert")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model, pytest.raises(Refusal):
        decision_heads(model, chains)
