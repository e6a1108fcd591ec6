"""What it costs to watch a model's heads while it writes, on a Llama-shaped model of 12 layers.

A prompt of 1024 tokens and 16 new ones, greedily:

    retrieval          the read of the method `retrieval`: the strongest key of every head at every step
    output_attentions  the same from the patterns that eager attention returns, prompt and all

Times are CPU times of one thread, taken in turns; a figure is the median over turns of the ratio to the mean of two
plain generations, and `noise` the ratio of those two. The model is attached throughout, which costs nothing that could
be measured (`headwise bench overhead`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from headwise.benches.shapes import LLAMA_GQA
from headwise.errors import HeadwiseError
from headwise.find.retrieval import strongest_keys
from headwise.model.attached import attach

TURNS = 5
PROMPT = 1024
NEW_TOKENS = 16


def measure(*, seed: int = 0) -> dict[str, float]:
    """`time.WAY`, ratios to plain generation (1 is free); `same_top`, how often both name the same strongest key.

    Raises `HeadwiseError` if the ways do not write the same tokens.
    """
    torch.set_num_threads(1)
    model: Any = replace(LLAMA_GQA, positions=PROMPT + NEW_TOKENS).build(seed=seed)
    ids = torch.randint(1, LLAMA_GQA.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    asked = {"attention_mask": torch.ones_like(ids), "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

    def generate(**options: Any) -> Any:
        return model.generate(ids, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **asked, **options)

    def plain() -> tuple[Tensor, list[Tensor]]:
        return generate().sequences, []

    def retrieval() -> tuple[Tensor, list[Tensor]]:
        with attached.reading(strongest_keys(attached)) as got:
            written = generate().sequences
        return written, [torch.stack(got.rows[site.label], dim=-1) for site in attached.sites]

    def from_patterns() -> tuple[Tensor, list[Tensor]]:
        model.set_attn_implementation("eager")
        try:
            done = generate(output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")
        by_layer = zip(*done.attentions, strict=True)
        return done.sequences, [torch.stack([p[:, :, -1].argmax(-1) for p in steps], dim=-1) for steps in by_layer]

    ways: dict[str, Callable[[], tuple[Tensor, list[Tensor]]]] = {
        "plain": plain,
        "retrieval": retrieval,
        "output_attentions": from_patterns,
        "plain_again": plain,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names, expected, tops = list(ways), plain()[0], {}
    with attach(model, example={"input_ids": ids[:, :32]}) as attached:
        for turn in range(TURNS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no way always comes first
                start = time.process_time()
                written, tops[name] = ways[name]()
                taken[name].append(time.process_time() - start)
                if not torch.equal(written, expected):
                    raise HeadwiseError(f"{name} wrote other tokens than plain generation")
    both = [(one + other) / 2 for one, other in zip(taken["plain"], taken["plain_again"], strict=True)]
    figures = {f"time.{name}": _ratio(taken[name], both) for name in ("retrieval", "output_attentions")}
    figures["time.noise"] = _ratio(taken["plain_again"], taken["plain"])
    same = [ours == theirs for ours, theirs in zip(tops["retrieval"], tops["output_attentions"], strict=True)]
    figures["same_top"] = float(torch.stack(same).double().mean())
    return figures


def _ratio(taken: list[float], plain: list[float]) -> float:
    return median(a / b for a, b in zip(taken, plain, strict=True))
