"""Dual runs in `generate()` and with caches, against whole recomputations without a cache.

The second way: `generate(use_cache=False)` with a plain forward hook that runs the model once more, with plain hooks on
the output projections for the second stream's edits, and puts the combined logits in place. At every step it sees the
whole sequence, so nothing that a cache could get wrong is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import headwise as hw
from headwise import zoo

MODES = ("batch", "caches")
DIM = 12  # of every head here

PROJECTIONS = {
    "tiny-llama": "model.layers.{}.self_attn.o_proj",
    "tiny-mistral": "model.layers.{}.self_attn.o_proj",
    "tiny-gpt_oss": "model.layers.{}.self_attn.o_proj",
    "tiny-qwen3_next": "model.layers.{}.self_attn.o_proj",
    "tiny-jamba": "model.layers.{}.self_attn.o_proj",
    "tiny-t5": "decoder.block.{}.layer.0.SelfAttention.o",
    "tiny-bart": "model.decoder.layers.{}.self_attn.out_proj",
    "tiny-llava": "model.language_model.layers.{}.self_attn.o_proj",
    "tiny-qwen2_vl": "model.language_model.layers.{}.self_attn.o_proj",
}
GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 40}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7}


def contrast(first: Tensor, second: Tensor) -> Tensor:
    return 2.5 * first - 1.5 * second


def changed(model: nn.Module, name: str, layer: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain hook that passes `[batch, position, head, dim]` z of a layer through `change`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (change(args[0].unflatten(-1, (-1, DIM))).flatten(-2),)

    return model.get_submodule(PROJECTIONS[name].format(layer)).register_forward_pre_hook(hook)


def times(head: int, factor: float) -> Callable[[Tensor], Tensor]:
    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, head] *= factor
        return z

    return change


@contextmanager
def recomputed(model: nn.Module, name: str, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every forward gives `contrast` of its own logits and those of a forward with `change` at `layer`."""

    def both(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        handle = changed(model, name, layer, change)
        output["logits"] = contrast(output.logits, model.forward(*args, **kwargs).logits)
        handle.remove()
        return output

    handle = model.register_forward_hook(both, with_kwargs=True)
    yield
    handle.remove()


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**settings, **options})


def same_steps(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    scores = zip(one.scores, other.scores, strict=True)
    return torch.equal(one.sequences, other.sequences) and all(
        torch.allclose(a.clamp(min=-1e9), b.clamp(min=-1e9), rtol=tolerance, atol=tolerance) for a, b in scores
    )


def attached(name: str) -> tuple[hw.AttachedModel, dict[str, Tensor], int]:
    organism = zoo.build(name)
    model = hw.attach(organism.model, organism.tokenizer, example=organism.example)
    inputs = {key: value for key, value in organism.example.items() if key != "decoder_input_ids"}
    return model, inputs, model.heads().sites[-1 if name == "tiny-qwen3_next" else 0].layer


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[hw.AttachedModel, dict[str, Tensor]]]:
    model, inputs, _ = attached("tiny-llama")
    with model:
        yield model, inputs


