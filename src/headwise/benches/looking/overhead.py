"""What edits of looking heads cost in `generate`: up to the first token, and from then on, over the model alone.

A prompt with one picture and 40 new tokens, greedily, on one thread, on the organism and on a larger LLaVA with random
weights (12 layers of 12 heads, width 768, 196 image tokens). A figure is the median over turns of the ratio to the mean
of two plain generations, in CPU time; `noise` is the ratio of those two. VHR has to see the prompt without its picture
once: `forwards` counts what the language model runs more than without, `tokens` their tokens, as a share of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StoppingCriteria

import headwise
from headwise.benches.turns import cpu_seconds
from headwise.model.attached import AttachedModel, attach
from headwise.use.intervention import Intervention
from headwise.use.looking.paint import PAINT
from headwise.use.looking.redistribution import VAR
from headwise.use.looking.reinforcement import VHR

TURNS = 9
NEW_TOKENS = 40
QUESTION = 24
"""Tokens behind the picture in the random model's prompt."""

Inputs = Mapping[str, Tensor]

WAYS: Mapping[str, Intervention] = {"vhr": VHR(), "paint": PAINT(), "var": VAR((0,))}


@dataclass(frozen=True, slots=True)
class Size:
    """Of a LLaVA with random weights."""

    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    width: int = 768
    feed_forward: int = 2048
    vocabulary: int = 32000
    side: int = 112
    patch: int = 8
    tower_layers: int = 4
    tower_width: int = 192

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


def measure(*, seed: int = 0, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """`MODEL.WAY.first` and `.later` for vhr, paint and var (1 is free), `MODEL.noise.first` and `.later`, and
    `MODEL.vhr.forwards` and `.tokens`; models are llava and organism."""
    figures: dict[str, float] = {}
    said("llava")
    network, inputs = random_llava(Size(), seed)
    with attach(network, example=dict(inputs)) as model:
        figures |= {f"llava.{name}": value for name, value in ratios(model, inputs).items()}
    said("organism")
    with headwise.load("zoo:visual-organism", dtype="float32") as model:
        one = {name: value[:1] for name, value in model.example.items()}
        figures |= {f"organism.{name}": value for name, value in ratios(model, one).items()}
    return figures


def ratios(
    model: AttachedModel, inputs: Inputs, *, new_tokens: int = NEW_TOKENS, turns: int = TURNS
) -> dict[str, float]:
    """The figures of one model: times over those of plain generation, taken in turns, and what VHR runs more."""
    torch.set_num_threads(1)
    asked: dict[str, Intervention | None] = {"plain": None, **WAYS, "again": None}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}

    def way(name: str) -> Callable[[], object]:
        return lambda: taken[name].append(_times(model, inputs, new_tokens, asked[name]))

    ways = {name: way(name) for name in asked}
    for each in ways.values():
        each()  # what is special about a first run is not counted
    for times in taken.values():
        times.clear()
    cpu_seconds(ways, turns=turns)
    figures: dict[str, float] = {}
    for part, which in (("first", 0), ("later", 1)):
        one, other = ([times[which] for times in taken[name]] for name in ("plain", "again"))
        both = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        figures |= {f"{name}.{part}": _ratio([times[which] for times in taken[name]], both) for name in WAYS}
        figures[f"noise.{part}"] = _ratio(other, one)
    plain, more = (counted(model, inputs, new_tokens, each) for each in (None, WAYS["vhr"]))
    prompt = inputs["input_ids"].shape[1]
    return figures | {"vhr.forwards": len(more) - len(plain), "vhr.tokens": (sum(more) - sum(plain)) / prompt}


def counted(model: AttachedModel, inputs: Inputs, new_tokens: int, intervention: Intervention | None) -> list[int]:
    """The tokens of every forward of the language model in one generation."""
    tokens: list[int] = []
    network: Any = model.model

    def note(module: object, given: object, named: Mapping[str, Any]) -> None:
        tokens.append(named["inputs_embeds"].shape[1])

    hook = network.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        _times(model, inputs, new_tokens, intervention)
    finally:
        hook.remove()
    return tokens


def random_llava(size: Size, seed: int = 0) -> tuple[LlavaForConditionalGeneration, Inputs]:
    """The same weights and inputs for the same seed. Global random state is left alone."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.tower_width,
            intermediate_size=4 * size.tower_width,
            num_hidden_layers=size.tower_layers,
            num_attention_heads=size.tower_width // 48,
            image_size=size.side,
            patch_size=size.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=0,
        ),
        image_token_index=size.vocabulary - 1,
        image_seq_length=size.patches,
        vision_feature_layer=-1,
    )
    with _seeded(seed):
        network = LlavaForConditionalGeneration(config).eval()
        question = torch.randint(2, size.vocabulary - 1, (QUESTION,))
        pixels = torch.randn(1, 3, size.side, size.side)
    ids = torch.cat([torch.tensor([1]), torch.full((size.patches,), size.vocabulary - 1), question])[None]
    return network, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _times(
    model: AttachedModel, inputs: Inputs, new_tokens: int, intervention: Intervention | None
) -> tuple[float, float]:
    """CPU seconds up to the first token, and from it to the last."""
    clock = _Clock()
    asked: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    start = time.process_time()
    with nullcontext() if intervention is None else intervention(model):
        model.generate(**inputs, **asked, pad_token_id=0, stopping_criteria=[clock])
    return clock.at[0] - start, clock.at[-1] - clock.at[0]


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was there, and stops nothing."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.at.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _ratio(taken: list[float], plain: list[float]) -> float:
    return median(one / other for one, other in zip(taken, plain, strict=True))
