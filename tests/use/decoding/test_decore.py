"""DeCoRe: against plain decoding where nothing is contrasted, and against two streams by hand where something is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, TextIteratorStreamer

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.probes import encode, probe
from headwise.scores import HeadScores, Provenance
from headwise.use.decoding.decore import DeCoRe
from headwise.use.intervention import Together
from headwise.use.scaling import HeadOffset, HeadScaling
from headwise.zoo.planted import planted

MODES = ("batch", "caches")
DIM = 12  # of every head here
QUERIES = {"tiny-llama": "model.layers.{}.self_attn.q_proj", "tiny-gpt2": "transformer.h.{}.attn.c_attn"}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 50},
    "beams": {"num_beams": 3},
}
HEADS = ((0, 1), (0, 2), (1, 3))
LABELS = "L0H1, L0H2, L1H3"


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What is written behind the prompt."""
    torch.manual_seed(3)
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False} | options
    written: Tensor = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return written


@contextmanager
def uniform_by_hand(network: nn.Module, name: str, heads: Sequence[tuple[int, int]], start: int) -> Iterator[None]:
    """Queries of 0 from column `start` on: the head attends equally to all that it sees. Of whole texts, no steps."""

    def hook(head: int) -> Callable[..., Tensor]:
        def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, start:, head * DIM : (head + 1) * DIM] = 0
            return output

        return silence

    with ExitStack() as undo:
        for layer, head in heads:
            module = network.get_submodule(QUERIES[name].format(layer))
            undo.callback(module.register_forward_hook(hook(head)).remove)
        yield