CASES = [
    ("tiny-llama", GREEDY),
    ("tiny-llama", SAMPLING),
    ("tiny-llama", BEAMS),
    ("tiny-llama", BEAMS | {"do_sample": True}),
    ("tiny-llama", GREEDY | {"cache_implementation": "static"}),
    ("tiny-llama", BEAMS | {"cache_implementation": "static"}),
    ("tiny-mistral", BEAMS),
    ("tiny-gpt_oss", GREEDY | {"cache_implementation": "static"}),
    ("tiny-qwen3_next", BEAMS),
    ("tiny-jamba", SAMPLING),
    ("tiny-jamba", BEAMS),
    ("tiny-t5", BEAMS),
    ("tiny-t5", GREEDY | {"cache_implementation": "static"}),
    ("tiny-bart", SAMPLING),
    ("tiny-bart", BEAMS),
    ("tiny-llava", BEAMS),
    ("tiny-qwen2_vl", SAMPLING),
    ("tiny-qwen2_vl", BEAMS),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
)
def test_contrast_equals_recomputation_at_every_step(name: str, options: dict[str, Any]) -> None:
    model, inputs, layer = attached(name)
    uncached = {key: value for key, value in options.items() if key != "cache_implementation"} | {"use_cache": False}
    with recomputed(model.model, name, layer, times(1, -3.0)):
        expected = generated(model, inputs, **uncached)
    plain = generated(model, inputs, **options)
    assert not torch.equal(plain.sequences, expected.sequences)
    with model:
        for mode in MODES:
            with model.dual(hw.edit.scale(f"L{layer}H1", -3.0), combine=contrast, mode=mode) as dual:
                assert same_steps(generated(model, inputs, **options), expected)
                rows = len(expected.scores[0])
                assert len(dual.first) == len(dual.second) == rows
                assert [(fired.calls, fired.positions > 0) for fired in dual.fired] == [(10, True)]
        assert same_steps(generated(model, inputs, **options), plain, 0.0)


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class After(StoppingCriteria):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.steps -= 1
        return torch.full((len(input_ids),), self.steps <= 0)


@pytest.mark.parametrize("mode", MODES)
def test_streaming_and_stopping(mode: str, llama: Any) -> None:
    model, inputs = llama
    inputs = {key: value[:1] for key, value in inputs.items()}
    told = []
    ways = {
        False: recomputed(model.model, "tiny-llama", 0, times(1, -3.0)),
        True: model.dual(hw.edit.scale("L0H1", -3.0), combine=contrast, mode=mode),
    }
    for cached, way in ways.items():
        streamer = Words()
        options = {"streamer": streamer, "stopping_criteria": [After(4)], "min_new_tokens": 1, "use_cache": cached}
        with way:
            sequences = generated(model, inputs, **options).sequences
        assert streamer.tokens == [*sequences[0].tolist(), -1]
        assert sequences.shape[1] == inputs["input_ids"].shape[1] + 4
        told.append(streamer.tokens)
    assert told[0] == told[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
def test_assisted_decoding_rolls_both_streams_back(name: str, mode: str) -> None:
    model, inputs, layer = attached(name)
    ids = inputs["input_ids"][:1]
    with recomputed(model.model, name, layer, times(1, -3.0)):
        expected = generated(model, {"input_ids": ids}, **GREEDY, use_cache=False).sequences
    drafts = [{"assistant_model": zoo.build(name, seed=1).model}, {"prompt_lookup_num_tokens": 3}]
    with model, model.dual(hw.edit.scale(f"L{layer}H1", -3.0), combine=contrast, mode=mode):
        for draft in drafts:
            assert torch.equal(generated(model, {"input_ids": ids}, **GREEDY, **draft).sequences, expected)


def test_a_stream_in_another_thread(llama: Any) -> None:
    from threading import Thread

    model, inputs = llama
    inputs = {key: value[:1] for key, value in inputs.items()}
    texts = []
    for _ in range(2):
        streamer = TextIteratorStreamer(model.tokenizer, timeout=20)
        with model.dual(hw.edit.scale("L0H1", -3.0), combine=contrast):
            thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 6, "streamer": streamer})
            thread.start()
            texts.append("".join(streamer))
            thread.join()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_neutral_settings_are_no_contrast(mode: str, options: dict[str, Any], llama: Any) -> None:
    """DeCoRe's (1 + a) log p - a log p' with a the entropy, and no heads masked: log p, whatever a is."""
    model, inputs = llama
    equal = []

    def decore(first: Tensor, second: Tensor) -> Tensor:
        equal.append(torch.equal(first, second))
        first, second = first.float().log_softmax(-1), second.float().log_softmax(-1)
        entropy = -(first.exp() * first).sum(-1, keepdim=True)
        return first + entropy * (first - second)

    plain = generated(model, inputs, **options, output_logits=True)
    with model.dual(combine=decore, mode=mode):
        contrasted = generated(model, inputs, **options, output_logits=True)
    assert torch.equal(contrasted.sequences, plain.sequences)
    assert len(equal) == 10
    assert all(equal) or mode == "batch"
    for one, other in zip(contrasted.logits, plain.logits, strict=True):
        expected = other.float().log_softmax(-1)
        assert torch.equal(one, expected) if mode == "caches" else torch.allclose(one, expected, atol=1e-4)


