"""What becomes of a cache that a dual run uses: followed while the block is open, the caller's own after it.

The second way is the same loop run twice by hand, each stream with a cache of its own and no headwise.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache

import headwise as hw
from headwise import zoo

MODES = ("batch", "caches")
NAMES = ("tiny-llama", "tiny-mistral", "tiny-jamba", "tiny-bart")
Change = Callable[[Any], None]


class TwoLoops:
    """Two streams by hand: the second with L1H1 (of 12 wide heads) times -3, by a plain hook."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        path = "model.decoder.layers.1.self_attn.out_proj" if name == "tiny-bart" else "model.layers.1.self_attn.o_proj"
        self.projection = model.get_submodule(path)
        self.caches: list[Any] = [None, None]

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        told = []
        for stream in (0, 1):
            with ExitStack() as undo:
                if stream:
                    undo.callback(self.projection.register_forward_pre_hook(self.hook).remove)
                output = self.model(**inputs, past_key_values=self.caches[stream], use_cache=True)
            self.caches[stream] = output.past_key_values
            told.append(output.logits[:, -1])
        return told

    @staticmethod
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.cat([args[0][..., :12], -3 * args[0][..., 12:24], args[0][..., 24:]], dim=-1),)


class DualLoop:
    """The same through a dual run."""

    def __init__(self, model: hw.AttachedModel, dual: Any) -> None:
        self.model, self.dual, self.cache = model, dual, None

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        self.cache = self.model(**inputs, past_key_values=self.cache, use_cache=True).past_key_values
        return [self.dual.first[:, -1], self.dual.second[:, -1]]


def started(name: str) -> tuple[hw.AttachedModel, dict[str, Tensor], Callable[[Tensor], dict[str, Tensor]]]:
    """A model, the inputs of its first step, and those of a later step that feeds some tokens."""
    organism = zoo.build(name)
    model = hw.attach(organism.model, organism.tokenizer, example=organism.example)
    if name != "tiny-bart":
        return model, {"input_ids": organism.example["input_ids"]}, lambda tokens: {"input_ids": tokens}
    with torch.no_grad():
        encoded = organism.model.get_encoder()(organism.example["input_ids"])
    first = {"encoder_outputs": encoded, "decoder_input_ids": organism.example["decoder_input_ids"]}

    def then(tokens: Tensor) -> dict[str, Tensor]:
        rows = encoded.last_hidden_state[:1].expand(len(tokens), -1, -1)
        return {"encoder_outputs": type(encoded)(last_hidden_state=rows), "decoder_input_ids": tokens}

    return model, first, then


def selected(cache: Any) -> None:
    cache.batch_select_indices(torch.tensor([1]))


def masked(cache: Any) -> None:
    cache.batch_select_indices(torch.tensor([False, True]))


def repeated(cache: Any) -> None:
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2]))


