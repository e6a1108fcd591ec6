"""What interventions cost in `generate`: CPU time per generation, over that of the model alone.

A prompt of 128 tokens and 32 new ones, greedily, on one thread, on two common shapes with random weights and on the
organism. A figure is the median over turns of the ratio to the mean of two plain generations; `noise` is the ratio of
those two. The model is attached throughout.

    z            eight heads in four layers scaled (HeadScaling)
    score_scale  the attention scores of eight heads scaled (AttentionTemperature)
    score_bias   a bias on the first key of eight heads (ZeroTuning)
    two_batch    a second stream without eight heads, in one forward of twice the rows (DeCoRe)
    two_caches   the same, a forward and a cache for each stream
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.benches.shapes import GPT2_SMALL, LLAMA_GQA, Shape
from headwise.benches.turns import cpu_seconds
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel, attach
from headwise.use.attention.temperature import AttentionTemperature
from headwise.use.attention.zero_tuning import ZeroTuning
from headwise.use.decoding.decore import DeCoRe
from headwise.use.intervention import Intervention
from headwise.use.scaling import HeadScaling

TURNS = 9
PROMPT = 128
NEW_TOKENS = 32

SHAPES: Mapping[str, Shape] = {"gpt2": GPT2_SMALL, "llama": LLAMA_GQA}


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`MODEL.WAY` for every way above (1 is free), and `MODEL.noise`; models are gpt2, llama and organism."""
    figures: dict[str, float] = {}
    for name, shape in SHAPES.items():
        said(name)
        model: Any = shape.build(seed=seed)
        ids = torch.randint(1, shape.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
        with attach(model, example={"input_ids": ids[:, :32]}) as attached:
            figures |= {f"{name}.{way}": value for way, value in ratios(attached, ids).items()}
    said("organism")
    with headwise.load("zoo:organism", dtype="float32") as organism:
        network: Any = organism.model
        ids = torch.randint(1, network.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
        figures |= {f"organism.{way}": value for way, value in ratios(organism, ids).items()}
    return figures


def ratios(model: AttachedModel, ids: Tensor, *, new_tokens: int = NEW_TOKENS, turns: int = TURNS) -> dict[str, float]:
    """The figures of one model: time of every way over plain generation, taken in turns."""
    torch.set_num_threads(1)
    asked = (None, *interventions(model).values(), None)
    names = ("plain", *interventions(model), "plain_again")
    ways = {name: _generation(model, ids, new_tokens, each) for name, each in zip(names, asked, strict=True)}
    for way in ways.values():
        way()  # what is special about a first run is not counted
    taken = cpu_seconds(ways, turns=turns)
    both = [(one + other) / 2 for one, other in zip(taken["plain"], taken["plain_again"], strict=True)]
    figures = {name: _ratio(taken[name], both) for name in names[1:-1]}
    return figures | {"noise": _ratio(taken["plain_again"], taken["plain"])}


def interventions(model: AttachedModel) -> dict[str, Intervention]:
    """What is measured: eight heads, two in each of four layers spread over the model."""
    layers = [site.label for site in model.sites]
    spread = [layers[len(layers) * place // 4] for place in range(4)]
    heads = HeadSet.parse([f"{layer}H{index}" for layer in dict.fromkeys(spread) for index in range(2)])
    return {
        "z": HeadScaling(heads, 0.5),
        "score_scale": AttentionTemperature(heads, 0.5),
        "score_bias": ZeroTuning(heads, 2.0),
        "two_batch": DeCoRe(heads),
        "two_caches": DeCoRe(heads, mode="caches"),
    }


def _generation(
    model: AttachedModel, ids: Tensor, tokens: int, intervention: Intervention | None
) -> Callable[[], object]:
    asked: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def way() -> object:
        with nullcontext() if intervention is None else intervention(model):
            return model.generate(ids, **asked)

    return way


def _ratio(taken: list[float], plain: list[float]) -> float:
    return median(one / other for one, other in zip(taken, plain, strict=True))
