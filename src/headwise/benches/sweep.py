"""The exact map of all heads: every head's z at 0, at all positions, one head at a time, and its effect on every item.

`headwise` is `measure_sets` with one set for each head. It keeps the clean run of every layer and runs only what lies
above the edit. All other ways run the whole model for each head. They are asked for a few heads over all layers, and
their time is that of one head times the number of heads: without reuse, every head costs them the same.

The least arithmetic that a map made of exact suffixes needs, in multiply-adds of weights, with L layers of h heads, T
tokens and N items, where `into` is the projections to q, k and v, and `ff` the feed-forward part of one layer:

    N T h ( sum over l < L - 1 of  ff + (L - 2 - l) layer + into )        layer = into + out + ff

Below its own feed-forward part nothing changes for a head of layer l; in the last layer only the last token is looked
at, for which all others still give keys and values. What grows with T squared is left out (3 percent at 128 tokens),
and so is the clean run. `gemm_fraction` is twice that, over the time it took, over the speed of one large matrix
product in the same run.

Two items of 128 tokens, the logit difference, GPT-2-small and Llama-GQA shapes, fp32, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.benches.peers import ALL_LOGITS, LAST_LOGIT, Hooks, Peer, Work, installed
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, Shape, random_items
from headwise.benches.turns import Way, cpu_seconds, ratio
from headwise.errors import HeadwiseError
from headwise.heads import Head, HeadSet, SiteId
from headwise.model.attached import attach
from headwise.sweep import KnockOut, measure_sets

ITEMS, TOKENS, TURNS, SAMPLES = 2, 128, 3, 4
"""SAMPLES heads for every other way in each turn, all of them different ones."""
SHORT = 32
"""Tokens where fp64 is compared."""
APART = 1e-3
"""How far scores of two ways may be apart, in logits: rounding in fp32, and other kernels (TransformerLens: eager)."""
SMALL = Shape("gpt2", 6, 6, 6, 384, 1536, 8192)
"""What the settings are varied on."""


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """For each shape `SHAPE.ratio_PEER_last_logit` and `SHAPE.ratio_PEER_all_logits`, the time of a peer over that of
    headwise (PEER `hf` is plain hooks), `SHAPE.seconds`, `SHAPE.gemm_fraction`, `SHAPE.max_diff_fp32` and
    `SHAPE.max_diff_fp64` (logits, against one by one); and `tokens_T.ratio`, `items_N.ratio`, `layers_L.ratio`,
    `heads_H.ratio`, the time of hooks with the last logit over that of headwise on a smaller model."""
    found: dict[str, float] = {}
    for shape in (GPT2_SMALL, LLAMA_GQA):
        said(f"{shape.family} shape")
        work = Work(shape, random_items(shape, n=ITEMS, tokens=TOKENS, seed=seed), seed)
        figures = measure_shape(work, turns=TURNS, samples=SAMPLES)
        figures["max_diff_fp64"] = difference_in_fp64(shape, tokens=SHORT, seed=seed)
        found |= {f"{shape.family}.{name}": value for name, value in figures.items()}
    return found | varied(seed=seed, said=said)


def measure_shape(work: Work, *, turns: int, samples: int) -> dict[str, float]:
    """The figures of one shape: one whole map and `samples` heads of every other way, in each of `turns`."""
    torch.set_num_threads(1)
    heads = all_heads(work.shape)
    apart = spread(work.shape, turns * samples)
    peers: dict[str, Peer] = {"hf": Hooks(work)}
    peers |= {name: peer(work) for name, peer in installed().items()}
    asked = {
        f"{name}_{kept}": partial(peer.knock_out, given=given)
        for name, peer in peers.items()
        for kept, given in (("all_logits", ALL_LOGITS), ("last_logit", LAST_LOGIT))
    }
    expected = asked["hf_last_logit"](apart[0])
    for name, one in asked.items():
        _require_alike(name, one(apart[0]), expected)
    found: list[Tensor] = []
    seen: dict[Head, Tensor] = {}
    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:

        def whole_map() -> None:
            found.append(measure_sets(model, work.items, [HeadSet((head,)) for head in heads], KnockOut()))

        ways: dict[str, Way] = {"headwise": whole_map}
        for name, one in asked.items():
            ways[name] = _a_few(one, apart, samples, seen if name == "hf_last_logit" else {})
        speed: list[float] = []
        ways["product"] = lambda: speed.append(matrix_speed())
        taken = cpu_seconds(ways, turns=turns)
    share = len(heads) / samples
    figures = {f"ratio_{name}": share * ratio(taken[name], taken["headwise"]) for name in asked}
    seconds = sorted(taken["headwise"])[turns // 2]
    flop = 2 * len(work.items) * work.ids.shape[1] * suffix_products(work.shape)
    figures |= {"seconds": seconds, "gemm_fraction": flop / seconds / max(speed)}
    for head, alone in seen.items():
        _require_alike("headwise", found[0][heads.index(head)], alone)
    figures["max_diff_fp32"] = max(float((found[0][heads.index(head)] - seen[head]).abs().max()) for head in seen)
    return figures


def all_heads(shape: Shape) -> list[Head]:
    return [Head(SiteId(layer=layer), index) for layer in range(shape.layers) for index in range(shape.heads)]


def spread(shape: Shape, n: int) -> list[Head]:
    """`n` different heads, from all layers alike, and not the same index again and again."""
    return [Head(SiteId(layer=place * shape.layers // n), place % shape.heads) for place in range(n)]


def suffix_products(shape: Shape) -> int:
    """Multiply-adds for one token of the exact map; see the module."""
    head_dim = shape.width // shape.heads
    into = shape.width * head_dim * (shape.heads + 2 * shape.kv_heads)
    feed_forward = (2 if shape.family == "gpt2" else 3) * shape.width * shape.feed_forward
    layer = into + shape.width * shape.width + feed_forward
    above = sum(feed_forward + (shape.layers - 2 - own) * layer + into for own in range(shape.layers - 1))
    return shape.heads * above


def matrix_speed(size: int = 2048) -> float:
    """Floating-point operations a second of CPU time, in one product of two square matrices in fp32."""
    one, other = torch.ones(size, size), torch.ones(size, size)
    start = time.process_time()
    torch.mm(one, other)
    return 2 * size**3 / (time.process_time() - start)


def difference_in_fp64(shape: Shape, *, tokens: int, seed: int = 0) -> float:
    """Largest difference, in logits, between the map's way and one whole run per head, at heads of several layers."""
    work = Work(shape, random_items(shape, n=ITEMS, tokens=tokens, seed=seed), seed, torch.float64)
    layers = sorted({0, shape.layers // 3, shape.layers - 3, shape.layers - 1} & set(range(shape.layers)))
    heads = [Head(SiteId(layer=layer), (5 * place) % shape.heads) for place, layer in enumerate(layers)]
    hooks = Hooks(work)
    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:
        found = measure_sets(model, work.items, [HeadSet((head,)) for head in heads], KnockOut())
    return max(
        float((values - hooks.knock_out(head, LAST_LOGIT)).abs().max())
        for head, values in zip(heads, found, strict=True)
    )


def varied(
    *, seed: int = 0, said: Callable[[str], None] = lambda _: None, base: Shape = SMALL, samples: int = 6
) -> dict[str, float]:
    """The ratio to hooks that keep the last logit, over one setting at a time, on a smaller model."""
    head_dim = base.width // base.heads
    cells = {f"tokens_{tokens}": (base, ITEMS, tokens) for tokens in (16, 32, 64, 128, 256)}
    cells |= {f"items_{n}": (base, n, 64) for n in (1, 2, 4, 8)}
    cells |= {f"layers_{n}": (_resized(base, n, base.heads, head_dim), ITEMS, 64) for n in (3, 6, 12, 24)}
    cells |= {f"heads_{n}": (_resized(base, base.layers, n, head_dim), ITEMS, 64) for n in (3, 6, 12)}
    found = {}
    for name, (shape, n, tokens) in cells.items():
        said(f"a smaller model, {name.replace('_', ' ')}")
        work = Work(shape, random_items(shape, n=n, tokens=tokens, seed=seed), seed)
        found[f"{name}.ratio"] = _against_hooks(work, samples)
    return found


def _against_hooks(work: Work, samples: int, turns: int = 3) -> float:
    torch.set_num_threads(1)
    hooks, heads = Hooks(work), all_heads(work.shape)
    few = spread(work.shape, turns * samples)
    hooks.knock_out(few[0])
    with attach(work.model(), example={"input_ids": work.ids[:, :8]}) as model:
        sets = [HeadSet((head,)) for head in heads]
        ways: dict[str, Way] = {
            "headwise": lambda: measure_sets(model, work.items, sets, KnockOut()),
            "hf": _a_few(partial(hooks.knock_out, given=LAST_LOGIT), few, samples, {}),
        }
        taken = cpu_seconds(ways, turns=turns)
    return len(heads) / samples * ratio(taken["hf"], taken["headwise"])


def _resized(shape: Shape, layers: int, heads: int, head_dim: int) -> Shape:
    width = heads * head_dim
    return Shape(shape.family, layers, heads, heads, width, 4 * width, shape.vocabulary, shape.positions)


def _a_few(
    one: Callable[[Head], Float[Tensor, " item"]], heads: Sequence[Head], samples: int, seen: dict[Head, Tensor]
) -> Way:
    """Knocks out the next `samples` of the heads whenever it is called, and files what comes of it in `seen`."""
    rest = list(heads)

    def run() -> None:
        for _ in range(samples):
            head = rest.pop(0)
            seen[head] = one(head)

    return run


def _require_alike(name: str, found: Tensor, expected: Tensor) -> None:
    """Raises `HeadwiseError` where a way gives other numbers: a comparison of times would mean nothing."""
    apart = float((found - expected).abs().max())
    if not apart < APART:
        raise HeadwiseError(f"{name} gives another effect than plain hooks, {apart:.1e} logits apart")
