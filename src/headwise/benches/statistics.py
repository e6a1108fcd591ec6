"""What row statistics cost on a Llama-shaped model of two layers, in time and memory, beside what a user would do.

Every way reads the same statistics of all heads and tokens of one text:

    three              entropy, sink mass, mass on the token before
    with_distance      those and the mean distance
    all                every statistic that there is, and the mass on the token before
    swept              `with_distance`, in chunks of rows, as it is done where no kernel hands out its logsumexp
    output_attentions  `with_distance` in plain PyTorch, from the patterns that eager attention returns

Times are CPU times of one thread, taken in turns; a figure is the median over turns of the ratio to the mean of two
plain forwards (sdpa, last logit only), and `noise` the ratio of those two. The model is attached throughout, which
costs nothing that could be measured (`headwise bench overhead`). Memory is of fresh processes: the peak during one
forward of one layer, above what the process held before it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from headwise.benches.shapes import LLAMA_GQA
from headwise.errors import HeadwiseError
from headwise.model import read
from headwise.model.attached import AttachedModel, attach
from headwise.model.attention import statistics as row_statistics
from headwise.model.read import Read
from headwise.model.site import Capability

TURNS = 5
LENGTHS = (1024, 4096)
LONG = 32_768
LAYERS = 2
THREE = ("entropy", "sink_mass")
WITH_DISTANCE = (*THREE, "mean_distance")
WAYS = ("three", "with_distance", "all", "swept", "output_attentions")


def measure(*, seed: int = 0) -> dict[str, float]:
    """`time.TOKENS.WAY`, ratios to the plain forward (1 is free), and `memory.TOKENS.WAY`, ratios and MB, at 4k tokens
    and, of `all` alone, at 32k."""
    figures: dict[str, float] = {}
    for tokens in LENGTHS:
        figures |= measure_times(tokens, seed=seed)
    return figures | measure_memory(max(LENGTHS), seed=seed) | measure_memory(LONG, seed=seed, ways=("all",))


def measure_times(tokens: int, *, seed: int = 0) -> dict[str, float]:
    """The ratios of all ways at one length."""
    torch.set_num_threads(1)
    model, ids, names = _model(tokens, LAYERS, seed), _ids(tokens, seed), ["plain", *WAYS, "plain_again"]
    taken: dict[str, list[float]] = {name: [] for name in names}
    with _attached(model) as attached:
        ways = {name: _way(name, attached, ids) for name in names}
        for turn in range(TURNS + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no way always comes first
                start = time.process_time()
                ways[name]()
                taken[name].append(time.process_time() - start)
    taken = {name: times[1:] for name, times in taken.items()}  # the first turn warms up
    both = [(one + other) / 2 for one, other in zip(taken["plain"], taken["plain_again"], strict=True)]
    figures = {f"time.{tokens}.{name}": _ratio(taken[name], both) for name in WAYS}
    figures[f"time.{tokens}.noise"] = _ratio(taken["plain_again"], taken["plain"])
    return figures


def measure_memory(tokens: int, *, seed: int = 0, ways: tuple[str, ...] = WAYS) -> dict[str, float]:
    """Peaks of fresh processes above their start: MB for the plain forward, ratios to that for the ways.

    Leave `output_attentions` out at 32k tokens: its patterns take 52 GB.
    """
    plain = _peak("plain", tokens, seed)
    peaks = {f"memory.{tokens}.{name}": _peak(name, tokens, seed) / plain for name in ways}
    return {f"memory.{tokens}.plain_mb": plain, **peaks}


def _attached(model: Any) -> AttachedModel:
    return attach(model, example={"input_ids": _ids(32, seed=0)})


def _way(name: str, attached: AttachedModel, ids: Tensor) -> Callable[[], object]:
    """One forward that reads what `name` says."""
    model: Any = attached.model

    def forward(**asked: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, logits_to_keep=1, use_cache=False, **asked)

    def reading(asked: Read) -> None:
        with attached.reading(asked):
            forward()

    def sweeping() -> None:
        with mock.patch.object(row_statistics, "flash_can", return_value=Capability(False, "so that it is swept")):
            reading(_read(WITH_DISTANCE, ids))

    def from_patterns() -> list[dict[str, Tensor]]:
        model.set_attn_implementation("eager")
        try:
            return [_of_pattern(pattern) for pattern in forward(output_attentions=True).attentions]
        finally:
            model.set_attn_implementation("sdpa")

    return {
        "plain": forward,
        "plain_again": forward,
        "three": lambda: reading(_read(THREE, ids)),
        "with_distance": lambda: reading(_read(WITH_DISTANCE, ids)),
        "all": lambda: reading(_read(row_statistics.STATISTICS, ids)),
        "swept": sweeping,
        "output_attentions": from_patterns,
    }[name]


def _read(wanted: tuple[str, ...], ids: Tensor) -> Read:
    before = torch.arange(-1, ids.shape[1] - 1).expand(len(ids), -1).unsqueeze(-1)
    return read.statistics(wanted=wanted, pairs={"previous": before})


def _of_pattern(pattern: Tensor) -> dict[str, Tensor]:
    columns = torch.arange(pattern.shape[-1], dtype=pattern.dtype)
    return {
        "entropy": torch.special.entr(pattern).sum(-1),
        "sink_mass": pattern[..., 0],
        "previous": pattern.diagonal(offset=-1, dim1=-2, dim2=-1),
        "mean_distance": columns - pattern @ columns,
    }


def _model(tokens: int, layers: int, seed: int) -> Any:
    return replace(LLAMA_GQA, layers=layers, positions=tokens).build(seed=seed)


def _ids(tokens: int, seed: int) -> Tensor:
    return torch.randint(1, LLAMA_GQA.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _ratio(taken: list[float], plain: list[float]) -> float:
    return median(a / b for a, b in zip(taken, plain, strict=True))


def _peak(name: str, tokens: int, seed: int) -> float:
    asked = [sys.executable, "-m", __name__, name, str(tokens), str(seed)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeadwiseError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def _rise(name: str, tokens: int, seed: int) -> float:
    """Peak memory of this process, in MB, above what it held before the forward. Linux only."""
    torch.set_num_threads(1)
    with _attached(_model(tokens, 1, seed)) as attached:
        _way(name, attached, _ids(64, seed))()
        run = _way(name, attached, _ids(tokens, seed))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        start = _peak_of_this_process()
        run()
        return _peak_of_this_process() - start


def _peak_of_this_process() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    print(_rise(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