# -- JUICE: the first stream adds a times the second, clean stream's z ------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_juice_equals_full_recomputation(mode: str, options: dict[str, Any], llama: Any) -> None:
    model, inputs = llama
    strengths = {("L0", 1): -2.0, ("L1", 2): 3.0, ("L2", 0): 2.0}

    def twice(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before each forward a clean one, whose z are what the hooks of the next one add."""
        if running:
            return
        running.append(True)
        for label, _ in strengths:
            record = partial(clean.__setitem__, label)
            recording.append(changed(model.model, "tiny-llama", int(label[1]), lambda z, record=record: record(z) or z))
        model.model.forward(*args, **kwargs)
        while recording:
            recording.pop().remove()
        running.pop()

    clean: dict[str, Tensor] = {}
    running: list[bool] = []
    recording: list[Any] = []

    def adding(label: str, head: int, strength: float) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            if running:
                return z
            z = z.clone()
            z[:, :, head] += strength * clean[label][:, :, head]
            return z

        return change

    handles = [model.model.register_forward_pre_hook(twice, with_kwargs=True)]
    for (label, head), strength in strengths.items():
        handles.append(changed(model.model, "tiny-llama", int(label[1]), adding(label, head, strength)))
    expected = generated(model, inputs, **options, use_cache=False)
    for handle in handles:
        handle.remove()
    edits = [hw.edit.add(f"{label}H{head}", hw.edit.OTHER, strength=a) for (label, head), a in strengths.items()]
    once = [hw.edit.scale(f"{label}H{head}", 1 + a) for (label, head), a in strengths.items()]
    with model.dual(mode=mode), model.editing(*edits):
        assert same_steps(generated(model, inputs, **options), expected)
    with model.editing(*once):  # one run: later heads are scaled as the earlier ones have changed them
        assert not same_steps(generated(model, inputs, **options), expected, 1e-2)
    with model.dual(mode=mode), model.editing(edits[-1]):
        twice_run = generated(model, inputs, **options)
    with model.editing(once[-1]):  # one head of the last layer: nothing comes after that could differ
        assert same_steps(generated(model, inputs, **options), twice_run)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variable", ["q", "k", "v", "score", "pattern", "residual_post"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
def test_what_is_read_of_the_second_stream_does_not_depend_on_a_cache(name: str, variable: str, mode: str) -> None:
    model, inputs, _ = attached(name)
    heads = {"k": "L1G1", "v": "L1G1", "residual_post": "L1"}.get(variable, "L1H2")
    patch = hw.edit.patch(heads, hw.edit.OTHER, variable=variable)
    with model:
        plain = generated(model, inputs, **BEAMS)
        with model.dual(hw.edit.scale("L0H1", -6.0), mode=mode), model.editing(patch):
            uncached = generated(model, inputs, **BEAMS, use_cache=False)
            assert same_steps(generated(model, inputs, **BEAMS), uncached)
        assert not same_steps(plain, uncached, 1e-3)


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_an_edit_of_the_last_position_shares_the_clean_prompt_cache(mode: str, llama: Any) -> None:
    """DeCoRe's decoder: the cache of the prompt but its last token is clean in both streams (card `decore`)."""
    model, inputs = llama
    ids = inputs["input_ids"][:1]
    clean = model(ids[:, :-1], use_cache=True).past_key_values
    caches, sequence = [copy.deepcopy(clean), copy.deepcopy(clean)], ids
    for _ in range(6):
        first = model(sequence[:, -1:], past_key_values=caches[0]).logits
        handle = changed(model.model, "tiny-llama", 0, times(1, -3.0))
        second = model(sequence[:, -1:], past_key_values=caches[1]).logits
        handle.remove()
        sequence = torch.cat([sequence, contrast(first, second)[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    with model.dual(hw.edit.scale("L0H1", -3.0, scope="last"), combine=contrast, mode=mode):
        assert torch.equal(model.generate(ids, **options), sequence)
        assert torch.equal(model.generate(ids, **options, past_key_values=copy.deepcopy(clean)), sequence)
    with model.dual(hw.edit.scale("L0H1", -3.0), combine=contrast, mode=mode):
        assert torch.equal(model.generate(ids, **options, past_key_values=copy.deepcopy(clean)), sequence)
        assert not torch.equal(model.generate(ids, **options), sequence)


def loop(model: Any, ids: Tensor, steps: int, cache: Any) -> tuple[Tensor, Any]:
    """Greedy decoding by hand: the logits of every step, and the cache."""
    told = []
    for _ in range(steps):
        output = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        told.append(output.logits[:, -1])
    return torch.stack(told), cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen3_next", "tiny-jamba"])
@torch.no_grad()
def test_a_cache_goes_into_the_block_and_comes_out_as_it_would_without(name: str, mode: str) -> None:
    model, inputs, layer = attached(name)
    ids, edit = inputs["input_ids"], hw.edit.scale(f"L{layer}H1", -3.0)
    makers: list[Callable[[], Any]] = [lambda: None]
    if name == "tiny-llama":
        makers.append(lambda: StaticCache(model.model.config, max_cache_len=64))
    for make in makers:
        steps, cache = loop(model, ids, 3, make())
        steps = [steps]
        for _ in range(2):
            more, cache = loop(model, steps[-1][-1:].argmax(-1).mT, 3, cache)
            steps.append(more)
        found, cache = loop(model, ids, 3, make())
        kind = type(cache)
        found = [found]
        with model.dual(edit, mode=mode) as dual:
            more, cache = loop(model, found[-1][-1:].argmax(-1).mT, 3, cache)
            assert not torch.allclose(dual.first, dual.second, atol=1e-3)
            found.append(more)
        assert type(cache) is kind
        assert not set(vars(cache)) & {"reorder_cache", "crop"}
        more, cache = loop(model, found[-1][-1:].argmax(-1).mT, 3, cache)
        found.append(more)
        assert torch.allclose(torch.cat(steps), torch.cat(found), atol=1e-4)
    model.detach()


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_prompt_is_a_prompt_in_both_streams(mode: str, llama: Any) -> None:
    """A cache from an earlier block: what it holds of decoding is not prompt in the second stream either."""
    model, inputs = llama
    ids = inputs["input_ids"][:1]
    with model.reading(hw.read.z("L0")):
        _, cache = loop(model, ids, 3, None)
    plain, n_prompt = copy.deepcopy(cache), ids.shape[1]
    plain.layers[0].values[:, 0, n_prompt:] *= -3.0
    new = model.model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: torch.cat([-3.0 * output[..., :DIM], output[..., DIM:]], dim=-1)
    )
    expected = model(ids[:, -1:], past_key_values=plain).logits
    new.remove()
    with model.dual(hw.edit.scale("L0G0", -3.0, variable="v", scope="decode"), mode=mode) as dual:
        model(ids[:, -1:], past_key_values=cache)
    assert torch.allclose(dual.second, expected, atol=1e-5)
    assert not torch.allclose(dual.second, dual.first, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_encoder_edits_are_refused_where_generate_encodes_once(mode: str) -> None:
    model, inputs, _ = attached("tiny-t5")
    with model:
        for edit in (hw.edit.zero("encoder.L0H1"), hw.edit.zero("encoder.L1", variable="mlp")):
            with model.dual(edit, mode=mode), pytest.raises(hw.Refusal, match="encodes once for both"):
                generated(model, inputs)
            with model.dual(mode=mode), model.editing(edit), pytest.raises(hw.Refusal, match="encodes once for both"):
                generated(model, inputs)
        with model.dual(hw.edit.zero("cross.L1H1"), combine=contrast, mode=mode), model.reading(hw.read.z()) as got:
            generated(model, inputs)
        assert got.z["encoder.L0"].shape == (2, 32, 4, DIM)
        assert got.z["cross.L1"].shape == (2, 10, 4, DIM)