CHANGES: list[tuple[Change, int, str]] = [
    (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2, "reorder"),
    (lambda cache: cache.reorder_cache(beam_idx=torch.tensor([1, 1, 0])), 3, "reorder to more"),
    (selected, 1, "select"),
    (masked, 1, "select by mask"),
    (repeated, 3, "repeat, then reorder"),
    (lambda cache: cache.crop(-2), 2, "crop"),
]
# What transformers itself offers: the states of jamba can only be reordered, a full window cannot be cropped.
UNSUPPORTED = {"tiny-jamba": ("select", "repeat", "crop"), "tiny-mistral": ("crop",)}
SUPPORTED = {name: [c for c in CHANGES if not c[2].startswith(UNSUPPORTED.get(name, ()) or "-")] for name in NAMES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "change", "n_rows"),
    [(name, change, rows) for name in NAMES for change, rows, _ in SUPPORTED[name]],
    ids=[f"{name}-{what}" for name in NAMES for _, _, what in SUPPORTED[name]],
)
@torch.no_grad()
def test_what_is_done_to_a_cache_is_done_to_both_streams(name: str, change: Change, n_rows: int, mode: str) -> None:
    model, first, then = started(name)
    two = TwoLoops(model.model, name)
    tokens = torch.arange(20, 20 + 3 * n_rows).reshape(n_rows, 3)
    told = [two(first)]
    for cache in two.caches:
        change(cache)
    told.append(two(then(tokens)))
    after = two(then(tokens))[0]
    with model, model.dual(hw.edit.scale("L1H1", -3.0), mode=mode) as dual:
        beside = DualLoop(model, dual)
        found = [beside(first)]
        change(beside.cache)
        found.append(beside(then(tokens)))
    torch.testing.assert_close(found, told, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told[1][0], told[1][1], atol=1e-3)
    alone = model.model(**then(tokens), past_key_values=beside.cache).logits[:, -1]
    torch.testing.assert_close(alone, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_copy_of_a_cache_is_a_fork_of_both_streams(mode: str) -> None:
    """One prompt, several continuations: the usual way is to deep-copy the prompt's cache."""
    model, first, then = started("tiny-llama")
    two = TwoLoops(model.model, "tiny-llama")
    two(first)
    kept, told = two.caches, []
    for start in (20, 30):
        two.caches = [copy.deepcopy(cache) for cache in kept]
        told.append(two(then(torch.arange(start, start + 2)[:, None])))
    with model, model.dual(hw.edit.scale("L1H1", -3.0), mode=mode) as dual:
        beside = DualLoop(model, dual)
        beside(first)
        prompt, forks = beside.cache, []
        for start, expected in zip((20, 30), told, strict=True):
            beside.cache = copy.deepcopy(prompt)
            forks.append(beside.cache)
            found = beside(then(torch.arange(start, start + 2)[:, None]))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        beside.cache.batch_select_indices(torch.tensor([1]))  # the copy's own rows, not the prompt's
        beside.cache = prompt
        torch.testing.assert_close(beside(then(torch.arange(30, 32)[:, None])), told[1], atol=1e-5, rtol=1e-5)
    assert {type(cache) for cache in (prompt, *forks)} == {DynamicCache}
    assert len(prompt.layers[0].keys) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_after_the_block_a_cache_is_the_first_stream_s(name: str, mode: str) -> None:
    """Bit for bit what it would be: made before the block or inside it, and also when the block ends in an error."""
    model, first, then = started(name)
    two = TwoLoops(model.model, name)
    two(first)
    before = copy.deepcopy(two.caches[0])
    two(then(torch.tensor([[20], [21]])))
    expected = two(then(torch.tensor([[30], [31]])))[0]
    caches = [before]
    with model:
        with model.dual(hw.edit.scale("L1H1", -3.0), mode=mode) as dual:
            beside = DualLoop(model, dual)
            beside(first)
            caches.append(beside.cache)
        for cache in caches:
            with suppress(KeyError), model.dual(hw.edit.scale("L1H1", -3.0), mode=mode) as dual:
                beside = DualLoop(model, dual)
                beside.cache = cache
                beside(then(torch.tensor([[20], [21]])))
                raise KeyError
            found = model(**then(torch.tensor([[30], [31]])), past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert type(cache) is type(before)
            assert vars(cache).keys() == vars(two.caches[0]).keys()


@torch.no_grad()
def test_a_static_cache_comes_back_too() -> None:
    model, first, then = started("tiny-llama")
    for mode in MODES:
        cache = StaticCache(model.model.config, max_cache_len=48)
        two = TwoLoops(model.model, "tiny-llama")
        two(first)
        expected = two(then(torch.tensor([[30], [31]])))
        with model.dual(hw.edit.scale("L1H1", -3.0), mode=mode) as dual:
            beside = DualLoop(model, dual)
            beside.cache = cache
            beside(first)
        found = model(input_ids=torch.tensor([[30], [31]]), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
        assert type(cache) is StaticCache


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_cache_is_freed_with_its_last_user(mode: str) -> None:
    """Without the garbage collector, inside the block: caches are large."""
    model, first, _ = started("tiny-llama")
    with model, model.dual(hw.edit.zero("L1H1"), mode=mode):
        held = weakref.ref(model(**first, use_cache=True).past_key_values)
        assert held() is None


def test_a_cache_with_a_graph_is_refused_where_it_would_be_copied() -> None:
    model, first, then = started("tiny-llama")
    cache = model(**first, use_cache=True).past_key_values
    step = then(torch.tensor([[20], [21]]))
    twin = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    expected = model(**step, past_key_values=twin).logits
    with model:
        with model.dual(hw.edit.zero("L1H1"), mode="caches"), pytest.raises(hw.Refusal, match="carries gradients"):
            model(**step, past_key_values=cache)
        assert type(cache) is DynamicCache
        with model.dual(hw.edit.zero("L1H1")):
            found = model(**step, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def cache_classes_are_left_alone() -> Iterator[None]:
    def methods() -> list[dict[str, Any]]:
        kinds = (Cache, DynamicCache, StaticCache, EncoderDecoderCache)
        return [{name: value for name, value in vars(kind).items() if callable(value)} for kind in kinds]

    before = methods()
    yield
    assert methods() == before
