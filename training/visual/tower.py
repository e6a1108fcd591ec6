"""What comes first: a tower that says of each patch what stands in its place, and which place that is.

It is taught on pictures in which every place is drawn for itself, so it knows nothing of pairs; afterwards it stays as
it is (as in LLaVA, Liu et al. 2023). What usually goes together is learnt by the decoder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from headwise.probes.scenes import COLORS, GRID, SHAPES, SIDE, STRIP, Scene, pixels, some_thing

PICTURES = 64
"""Of one step."""
RATE = 2e-3
WARM_UP = 100
FAINT = 0.4
"""Share of the pictures that are faint, to any degree."""
LABELS = (len(SHAPES) + 1, len(COLORS) + 1, len(GRID) + len(STRIP))
"""Shape, color and place; no shape and no color are the last of their kind."""


def some_scene(random: Random) -> Scene:
    """A grid or strip whose places are drawn each for itself."""
    layout = random.choice((GRID, STRIP))
    empty = random.uniform(0.1, 0.8)
    things = tuple(None if random.random() < empty else some_thing(random) for _ in range(len(layout)))
    return Scene(layout, things, random.random() if random.random() < FAINT else 0.0)


def told(scene: Scene, patch: int) -> np.ndarray:
    """`[patch, 3]`: what is to be said of each patch, in reading order."""
    rows = SIDE // patch
    labels = np.zeros((rows, rows, 3), np.int64)
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = (each // patch for each in scene.layout.box(number))
        said = (len(SHAPES), len(COLORS))
        if thing is not None:
            said = (SHAPES.index(thing.shape), [*COLORS].index(thing.color))
        labels[top:bottom, left:right] = (*said, number + (len(GRID) if scene.layout is STRIP else 0))
    return labels.reshape(-1, 3)


class Reader(nn.Module):
    """Reads shape, color and place from a patch; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, sum(LABELS))

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        return self.read(self.norm(patches)).split(LABELS, dim=-1)


def teach_tower(tower: PreTrainedModel, *, seed: int, steps: int, patches: Callable[[Tensor], Tensor]) -> list[float]:
    """Train it in place; `patches` gives what it makes of `[picture, 3, row, column]` bytes.

    The result is the share of patches of clear pictures whose three labels are right, every 100 steps.
    """
    reader = Reader(tower.config.hidden_size)
    parameters = [*tower.parameters(), *reader.parameters()]
    adam = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    curve: list[float] = []
    hits: list[float] = []
    for step in range(steps):
        random = Random(f"tower/{seed}/{step}")
        scenes = [some_scene(random) for _ in range(PICTURES)]
        shown = torch.from_numpy(np.stack([pixels(each, random) for each in scenes])).permute(0, 3, 1, 2)
        labels = torch.from_numpy(np.stack([told(each, tower.config.patch_size) for each in scenes]))
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * max(1 - step / steps, 0.02)
        read = reader(patches(shown))
        loss = sum(cross_entropy(each.flatten(0, 1), labels[..., which].flatten()) for which, each in enumerate(read))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        clear = torch.tensor([each.faintness == 0 for each in scenes])
        right = torch.stack([each.argmax(-1) == labels[..., which] for which, each in enumerate(read)]).all(0)
        hits.append(float(right[clear].float().mean()))
        if (step + 1) % 100 == 0:
            curve.append(round(sum(hits) / len(hits), 4))
            print(f"tower step {step + 1}: loss {float(loss.detach()):.3f}, right {curve[-1]:.3f}", flush=True)
            hits = []
    return curve