@contextmanager
def recomputed(
    network: nn.Module, second: Callable[[], Any], combine: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Every forward gives `combine` of its logits and those of the same forward inside `second()`."""

    def both(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        with second():
            other = module.forward(*args, **kwargs).logits
        output["logits"] = combine(output.logits, other)
        return output

    handle = network.register_forward_hook(both, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def llama() -> Iterator[hw.AttachedModel]:
    with attached("tiny-llama") as model:
        yield model


def by_entropy(first: Tensor, second: Tensor) -> Tensor:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    alpha = -(p.exp() * p).sum(-1, keepdim=True)
    return (1 + alpha) * p - alpha * q


def static(alpha: float, first: Tensor, second: Tensor) -> Tensor:
    return (1 + alpha) * first.log_softmax(-1) - alpha * second.log_softmax(-1)


# -- where nothing is contrasted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "neutral",
    [DeCoRe(()), DeCoRe(LABELS, alpha=0), DeCoRe(LABELS, alpha=0.0, mask_prompt=True), DeCoRe(LABELS, alpha_cap=0)],
)
def test_with_no_heads_or_no_alpha_it_is_the_plain_model(llama: hw.AttachedModel, neutral: DeCoRe) -> None:
    plain, text = llama(**llama.example).logits, generated(llama, llama.example)
    with neutral(llama):
        assert torch.equal(llama(**llama.example).logits, plain)
        assert torch.equal(generated(llama, llama.example), text)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_heads_that_write_nothing_change_nothing(mode: Any) -> None:
    with attached("tiny-llama") as model:
        network: Any = model.model
        for layer, head in HEADS:
            network.model.layers[layer].self_attn.o_proj.weight[:, head * DIM : (head + 1) * DIM] = 0
        plain = model(**model.example).logits.log_softmax(-1)
        texts = {name: generated(model, model.example, **search) for name, search in SEARCHES.items()}
        for decore in (DeCoRe(LABELS, mode=mode), DeCoRe(LABELS, alpha=30.0, mask_prompt=True, mode=mode)):
            with decore(model):
                found = model(**model.example).logits
                torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
                assert mode == "batch" or torch.equal(found, plain)
                for name, search in SEARCHES.items():
                    assert torch.equal(generated(model, model.example, **search), texts[name])


# -- two streams are two runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize(("name", "mode"), [("tiny-llama", "batch"), ("tiny-llama", "caches"), ("tiny-gpt2", "batch")])
def test_generation_is_that_of_two_models_recomputed(name: str, mode: Any, mask_prompt: bool, search: str) -> None:
    with attached(name) as model:
        inputs = {key: model.example[key] for key in ("input_ids", "attention_mask")}
        plain = generated(model, inputs, **SEARCHES[search])
        start = 0 if mask_prompt else inputs["input_ids"].shape[1] - 1
        with DeCoRe(LABELS, mask_prompt=mask_prompt, mode=mode)(model):
            found = generated(model, inputs, **SEARCHES[search])
        second = partial(uniform_by_hand, model.model, name, HEADS, start)
        with recomputed(model.model, second, by_entropy):
            expected = generated(model, inputs, use_cache=False, **SEARCHES[search])
        assert torch.equal(found, expected)
        assert not torch.equal(found, plain)


def test_masking_the_prompt_is_another_function(llama: hw.AttachedModel) -> None:
    logits = {}
    for mask_prompt in (False, True):
        with torch.no_grad(), DeCoRe(LABELS, alpha=0.5, mask_prompt=mask_prompt)(llama):
            logits[mask_prompt] = llama(**llama.example).logits[:, -1]
    assert float((logits[False] - logits[True]).abs().max()) > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_a_row_is_written_as_it_is_alone(llama: hw.AttachedModel, mode: Any) -> None:
    with DeCoRe(LABELS, mode=mode)(llama):
        together = generated(llama, llama.example)
        for row, mask in enumerate(llama.example["attention_mask"].bool()):
            ids = llama.example["input_ids"][row][mask][None]
            alone = generated(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            assert torch.equal(together[row], alone[0])


# -- the contrast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decore", "combine"),
    [
        (DeCoRe(LABELS), by_entropy),
        (DeCoRe(LABELS, alpha=0.5), partial(static, 0.5)),
        (DeCoRe(LABELS, alpha_cap=1.25), partial(static, 1.25)),  # every entropy here is above it
        (DeCoRe(LABELS, alpha_cap=100), by_entropy),
    ],
)
@torch.no_grad()
def test_scores_are_the_formula(llama: hw.AttachedModel, decore: DeCoRe, combine: Any) -> None:
    first = llama(**llama.example).logits[:, -1]
    with uniform_by_hand(llama.model, "tiny-llama", HEADS, 31):
        second = llama.model.forward(**llama.example).logits[:, -1]
    with decore(llama):
        found = llama(**llama.example).logits[:, -1]
    torch.testing.assert_close(found, combine(first, second), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_scaled_entropy_is_a_share_of_its_largest(llama: hw.AttachedModel) -> None:
    first = llama(**llama.example).logits[:, -1]
    with DeCoRe(LABELS, alpha=1.0)(llama):
        apart = llama(**llama.example).logits[:, -1] - first.log_softmax(-1)
    p = first.softmax(-1)
    share = -(p * p.log()).sum(-1, keepdim=True) / math.log(p.shape[-1])
    with DeCoRe(LABELS, scale_alpha=True)(llama):
        found = llama(**llama.example).logits[:, -1]
    torch.testing.assert_close(found, first.log_softmax(-1) + share * apart, rtol=1e-4, atol=1e-4)
    assert float(share.max()) < 1


@torch.no_grad()
def test_the_filter_rules_out_what_the_model_itself_finds_unlikely(llama: hw.AttachedModel) -> None:
    p = llama(**llama.example).logits[:, -1].softmax(-1)
    with DeCoRe(LABELS, alpha=40.0)(llama):
        free = llama(**llama.example).logits[:, -1]
    with DeCoRe(LABELS, alpha=40.0, relative_top=0.5)(llama):
        found = llama(**llama.example).logits[:, -1]
    kept = p >= 0.5 * p.max(-1, keepdim=True).values
    assert torch.equal(found > -math.inf, kept)
    torch.testing.assert_close(found[kept], free[kept])
    assert not bool(kept.gather(1, free.argmax(-1, keepdim=True)).all())  # without it such a token wins
    for alone in (DeCoRe(LABELS, alpha=0, relative_top=0.5), DeCoRe((), relative_top=0.5)):
        with alone(llama):
            assert torch.equal(llama(**llama.example).logits[:, -1] > -math.inf, kept)


def test_a_head_that_copies_raises_the_margin_of_what_it_copied() -> None:
    """Planted heads that copy a name: by alpha times what the masked model lost of the margin."""
    organism = planted("llama-gqa", seed=2, strength=1.0)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        items = encode(probe("ioi"), model.tokenizer, n=6)
        heads = organism.truth.with_effect("ioi", "direct")
        plain, masked = (
            hw.measure(model, items, "logit-difference", edits=edits) for edits in ((), (hw.edit.uniform(heads),))
        )
        assert bool((masked < plain).all())
        for alpha in (0.5, 2.0):
            decore = DeCoRe(heads, alpha=alpha, mask_prompt=True)
            found = hw.measure(model, items, "logit-difference", under=decore)
            torch.testing.assert_close(found, plain + alpha * (plain - masked), rtol=1e-4, atol=1e-4)


# -- in use -----------------------------------------------------------------------------------------------------------


def test_heads_by_score() -> None:
    values = np.arange(24.0).reshape(2, 3, 4)
    made_by = Provenance("retrieval", settings={}, model="made", revision=None, probe="needle", seed=0)
    scores = HeadScores({"main": values}, {"main": tuple(SiteId(layer=n) for n in range(3))}, ["a", "b"], made_by)
    chosen = DeCoRe.from_scores(scores, 2, alpha=0.5)
    assert chosen.heads == HeadSet.parse("L2H2, L2H3")
    assert chosen.alpha == 0.5
    assert not DeCoRe.from_scores(scores, 0).heads
    with pytest.raises(InputError, match="takes the HeadScores of find"):
        DeCoRe.from_scores(chosen.heads, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n=50 is not a number of heads from 0 to 12"):
        DeCoRe.from_scores(scores)


def test_streaming_and_stopping(llama: hw.AttachedModel) -> None:
    inputs = {name: value[:1] for name, value in llama.example.items()}

    class After(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 32 + 4)

    with DeCoRe(LABELS)(llama):
        whole = generated(llama, inputs)
        stopped = generated(llama, inputs, stopping_criteria=[After()], min_new_tokens=None)
        streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=generated, args=(llama, inputs), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert torch.equal(stopped[0], whole[0, :4])
    assert text == llama.tokenizer.decode(whole[0], skip_special_tokens=True)


@pytest.mark.parametrize("mode", MODES)
def test_streams_can_start_from_one_cache_of_the_prompt(llama: hw.AttachedModel, mode: Any) -> None:
    """Filled outside, up to the token before the last: nothing is masked up to there."""
    ids = llama.example["input_ids"][:1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        cache = llama(ids[:, :-1], use_cache=True).past_key_values
    with DeCoRe(LABELS, mode=mode)(llama):
        whole = generated(llama, inputs)
        assert torch.equal(generated(llama, inputs, past_key_values=cache), whole)


@pytest.mark.parametrize("mode", MODES)
def test_drafts_change_nothing(llama: hw.AttachedModel, mode: Any) -> None:
    inputs = {name: value[:1] for name, value in llama.example.items()}
    with DeCoRe(LABELS, mode=mode)(llama):
        expected = generated(llama, inputs)
        assert torch.equal(generated(llama, inputs, prompt_lookup_num_tokens=3), expected)


def test_what_cannot_be_served_is_refused(llama: hw.AttachedModel) -> None:
    with pytest.raises(Refusal, match="dola_generation is code"), DeCoRe(LABELS)(llama):
        llama.generate(**llama.example, dola_layers="low")
    with pytest.raises(PlanConflict, match="two streams are all"), DeCoRe(LABELS)(llama), DeCoRe("L1H1")(llama):
        pass
    with pytest.raises(InputError, match="no attention at L7"), DeCoRe("L7H0")(llama):
        pass
    for wrong, message in (
        ({"alpha": -1}, "from 0 on"),
        ({"alpha": "half"}, "neither 'entropy' nor a number"),
        ({"alpha": math.nan}, "out of range"),
        ({"alpha": 0.5, "alpha_cap": 1.0}, "are for alpha='entropy'"),
        ({"alpha": 0.5, "scale_alpha": True}, "are for alpha='entropy'"),
        ({"alpha_cap": -1}, "alpha_cap=-1 is out of range"),
        ({"relative_top": 2}, "from 0 to 1"),
        ({"mask_prompt": 1}, "not True or False"),
        ({"mode": "cache"}, "not one of batch, caches"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            DeCoRe(LABELS, **wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    for nothing in (None, 0, "", {}):
        with pytest.raises(InputError):
            DeCoRe(nothing)  # type: ignore[arg-type]


@torch.no_grad()
def test_together_with_a_scaling_it_contrasts_the_scaled_model(llama: hw.AttachedModel) -> None:
    with Together((HeadScaling("L1H0", 3.0), DeCoRe(LABELS, alpha=0.5)))(llama):
        found = llama(**llama.example).logits[:, -1]
    with HeadScaling("L1H0", 3.0)(llama), llama.editing(hw.edit.uniform(LABELS, scope="last")):
        second = llama(**llama.example).logits[:, -1]
    with HeadScaling("L1H0", 3.0)(llama):
        first = llama(**llama.example).logits[:, -1]
    torch.testing.assert_close(found, static(0.5, first, second), rtol=1e-4, atol=1e-4)
    push = HeadOffset({"L1H0": torch.ones(DIM)})  # after the scaling, in both streams, however they are put together
    scaled, decore = HeadScaling("L1H0", 3.0), DeCoRe(LABELS, alpha=0.5)
    written = []
    for parts in ((scaled, push, decore), (Together((scaled, decore)), push), (scaled, Together((decore, push)))):
        with Together(parts)(llama):
            written.append(llama(**llama.example).logits[:, -1])
    torch.testing.assert_close(written[1], written[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written[2], written[0], rtol=1e-5, atol=1e-5)
    # In nested blocks the scaling is the first stream's alone, whichever of them is outside.
    with llama.editing(hw.edit.uniform(LABELS, scope="last")):
        unscaled = llama(**llama.example).logits[:, -1]
    with HeadScaling("L1H0", 3.0)(llama), DeCoRe(LABELS, alpha=0.5)(llama):
        nested = llama(**llama.example).logits[:, -1]
    torch.testing.assert_close(nested, static(0.5, first, unscaled), rtol=1e-4, atol=1e-4)
    with DeCoRe(LABELS, alpha=0.5)(llama), HeadScaling("L1H0", 3.0)(llama):
        assert torch.equal(llama(**llama.example).logits[:, -1], nested)
    assert not torch.allclose(nested, found, rtol=1e-2, atol=1e-2)
