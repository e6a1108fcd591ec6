"""What attaching and reading cost on a GPT-2-small-shaped model, against the model alone and plain PyTorch hooks.

Times are CPU times of one thread, taken in turns whose order rotates, so that a noisy machine disturbs all alike. A
figure is the median over turns of the ratio to the mean of two plain measurements; `noise` is the ratio of those two.
What an idle seam costs is far below that noise, so it is measured by itself too. Memory is the peak of fresh processes.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.errors import HeadwiseError
from headwise.model import read
from headwise.model.attached import attach

TURNS = 25
TOKENS = 128
LONG = 4096


def measure(*, seed: int = 0) -> dict[str, float]:
    """Ratios of forward times to the plain model's (1 is free), and megabytes above the plain forward at 4k tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(1000, (1, TOKENS))

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)

    def hooked() -> None:
        """What a user would write instead: a plain pre-hook on every output projection."""
        kept: list[Tensor] = []
        with ExitStack() as hooks:
            for block in model.transformer.h:
                handle = block.attn.c_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
                hooks.callback(handle.remove)
            forward()

    def attached_idle() -> AbstractContextManager[object]:
        return attach(model, example={"input_ids": ids[:, :32]})

    @contextmanager
    def reading_z() -> Iterator[None]:
        with attach(model, example={"input_ids": ids[:, :32]}) as attached, attached.reading(read.z()):
            yield

    ways: dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[], None]]] = {
        "plain": (nullcontext, forward),
        "idle": (attached_idle, forward),
        "read_z": (reading_z, forward),
        "hooks": (nullcontext, hooked),
        "plain_again": (nullcontext, forward),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(TURNS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no way always comes first
            around, run = ways[name]
            with around():
                run()  # not counted: what came before has emptied the processor's caches
                times[name].append(_seconds(run))
    both = [(one + other) / 2 for one, other in zip(times["plain"], times["plain_again"], strict=True)]
    figures = {f"time.{name}": _ratio(times[name], both) for name in ("idle", "read_z", "hooks")}
    figures["time.noise"] = _ratio(times["plain_again"], times["plain"])
    figures["time.idle_seam_share"] = _seam_seconds(model) / (statistics.median(both) / 2)
    plain, with_statistics = _peak("plain"), _peak("statistics")
    figures["memory.statistics_above_plain_mb"] = with_statistics - plain
    figures["memory.plain_mb"] = plain
    return figures


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    run()
    return time.process_time() - start


def _seam_seconds(model: GPT2LMHeadModel, n: int = 2000) -> float:
    """What the look-ups and idle wrappers of one forward add, with a kernel that does nothing."""
    module, layers = model.transformer.h[0].attn, len(model.transformer.h)

    def kernel(module: nn.Module) -> tuple[()]:
        return ()

    def calls() -> float:
        start = time.process_time()
        for _ in range(n):
            ALL_ATTENTION_FUNCTIONS.get_interface("eager", kernel)(module)
        return (time.process_time() - start) / n * layers

    plain = min(calls() for _ in range(5))
    with attach(model, example={"input_ids": torch.ones(1, 8, dtype=torch.long)}):
        return min(calls() for _ in range(5)) - plain


def _ratio(taken: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(taken, plain, strict=True))


def _peak(what: str) -> float:
    """Peak memory in MB of a fresh process that makes one forward of 4k tokens."""
    done = subprocess.run([sys.executable, "-m", __name__, what], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeadwiseError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def _one_long_forward(what: str) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=LONG,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (1, LONG))
    with torch.no_grad():
        if what == "plain":
            model(input_ids=ids, logits_to_keep=1)
        else:
            with attach(model) as attached, attached.reading(read.statistics()):
                model(input_ids=ids, logits_to_keep=1)
    return _peak_of_this_process()


def _peak_of_this_process() -> float:
    """In MB. Where Linux says it, without what the parent held when it started this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(_one_long_forward(sys.argv[1]))
